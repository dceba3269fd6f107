"""The backward through edges: P is made again from the log-sum-exp, tile by tile."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...fake_tensors import has_data
from ...primitives.arguments import wanted
from ...primitives.attention_pattern import Pattern
from ...primitives.registration import kernel_op, outside_autocast
from ...primitives.schema import Flat, flat, schema_of, unflat
from ...routes import Routes
from ...tables import Table
from .edges import Edges, Flow, Part, Reading
from .operands import Keys, Rows
from .tiling import Tiling, exp_
from .visibility import Sight, Visible


class Backward(NamedTuple):
    """Everything that the backward takes after its tensors.

    Attributes:
        ids: `[B * S]`; None: no edges.
        score_edges: `[R, R]`; None: ones.
        value_edges: `[R, R]`; None: ones.
        delta: `[B, H, S_q]`, where it is known.
        pattern: which keys a query sees.
        want_query: compute dq.
        want_key_value: compute dk and dv.
    """

    ids: Tensor | None
    score_edges: Tensor | None
    value_edges: Tensor | None
    delta: Tensor | None
    pattern: Pattern
    want_query: bool
    want_key_value: bool


def attention_backward(
    d_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    routes: Routes | None,
    score_edges: Table | None,
    value_edges: Table | None,
    pattern: Pattern,
    delta: Tensor | None = None,
    *,
    want_query: bool,
    want_key_value: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of attention through edges.

    P = exp(scale q kᵀ - lse); dv = (E_value ⊙ P)ᵀ do; dS = E_score ⊙ P ⊙ (do vᵀ - rowsum(do ⊙ o));
    dq = scale dS k; dk = scale dSᵀ q, summed over the heads of a group. Where an edge is 0, nothing passes,
    not even NaN.

    Args:
        d_o: `[B, H, S_q, D]`, masked by head.
        q: `[B, H, S_q, D]`, fp32, bf16, fp16 or fp64.
        k: `[B, G, S_k, D]`; H is a multiple of G.
        v: `[B, G, S_k, D]`.
        o: `[B, H, S_q, D]`, attention's output, not masked.
        lse: `[B, H, S_q]`; it may be anything where a query sees no key.
        routes: the routes of the tokens `[B, S]`, S_q = S_k; may be None without edges.
        score_edges: `[R, R]`, by [query's route, key's route]; None: ones.
        value_edges: `[R, R]`; None: ones.
        pattern: which keys a query sees; no dropout.
        delta: `[B, H, S_q]` in fp32 (fp64 for fp64), rowsum(do ⊙ o), where it is known already.
        want_query: compute dq.
        want_key_value: compute dk and dv.

    Returns:
        dq, dk, dv in the dtypes of q, k, v, summed over tiles in fp32 (fp64 for fp64); None for what is not wanted.
    """
    score, value = (
        None if table is None or table.kind == "ones" else table.on(q.device)
        for table in (score_edges, value_edges)
    )
    has_edges = score is not None or value is not None
    ids = routes.ids if routes is not None and has_edges else None
    call = Backward(ids, score, value, delta, pattern, want_query, want_key_value)
    dq, dk, dv = backward_op(d_o, q, k, v, o, lse, *flat(call))
    return wanted((dq, want_query), (dk, want_key_value), (dv, want_key_value))


@kernel_op(
    "attention_tiled_backward(Tensor d_o, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, "
    f"{schema_of(Backward)}) -> (Tensor, Tensor, Tensor)"
)
@outside_autocast
def backward_op(
    d_o: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, *fields: Flat
) -> tuple[Tensor, Tensor, Tensor]:
    """See `attention_backward`; outputs that are not wanted have no elements."""
    call = unflat(Backward, fields)
    dq, dk, dv = (
        torch.empty_like(t) if is_wanted else t.new_empty(0)
        for t, is_wanted in ((q, call.want_query), (k, call.want_key_value), (v, call.want_key_value))
    )
    if not has_data(q) or not (call.want_query or call.want_key_value):
        return dq, dk, dv
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    by = Tiling.of(q, k, call.pattern, tiles=2)
    for batch in by.batches(q.shape[0]):
        edges = Edges.of(call.ids, call.score_edges, call.value_edges, batch, k.shape[2])
        sight = Sight.of(q, k, call.pattern, batch)
        parts = list(edges.parts(sight, call.want_key_value)) if by.picks else [edges.whole(sight)]
        for fold in by.folds(batch):
            rows = Rows.of(fold, by, d_o, q, o, lse, call.delta, call.want_query)
            keys = Keys.of(fold, by, k, v, call.want_key_value)
            taught = (rows.d_o != 0).any(-1) if by.picks else None
            for part in parts:
                _backward_part(part, taught, rows, keys, edges, by)
            fold.put_rows(dq, rows.dq, call.pattern.scale)
            fold.put_keys(dk, keys.dk, by.key_scale)
            fold.put_keys(dv, keys.dv)
    return dq, dk, dv


def _backward_part(
    part: Part, taught: Tensor | None, rows: Rows, keys: Keys, edges: Edges, by: Tiling
) -> None:
    """Adds a part's gradients to the sums of all rows and keys; `taught [N]` says which rows have a gradient."""
    index = None
    if taught is not None and part.queries is not None:
        taught = taught & part.queries.repeat_interleave(by.group)
        index = None if bool(taught.all()) else taught.nonzero()[:, 0]
    if index is not None and len(index) == 0:
        return
    some = rows if index is None else rows.taken(index)
    for reading in part.readings:
        read = keys.taken(reading)
        _backward_rows(some, read, reading, reading.sight.of_rows(index, by), edges, by)
        read.give_back(keys, reading)
    if index is not None and rows.dq is not None:
        assert some.dq is not None
        rows.dq.index_copy_(0, index, some.dq)


def _backward_rows(
    rows: Rows, keys: Keys, reading: Reading, visible: Visible, edges: Edges, by: Tiling
) -> None:
    """Adds what a reading teaches to the sums of rows and keys, tile by tile."""
    for band in visible.bands:
        some = rows.at(band.rows)
        for part in by.parts(band.keys):
            read = keys.at(part)
            p = exp_(by.scores(some.q, read.k).sub_(some.lse))
            visible.hide_(p, 0.0, part, band)
            if reading.score is not None:
                _score_gradient(p, some, read, reading.score, edges, by)
            if reading.value is not None and read.dv is not None:
                edges.weigh_(p, reading.value.table, some.positions, read.positions)
                by.accumulate(read.dv, p.mT, some.d_o)


def _score_gradient(p: Tensor, rows: Rows, keys: Keys, flow: Flow, edges: Edges, by: Tiling) -> None:
    """dS = E ⊙ P ⊙ (do vᵀ - delta) for P `[..., n, m]`; dq += dS k; dk += dSᵀ q."""
    ds = by.product(rows.d_o, keys.v, 1).sub_(rows.delta).mul_(p)
    edges.weigh_(ds, flow.table, rows.positions, keys.positions)
    if rows.dq is not None:
        by.accumulate(rows.dq, ds, keys.k_weighted)
    if keys.dk is not None:
        by.accumulate(keys.dk, ds.mT, rows.q)
