"""A parameter's gradient from grouped products."""

from __future__ import annotations

from torch import Tensor

from ..primitives.overwriting import plus
from .grouped import grouped_sums
from .tiling import Tiling


class GroupedTotal:
    """A gradient whose rows, or columns, are tiled: the sum of what the strata of a tiling give.

    Attributes:
        like: a tensor of its dtype and device.
        shape: its shape.
        is_wide: whether strata overlap, so that they are summed before they are rounded.
    """

    def __init__(self, like: Tensor, shape: tuple[int, ...], tiling: Tiling) -> None:
        self.like = like
        self.shape = shape
        self.is_wide = tiling.overlaps
        self._total: Tensor | None = None

    def add_rows(self, a: Tensor, b: Tensor, ends: Tensor) -> None:
        """Adds each tile's product of a `[E, width]` and b `[E, N]` to the tile's rows."""
        self._add(grouped_sums(a, b, ends, self.is_wide).flatten(0, 1))

    def add_columns(self, a: Tensor, b: Tensor, ends: Tensor) -> None:
        """Adds each tile's product of a `[E, M]` and b `[E, width]` to the tile's columns."""
        self._add(grouped_sums(a, b, ends, self.is_wide).transpose(0, 1).flatten(1, 2))

    def _add(self, summand: Tensor) -> None:
        self._total = summand if self._total is None else plus(self._total, summand)

    def result(self) -> Tensor:
        """The sum; zeros where no stratum gave anything."""
        return self.like.new_zeros(self.shape) if self._total is None else self._total.to(self.like.dtype)
