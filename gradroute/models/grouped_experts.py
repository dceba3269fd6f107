"""Products of rows that are sorted by expert: transformers' own forward, and backwards that mask who updates what."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .. import backends
from ..function import Context, Function
from ..linear import LinearSites
from ..primitives.protocol import Primitives
from ..reference import masked_by
from ..routes import Routes
from ..skipping.grouped import grouped_rows, grouped_sums
from ..tables import Table
from ..transforms import first_order

#: Where transformers has its batched experts.
INTEGRATION = "transformers.integrations.moe"


def primitives_for(x: Tensor, backend: str | None) -> Primitives | None:
    """The primitives that mask the gradient of x; None: those of backend "reference", which are formulas."""
    chosen = backends.choose("route_grad", backend, x)
    return None if chosen == "reference" else backends.primitives(chosen)


class GroupedProducts(NamedTuple):
    """Linear layers of rows that are sorted by expert.

    Attributes:
        ends: `[E]` int32, up to which row each expert's go.
        rows: their routes.
        is_transposed: whether a weight is `[E, I, O]` and not `[E, O, I]`.
        backend: see `gradroute.use_backend`.
    """

    ends: Tensor
    rows: Routes
    is_transposed: bool
    backend: str | None

    def linear(self, x: Tensor, weight: Tensor, sites: LinearSites | None) -> Tensor:
        """[n, I] → [n, O], without bias."""
        if sites is None or not sites.effective.tables:
            return _product(x, weight, self.ends, self.is_transposed)
        call = (self.ends, self.is_transposed, self.rows, sites.effective, primitives_for(x, self.backend))
        return GroupedLinearFunction.apply(x.to(weight.dtype), weight, *call)


def _product(x: Tensor, weight: Tensor, ends: Tensor, is_transposed: bool) -> Tensor:
    """transformers' own grouped product."""
    linear = sys.modules[INTEGRATION]._grouped_linear
    return linear(x, weight, ends, bias=None, is_transposed=is_transposed)


def _masked_rows(g: Tensor, rows: Routes, table: Table | None, primitives: Primitives | None) -> Tensor:
    if primitives is None:
        return masked_by(rows)(table, g)
    return primitives.masked_product(g, rows, table)


class GroupedLinearContext(Context, Protocol):
    """The context of a grouped linear layer: its arguments, less those that are saved."""

    is_transposed: bool
    rows: Routes
    sites: LinearSites
    primitives: Primitives | None


class GroupedLinearFunction(Function):
    """A linear layer of rows sorted by expert, in which a row may update a part of its expert's weight alone.

    dx = g W_e, dW_e = Σ over e's rows (m_update_rows ⊙ g)ᵀ (m_update_cols ⊙ x).
    """

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        ends: Tensor,
        is_transposed: bool,
        rows: Routes,
        sites: LinearSites,
        primitives: Primitives | None,
    ) -> Tensor:
        return _product(x, weight, ends, is_transposed)

    @staticmethod
    def setup_context(ctx: GroupedLinearContext, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, ends, ctx.is_transposed, ctx.rows, ctx.sites, ctx.primitives = inputs
        needs = ctx.needs_input_grad
        ctx.save_for_backward(x if needs[1] else None, weight if needs[0] else None, ends)

    @staticmethod
    @first_order("the experts of a routed model")
    def backward(ctx: GroupedLinearContext, g: Tensor) -> tuple[Any, ...]:
        x, weight, ends = ctx.saved_tensors
        g = g.contiguous()
        dx = dweight = None
        if weight is not None:
            matrices = weight.transpose(1, 2) if ctx.is_transposed else weight
            dx = grouped_rows(g, matrices, ends, False)
        if x is not None:
            g = _masked_rows(g, ctx.rows, ctx.sites.update_rows, ctx.primitives)
            x = _masked_rows(x, ctx.rows, ctx.sites.update_cols, ctx.primitives)
            sides = (x, g) if ctx.is_transposed else (g, x)
            dweight = grouped_sums(*sides, ends, False)
        return (
            dx,
            dweight,
            None,  # ends
            None,  # is_transposed
            None,  # rows
            None,  # sites
            None,  # primitives
        )


class WeightedContext(Context, Protocol):
    """The context of WeightedFunction: its arguments, less those that are saved."""

    rows: Routes
    table: Table
    primitives: Primitives | None
    dtype: torch.dtype


class WeightedFunction(Function):
    """Rows times a weight each, y = w x, with dx = m ⊙ (w g), the mask in place, and dw = Σ x ⊙ g."""

    @staticmethod
    def forward(x: Tensor, w: Tensor, rows: Routes, table: Table, primitives: Primitives | None) -> Tensor:
        return x * w.unsqueeze(-1)

    @staticmethod
    def setup_context(ctx: WeightedContext, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, w, ctx.rows, ctx.table, ctx.primitives = inputs
        needs = ctx.needs_input_grad
        ctx.save_for_backward(x if needs[1] else None, w)
        ctx.dtype = x.dtype

    @staticmethod
    @first_order("the experts of a routed model")
    def backward(ctx: WeightedContext, g: Tensor) -> tuple[Any, ...]:
        x, w = ctx.saved_tensors
        dx = dw = None
        if x is not None:
            dw = (g * x).sum(-1).to(w.dtype)
        if ctx.needs_input_grad[0]:
            dx = (g * w.unsqueeze(-1)).to(ctx.dtype)
            if ctx.primitives is None:
                dx = masked_by(ctx.rows)(ctx.table, dx)
            else:
                dx = ctx.primitives.masked_product(dx, ctx.rows, ctx.table, overwrite=True)
        return (
            dx,
            dw,
            None,  # rows
            None,  # table
            None,  # primitives
        )
