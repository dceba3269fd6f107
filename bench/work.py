"""The work of an op: its FLOPs as if nothing were masked, those that masks leave, and the bytes that must be moved.

Masks of activations make parts of dH, and of the products that follow from it, unnecessary; masks of updates make parts
of weight gradients so. Nothing makes a forward product unnecessary, and only update masks a gradient of the output
weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from gradroute import Table
from gradroute.testing import Sample

from .cases import BACKWARD, FORWARD, FULL, Work
from .op_table import OPS, SHORTHANDS


def work_of(call: Sample) -> dict[str, Work]:
    """The work of a call by pass."""
    if OPS[call.op].products:
        return _whole({mode: Work(*flops) for mode, flops in _flops(call).items()})
    moved = _moved_bytes(call)
    return _whole({mode: Work(0.0, 0.0, number) for mode, number in moved.items()})


def _whole(passes: dict[str, Work]) -> dict[str, Work]:
    forward, backward = passes[FORWARD], passes[BACKWARD]
    moved = None if forward.moved_bytes is None else forward.moved_bytes + (backward.moved_bytes or 0)
    both = Work(
        forward.dense_flops + backward.dense_flops, forward.useful_flops + backward.useful_flops, moved
    )
    return passes | {FULL: both}


def left(call: Sample, *sites: str) -> Tensor:  # [R]
    """The share of features by route where no weight of the sites is 0; a strength brings in route 0's."""
    assert call.routes is not None
    tables = {_site(call.tables, site) for site in sites} - {None}
    alive = torch.ones(call.routes.num_routes, max((table.features for table in tables if table), default=1))
    for table in tables:
        assert table is not None
        nonzero = table.weights != 0
        alive *= (nonzero | nonzero[:1]) if call.routes.strength is not None else nonzero
    return alive.mean(-1)


def _site(tables: Mapping[str, Table], site: str) -> Table | None:
    return tables.get(site, tables.get(SHORTHANDS.get(site, site)))


def _tokens(call: Sample) -> Tensor:  # [R]
    assert call.routes is not None
    return call.routes.ids.cpu().long().bincount(minlength=call.routes.num_routes).double()


def _flops(call: Sample) -> dict[str, tuple[float, float]]:
    """FLOPs by pass: those of the unmasked op, and those that masks leave."""
    op = OPS[call.op]
    weight = call.tensors[op.matrix]
    assert weight is not None
    tokens, product = _tokens(call), 2.0 * weight.numel()
    total = float(product * tokens.sum())
    useful = torch.zeros(len(tokens))
    for groups in op.backward:
        useful = useful + math.prod(left(call, *sites) for sites in groups)
    return {
        FORWARD: (op.products * total, op.products * total),
        BACKWARD: (len(op.backward) * total, float(product * (tokens * useful).sum())),
    }


def _moved_bytes(call: Sample) -> dict[str, float]:
    size = call.upstream.nbytes
    if call.op == "route_grad":  # where the mask is 0 nothing is read
        share = float((_tokens(call) * left(call, "table")).sum() / _tokens(call).sum())
        return {FORWARD: 0, BACKWARD: size * (1 + share)}
    op = OPS[call.op]
    forward, backward = op.passes
    weight = call.tensors.get("weight") if op.weight_moved else None
    return {FORWARD: forward * size, BACKWARD: backward * size + (0 if weight is None else weight.nbytes)}
