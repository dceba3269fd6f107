"""Existing models, routed by one call: `route(model, plan)`, and ordinary again by `unroute(model)`.

They are models of transformers 5 (`ARCHITECTURES` lists them; mixtures of experts among them), and modules of the form
of nanoGPT.
"""

from typing import TYPE_CHECKING, Any

from .ablation import ablate
from .architectures import ARCHITECTURES, NANO_GPT, Architecture
from .collator import RouteCollator
from .expert_presets import localize_experts
from .moe_sites import MoESites
from .plan import ResidualSites, RoutingPlan, Shape
from .presets import era, localize_mlp, sgtm, steering
from .routing import route, routing, unroute, unrouted
from .top import UnroutedWarning
from .trainers import routed_trainer

__all__ = [
    "ARCHITECTURES",
    "NANO_GPT",
    "Architecture",
    "MoESites",
    "ResidualSites",
    "RouteCollator",
    "RoutedAttentionParallel",
    "RoutedMLPParallel",
    "RoutingPlan",
    "Shape",
    "UnroutedWarning",
    "ablate",
    "contract",
    "era",
    "expand",
    "localize_experts",
    "localize_mlp",
    "route",
    "routed_trainer",
    "routing",
    "sgtm",
    "steering",
    "tensor_parallel",
    "unroute",
    "unrouted",
]

if TYPE_CHECKING:
    from ..era import contract, expand
    from .parallel import RoutedAttentionParallel, RoutedMLPParallel, tensor_parallel


def __getattr__(name: str) -> Any:
    """Imports a name when it is asked for: not every torch has torch.distributed, and era imports models itself."""
    if name in ("contract", "expand"):
        from .. import era

        return getattr(era, name)
    if name in ("RoutedAttentionParallel", "RoutedMLPParallel", "tensor_parallel"):
        from . import parallel

        return getattr(parallel, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
