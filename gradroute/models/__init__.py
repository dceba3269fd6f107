"""Existing models, routed by one call: `route(model, plan)`, and ordinary again by `unroute(model)`.

Models of transformers 5 (Llama, Mistral, Qwen2, Qwen3, Gemma 3, GPT-2, GPT-Neo, GPT-NeoX and Pythia, Phi-3), and
modules of the form of nanoGPT.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .ablation import ablate
from .architectures import ARCHITECTURES, NANO_GPT, Architecture
from .collator import RouteCollator
from .plan import ResidualSites, RoutingPlan, Shape
from .presets import era, localize_mlp, sgtm, steering
from .routing import route, unroute

__all__ = [
    "ARCHITECTURES",
    "NANO_GPT",
    "Architecture",
    "ResidualSites",
    "RouteCollator",
    "RoutedAttentionParallel",
    "RoutedMLPParallel",
    "RoutingPlan",
    "Shape",
    "ablate",
    "contract",
    "era",
    "expand",
    "localize_mlp",
    "route",
    "sgtm",
    "steering",
    "tensor_parallel",
    "unroute",
]

if TYPE_CHECKING:
    from ..era import contract, expand
    from .parallel import RoutedAttentionParallel, RoutedMLPParallel, tensor_parallel

# Imported when they are asked for: not every torch has torch.distributed, and gradroute.era imports from here.
_LATER = dict.fromkeys(
    ("RoutedAttentionParallel", "RoutedMLPParallel", "tensor_parallel"), "gradroute.models.parallel"
)
_LATER |= dict.fromkeys(("contract", "expand"), "gradroute.era")


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(importlib.import_module(_LATER[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
