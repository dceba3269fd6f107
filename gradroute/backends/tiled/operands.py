"""Rows and keys as the backward multiplies them, with the sums of their gradients so far."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ...primitives.arguments import product_dtype
from .edges import Reading, taken
from .tiling import Fold, Tiling


class Rows(NamedTuple):
    """The tensors of rows, `[..., N, X]`.

    Attributes:
        q: `[..., N, D]`, scaled.
        d_o: `[..., N, D]`.
        lse: `[..., N, 1]`, inf for a row that sees no key.
        delta: `[..., N, 1]`, rowsum(do ⊙ o); 0 for a row that sees no key.
        positions: `[N, 1]`, each row's query.
        dq: `[..., N, D]` in fp32 or fp64, the sum so far; None: not wanted.
    """

    q: Tensor
    d_o: Tensor
    lse: Tensor
    delta: Tensor
    positions: Tensor
    dq: Tensor | None

    @staticmethod
    def of(
        fold: Fold,
        by: Tiling,
        d_o: Tensor,
        q: Tensor,
        o: Tensor,
        lse: Tensor,
        delta: Tensor | None,
        want_query: bool,
    ) -> Rows:
        """The rows of a fold, from tensors `[B, H, S_q, D]`, and lse and delta (if known) `[B, H, S_q]`."""
        wide = product_dtype(q.dtype)
        lse_rows = fold.rows(lse.unsqueeze(-1)).to(wide)
        sees_none = lse_rows.isinf()
        d_o_rows = fold.rows(d_o).to(wide)
        if delta is None:
            delta_rows = (d_o_rows * fold.rows(o)).sum(-1, keepdim=True)
        else:
            delta_rows = fold.rows(delta.unsqueeze(-1))
        q_rows = by.scaled(fold.rows(q))
        positions = torch.arange(q_rows.shape[-2], device=q.device)[:, None] // by.group
        return Rows(
            q_rows,
            by.operand(d_o_rows),
            lse_rows.masked_fill(sees_none, math.inf),
            delta_rows.masked_fill(sees_none, 0),
            positions,
            torch.zeros(q_rows.shape, dtype=wide, device=q.device) if want_query else None,
        )

    def at(self, rows: slice) -> Rows:
        """Views of some rows."""
        return Rows(*(None if t is None else t[..., rows, :] for t in self))  # type: ignore[arg-type]

    def taken(self, index: Tensor) -> Rows:
        """Copies of some rows, with sums of their own: on the CPU."""
        dq = None if self.dq is None else self.dq.new_zeros(len(index), self.dq.shape[1])
        q, d_o, lse, delta, positions = (t.index_select(0, index) for t in self[:5])
        return Rows(q, d_o, lse, delta, positions, dq)


class Keys(NamedTuple):
    """The tensors of keys, `[..., K, X]`.

    Attributes:
        k: `[..., K, D]`.
        v: `[..., K, D]`.
        k_weighted: `[..., K, D]`, k times the weights of score edges that all rows share.
        positions: `[K, 1]`, each key's place in the sequence.
        dk: `[..., K, D]` in fp32 or fp64, the sum so far; None: not wanted.
        dv: the same for v.
    """

    k: Tensor
    v: Tensor
    k_weighted: Tensor
    positions: Tensor
    dk: Tensor | None
    dv: Tensor | None

    @staticmethod
    def of(fold: Fold, by: Tiling, k: Tensor, v: Tensor, want_key_value: bool) -> Keys:
        """The keys of a fold, from tensors `[B, G, S_k, D]`."""
        keys, values = (by.operand(fold.keys(t)) for t in (k, v))
        positions = torch.arange(k.shape[2], device=k.device)[:, None]
        sums: list[Tensor | None] = [None, None]
        if want_key_value:
            sums = [torch.zeros(keys.shape, dtype=product_dtype(k.dtype), device=k.device) for _ in range(2)]
        return Keys(keys, values, keys, positions, *sums)

    def at(self, keys: slice) -> Keys:
        """Views of some keys."""
        return Keys(*(None if t is None else t[..., keys, :] for t in self))  # type: ignore[arg-type]

    def taken(self, reading: Reading) -> Keys:
        """The keys of a reading, weighted: copies with sums of their own where it has an index or weights."""
        score, value = (None if flow is None else flow.weights for flow in (reading.score, reading.value))
        if reading.picked is None and score is None and value is None:
            return self
        k, v, _, positions = (taken(t, reading.picked) for t in self[:4])
        k_weighted = k if score is None else k * score
        sums = (None if t is None else torch.zeros_like(k) for t in self[4:])
        return Keys(k, v, k_weighted, positions, *sums)

    def give_back(self, whole: Keys, reading: Reading) -> None:
        """Adds the sums of the keys that `taken` made, weighted, to the sums of all keys."""
        for mine, total, flow in ((self.dk, whole.dk, reading.score), (self.dv, whole.dv, reading.value)):
            if mine is None or mine is total or flow is None:
                continue
            assert total is not None
            if flow.weights is not None:
                mine.mul_(flow.weights)
            if reading.picked is None:
                total.add_(mine)
            else:
                total.index_copy_(0, reading.picked, mine.add_(total.index_select(0, reading.picked)))
