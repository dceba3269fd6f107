"""Products of an MLP's backward as rectangles: the tokens of a route × the features that carry its gradient.

A mask of zeros makes parts of dH vanish, and of the products that follow. With the tokens sorted by route what is left
are rectangles, so the cost of the GEMMs falls with the tables' density. On the CPU tokens are taken in runs besides, so
that what lies between two products never leaves the cache: a fresh matrix of T × d_ff costs more there in page faults
than in arithmetic (10 ms for 33 MB, where the GEMM takes 36).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .routes import Routes
from .tables import Table

ALL = slice(None)

# Tokens of a run.
RUN = 1024

# Sorting pays from this share of skipped work on: rows must be gathered and put back.
MIN_SAVING = 0.05

# More runs of features than this are taken as one; more routes than this, or fewer tokens a rectangle, as they come.
MAX_SPANS = 4
MAX_ROUTES = 64
MIN_TOKENS = 64


class Span(NamedTuple):
    """Features of some routes' tokens.

    Attributes:
        features: of `[T, F]`.
        sites: the sites on these features, None where these routes' weights are ones.
        has_grad: whether gradient passes here.
        has_z: whether the output weight is updated from here.
        updates: the features whose input weights are updated: as counted from the span's first, and of F.
    """

    features: slice
    sites: Any
    has_grad: bool
    has_z: bool
    updates: tuple[tuple[slice, slice], ...]


class Group(NamedTuple):
    """Neighbouring routes whose tokens have the same spans."""

    first: int
    last: int
    spans: tuple[Span, ...]
    cost: float  # of a token, where one with all features costs 1


class Part(NamedTuple):
    """Some tokens with their spans.

    Attributes:
        tokens: None for all of them, a slice, or their positions.
        routes: theirs.
        spans: theirs.
    """

    tokens: slice | Tensor | None
    routes: Routes
    spans: tuple[Span, ...]

    def of(self, matrix: Any, features: slice = ALL) -> Any:
        """The part's rows of `matrix [T, F]`, and these features."""
        if matrix is None or self.tokens is None:
            return matrix
        if isinstance(self.tokens, slice):
            return matrix[self.tokens, features]
        return matrix[:, features].index_select(0, self.tokens)

    def put(self, product: Tensor | None, out: Any) -> Any:
        """`out [T, F]` with the part's rows set to `product` (None: 0); the product itself where it has all rows."""
        if self.tokens is None:
            return product
        if isinstance(self.tokens, slice):
            out[self.tokens] = 0 if product is None else product
        elif product is None:
            out.index_fill_(0, self.tokens, 0)
        else:
            out.index_copy_(0, self.tokens, product)
        return out


class Total:
    """A gradient of this shape summed over the parts, in fp32 at least where there are several."""

    def __init__(self, like: Tensor, shape: tuple[int, ...], parts: list[Part]) -> None:
        self.like = like
        self.shape = shape
        self.is_sum = len(parts) > 1 or len(parts[0].spans) > 1
        self.value: Any = None

    def add(self, summand: Tensor, features: slice = ALL) -> None:
        """Adds to the entries of these features."""
        if self.value is None and features == ALL:
            self.value = self._wide(summand)
        else:
            self._started()[features] += summand

    def add_product(self, a: Tensor, b: Tensor, rows: slice = ALL, cols: slice = ALL) -> None:
        """Adds the product a b to these rows and columns."""
        if self.value is None and rows == cols == ALL:
            self.value = self._wide(a @ b)
        elif self._started().dtype == a.dtype:
            self.value[rows, cols].addmm_(a, b)
        else:
            self.value[rows, cols] += a @ b

    def _wide(self, first: Tensor) -> Tensor:
        return first.to(torch.promote_types(first.dtype, torch.float32)) if self.is_sum else first

    def _started(self) -> Tensor:
        if self.value is None:
            self.value = self._wide(self.like.new_zeros(self.shape))
        value: Tensor = self.value
        return value

    def result(self) -> Tensor:
        """The sum in the dtype of its parameter."""
        return self._started().to(self.like.dtype)


def whole(routes: Routes, sites: Any) -> list[Part]:
    """One part: all tokens with all features, as they come."""
    return [Part(None, routes, (Span(ALL, sites, True, True, ((ALL, ALL),)),))]


def split(routes: Routes, sites: Any, d_ff: int, pays: bool) -> list[Part]:
    """The parts of a batch.

    Args:
        routes: the batch's routes.
        sites: effective sites with pre, hidden, forward, update_in and update_out.
        d_ff: F.
        pays: whether products should be made in parts at all.
    """
    if not pays or routes.host_counts is None or len(routes) == 0:
        return whole(routes, sites)
    if routes.strength is None and routes.num_routes <= MAX_ROUTES:
        key = (routes.num_routes, d_ff)
        if key not in sites.groups:
            sites.groups[key] = _groups(sites, *key)
        parts = _rectangles(routes, sites.groups[key])
        if parts:
            return parts
    spans = whole(routes, sites)[0].spans
    return [_part(routes, run, spans) for run in _runs(0, len(routes))]


def _rectangles(routes: Routes, groups: tuple[Group, ...]) -> list[Part]:
    """The groups' runs of tokens; none where they save too little."""
    assert routes.host_counts is not None
    counts = [sum(routes.host_counts[group.first : group.last + 1]) for group in groups]
    cost = sum(count * group.cost for count, group in zip(counts, groups, strict=True))
    number = sum(len(group.spans) for count, group in zip(counts, groups, strict=True) if count)
    if cost > (1 - MIN_SAVING) * len(routes) or number * MIN_TOKENS > len(routes):
        return []
    parts, first = [], 0
    for count, group in zip(counts, groups, strict=True):
        for run in _runs(first, first + count):
            parts.append(_part(routes, run if routes.in_order else routes.order[run].long(), group.spans))
        first += count
    return parts


def _part(routes: Routes, tokens: slice | Tensor, spans: tuple[Span, ...]) -> Part:
    return Part(tokens, routes.at(tokens), spans)


def _runs(first: int, last: int) -> Iterator[slice]:
    for start in range(first, last, RUN):
        yield slice(start, min(start + RUN, last))


class _Live(NamedTuple):
    """The runs of features with gradient, for the output weight, and for the input weights."""

    grad: tuple[slice, ...]
    z: tuple[slice, ...]
    update: tuple[slice, ...]


def _groups(sites: Any, num_routes: int, d_ff: int) -> tuple[Group, ...]:
    """The routes' groups, which depend on the tables alone."""
    middle = (sites.pre, sites.hidden, sites.forward)
    lives = [
        _Live(
            _live(middle, route, d_ff),
            _live((sites.forward, sites.update_out), route, d_ff),
            _live((*middle, sites.update_in), route, d_ff),
        )
        for route in range(num_routes)
    ]
    groups, first = [], 0
    for route in range(1, num_routes + 1):
        if route == num_routes or lives[route] != lives[first]:
            groups.append(_group(sites, first, route - 1, lives[first], d_ff))
            first = route
    return tuple(groups)


def _live(tables: tuple[Table | None, ...], route: int, width: int) -> tuple[slice, ...]:
    """The runs of features on which no table has weight 0 for the route."""
    live = torch.ones(width, dtype=torch.bool, device="cpu")
    for table in tables:
        if table is not None:
            live &= table.weights[route] != 0
    edges = torch.nn.functional.pad(live.int(), (1, 1)).diff().nonzero().flatten().tolist()
    runs = tuple(slice(*run) for run in zip(edges[::2], edges[1::2], strict=True))
    return runs if len(runs) <= MAX_SPANS else (slice(edges[0], edges[-1]),)


def _group(sites: Any, first: int, last: int, live: _Live, d_ff: int) -> Group:
    spans = []
    for features in live.grad:
        kept = _restricted(sites, features, first, last)
        spans.append(Span(features, kept, True, features in live.z, _updates(features, live.update)))
    for features in live.z:
        if features not in live.grad:
            spans.append(Span(features, _restricted(sites, features, first, last), False, True, ()))
    # dH and dX cost as much as both weights' gradients (gated: three products to two and one).
    cost = 0.5 * _width(live.grad) + 0.33 * _width(live.update) + 0.17 * _width(live.z)
    return Group(first, last, tuple(spans), cost / d_ff)


def _updates(features: slice, runs: tuple[slice, ...]) -> tuple[tuple[slice, slice], ...]:
    """The runs inside `features`: counted from its first, and as they are."""
    found = []
    for run in runs:
        start, stop = max(features.start, run.start), min(features.stop, run.stop)
        if start < stop:
            found.append((slice(start - features.start, stop - features.start), slice(start, stop)))
    return tuple(found)


def _width(runs: tuple[slice, ...]) -> int:
    return sum(run.stop - run.start for run in runs)


def _restricted(sites: Any, features: slice, first: int, last: int) -> Any:
    """The sites of the middle on some features, without tables that are ones for these routes."""
    tables = {}
    for name in ("pre", "hidden", "forward", "update_in", "update_out"):
        table = getattr(sites, name)
        if table is not None:
            weights = table.weights if table.features == 1 else table.weights[:, features]
            if bool((weights[first : last + 1] != 1).any()):
                tables[name] = Table(weights)
    return type(sites)(**tables).effective


class Branch:
    """One of the input linears of an MLP, of which a gated MLP has two, and its gradients.

    Attributes:
        a: `[T, d_ff]`, its pre-activations.
        weight: `[d_ff, d_model]`, where x's gradient is needed.
        weight_grad: None where it is not needed.
        bias_grad: None where it is not needed.
    """

    def __init__(self, a: Tensor, weight: Tensor | None, need_weight: bool, need_bias: bool) -> None:
        self.a = a
        self.weight = weight
        self.needs = (need_weight, need_bias)
        self.weight_grad: Total | None = None
        self.bias_grad: Total | None = None

    def begin(self, x: Tensor | None, g: Tensor, parts: list[Part]) -> None:
        """Makes the totals of the gradients that are needed."""
        need_weight, need_bias = self.needs
        d_ff = self.a.shape[1]
        if need_weight:
            assert x is not None
            self.weight_grad = Total(g, (d_ff, x.shape[1]), parts)
        if need_bias:
            self.bias_grad = Total(g, (d_ff,), parts)

    def add(
        self, grad: Tensor, bias: Tensor | None, x: Tensor | None, part: Part, span: Span, kernels: Any
    ) -> None:
        """Adds a span: the gradient `[tokens, features]` of its pre-activations, which has served dx, and is masked."""
        if self.bias_grad is not None:
            assert bias is not None
            self.bias_grad.add(bias, span.features)
        if self.weight_grad is not None:
            assert x is not None
            kernels.masked_product_(grad, part.routes, span.sites.update_in)
            for inside, rows in span.updates:
                self.weight_grad.add_product(grad[:, inside].T, x, rows=rows)

    def results(self) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of the weight and the bias."""
        weight, bias = self.weight_grad, self.bias_grad
        return None if weight is None else weight.result(), None if bias is None else bias.result()


def mlp_backward(
    g: Tensor,
    x: Tensor | None,
    branches: list[Branch],
    w_out: Tensor | None,
    routes: Routes,
    sites: Any,
    activation: str,
    backward: Callable[..., tuple[Any, ...]],
    kernels: Any,
    *,
    need_x: bool,
    need_w_out: bool,
) -> tuple[Any, Any]:
    """The gradients of an MLP's products; those of the branches are left in them.

    Args:
        g: `[T, d_out]`, the incoming gradient, masked.
        x: `[T, d_model]`, where an input weight's gradient is needed.
        branches: its input linears.
        w_out: `[d_out, d_ff]`, where any gradient before it is needed.
        routes: the batch's routes.
        sites: effective sites.
        activation: its name.
        backward: the leaf computation of the middle.
        kernels: the backend's leaf computations.
        need_x: compute dx.
        need_w_out: compute dW_out.

    Returns:
        dx `[T, d_model]` and dW_out `[d_out, d_ff]`, None for what is not needed.
    """
    tokens, d_ff = branches[0].a.shape
    parts = split(routes, sites, d_ff, kernels.splits(g.device))
    dx: Any = None
    if need_x and parts[0].tokens is not None:
        assert branches[0].weight is not None
        dx = g.new_empty(tokens, branches[0].weight.shape[1])
    dw_out = Total(g, (g.shape[1], d_ff), parts) if need_w_out else None
    want_bias = False
    for branch in branches:
        branch.begin(x, g, parts)
        want_bias = want_bias or branch.bias_grad is not None
    for part in parts:
        part_g, part_x, part_dx = part.of(g), part.of(x), None
        for span in part.spans:
            features = span.features
            dz = part_g @ w_out[:, features] if w_out is not None and span.has_grad else None
            want_z = need_w_out and span.has_z
            if dz is None and not want_z:
                continue
            a = [part.of(branch.a, features) for branch in branches]
            outputs = backward(
                dz,
                *a,
                part.routes,
                span.sites,
                activation,
                want_z=want_z,
                want_bias=want_bias and dz is not None,
            )
            grads, z, biases = outputs[: len(a)], outputs[len(a)], outputs[len(a) + 1 :]
            if dw_out is not None and want_z:
                dw_out.add_product(part_g.T, z, cols=features)
            for branch, grad, bias in zip(branches, grads, biases, strict=True) if dz is not None else ():
                if branch.weight is not None:
                    part_dx = _plus_product(part_dx, grad, branch.weight[features])
                branch.add(grad, bias, part_x, part, span, kernels)
        if need_x:
            dx = part.put(part_dx, dx)
    return dx, None if dw_out is None else dw_out.result()


def _plus_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    return a @ b if total is None else torch.addmm(total, a, b)
