"""The products of a linear layer's backward, without what masks make vanish."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from ..primitives.products import plus_product
from ..primitives.protocol import Primitives
from ..routes import Routes
from ..tables import Table
from .grouped_linear import LinearTilings, SideTiling, grouped_input_grad, grouped_weight_grad
from .parts import Group, Part, Product, Rows, Spans, live, part_of, rectangles, width_of
from .rule import GROUPED, decide
from .tiling import is_aligned
from .totals import Total

if TYPE_CHECKING:
    from ..linear import LinearSites

MaskedRuns = tuple[tuple[slice, "Table | None"], ...]  # runs of features with the tables there


class InputSpan(NamedTuple):
    """The part of dx that is left for some routes' tokens.

    Attributes:
        outputs: runs of `[T, O]` where gradient arrives.
        inputs: runs of `[T, I]` where it leaves, with the tables there.
    """

    outputs: tuple[slice, ...]
    inputs: MaskedRuns


class _LinearProduct(Product[Spans]):
    """One of a linear layer's products, by its outputs and inputs.

    Attributes:
        sites: effective sites.
        tiling: how it is grouped; None where that saves nothing.
    """

    def __init__(self, sites: LinearSites, outputs: int, inputs: int) -> None:
        super().__init__(sites, outputs, inputs)
        self.is_aligned = is_aligned(outputs, inputs)
        self.sites = sites
        self.tiling = None if sites.tilings is None else self._tiling(sites.tilings)

    @abstractmethod
    def _tiling(self, tilings: LinearTilings) -> SideTiling | None:
        """Its own of a layer's tilings."""

    @property
    def grouped_work(self) -> float:
        return 1.0 if self.tiling is None else self.tiling.tiling.work


class InputProduct(_LinearProduct[InputSpan]):
    """dx = m_input ⊙ (g W)."""

    def _tiling(self, tilings: LinearTilings) -> SideTiling | None:
        return tilings.dx

    def live(self, route: int) -> tuple[tuple[slice, ...], ...]:
        outputs, inputs = self.widths
        return live((self.sites.output,), route, outputs), live((self.sites.input,), route, inputs)

    def group(self, first: int, last: int) -> Group[InputSpan]:
        arriving, leaving = self.live(first)
        span = InputSpan(arriving, _masked(leaving, self.sites.input, first, last))
        return _group(self, first, last, span, width_of(arriving) * width_of(leaving))


class WeightSpan(NamedTuple):
    """The part of dW that is left for some routes' tokens.

    Attributes:
        rows: runs of `[T, O]`, the rows of the weight that are updated, with the tables there.
        cols: runs of `[T, I]`, the columns, likewise.
    """

    rows: MaskedRuns
    cols: MaskedRuns


class WeightProduct(_LinearProduct[WeightSpan]):
    """dW = (m_update_rows ⊙ g)ᵀ (m_update_cols ⊙ x)."""

    def _tiling(self, tilings: LinearTilings) -> SideTiling | None:
        return tilings.dweight

    def live(self, route: int) -> tuple[tuple[slice, ...], ...]:
        outputs, inputs = self.widths
        rows = live((self.sites.output, self.sites.update_rows), route, outputs)
        return rows, live((self.sites.update_cols,), route, inputs)

    def group(self, first: int, last: int) -> Group[WeightSpan]:
        rows, cols = self.live(first)
        span = WeightSpan(
            _masked(rows, self.sites.update_rows, first, last),
            _masked(cols, self.sites.update_cols, first, last),
        )
        return _group(self, first, last, span, width_of(rows) * width_of(cols))


def _masked(runs: tuple[slice, ...], table: Table | None, first: int, last: int) -> MaskedRuns:
    return tuple((run, part_of(table, run, first, last)) for run in runs)


def _group(product: Product[Spans], first: int, last: int, span: Spans, area: int) -> Group[Spans]:
    outputs, inputs = product.widths
    return Group(first, last, (span,) if area else (), area / max(outputs * inputs, 1))


# dx and dW are split each by itself: where masks leave one whole it is one product. Split together, tables of updates
# alone had dx gathered, made and put back in parts: backward took 1.24 times the ordinary layer's instead of 0.92 (x of
# 1024 × 128 in fp32, 42 % of the tokens without updates, 2 cores).


def _decided(product: _LinearProduct[Spans], g: Tensor, routes: Routes) -> SideTiling | list[Part[Spans]]:
    """How one of a linear layer's products is grouped, or its parts; none where it is made whole."""
    decision = decide("linear", product, routes, g.dtype)
    if decision.form == GROUPED and product.tiling is not None:
        return product.tiling
    return rectangles(product, routes, decision)


def linear_input_grad(
    g: Tensor, weight: Tensor, routes: Routes, sites: LinearSites, primitives: Primitives
) -> Tensor | None:
    """dx of a linear layer: of the tokens and features that gradient arrives at and leaves.

    Args:
        g: `[T, O]`, the incoming gradient, masked.
        weight: `[O, I]`.
        routes: the batch's routes.
        sites: effective sites.
        primitives: the backend's.

    Returns:
        `[T, I]`; None where parts do not pay.
    """
    parts = _decided(InputProduct(sites, *weight.shape), g, routes)
    if isinstance(parts, SideTiling):
        return grouped_input_grad(g, weight, routes, sites, parts, primitives)
    if not parts:
        return None
    dx = g.new_zeros(g.shape[0], weight.shape[1])
    for part in parts:
        for span in part.spans:
            part_g = part.of(g)
            for inputs, table in span.inputs:
                total: Tensor | None = None
                for outputs in span.outputs:
                    total = plus_product(total, part_g[:, outputs], weight[outputs, inputs])
                if total is not None:
                    total = primitives.masked_product(total, part.routes, table, overwrite=True)
                    dx = part.put(total, dx, inputs)
    return dx


def linear_weight_grad(
    g: Tensor, x: Rows, routes: Routes, sites: LinearSites, primitives: Primitives
) -> Tensor | None:
    """dW of a linear layer: of the tokens that may update, and what they may update.

    Args:
        g: `[T, O]`, the incoming gradient, masked.
        x: `[T, I]`, with its rows.
        routes: the batch's routes.
        sites: effective sites.
        primitives: the backend's.

    Returns:
        `[O, I]`; None where parts do not pay.
    """
    shape = (g.shape[1], x.matrix.shape[1])
    parts = _decided(WeightProduct(sites, *shape), g, routes)
    if isinstance(parts, SideTiling):
        return grouped_weight_grad(g, x, routes, sites, parts, primitives)
    if not parts:
        return None
    spans = [span for part in parts for span in part.spans]
    dweight = Total(
        g, shape, [(rows, cols) for span in spans for rows, _ in span.rows for cols, _ in span.cols]
    )
    for part in parts:
        for span in part.spans:
            part_g, part_x = part.of(g), x.of(part)
            masked_x = [
                (cols, primitives.masked_product(part_x[:, cols], part.routes, table))
                for cols, table in span.cols
            ]
            for rows, table in span.rows:
                masked_g = primitives.masked_product(part_g[:, rows], part.routes, table)
                for cols, part_of_x in masked_x:
                    dweight.add_product(masked_g.T, part_of_x, rows, cols)
    return dweight.result()
