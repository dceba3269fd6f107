from .linear import LinearSites, routed_linear
from .route_grad import route_grad
from .routes import Routes
from .tables import Table
from .mlp import ActivationSites, MLPSites, routed_activation, routed_mlp
from .gated_mlp import routed_gated_mlp, routed_glu
