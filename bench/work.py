"""What an op has to do: FLOPs as if nothing were masked, FLOPs that masks leave, bytes that must be moved.

Masks of activations make parts of dH unnecessary, and of the products that follow; masks of updates parts of weight
gradients. Nothing makes a forward product unnecessary, nor a gradient of the output weight, but its update masks.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gradroute import Table
from gradroute.testing import Sample

from .cases import BACKWARD, FORWARD, FULL, Work


def work_of(call: Sample) -> dict[str, Work]:
    """By pass, where it is known."""
    if call.op in _FLOPS:
        return _whole({mode: Work(*flops) for mode, flops in _FLOPS[call.op](call).items()})
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
    """By route, the share of features where no weight of the sites is 0; a strength brings in route 0's."""
    assert call.routes is not None
    tables = {_site(call.tables, site) for site in sites} - {None}
    alive = torch.ones(call.routes.num_routes, max((table.features for table in tables if table), default=1))
    for table in tables:
        assert table is not None
        nonzero = table.weights != 0
        alive *= (nonzero | nonzero[:1]) if call.routes.strength is not None else nonzero
    return alive.mean(-1)


def _site(tables: Mapping[str, Table], site: str) -> Table | None:
    shorthand = {"update_in": "update", "update_out": "update"}.get(site, site)
    return tables.get(site, tables.get(shorthand))


def _tokens(call: Sample) -> Tensor:  # [R]
    assert call.routes is not None
    return call.routes.ids.cpu().long().bincount(minlength=call.routes.num_routes).double()


def _linear_flops(call: Sample) -> dict[str, tuple[float, float]]:
    weight = call.tensors["weight"]
    assert weight is not None
    tokens, product = _tokens(call), 2.0 * weight.numel()
    total = float(product * tokens.sum())
    rows, columns = left(call, "output"), left(call, "input")
    updated = left(call, "output", "update_rows") * left(call, "update_cols")
    return {
        FORWARD: (total, total),
        BACKWARD: (2 * total, float(product * (tokens * (rows * columns + updated)).sum())),
    }


def _mlp_flops(call: Sample) -> dict[str, tuple[float, float]]:
    w_out = call.tensors["w_out" if call.op == "routed_mlp" else "w_down"]
    assert w_out is not None
    branches = 1 if call.op == "routed_mlp" else 2
    tokens, product = _tokens(call), 2.0 * w_out.numel()
    total = float(product * tokens.sum())
    output, hidden = left(call, "output"), left(call, "hidden", "forward")
    inner = left(call, "hidden", "forward", "pre")
    useful = output * hidden + output * left(call, "update_out", "forward")
    useful = useful + branches * (inner + left(call, "hidden", "forward", "pre", "update_in"))
    return {
        FORWARD: ((branches + 1) * total, (branches + 1) * total),
        BACKWARD: (2 * (branches + 1) * total, float(product * (tokens * useful).sum())),
    }


_FLOPS = {"routed_linear": _linear_flops, "routed_mlp": _mlp_flops, "routed_gated_mlp": _mlp_flops}

# Tensors of the output's size that a pass reads and writes.
_PASSES = {
    "routed_activation": (2, 3),  # a, z; dz, a, da
    "routed_glu": (3, 5),  # gate, up, z; dz, gate, up, dgate, dup
    "routed_rms_norm": (2, 3),  # x, y; dy, x, dx
    "routed_layer_norm": (2, 3),
    "routed_embedding": (2, 1),  # rows, y; dy, and the weight's gradient besides
}


def _moved_bytes(call: Sample) -> dict[str, float]:
    size = call.upstream.nbytes
    if call.op == "route_grad":  # where the mask is 0 nothing is read
        share = float((_tokens(call) * left(call, "table")).sum() / _tokens(call).sum())
        return {FORWARD: 0, BACKWARD: size * (1 + share)}
    forward, backward = _PASSES[call.op]
    weight = call.tensors.get("weight") if call.op == "routed_embedding" else None
    return {FORWARD: forward * size, BACKWARD: backward * size + (0 if weight is None else weight.nbytes)}
