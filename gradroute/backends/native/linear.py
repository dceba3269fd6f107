"""The gradients of a linear layer: its products are torch's, with masked gradients."""

from __future__ import annotations

from torch import Tensor

from ...primitives import shared
from ...primitives.arguments import as_dtype, tokens_of
from ...primitives.registration import kernel_op
from ...routes import Routes
from ...tables import Table
from .launch import launch, new_sums, summed
from .operands import BiasOperands, Mask
from .route_grad import masked_product


def bias_grad(g: Tensor, routes: Routes, table: Table | None) -> Tensor:
    if table is None:
        return g.sum(0)
    return bias_grad_op(g, *tokens_of(routes), table.on(g.device))


@kernel_op("native_bias_grad(Tensor g, Tensor ids, Tensor? strength, Tensor weights) -> Tensor")
def bias_grad_op(g: Tensor, ids: Tensor, strength: Tensor | None, weights: Tensor) -> Tensor:
    """The op behind `bias_grad`."""
    sums = new_sums(g)
    launch("bias_grad", BiasOperands(g, sums, Mask.of(ids, strength, weights)))
    return as_dtype(summed(sums, g), g.dtype)


def input_grad(g: Tensor, weight: Tensor, routes: Routes, table: Table | None) -> Tensor:
    return shared.input_grad(g, weight, routes, table, masked_product)


def weight_grad(g: Tensor, x: Tensor, routes: Routes, rows: Table | None, cols: Table | None) -> Tensor:
    return shared.weight_grad(g, x, routes, rows, cols, masked_product)
