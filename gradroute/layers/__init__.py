"""Layers: torch.nn's own with routed gradients. Each is thin and calls its op; `forward(x, routes=None)`.

Parameters and state_dict keys are the ordinary layer's. The sites are a plain attribute: no part of the state_dict,
untouched by `.to(dtype)` and meta devices, and free to be reassigned between steps.

The `from_*` constructors share the very Parameters of an existing layer (and so their device, dtype and
requires_grad) and take over its training mode. Hooks are not copied: what a hook of the existing layer did is not
done by the routed one. Submodules of an MLP or of attention are shared whole, with theirs.
"""

from .attention import RoutedAttention
from .embedding import RoutedEmbedding, check_embedding
from .gated_mlp import RoutedGatedMLP
from .linear import RoutedLinear
from .mlp import RoutedMLP
from .module import RoutedModule
from .norm import RoutedLayerNorm, RoutedRMSNorm

__all__ = [
    "RoutedAttention",
    "RoutedEmbedding",
    "RoutedGatedMLP",
    "RoutedLayerNorm",
    "RoutedLinear",
    "RoutedMLP",
    "RoutedModule",
    "RoutedRMSNorm",
    "check_embedding",
]
