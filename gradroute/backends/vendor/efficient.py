"""PyTorch's memory-efficient attention, which takes fp32 too.

It wants a head of its own for every query head. Its causal mask is aligned at the top left, also together with a mask
of keys, which must be expanded. Asked for determinism it does not split the keys of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...primitives.attention_pattern import Pattern
from .contract import Gradients, Saved
from .layout import is_causal, key_bias, readable, repeated, summed, unpadded
from .refusals import (
    HALVES,
    why_not_aligned_top_left,
    why_not_deterministic_on_request,
    why_not_features,
    why_not_inputs,
    why_not_on_gpu,
    why_not_switched_on,
)

aten = torch.ops.aten


def why_not(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> str | None:
    """See `VendorKernel`."""
    return (
        why_not_inputs(q, k, v, ("cuda",), (*HALVES, torch.float32))
        or why_not_on_gpu(q, (8, 0))
        or why_not_switched_on("mem_efficient")
        or why_not_features(pattern, key_mask=True, dropout=True)
        or why_not_aligned_top_left(q, k, pattern)
        or why_not_deterministic_on_request()
    )


def _bias(q: Tensor, k: Tensor, pattern: Pattern) -> Tensor | None:
    """The mask of keys as `[B, H, S_q, S_k]`, of strides 0 along H and S_q."""
    bias = key_bias(pattern, q.dtype)
    return None if bias is None else bias.expand(-1, q.shape[1], q.shape[2], k.shape[2])


def forward(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Saved:
    """See `VendorKernel`."""
    group = q.shape[1] // k.shape[1]
    o, stats, seed, offset = aten._scaled_dot_product_efficient_attention.default(
        readable(q),
        readable(repeated(k, group)),
        readable(repeated(v, group)),
        _bias(q, k, pattern),
        True,  # compute_log_sumexp
        pattern.dropout,
        is_causal(q, pattern),
        scale=pattern.scale,
    )
    # Backward takes the log-sum-exp as it was returned: [B, H, S_q rounded up to a multiple of 32].
    return unpadded(o, q.shape[3]), stats.narrow(-1, 0, q.shape[2]), stats, seed, offset


def backward(d_o: Tensor, q: Tensor, k: Tensor, v: Tensor, saved: Saved, pattern: Pattern) -> Gradients:
    """See `VendorKernel`."""
    o, _, stats, seed, offset = saved
    group = q.shape[1] // k.shape[1]
    dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward.default(
        readable(d_o),
        readable(q),
        readable(repeated(k, group)),
        readable(repeated(v, group)),
        _bias(q, k, pattern),
        readable(o),
        stats,
        seed,
        offset,
        pattern.dropout,
        [True, True, True, False],  # which gradients: none of the bias
        is_causal(q, pattern),
        scale=pattern.scale,
    )
    return (
        unpadded(dq, q.shape[3]),
        unpadded(summed(dk, group), q.shape[3]),
        unpadded(summed(dv, group), q.shape[3]),
    )
