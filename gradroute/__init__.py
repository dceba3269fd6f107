"""Gradient routing for PyTorch: choose, token by token, which data updates which part of a network.

The forward pass is the ordinary one; in the backward pass each token's gradient is multiplied by a mask chosen by that
token's route (Cloud et al. 2024, arXiv 2410.04332). `Routes` says which route each token of a batch takes, a `Table`
what a token of each route does to the features of one site, and the `routed_*` functions and `Routed*` layers are
PyTorch's ordinary ones with such sites.

Around them: `models` routes existing models, `labels` makes routes of tokens, `optim` has an AdamW that leaves alone
what a step does not train, `era` expands, ablates and contracts, `telemetry` says what routing does while it trains.
"""

import importlib
from typing import Any

from . import reference, tables
from .attention import AttentionSites, routed_attention
from .backends import BackendError, available_backends, unavailable_backends, use_backend
from .embedding import EmbeddingSites, routed_embedding
from .gated_mlp import routed_gated_mlp, routed_glu
from .layers import (
    RoutedAttention,
    RoutedEmbedding,
    RoutedGatedMLP,
    RoutedLayerNorm,
    RoutedLinear,
    RoutedMLP,
    RoutedRMSNorm,
)
from .linear import LinearSites, routed_linear
from .mlp import ActivationSites, MLPSites, routed_activation, routed_mlp
from .norm import NormSites, routed_layer_norm, routed_rms_norm
from .route_grad import route_grad
from .routes import Routes
from .tables import Table
from .version import __version__ as __version__

__all__ = [
    "ActivationSites",
    "AttentionSites",
    "BackendError",
    "EmbeddingSites",
    "LinearSites",
    "MLPSites",
    "NormSites",
    "RoutedAttention",
    "RoutedEmbedding",
    "RoutedGatedMLP",
    "RoutedLayerNorm",
    "RoutedLinear",
    "RoutedMLP",
    "RoutedRMSNorm",
    "Routes",
    "Table",
    "available_backends",
    "reference",
    "route_grad",
    "routed_activation",
    "routed_attention",
    "routed_embedding",
    "routed_gated_mlp",
    "routed_glu",
    "routed_layer_norm",
    "routed_linear",
    "routed_mlp",
    "routed_rms_norm",
    "tables",
    "unavailable_backends",
    "use_backend",
]

# Submodules around the layers are imported when they are asked for: torch.distributed.tensor alone takes two seconds.
_SUBMODULES = ("blocks", "era", "labels", "models", "optim", "telemetry", "testing")


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_SUBMODULES})
