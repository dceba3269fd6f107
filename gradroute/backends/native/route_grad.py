"""The masked product of a gradient."""

from __future__ import annotations

from torch import Tensor

from ...primitives.arguments import tokens_of
from ...primitives.overwriting import may_overwrite
from ...primitives.registration import kernel_op
from ...routes import Routes
from ...tables import Table
from .launch import launch
from .operands import Mask, ProductOperands


def masked_product(g: Tensor, routes: Routes, table: Table | None, *, overwrite: bool = False) -> Tensor:
    if table is None:
        return g
    masks = (*tokens_of(routes), table.on(g.device), _bounds(table))
    if overwrite and may_overwrite(g):
        masked_product_in_place_op(g, *masks)
        return g
    return masked_product_op(g, *masks)


def _bounds(table: Table) -> list[int]:
    """Start and stop of each constant segment; a table that is broadcast has no segments."""
    return [] if table.features == 1 else [bound for segment in table.segments for bound in segment]


@kernel_op(
    "native_masked_product(Tensor g, Tensor ids, Tensor? strength, Tensor weights, int[] segments) -> Tensor"
)
def masked_product_op(
    g: Tensor, ids: Tensor, strength: Tensor | None, weights: Tensor, segments: list[int]
) -> Tensor:
    """The op behind `masked_product`."""
    out = g.new_empty(g.shape)
    launch("masked_product", ProductOperands(g, out, Mask.of(ids, strength, weights), segments))
    return out


@kernel_op(
    "native_masked_product_(Tensor(a!) g, Tensor ids, Tensor? strength, Tensor weights, int[] segments) -> ()"
)
def masked_product_in_place_op(
    g: Tensor, ids: Tensor, strength: Tensor | None, weights: Tensor, segments: list[int]
) -> None:
    """The op behind `masked_product` where it overwrites."""
    launch("masked_product", ProductOperands(g, g, Mask.of(ids, strength, weights), segments))
