"""The products of an MLP's backward, without what masks make vanish: one, or two branches into one hidden width."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from ..primitives.arguments import ActivationMasks
from ..primitives.overwriting import ALL
from ..primitives.products import plus_product, product
from ..primitives.protocol import Primitives
from ..routes import Routes
from ..tables import Table
from .grouped_mlp import GroupedMLP, MLPTilings
from .parts import Group, Part, Product, live, part_of, rectangles, runs, width_of
from .rule import GROUPED, Decision, decide
from .tiling import is_aligned
from .totals import Area, Total

if TYPE_CHECKING:
    from ..mlp import MLPSites


class Span(NamedTuple):
    """Features of some routes' tokens.

    Attributes:
        features: a run of `[T, d_ff]`.
        masks: the tables on these features, without those that are ones for all these routes.
        has_grad: whether gradient passes here.
        outputs: the features from which the output weight is updated: as counted from the span's first, and of d_ff.
        updates: the features whose input weights are updated, likewise, with the tables there.
    """

    features: slice
    masks: ActivationMasks
    has_grad: bool
    outputs: tuple[tuple[slice, slice], ...]
    updates: tuple[tuple[slice, slice, tuple[Table, ...]], ...]


class MLPProduct(Product[Span]):
    """The products of an MLP by its hidden features: dH, dx, and the weights' gradients.

    `sides` are the widths of x and of the output, as far as the products need them.
    """

    def __init__(self, sites: MLPSites, d_ff: int, *sides: int) -> None:
        super().__init__(sites, d_ff)
        self.is_aligned = is_aligned(d_ff, *sides)
        self.masks = sites.masks
        self.tilings: MLPTilings | None = sites.tilings

    @property
    def grouped_work(self) -> float:
        return 1.0 if self.tilings is None else self.tilings.work

    def live(self, route: int) -> tuple[tuple[slice, ...], ...]:
        """The runs of features with gradient, for the output weight, and for the input weights."""
        masks, (d_ff,) = self.masks, self.widths
        gradient = (*masks.dh, *masks.da)
        return (
            live(gradient, route, d_ff),
            live(masks.z, route, d_ff),
            live((*gradient, *masks.update), route, d_ff),
        )

    def group(self, first: int, last: int) -> Group[Span]:
        with_grad, of_z, updated = self.live(first)
        of_updates = ActivationMasks(update=self.masks.update)
        spans = []
        for features in with_grad:
            updates = tuple(
                (inside, rows, masks_on(of_updates, rows, first, last).update)
                for inside, rows in _inside(features, updated)
            )
            # z is made of all features of the span or of none: a pass over both operands more would cost more.
            outputs = _inside(features, tuple(run for run in of_z if _contains(features, run)))
            spans.append(Span(features, masks_on(self.masks, features, first, last), True, outputs, updates))
        for features in of_z:
            if not any(_contains(span.features, features) for span in spans if span.has_grad):
                masks = masks_on(self.masks, features, first, last)
                spans.append(Span(features, masks, False, ((ALL, features),), ()))
        # dH and dX cost as much as both weights' gradients (gated: three products to two and one).
        cost = 0.5 * width_of(with_grad) + 0.33 * width_of(updated) + 0.17 * width_of(of_z)
        return Group(first, last, tuple(spans), cost / max(self.widths[0], 1))


def masks_on(masks: ActivationMasks, features: slice, first: int, last: int) -> ActivationMasks:
    """The masks on some features, without those that are ones for the routes from first to last."""
    tables = {table: part_of(table, features, first, last) for group in masks for table in group}
    groups = ([tables[table] for table in group] for group in masks)
    return ActivationMasks(*(tuple(table for table in group if table is not None) for group in groups))


def _contains(features: slice, run: slice) -> bool:
    return bool(features.start <= run.start and run.stop <= features.stop)


def _inside(features: slice, runs: tuple[slice, ...]) -> tuple[tuple[slice, slice], ...]:
    """The runs inside `features`: counted from its first, and as they are."""
    found = []
    for run in runs:
        start, stop = max(features.start, run.start), min(features.stop, run.stop)
        if start < stop:
            found.append((slice(start - features.start, stop - features.start), slice(start, stop)))
    return tuple(found)


def name_of(branches: int) -> str:
    """What the rule for the products of an MLP of one branch, or of two, is called."""
    return "mlp" if branches == 1 else "gated_mlp"


def split(product: MLPProduct, routes: Routes, decision: Decision) -> list[Part[Span]]:
    """The parts of a batch; where they do not pay, all features of the tokens as they come, in runs."""
    masks = product.masks
    whole = (Span(ALL, masks, True, ((ALL, ALL),), ((ALL, ALL, masks.update),)),)
    parts = rectangles(product, routes, decision)
    if parts:
        return parts
    run = decision.run
    if run is None or run >= len(routes):
        return [Part(None, routes, whole)]
    return [Part(tokens, routes._at(tokens), whole) for tokens in runs(0, len(routes), run)]


class Branch:
    """One of the input linears of an MLP, of which a gated MLP has two, and its gradients.

    Attributes:
        a: `[T, d_ff]`, its pre-activations.
        weight: `[d_ff, d_model]`, where x's gradient is needed.
        need_weight: compute dW.
        need_bias: compute db.
        weight_grad: dW `[d_ff, d_model]`, once it is made; None where it is not needed.
        bias_grad: db `[d_ff]`, likewise.
    """

    def __init__(self, a: Tensor, weight: Tensor | None, need_weight: bool, need_bias: bool) -> None:
        self.a = a
        self.weight = weight
        self.need_weight = need_weight
        self.need_bias = need_bias
        self.weight_grad: Tensor | None = None
        self.bias_grad: Tensor | None = None
        self._weight_total: Total | None = None
        self._bias_total: Total | None = None

    def begin(self, x: Tensor | None, g: Tensor, parts: list[Part[Span]]) -> None:
        """Makes the totals of the gradients that are needed."""
        d_ff = self.a.shape[1]
        spans = [span for part in parts for span in part.spans if span.has_grad]
        if self.need_weight:
            assert x is not None
            areas: list[Area] = [(rows,) for span in spans for _, rows, _ in span.updates]
            self._weight_total = Total(g, (d_ff, x.shape[1]), areas)
        if self.need_bias:
            self._bias_total = Total(g, (d_ff,), [(span.features,) for span in spans])

    def add(
        self,
        grad: Tensor,
        bias: Tensor | None,
        x: Tensor | None,
        part: Part[Span],
        span: Span,
        primitives: Primitives,
    ) -> None:
        """Adds a span: the gradient `[tokens, features]` of its pre-activations, which has served dx, and is masked."""
        if self._bias_total is not None:
            assert bias is not None
            self._bias_total.add(bias, span.features)
        if self._weight_total is not None:
            assert x is not None
            for inside, rows, tables in span.updates:
                updating = grad[:, inside]
                for table in tables:
                    updating = primitives.masked_product(updating, part.routes, table, overwrite=True)
                self._weight_total.add_product(updating.T, x, rows, ALL)

    def finish(self) -> None:
        """Makes the gradients of their totals."""
        if self._weight_total is not None:
            self.weight_grad = self._weight_total.result()
        if self._bias_total is not None:
            self.bias_grad = self._bias_total.result()


class MLPBackward:
    """The backward of an MLP's products, of one branch or two.

    Attributes:
        g: `[T, d_out]`, the incoming gradient, masked.
        branches: its input linears, in which their gradients are left.
        routes: the batch's routes.
        sites: effective sites.
        activation: its name.
        primitives: the backend's.
    """

    def __init__(
        self,
        g: Tensor,
        branches: list[Branch],
        routes: Routes,
        sites: MLPSites,
        activation: str,
        primitives: Primitives,
    ) -> None:
        self.g = g
        self.branches = branches
        self.routes = routes
        self.sites = sites
        self.activation = activation
        self.primitives = primitives
        self._need_bias = True in [branch.need_bias for branch in branches]

    def gradients(
        self, x: Tensor | None, w_out: Tensor | None, need_x: bool, need_w_out: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of x and of the output weight, None for what is not needed.

        Args:
            x: `[T, d_model]`, where an input weight's gradient is needed.
            w_out: `[d_out, d_ff]`, where any gradient before it is needed.
            need_x: compute dx.
            need_w_out: compute dW_out.

        Returns:
            dx `[T, d_model]`; dW_out `[d_out, d_ff]`.
        """
        g, (tokens, d_ff) = self.g, self.branches[0].a.shape
        weight = self.branches[0].weight
        sides = [matrix.shape[1] for matrix in (g, x, weight) if matrix is not None]
        products = MLPProduct(self.sites, d_ff, *sides)
        decision = decide(name_of(len(self.branches)), products, self.routes, g.dtype)
        if decision.form == GROUPED:
            assert products.tilings is not None
            return GroupedMLP(self, products.tilings, x, w_out).gradients(need_w_out)
        parts = split(products, self.routes, decision)
        areas: list[Area] = [(cols,) for part in parts for span in part.spans for _, cols in span.outputs]
        dw_out = Total(g, (g.shape[1], d_ff), areas) if need_w_out else None
        for branch in self.branches:
            branch.begin(x, g, parts)
        if parts[0].tokens is None:
            dx = self._add(parts[0], x, w_out, dw_out)
        else:
            dx = None if weight is None else g.new_empty(tokens, weight.shape[1])
            for part in parts:
                part_dx = self._add(part, x, w_out, dw_out)
                if dx is not None:
                    dx = part.put(part_dx, dx)
        for branch in self.branches:
            branch.finish()
        return dx, None if dw_out is None else dw_out.result()

    def _add(
        self, part: Part[Span], x: Tensor | None, w_out: Tensor | None, dw_out: Total | None
    ) -> Tensor | None:
        """Adds a part's share to the weights' gradients; its rows of dx, where they are needed and not 0."""
        g, part_x = part.of(self.g), None if x is None else part.of(x)
        dx: Tensor | None = None
        for span in part.spans:
            dz = product(g, w_out[:, span.features]) if w_out is not None and span.has_grad else None
            want_z = dw_out is not None and bool(span.outputs)
            if dz is None and not want_z:
                continue
            grads, z, biases = self.middle(
                dz,
                [part.of(branch.a, span.features) for branch in self.branches],
                part.routes,
                span.masks,
                want_z=want_z,
                want_bias=self._need_bias and dz is not None,
                overwrite=isinstance(part.tokens, Tensor),  # then a was gathered; dz is made for this alone
            )
            if dw_out is not None and z is not None:
                for inside, cols in span.outputs:
                    dw_out.add_product(g.T, z[:, inside], ALL, cols)
            for branch, grad, bias in zip(self.branches, grads, biases, strict=True):
                if grad is None:
                    continue
                if branch.weight is not None:
                    dx = plus_product(dx, grad, branch.weight[span.features])
                branch.add(grad, bias, part_x, part, span, self.primitives)
        return dx

    def middle(
        self,
        dz: Tensor | None,
        a: list[Tensor],
        routes: Routes,
        masks: ActivationMasks,
        *,
        want_z: bool,
        want_bias: bool,
        overwrite: bool = False,
    ) -> tuple[tuple[Tensor | None, ...], Tensor | None, tuple[Tensor | None, ...]]:
        """The middle's backward, of the activation of one branch or of the product of two; see `Primitives`.

        Returns:
            Each branch's gradient of its pre-activations; z; each branch's bias gradient.
        """
        if len(a) == 1:
            da, z, db = self.primitives.activation_backward(
                dz,
                a[0],
                routes,
                masks,
                self.activation,
                want_z=want_z,
                want_bias=want_bias,
                overwrite=overwrite,
            )
            return (da,), z, (db,)
        gate, up = a
        dgate, dup, z, db_gate, db_up = self.primitives.glu_backward(
            dz,
            gate,
            up,
            routes,
            masks,
            self.activation,
            want_z=want_z,
            want_bias=want_bias,
            overwrite=overwrite,
        )
        return (dgate, dup), z, (db_gate, db_up)
