"""PyTorch's flash attention for the CPU.

Found by experiment with PyTorch 2.13: its causal mask is aligned at the top left, also together with a mask of keys,
which broadcasts; it takes grouped heads, all strides of q, k and v but the last, and any strides of d_o. It gives the
same bits for the same number of threads; on Intel's CPUs, where its products are MKL's, other bits for another number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...primitives.attention_pattern import Pattern
from .contract import Gradients, Saved
from .layout import dense_rows, is_causal, key_bias, repeated, summed
from .refusals import why_not_aligned_top_left, why_not_features, why_not_inputs, why_not_switched_on

aten = torch.ops.aten

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def why_not(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> str | None:
    """See `VendorKernel`."""
    return (
        why_not_inputs(q, k, v, ("cpu", "meta"), DTYPES)
        or why_not_switched_on("flash")
        or why_not_features(pattern, key_mask=True)
        or why_not_aligned_top_left(q, k, pattern)
    )


def forward(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Saved:
    """See `VendorKernel`."""
    o, lse = aten._scaled_dot_product_flash_attention_for_cpu.default(
        dense_rows(q),
        dense_rows(k),
        dense_rows(v),
        0.0,  # dropout_p
        is_causal(q, pattern),
        attn_mask=key_bias(pattern, q.dtype),
        scale=pattern.scale,
    )
    return o, lse


def backward(d_o: Tensor, q: Tensor, k: Tensor, v: Tensor, saved: Saved, pattern: Pattern) -> Gradients:
    """See `VendorKernel`."""
    o, lse = saved
    # With grouped heads the kernel rounds dk and dv to the dtype after every head and every tile of queries. In bf16
    # and fp16 a head of its own for every query head halves that error (dv at S = 700, H = 8, G = 1: 2.4e-2 → 7.7e-3
    # of its largest value) for 2 to 6 % more time; in fp32 it would bring nothing.
    group = q.shape[1] // k.shape[1] if q.dtype.itemsize == 2 else 1
    dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward.default(
        d_o,
        dense_rows(q),
        dense_rows(repeated(k, group)),
        dense_rows(repeated(v, group)),
        o,
        lse,
        0.0,  # dropout_p
        is_causal(q, pattern),
        attn_mask=key_bias(pattern, q.dtype),
        scale=pattern.scale,
    )
    return dq, summed(dk, group), summed(dv, group)
