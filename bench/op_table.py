"""The ops that suites are made of, attention aside, with everything that a benchmark has to know of one."""

from __future__ import annotations

from typing import NamedTuple


class Op(NamedTuple):
    """An op.

    Attributes:
        suite: the suite it belongs to.
        activation: the sites that the axis value "activation" stands for; none: the op has no such site.
        update: the sites that "update" stands for.
        passes: tensors of the output's size that a forward and a backward read and write, where bytes bound the time;
            None: FLOPs do (bench/work.py).
        alone: whether the automatic choice between `cpu` and `torch` rests on its times alone, outside of a layer.
    """

    suite: str
    activation: tuple[str, ...] = ()
    update: tuple[str, ...] = ()
    passes: tuple[int, int] | None = None
    alone: bool = False


OPS = {
    # Where the mask is 0 route_grad reads nothing, so bench/work.py counts its bytes itself.
    "route_grad": Op("primitive", ("table",), passes=(0, 2), alone=True),
    "routed_activation": Op("primitive", ("hidden",), passes=(2, 3), alone=True),  # a, z; dz, a, da
    "routed_glu": Op(
        "primitive", ("hidden",), passes=(3, 5), alone=True
    ),  # gate, up, z; dz, gate, up, dgate, dup
    # rows, y; dy, and the weight's gradient besides.
    "routed_embedding": Op("primitive", update=("update",), passes=(2, 1), alone=True),
    "routed_linear": Op("linear", ("output",), ("update_rows",)),
    "routed_mlp": Op("mlp", ("hidden",), ("update",)),
    "routed_gated_mlp": Op("gated_mlp", ("hidden",), ("update",)),
    "routed_rms_norm": Op("norm", update=("update",), passes=(2, 3), alone=True),  # x, y; dy, x, dx
    "routed_layer_norm": Op("norm", update=("update",), passes=(2, 3), alone=True),
}


def ops_by_suite() -> dict[str, tuple[str, ...]]:
    """The ops of every suite, both in the table's order."""
    suites: dict[str, tuple[str, ...]] = {}
    for name, op in OPS.items():
        suites[op.suite] = (*suites.get(op.suite, ()), name)
    return suites
