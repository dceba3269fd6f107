"""A gradient put together from products over parts of the tokens and of the features."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from ..primitives.arguments import as_dtype
from ..primitives.overwriting import ALL, may_overwrite, plus, with_part
from ..primitives.products import HALVES, by_onednn, product, wide_product

# At most this many areas are compared pairwise; more are taken to overlap.
MAX_AREAS = 16

Area = tuple[slice, ...]  # rows of a gradient, or rows and columns


class Total:
    """A gradient of this shape, the sum of what is added to its areas; where some overlap, in fp32 at least."""

    def __init__(self, like: Tensor, shape: tuple[int, ...], areas: Sequence[Area]) -> None:
        self.like = like
        self.shape = shape
        self.is_sum = overlap(areas)
        self.value: Tensor | None = None

    def add(self, summand: Tensor, features: slice) -> None:
        """Adds to the entries of these features."""
        if self.value is None and features == ALL:
            self.value = self._wide(summand)
        else:
            started = self._started()
            self._set(plus(started[features], summand), features)

    def add_product(self, a: Tensor, b: Tensor, rows: slice, cols: slice) -> None:
        """Adds the product a b to these rows and columns."""
        is_first = self.value is None and _is_all(rows, self.shape[0]) and _is_all(cols, self.shape[1])
        if is_first:
            self.value = self._product(a, b)
            return
        area = self._started()[rows, cols]
        if self._is_wide(a) or by_onednn(a, b):
            area = plus(area, self._product(a, b))
        elif may_overwrite(area):
            area.addmm_(a, b, beta=int(self.is_sum))
        else:
            area = torch.addmm(area, a, b, beta=int(self.is_sum))
        self._set(area, rows, cols)

    def result(self) -> Tensor:
        """The sum in the dtype of its parameter."""
        return as_dtype(self._started(), self.like.dtype)

    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        return wide_product(a, b) if self.is_sum else product(a, b)

    def _is_wide(self, summand: Tensor) -> bool:
        return self.is_sum and summand.dtype in HALVES

    def _wide(self, summand: Tensor) -> Tensor:
        """In fp32 at least where there are several: rounded to half precision, one could overflow before the sum."""
        return summand.to(torch.float32) if self._is_wide(summand) else summand

    def _set(self, part: Tensor, rows: slice, cols: slice = ALL) -> None:
        """Puts a part in its place; one that was written to, as a view of the value, is there already."""
        value = self._started()
        if not may_overwrite(value):
            self.value = with_part(value, part, rows, cols)

    def _started(self) -> Tensor:
        if self.value is None:
            self.value = self._wide(self.like.new_zeros(self.shape))
        return self.value


def _is_all(run: slice, size: int) -> bool:
    return run == ALL or (run.start, run.stop) == (0, size)


def overlap(areas: Sequence[Area]) -> bool:
    """Whether any two areas have an element in common, or are so many that it is supposed."""
    if len(areas) > MAX_AREAS:
        return True
    return any(all(map(_meet, one, other)) for one, other in combinations(areas, 2))


def _meet(one: slice, other: slice) -> bool:
    return ALL in (one, other) or max(one.start, other.start) < min(one.stop, other.stop)
