"""The forward: a running softmax over tiles of keys, band by band."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...fake_tensors import has_data
from ...primitives.arguments import product_dtype
from ...primitives.attention_pattern import Pattern
from ...primitives.registration import kernel_op, outside_autocast
from ...primitives.schema import Flat, flat, schema_of, unflat
from .edges import taken
from .tiling import Tiling, exp_
from .visibility import Band, Sight, Visible


def attention_forward(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """o = softmax(scale q kᵀ) v, and the logarithm of the softmax's denominator.

    Args:
        q: `[B, H, S_q, D]`, fp32, bf16, fp16 or fp64.
        k: `[B, G, S_k, D]`; H is a multiple of G.
        v: `[B, G, S_k, D]`.
        pattern: which keys a query sees; no dropout.

    Returns:
        o `[B, H, S_q, D]` in q's dtype, 0 for a query that sees no key; lse `[B, H, S_q]` in fp32 (fp64 for fp64),
        -inf for such a query.
    """
    return forward_op(q, k, v, *flat(pattern))


@kernel_op(f"attention_tiled_forward(Tensor q, Tensor k, Tensor v, {schema_of(Pattern)}) -> (Tensor, Tensor)")
@outside_autocast
def forward_op(q: Tensor, k: Tensor, v: Tensor, *fields: Flat) -> tuple[Tensor, Tensor]:
    """See `attention_forward`; behind the tensors come the pattern's fields."""
    o = torch.empty_like(q)
    lse = q.new_empty(q.shape[:-1], dtype=product_dtype(q.dtype))
    if not has_data(q):
        return o, lse
    if q.numel() == 0 or k.numel() == 0:
        return o.zero_(), lse.fill_(-math.inf)
    pattern = unflat(Pattern, fields)
    by = Tiling.of(q, k, pattern, tiles=1)
    for batch in by.batches(q.shape[0]):
        sight = Sight.of(q, k, pattern, batch)
        index, sight = sight.of_keys(None) if by.picks else (None, sight)
        visible = sight.of_rows(None, by)
        for fold in by.folds(batch):
            rows = by.scaled(fold.rows(q))
            keys, values = (taken(by.operand(fold.keys(t)), index) for t in (k, v))
            o_rows, lse_rows = _forward_rows(rows, keys, values, visible, by)
            fold.put_rows(o, o_rows)
            fold.put_rows(lse.unsqueeze(-1), lse_rows)
    return o, lse


def _forward_rows(q: Tensor, k: Tensor, v: Tensor, visible: Visible, by: Tiling) -> tuple[Tensor, Tensor]:
    """o and lse: q `[..., N, D]`, scaled, k and v `[..., K, D]` → `[..., N, D]`, `[..., N, 1]`, fp32 or fp64."""
    o = torch.zeros(q.shape, dtype=product_dtype(q.dtype), device=q.device)
    lse = torch.full_like(o[..., :1], -math.inf)
    for band in visible.bands:
        rows = (..., band.rows, slice(None))
        lse[rows] = _forward_band(q[rows], k, v, o[rows], band, visible, by)
    return o, lse


def _forward_band(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, band: Band, visible: Visible, by: Tiling
) -> Tensor:
    """o += softmax(q kᵀ) v for o of zeros `[..., n, D]`; returns lse `[..., n, 1]`."""
    # Finite: -inf − -inf would be NaN before a row sees a key.
    highest = torch.full_like(o[..., :1], torch.finfo(o.dtype).min)
    total = torch.zeros_like(highest)
    for keys in by.parts(band.keys):
        p = by.scores(q, k[..., keys, :])
        visible.hide_(p, -math.inf, keys, band)
        higher = torch.maximum(highest, p.amax(-1, keepdim=True))
        fade = (highest - higher).exp_()
        exp_(p.sub_(higher))
        total.mul_(fade).add_(p.sum(-1, keepdim=True))
        by.accumulate(o.mul_(fade), p, v[..., keys, :])
        highest = higher
    o.div_(torch.where(total == 0, 1, total))
    return highest + total.log()
