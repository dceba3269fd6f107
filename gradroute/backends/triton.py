"""Backend `triton`: the primitives as Triton kernels with their launchers."""

from __future__ import annotations

from torch import Tensor

from ..kernels import attention as own_attention
from ..kernels.activation_forward import activation_forward
from ..kernels.attention import attention_backward
from ..kernels.embedding import embedding_backward
from ..kernels.gated_mlp import glu_backward
from ..kernels.launch import INTERPRETED, record, recording
from ..kernels.linear import bias_grad, input_grad, weight_grad
from ..kernels.mlp import activation_backward
from ..kernels.norm import norm_backward
from ..kernels.optim import adamw_step
from ..kernels.route_grad import masked_product
from ..primitives.attention_kernels import AttentionKernels
from ..primitives.attention_pattern import Pattern
from ..primitives.protocol import AttentionTables
from ..routes import Routes
from . import composed
from .attention import output_and_lse
from .optim import touched_blocks

__all__ = [
    "INTERPRETED",
    "activation_backward",
    "activation_forward",
    "adamw_step",
    "attention_backward",
    "attention_forward",
    "bias_grad",
    "embedding_backward",
    "glu_backward",
    "input_grad",
    "masked_product",
    "norm_backward",
    "record",
    "recording",
    "touched_blocks",
    "weight_grad",
]


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routes: Routes | None,
    sites: AttentionTables,
    pattern: Pattern,
    kernels: AttentionKernels,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The own backward needs z and the log-sum-exp, whichever kernel they come from."""
    if kernels.forward is None:
        return own_attention.attention_forward(q, k, v, routes, sites, pattern)
    o, lse = output_and_lse(kernels.forward, q, k, v, pattern)
    documents = own_attention.document_bounds(routes, pattern.cu_seqlens, k.shape[2])
    z = composed.masked_heads(o, routes, sites.forward_heads)
    return z, own_attention.saved_with(lse, documents)
