"""Products of a backward as rectangles: the tokens of a route × the features that carry its gradient.

A mask of zeros makes parts of dH vanish, and of the products that follow. With the tokens sorted by route what is left
are rectangles, so the cost of the GEMMs falls with the tables' density. On the CPU an MLP takes tokens in runs besides,
so that what lies between two products stays in the cache: a fresh matrix of T × d_ff costs page faults (10 ms for
33 MB, where the GEMM that fills it takes 36).

How many tokens a route has must be known on the host, or the device would be waited for: routes that came from there
know it, others have their products made whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .primitives.protocol import Primitives
from .routes import Routes
from .tables import Table

ALL = slice(None)

# Tokens of a run, in fp32 and fp64. In half precision the product of a run would be rounded, and could overflow, before
# it is summed. With runs of 320 tokens, whose matrices stay in the second-level cache, a gated MLP of 128 × 512 took
# 1.18 times as long in backward, with 128 tokens 1.45 times.
RUN = 1024

# Sorting pays from this share of skipped work on: rows must be gathered and put back. On CUDA an estimate from bytes,
# not yet measured: with 16384 tokens of 4096 × 14336 gathering and putting back move 0.4 ms' worth of a backward of
# 14 ms.
MIN_SAVING = {"cpu": 0.05, "cuda": 0.1}

# More runs of features than this are taken as one; more routes than this, or fewer tokens a rectangle, as they come. On
# CUDA an estimate too: 2048 × 3584 elements are 224 tiles of 128 × 256, for 132 multiprocessors.
MAX_SPANS = 4
MAX_ROUTES = 64
MIN_TOKENS = {"cpu": 64, "cuda": 2048}

# So many areas are compared with each other at most.
MAX_AREAS = 16


class Span(NamedTuple):
    """Features of some routes' tokens.

    Attributes:
        features: of `[T, F]`.
        sites: the sites on these features, None where these routes' weights are ones.
        has_grad: whether gradient passes here.
        outputs: the features from which the output weight is updated: as counted from the span's first, and of F.
        updates: the features whose input weights are updated, likewise, with the table there.
    """

    features: slice
    sites: Any
    has_grad: bool
    outputs: tuple[tuple[slice, slice], ...]
    updates: tuple[tuple[slice, slice, Table | None], ...]


class InputProducts(NamedTuple):
    """What is left of dx of a linear layer for some routes' tokens, as runs of features.

    Attributes:
        outputs: of `[T, O]`, where gradient arrives.
        inputs: of `[T, I]`, where it leaves, with the tables there.
    """

    outputs: tuple[slice, ...]
    inputs: tuple[tuple[slice, Table | None], ...]


class WeightProducts(NamedTuple):
    """What is left of dW of a linear layer for some routes' tokens, as runs of features with the tables there.

    Attributes:
        rows: of `[T, O]`, the rows of the weight that are updated.
        cols: of `[T, I]`, the columns.
    """

    rows: tuple[tuple[slice, Table | None], ...]
    cols: tuple[tuple[slice, Table | None], ...]


class Group(NamedTuple):
    """Neighbouring routes whose tokens have the same rectangles."""

    first: int
    last: int
    spans: tuple[Any, ...]  # of Span (MLP), InputProducts or WeightProducts (linear); none: there is no work
    cost: float  # of a token, where one with all features costs 1


class Groups:
    """The groups of some sites. A batch keeps its parts under this object, which equals no other."""

    def __init__(self, groups: list[Group]) -> None:
        self.groups = groups
        self.least_cost = min(group.cost for group in groups)


class Part(NamedTuple):
    """Some tokens with their spans.

    Attributes:
        tokens: None for all of them, a slice, or their positions.
        routes: theirs.
        spans: theirs.
    """

    tokens: slice | Tensor | None
    routes: Routes
    spans: tuple[Any, ...]

    def of(self, matrix: Any, features: slice = ALL) -> Any:
        """The part's rows of `matrix [T, F]`, and these features."""
        if matrix is None or self.tokens is None:
            return matrix
        if isinstance(self.tokens, slice):
            return matrix[self.tokens, features]
        return (matrix if features is ALL else matrix[:, features]).index_select(0, self.tokens)

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


class Rows:
    """A matrix `[T, F]` whose rows several products want, part by part: they are gathered once."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self._of_tokens: dict[int, Tensor] = {}

    def of(self, part: Part) -> Tensor:
        """The part's rows."""
        key = id(part.tokens)  # the batch keeps them alive
        if key not in self._of_tokens:
            self._of_tokens[key] = part.of(self.matrix)
        return self._of_tokens[key]


Area = tuple[slice, ...]  # of a gradient: rows, or rows and columns


class Total:
    """A gradient of this shape, put together from the parts' areas; where some overlap, summed in fp32 at least."""

    def __init__(self, like: Tensor, shape: tuple[int, ...], areas: Sequence[Area]) -> None:
        self.like = like
        self.shape = shape
        self.is_sum = _overlap(areas)
        self.value: Any = None

    def add(self, summand: Tensor, features: slice = ALL) -> None:
        """Adds to the entries of these features."""
        if self.value is None and features == ALL:
            self.value = self._wide(summand)
        else:
            self._started()[features] += summand

    def add_product(self, a: Tensor, b: Tensor, rows: slice = ALL, cols: slice = ALL) -> None:
        """Adds the product a b to these rows and columns."""
        is_first = self.value is None and _is_all(rows, self.shape[0]) and _is_all(cols, self.shape[1])
        if is_first:
            self.value = self._product(a, b)
        elif a.is_cuda and self._is_wide(a):
            self._started()[rows, cols] += self._product(a, b)
        else:
            self._started()[rows, cols].addmm_(self._wide(a), self._wide(b), beta=int(self.is_sum))

    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        if a.is_cuda and self._is_wide(a):  # tensor cores take half precision as it is, and sum up in fp32
            return torch.mm(a, b, out_dtype=torch.float32)
        return self._wide(a) @ self._wide(b)

    def _is_wide(self, summand: Tensor) -> bool:
        return self.is_sum and summand.dtype in (torch.float16, torch.bfloat16)

    def _wide(self, summand: Tensor) -> Tensor:
        """In fp32 at least where there are several: rounded to half precision, one could overflow before the sum."""
        return summand.to(torch.float32) if self._is_wide(summand) else summand

    def _started(self) -> Tensor:
        if self.value is None:
            self.value = self._wide(self.like.new_zeros(self.shape))
        value: Tensor = self.value
        return value

    def result(self) -> Tensor:
        """The sum in the dtype of its parameter."""
        return self._started().to(self.like.dtype)


def _is_all(run: slice, size: int) -> bool:
    return run == ALL or (run.start, run.stop) == (0, size)


def _overlap(areas: Sequence[Area]) -> bool:
    """Whether any two have an element in common; of many areas it is supposed."""
    if len(areas) > MAX_AREAS:
        return True
    return any(all(map(_meet, one, other)) for one, other in combinations(areas, 2))


def _meet(one: slice, other: slice) -> bool:
    return ALL in (one, other) or max(one.start, other.start) < min(one.stop, other.stop)


def whole(routes: Routes, sites: Any) -> list[Part]:
    """One part: all tokens with all features, as they come."""
    span = Span(ALL, sites, True, ((ALL, ALL),), ((ALL, ALL, sites.update_in),))
    return [Part(None, routes, (span,))]


def splits(device: torch.device) -> bool:
    """Whether products are made in parts: not in traced code, which must not depend on how many tokens a route has."""
    return device.type in MIN_TOKENS and not torch.compiler.is_compiling()


def split(routes: Routes, sites: Any, d_ff: int, dtype: torch.dtype) -> list[Part]:
    """The parts of a batch.

    Args:
        routes: the batch's routes.
        sites: effective sites with pre, hidden, forward, update_in and update_out.
        d_ff: F.
        dtype: of the products.
    """
    if not splits(routes.device) or routes.host_counts is None or len(routes) == 0:
        return whole(routes, sites)
    run = _run_of(dtype, routes)
    parts = _rectangles(routes, sites, run, _mlp_live, _mlp_group, d_ff)
    if parts or run >= len(routes):
        return parts or whole(routes, sites)
    spans = whole(routes, sites)[0].spans
    return [Part(tokens, routes._at(tokens), spans) for tokens in _runs(0, len(routes), run)]


def _run_of(dtype: torch.dtype, routes: Routes) -> int:
    in_runs = routes.device.type == "cpu" and dtype in (torch.float32, torch.float64)
    return RUN if in_runs else len(routes)


def _rectangles(
    routes: Routes,
    sites: Any,
    run: int,
    live_of: Callable[..., Any],
    group_of: Callable[..., Group],
    *widths: int,
) -> list[Part]:
    """The parts, sorted by route; none where they save too little, or a strength blends the tables' rows."""
    if routes.strength is not None or routes.num_routes > MAX_ROUTES or routes.host_counts is None:
        return []
    key = (live_of, routes.num_routes, *widths)
    if key not in sites.groups:
        lives = [live_of(sites, route, *widths) for route in range(routes.num_routes)]
        sites.groups[key] = _groups(sites, lives, group_of, widths)
    groups = sites.groups[key]
    if groups.least_cost > 1 - MIN_SAVING[routes.device.type]:
        return []
    return routes.derived((groups, run), lambda: _parts(routes, groups.groups, run))


def _parts(routes: Routes, groups: list[Group], run: int) -> list[Part]:
    """The parts of a batch whose tokens are counted on the host; none where they save too little."""
    assert routes.host_counts is not None
    counts = [sum(routes.host_counts[group.first : group.last + 1]) for group in groups]
    cost = sum(count * group.cost for count, group in zip(counts, groups, strict=True))
    number = sum(len(group.spans) for count, group in zip(counts, groups, strict=True) if count)
    device = routes.device.type
    if cost > (1 - MIN_SAVING[device]) * len(routes) or number * MIN_TOKENS[device] > len(routes):
        return []
    parts, first = [], 0
    for count, group in zip(counts, groups, strict=True):
        for tokens in _runs(first, first + count, run):
            parts.append(Part(*_sorted_tokens(routes, tokens), group.spans))
        first += count
    return parts


def _sorted_tokens(routes: Routes, tokens: slice) -> tuple[slice | Tensor, Routes]:
    """Where some of the tokens sorted by route are, and their routes; made once for all sites that split there."""

    def find() -> tuple[slice | Tensor, Routes]:
        at = tokens if routes.in_order else routes.order[tokens].long()
        return at, routes._at(at)

    return routes.derived(("sorted", tokens.start, tokens.stop), find)


def _runs(first: int, last: int, run: int) -> Iterator[slice]:
    for start in range(first, last, run):
        yield slice(start, min(start + run, last))


def _groups(sites: Any, lives: list[Any], group_of: Callable[..., Group], widths: tuple[int, ...]) -> Groups:
    """Neighbouring routes with the same live features, together."""
    groups: list[Group] = []
    first = 0
    for route in range(1, len(lives) + 1):
        if route == len(lives) or lives[route] != lives[first]:
            groups.append(group_of(sites, first, route - 1, lives[first], *widths))
            first = route
    return Groups(groups)


def _live(tables: tuple[Table | None, ...], route: int, width: int) -> tuple[slice, ...]:
    """The runs of features on which no table has weight 0 for the route."""
    live = torch.ones(width, dtype=torch.bool, device="cpu")
    for table in tables:
        if table is not None:
            live &= table.weights[route] != 0
    edges = torch.nn.functional.pad(live.int(), (1, 1)).diff().nonzero().flatten().tolist()
    runs = tuple(slice(*run) for run in zip(edges[::2], edges[1::2], strict=True))
    return runs if len(runs) <= MAX_SPANS else (slice(edges[0], edges[-1]),)


class _MLPLive(NamedTuple):
    """The runs of features with gradient, for the output weight, and for the input weights."""

    grad: tuple[slice, ...]
    z: tuple[slice, ...]
    update: tuple[slice, ...]


def _mlp_live(sites: Any, route: int, d_ff: int) -> _MLPLive:
    middle = (sites.pre, sites.hidden, sites.forward)
    return _MLPLive(
        _live(middle, route, d_ff),
        _live((sites.forward, sites.update_out), route, d_ff),
        _live((*middle, sites.update_in), route, d_ff),
    )


def _mlp_group(sites: Any, first: int, last: int, live: _MLPLive, d_ff: int) -> Group:
    spans = []
    for features in live.grad:
        kept = _restricted(sites, features, first, last)
        updates = tuple(
            (inside, rows, _part_of(sites.update_in, rows, first, last))
            for inside, rows in _inside(features, live.update)
        )
        # z is made of all features of the span or of none: a pass over both operands more would cost more.
        outputs = _inside(features, tuple(run for run in live.z if _contains(features, run)))
        spans.append(Span(features, kept, True, outputs, updates))
    for features in live.z:
        if not any(_contains(span.features, features) for span in spans if span.has_grad):
            kept = _restricted(sites, features, first, last)
            spans.append(Span(features, kept, False, ((ALL, features),), ()))
    # dH and dX cost as much as both weights' gradients (gated: three products to two and one).
    cost = 0.5 * _width(live.grad) + 0.33 * _width(live.update) + 0.17 * _width(live.z)
    return Group(first, last, tuple(spans), cost / max(d_ff, 1))


def _contains(features: slice, run: slice) -> bool:
    return features.start <= run.start and run.stop <= features.stop


def _inside(features: slice, runs: tuple[slice, ...]) -> tuple[tuple[slice, slice], ...]:
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
    names = ("pre", "hidden", "forward", "update_in", "update_out")
    tables = {name: _part_of(getattr(sites, name), features, first, last) for name in names}
    return type(sites)(**tables).effective


def _part_of(table: Table | None, features: slice, first: int, last: int) -> Table | None:
    """The table on some features; None where it is ones for these routes."""
    if table is None:
        return None
    weights = table.weights if table.features == 1 else table.weights[:, features]
    return Table(weights) if bool((weights[first : last + 1] != 1).any()) else None


def linear_input_grad(
    g: Tensor, weight: Tensor, routes: Routes, sites: Any, primitives: Primitives
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
    parts = _linear_parts(g, weight.shape, routes, sites, primitives, _input_live, _input_group)
    if not parts:
        return None
    dx = g.new_zeros(g.shape[0], weight.shape[1])
    for part in parts:
        for products in part.spans:
            part_g = part.of(g)
            for inputs, table in products.inputs:
                total = None
                for outputs in products.outputs:
                    total = _plus_product(total, part_g[:, outputs], weight[outputs, inputs])
                if total is not None:
                    primitives.masked_product_(total, part.routes, table)
                    part.put(total, dx[:, inputs])
    return dx


def linear_weight_grad(
    g: Tensor, x: Rows, routes: Routes, sites: Any, primitives: Primitives
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
    parts = _linear_parts(g, shape, routes, sites, primitives, _weight_live, _weight_group)
    if not parts:
        return None
    areas = [
        (rows, cols)
        for part in parts
        for products in part.spans
        for rows, _ in products.rows
        for cols, _ in products.cols
    ]
    dweight = Total(g, shape, areas)
    for part in parts:
        for products in part.spans:
            part_g, part_x = part.of(g), x.of(part)
            masked_x = [
                (cols, primitives.masked_product(part_x[:, cols], part.routes, table))
                for cols, table in products.cols
            ]
            for rows, table in products.rows:
                masked_g = primitives.masked_product(part_g[:, rows], part.routes, table)
                for cols, part_of_x in masked_x:
                    dweight.add_product(masked_g.T, part_of_x, rows, cols)
    return dweight.result()


def _linear_parts(
    g: Tensor,
    shape: Sequence[int],
    routes: Routes,
    sites: Any,
    primitives: Primitives,
    live_of: Callable[..., Any],
    group_of: Callable[..., Group],
) -> list[Part]:
    """The parts of one of a linear layer's products, none where they do not pay.

    dx and dW are split each by itself: where masks leave one whole it is one product. Split together, tables of updates
    alone had dx gathered, made and put back in parts: backward took 1.24 times the ordinary layer's instead of 0.92
    (x of 1024 × 128 in fp32, 42 % of the tokens without updates, 2 cores).
    """
    if not splits(g.device) or len(routes) == 0:
        return []
    return _rectangles(routes, sites, _run_of(g.dtype, routes), live_of, group_of, *shape)


def _input_live(sites: Any, route: int, outputs: int, inputs: int) -> tuple[tuple[slice, ...], ...]:
    return _live((sites.output,), route, outputs), _live((sites.input,), route, inputs)


def _input_group(
    sites: Any, first: int, last: int, live: tuple[tuple[slice, ...], ...], outputs: int, inputs: int
) -> Group:
    arriving, leaving = live
    products = InputProducts(arriving, _with_tables(leaving, sites.input, first, last))
    area = _width(arriving) * _width(leaving)
    return Group(first, last, (products,) if area else (), area / max(outputs * inputs, 1))


def _weight_live(sites: Any, route: int, outputs: int, inputs: int) -> tuple[tuple[slice, ...], ...]:
    rows = _live((sites.output, sites.update_rows), route, outputs)
    return rows, _live((sites.update_cols,), route, inputs)


def _weight_group(
    sites: Any, first: int, last: int, live: tuple[tuple[slice, ...], ...], outputs: int, inputs: int
) -> Group:
    rows, cols = live
    products = WeightProducts(
        _with_tables(rows, sites.update_rows, first, last), _with_tables(cols, sites.update_cols, first, last)
    )
    area = _width(rows) * _width(cols)
    return Group(first, last, (products,) if area else (), area / max(outputs * inputs, 1))


def _with_tables(
    runs: tuple[slice, ...], table: Table | None, first: int, last: int
) -> tuple[tuple[slice, Table | None], ...]:
    return tuple((run, _part_of(table, run, first, last)) for run in runs)


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
        spans = [span for part in parts for span in part.spans if span.has_grad]
        if need_weight:
            assert x is not None
            areas: list[Area] = [(rows,) for span in spans for _, rows, _ in span.updates]
            self.weight_grad = Total(g, (d_ff, x.shape[1]), areas)
        if need_bias:
            self.bias_grad = Total(g, (d_ff,), [(span.features,) for span in spans])

    def add(
        self,
        grad: Tensor,
        bias: Tensor | None,
        x: Tensor | None,
        part: Part,
        span: Span,
        primitives: Primitives,
    ) -> None:
        """Adds a span: the gradient `[tokens, features]` of its pre-activations, which has served dx, and is masked."""
        if self.bias_grad is not None:
            assert bias is not None
            self.bias_grad.add(bias, span.features)
        if self.weight_grad is not None:
            assert x is not None
            for inside, rows, table in span.updates:
                primitives.masked_product_(grad[:, inside], part.routes, table)
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
    primitives: Primitives,
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
        primitives: the backend's.
        need_x: compute dx.
        need_w_out: compute dW_out.

    Returns:
        dx `[T, d_model]` and dW_out `[d_out, d_ff]`, None for what is not needed.
    """
    tokens, d_ff = branches[0].a.shape
    parts = split(routes, sites, d_ff, g.dtype)
    dx: Any = None
    if need_x and parts[0].tokens is not None:
        assert branches[0].weight is not None
        dx = g.new_empty(tokens, branches[0].weight.shape[1])
    areas: list[Area] = [(cols,) for part in parts for span in part.spans for _, cols in span.outputs]
    dw_out = Total(g, (g.shape[1], d_ff), areas) if need_w_out else None
    want_bias = False
    for branch in branches:
        branch.begin(x, g, parts)
        want_bias = want_bias or branch.bias_grad is not None
    for part in parts:
        part_g, part_x, part_dx = part.of(g), part.of(x), None
        for span in part.spans:
            features = span.features
            dz = part_g @ w_out[:, features] if w_out is not None and span.has_grad else None
            want_z = need_w_out and bool(span.outputs)
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
                **({"overwrite": True} if isinstance(part.tokens, Tensor) else {}),
            )
            grads, z, biases = outputs[: len(a)], outputs[len(a)], outputs[len(a) + 1 :]
            if dw_out is not None:
                for inside, cols in span.outputs:
                    dw_out.add_product(part_g.T, z[:, inside], cols=cols)
            for branch, grad, bias in zip(branches, grads, biases, strict=True) if dz is not None else ():
                if branch.weight is not None:
                    part_dx = _plus_product(part_dx, grad, branch.weight[features])
                branch.add(grad, bias, part_x, part, span, primitives)
        if need_x:
            dx = part.put(part_dx, dx)
    return dx, None if dw_out is None else dw_out.result()


def _plus_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    return a @ b if total is None else total.addmm_(a, b)
