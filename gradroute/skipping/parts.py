"""A batch in parts: some routes' tokens, with the features that their products need."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ..primitives.overwriting import ALL, may_overwrite, with_part
from ..routes import Routes
from ..sites import Sites
from ..tables import Table
from .rule import RECTANGLES, Decision

Spans = TypeVar("Spans")

# More runs of features than this are taken as one.
MAX_SPANS = 4


class Group(Generic[Spans]):
    """Neighbouring routes whose tokens have the same rectangles.

    Attributes:
        first: the first of the routes.
        last: the last of them.
        spans: what the product needs of their tokens; empty: there is no work.
        cost: of a token, where one with all features costs 1.
    """

    def __init__(self, first: int, last: int, spans: tuple[Spans, ...], cost: float) -> None:
        self.first = first
        self.last = last
        self.spans = spans
        self.cost = cost


class Groups(Generic[Spans]):
    """The groups of some sites. A batch keeps its parts under this object, which equals no other."""

    def __init__(self, groups: list[Group[Spans]]) -> None:
        self.groups = groups
        self.least_cost = min(group.cost for group in groups)

    def counts(self, routes: Routes) -> list[int]:
        """How many tokens of a batch, which are counted on the host, each group has."""
        counts = routes.host_counts
        assert counts is not None
        return [sum(counts[group.first : group.last + 1]) for group in self.groups]


class Part(Generic[Spans]):
    """Some tokens with their spans.

    Attributes:
        tokens: None for all of them, a slice, or their positions.
        routes: theirs.
        spans: theirs.
    """

    def __init__(self, tokens: slice | Tensor | None, routes: Routes, spans: tuple[Spans, ...]) -> None:
        self.tokens = tokens
        self.routes = routes
        self.spans = spans

    def of(self, matrix: Tensor, features: slice | None = None) -> Tensor:
        """The part's rows of `matrix [T, F]`, and these features (None: all)."""
        if self.tokens is None:
            return matrix
        if isinstance(self.tokens, slice):
            return matrix[self.tokens, ALL if features is None else features]
        return (matrix if features is None else matrix[:, features]).index_select(0, self.tokens)

    def put(self, product: Tensor | None, out: Tensor, features: slice = ALL) -> Tensor:
        """`out [T, F]` with the part's rows of these features set to `product`, to 0 where there is none."""
        assert self.tokens is not None
        at = out[:, features]
        if product is None:
            product = out.new_zeros(()).expand(len(self.routes), at.shape[1])
        if may_overwrite(out):
            if isinstance(self.tokens, slice):
                at[self.tokens] = product
            else:
                at.index_copy_(0, self.tokens, product)
            return out
        if isinstance(self.tokens, slice):
            return with_part(out, product, self.tokens, features)
        return with_part(out, at.index_copy(0, self.tokens, product), ALL, features)


class Rows:
    """A matrix `[T, F]` whose rows several products want, part by part: they are gathered once."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self._of_tokens: dict[int, Tensor] = {}

    def of(self, part: Part[Any]) -> Tensor:
        """The part's rows."""
        return self._gathered(part.tokens, lambda: part.of(self.matrix))

    def at(self, tokens: Tensor) -> Tensor:
        """The rows of these tokens, which are the batch's own."""
        return self._gathered(tokens, lambda: self.matrix.index_select(0, tokens))

    def _gathered(self, tokens: slice | Tensor | None, gather: Callable[[], Tensor]) -> Tensor:
        if torch.compiler.is_compiling():  # the compiler removes what is the same
            return gather()
        key = id(tokens)  # the batch keeps them alive
        if key not in self._of_tokens:
            self._of_tokens[key] = gather()
        return self._of_tokens[key]


class Product(ABC, Generic[Spans]):
    """A product of a backward whose features may vanish route by route, for some sites and widths.

    Attributes:
        groups: what was derived of the sites.
        widths: of the features, operand by operand.
        is_aligned: whether torch's grouped product on CUDA takes matrices of these widths.
    """

    is_aligned: bool

    def __init__(self, sites: Sites, *widths: int) -> None:
        self.groups = sites.groups
        self.widths = widths

    @property
    @abstractmethod
    def grouped_work(self) -> float:
        """The share of the work that grouped products do where every route has as many tokens; 1 where none is made."""

    @abstractmethod
    def live(self, route: int) -> tuple[tuple[slice, ...], ...]:
        """The runs of features that the product needs of a route's tokens, operand by operand."""

    @abstractmethod
    def group(self, first: int, last: int) -> Group[Spans]:
        """The group of the routes from first to last, which have the same live features."""

    def groups_of(self, num_routes: int) -> Groups[Spans]:
        """The groups of all routes, derived once for sites and widths."""
        key = (type(self), num_routes, *self.widths)
        found: Groups[Spans] | None = self.groups.get(key)
        if found is None:
            found = self.groups[key] = Groups(list(self._neighbours(num_routes)))
        return found

    def _neighbours(self, num_routes: int) -> Iterator[Group[Spans]]:
        """Neighbouring routes with the same live features, together."""
        lives = [self.live(route) for route in range(num_routes)]
        first = 0
        for route in range(1, num_routes + 1):
            if route == num_routes or lives[route] != lives[first]:
                yield self.group(first, route - 1)
                first = route


def rectangles(product: Product[Spans], routes: Routes, decision: Decision) -> list[Part[Spans]]:
    """The parts of a product that is made as rectangles, sorted by route; none of another."""
    if decision.form != RECTANGLES:
        return []
    groups, run = product.groups_of(routes.num_routes), decision.run or len(routes)
    return routes.derived((groups, run), lambda: _parts(routes, groups, run))


def _parts(routes: Routes, groups: Groups[Spans], run: int) -> list[Part[Spans]]:
    """The parts of a batch whose tokens are counted on the host."""
    parts, first = [], 0
    for count, group in zip(groups.counts(routes), groups.groups, strict=True):
        for tokens in runs(first, first + count, run):
            parts.append(Part(*_sorted_tokens(routes, tokens), group.spans))
        first += count
    return parts


def _sorted_tokens(routes: Routes, tokens: slice) -> tuple[slice | Tensor, Routes]:
    """Where some of the tokens sorted by route are, and their routes; made once for all sites that split there."""

    def find() -> tuple[slice | Tensor, Routes]:
        at = tokens if routes.in_order else routes.order[tokens].long()
        return at, routes._at(at)

    return routes.derived(("sorted", tokens.start, tokens.stop), find)


def runs(first: int, last: int, run: int) -> Iterator[slice]:
    """The tokens from first to last, so many at once."""
    for start in range(first, last, run):
        yield slice(start, min(start + run, last))


def live(tables: tuple[Table | None, ...], route: int, width: int) -> tuple[slice, ...]:
    """The runs of features on which no table has weight 0 for the route."""
    kept = torch.ones(width, dtype=torch.bool, device="cpu")
    for table in tables:
        if table is not None:
            kept &= table.weights[route] != 0
    edges = torch.nn.functional.pad(kept.int(), (1, 1)).diff().nonzero().flatten().tolist()
    found = tuple(slice(*run) for run in zip(edges[::2], edges[1::2], strict=True))
    return found if len(found) <= MAX_SPANS else (slice(edges[0], edges[-1]),)


def width_of(runs: tuple[slice, ...]) -> int:
    """How many features some runs have."""
    return sum(run.stop - run.start for run in runs)


def part_of(table: Table | None, features: slice, first: int, last: int) -> Table | None:
    """The table on some features; None where it is ones for the routes from first to last."""
    if table is None:
        return None
    weights = table.weights if table.features == 1 else table.weights[:, features]
    return Table(weights) if bool((weights[first : last + 1] != 1).any()) else None
