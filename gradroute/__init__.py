from .linear import LinearSites, routed_linear
from .route_grad import route_grad
from .routes import Routes
from .tables import Table
