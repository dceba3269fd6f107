"""The ops that suites are made of, attention aside: everything that a benchmark has to know of an op and its sites."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

Sites = tuple[str, ...]


class Updates(NamedTuple):
    """The sites that decide which tokens update a parameter's rows and its columns; "": all do."""

    rows: str = ""
    columns: str = ""


class Op(NamedTuple):
    """An op.

    Attributes:
        suite: the suite it belongs to.
        activation: the sites that the axis value "activation" stands for; none: the op has no such site.
        update: the sites that "update" stands for.
        updates: the parameters that update sites confine.
        products: how many matrix products a forward has; 0: bytes bound the time.
        backward: for every product of a backward, groups of sites. Masks of a group leave a share of the product, and
            those of several groups the product of their shares.
        matrix: the parameter that has the size of the weight in every product.
        passes: tensors of the output's size that a forward and a backward read and write, where bytes bound the time.
        weight_moved: whether a backward also writes the weight's gradient, of the size of the weight.
        alone: whether the automatic choice between `cpu` and `torch` rests on its times alone, outside of a layer.
    """

    suite: str
    activation: Sites = ()
    update: Sites = ()
    updates: Mapping[str, Updates] = MappingProxyType({})
    products: int = 0
    backward: tuple[tuple[Sites, ...], ...] = ()
    matrix: str = "weight"
    passes: tuple[int, int] = (0, 0)
    weight_moved: bool = False
    alone: bool = False


_DX, _DW_IN = (("hidden", "forward", "pre"),), (("hidden", "forward", "pre", "update_in"),)
_DZ, _DW_OUT = (("output",), ("hidden", "forward")), (("output",), ("update_out", "forward"))
_IN, _OUT, _OUT_BIAS = Updates("update_in"), Updates(columns="update_out"), Updates("update_output_bias")
_NORM = Updates("update")

OPS = {
    "route_grad": Op("primitive", ("table",), passes=(0, 2), alone=True),  # dy and dx where the mask is not 0
    "routed_activation": Op("primitive", ("hidden",), passes=(2, 3), alone=True),  # a, z; dz, a, da
    "routed_glu": Op(
        "primitive", ("hidden",), passes=(3, 5), alone=True
    ),  # gate, up, z; dz, gate, up, dgate, dup
    "routed_embedding": Op(
        "primitive",
        update=("update",),
        passes=(2, 1),  # rows, y; dy
        weight_moved=True,
        alone=True,
    ),
    "routed_linear": Op(
        "linear",
        ("output",),
        ("update_rows",),
        {"weight": Updates("update_rows", "update_cols"), "bias": Updates("update_bias")},
        products=1,
        backward=((("output",), ("input",)), (("output", "update_rows"), ("update_cols",))),
    ),
    "routed_mlp": Op(
        "mlp",
        ("hidden",),
        ("update",),
        {"w_in": _IN, "b_in": _IN, "w_out": _OUT, "b_out": _OUT_BIAS},
        products=2,
        backward=(_DZ, _DW_OUT, _DX, _DW_IN),
        matrix="w_out",
    ),
    "routed_gated_mlp": Op(
        "gated_mlp",
        ("hidden",),
        ("update",),
        {"w_gate": _IN, "w_up": _IN, "b_gate": _IN, "b_up": _IN, "w_down": _OUT, "b_down": _OUT_BIAS},
        products=3,
        backward=(_DZ, _DW_OUT, *(_DX, _DW_IN) * 2),
        matrix="w_down",
    ),
    "routed_rms_norm": Op(
        "norm",
        update=("update",),
        updates={"weight": _NORM},
        passes=(2, 3),  # x, y; dy, x, dx
        alone=True,
    ),
    "routed_layer_norm": Op(
        "norm", update=("update",), updates={"weight": _NORM, "bias": _NORM}, passes=(2, 3), alone=True
    ),
}

#: The site that stands for several, by each of them.
SHORTHANDS = {"update_in": "update", "update_out": "update", "update_bias": "update_rows"}


def ops_by_suite() -> dict[str, tuple[str, ...]]:
    """The ops of every suite, both in the table's order."""
    suites: dict[str, tuple[str, ...]] = {}
    for name, op in OPS.items():
        suites[op.suite] = (*suites.get(op.suite, ()), name)
    return suites
