"""Cases of larger sizes, of other numbers of routes, and of calls that are made in another way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch

from ... import testing

Sizes = testing.Sizes


class Cover(NamedTuple):
    """Cases of a kind that cover axes.

    Attributes:
        kind: a name of `cases.KINDS`.
        axes: the values of every axis beside the dtypes; each is in some case.
        common: the options of all cases.
        is_quick: whether a quick check has them too.
        meeting: in a whole check, of how many axes, the dtypes among them, every combination of values is there.
    """

    kind: str
    axes: Mapping[str, tuple[Any, ...]]
    common: Mapping[str, Any]
    is_quick: bool = False
    meeting: int = 1


#: Segments of more than 256 features, and of no multiple of any tile.
SEGMENTED = Sizes(d_model=331, d_ff=1301, heads=4, kv_heads=2, head_dim=24)
#: More tokens than any kernel sums at once.
MANY = 4099
#: A sequence of several tiles of attention.
LONG_SEQUENCE = 1100
HEAD_DIMENSIONS = (64, 80, 128)
NUMBERS_OF_ROUTES = (2, 3, 33, 70)
#: Routes whose tokens the device alone has counted, and widths that torch's grouped product takes.
UNCOUNTED: dict[str, Any] = {
    "tokens": 130,
    "tables": "blocks",
    "sizes": Sizes(d_model=96, d_ff=192),
    "uncounted": True,
}
#: The ops whose backward leaves out what masks zero.
WITH_RECTANGLES = ("routed_linear", "routed_mlp", "routed_gated_mlp")


def covers(op: str, device: torch.device) -> Iterator[Cover]:
    """The covers of an op on a device."""
    is_attention = op == "routed_attention"
    yield Cover("numbers", {"frozen": _frozen(op)}, {"tokens": 37}, is_quick=True)
    yield Cover("numbers", {"num_routes": NUMBERS_OF_ROUTES}, {"tokens": 37, "strength": "token"}, True, 2)
    yield Cover("numbers", {"twice": (True,)}, {"tokens": 37, "strength": "token"})
    yield Cover("numbers", {"ordinary": (True,)}, {"tokens": 37})
    yield Cover("numbers", {"exact_strength": (True,)}, {"tokens": 37, "strength": "token"})
    if is_attention:
        yield from _of_attention()
        return
    segmented = {"tables": ("blocks", "sparse")}
    yield Cover("numbers", segmented, {"tokens": 37, "sizes": SEGMENTED}, is_quick=True)
    yield Cover("numbers", segmented, {"tokens": MANY, "strength": "token"})
    yield Cover("numbers", {"used": (1,)}, {"tokens": MANY, "tables": "ones"}, is_quick=True)
    yield Cover("determinism", {}, {"tokens": MANY, "sizes": Sizes(d_model=131, d_ff=261), "runs": 6})
    if op in WITH_RECTANGLES:
        sites = {"sites": ("all", *testing.site_names(op)), "used": (3, 4)}
        yield Cover("numbers", sites, {"tokens": 1501, "tables": "blocks", "on_host": True})
        yield Cover("numbers", sites, UNCOUNTED, True, 2)
        for kind in ("determinism", "bounds", *(("graphs", "streams") if device.type == "cuda" else ())):
            yield Cover(kind, {}, UNCOUNTED, is_quick=True)


def _of_attention() -> Iterator[Cover]:
    """Attention's: long sequences, and heads of usual dimensions beside those of other cases."""
    heads = tuple(Sizes(heads=2, kv_heads=1, head_dim=number) for number in HEAD_DIMENSIONS)
    yield Cover("numbers", {"sizes": heads}, {"tokens": 70, "strength": "token"}, True, 2)
    small = {"tokens": LONG_SEQUENCE, "sizes": Sizes(heads=2, kv_heads=1, head_dim=8)}
    yield Cover("numbers", {"variant": testing.variants("routed_attention")}, small)
    yield Cover("determinism", {}, small | {"runs": 6})


def _frozen(op: str) -> tuple[tuple[str, ...], ...]:
    """Each input that has a gradient alone, and all but each."""
    tokens = (1, 2) if op == "routed_attention" else 2
    names = testing.sample(op, tokens=tokens).differentiable
    if len(names) == 1:
        return ((),)
    alone = {(name,) for name in names}
    others = {tuple(other for other in names if other != name) for name in names}
    return tuple(sorted(alone | others))
