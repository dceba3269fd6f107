"""cuDNN's attention: grouped heads natively, and a causal mask that is aligned at the top left.

Head dimension 256 is left to flash: whether cuDNN has it depends on the version of its frontend that PyTorch was built
with.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...primitives.attention_pattern import Pattern
from . import machine
from .contract import Gradients, Saved
from .layout import is_causal, readable, unpadded
from .refusals import (
    HALVES,
    why_not_aligned_top_left,
    why_not_features,
    why_not_inputs,
    why_not_on_gpu,
    why_not_switched_on,
)

aten = torch.ops.aten


def why_not(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> str | None:
    """See `VendorKernel`."""
    return (
        why_not_inputs(q, k, v, ("cuda",), HALVES)
        or why_not_on_gpu(q, (8, 0))
        or why_not_switched_on("cudnn")
        # key_mask: rows of padding alone give NaN before cuDNN 9.25. Dropout: in sixteenths, broken from 9.11 to 9.13.
        or why_not_features(pattern)
        or why_not_aligned_top_left(q, k, pattern)
        or _why_not_shape(q, k)
        or _why_not_version()
    )


def _why_not_shape(q: Tensor, k: Tensor) -> str | None:
    if q.shape[3] > 128:
        return f"its backward is certain for head dimensions up to 128; got {q.shape[3]}"
    # pytorch#193893: a single query is silently wrong on Blackwell; pytorch#138529: it is refused by cuDNN's frontend.
    if q.shape[2] == 1 or k.shape[2] == 1:
        return f"single queries and keys are wrong in some of its versions; got {q.shape[2]} and {k.shape[2]}"
    return None


def _why_not_version() -> str | None:
    if torch.are_deterministic_algorithms_enabled():
        return "its backward is not deterministic, and deterministic algorithms are asked for"
    version = machine.cudnn_version()
    if version is not None and version <= 91500:  # pytorch#169849: lengths that 128 does not divide
        return f"before version 9.15.1 it is wrong for some lengths; got version number {version}"
    return None


def forward(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> Saved:
    """See `VendorKernel`."""
    o, stats, _, _, _, _, seed, offset, _ = aten._scaled_dot_product_cudnn_attention.default(
        readable(q),
        readable(k),
        readable(v),
        None,  # attn_bias
        True,  # compute_log_sumexp
        0.0,  # dropout_p
        is_causal(q, pattern),
        scale=pattern.scale,
    )
    # Backward takes the log-sum-exp as it was returned: [B, H, S_q, 1], in some versions [B, H, S_q].
    return unpadded(o, q.shape[3]), stats.view(q.shape[:3]), stats, seed, offset


def backward(d_o: Tensor, q: Tensor, k: Tensor, v: Tensor, saved: Saved, pattern: Pattern) -> Gradients:
    """See `VendorKernel`."""
    o, _, stats, seed, offset = saved
    o, d_o = readable(o), readable(d_o)
    # PyTorch finds the graph that cuDNN compiled by the strides of q, k and v, but in older versions not by those of
    # d_o, and would run it on a layout that it was not made for. With o's strides there is one layout.
    if d_o.stride() != o.stride():
        d_o = torch.empty_like(o).copy_(d_o)
    dq, dk, dv = aten._scaled_dot_product_cudnn_attention_backward.default(
        d_o,
        readable(q),
        readable(k),
        readable(v),
        o,
        stats,
        seed,
        offset,
        None,  # attn_bias
        None,  # cum_seq_q
        None,  # cum_seq_k
        q.shape[2],
        k.shape[2],
        0.0,  # dropout_p
        is_causal(q, pattern),
        scale=pattern.scale,
    )
    return unpadded(dq, q.shape[3]), unpadded(dk, q.shape[3]), unpadded(dv, q.shape[3])
