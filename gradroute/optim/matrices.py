"""Parameters as the primitives `touched_blocks` and `adamw_step` take them: as matrices or vectors, in blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ..primitives.arguments import COLUMNS, ONE, ROWS


class Division(NamedTuple):
    """How tensors of one shape are taken: as matrices `[N, M]`, or as vectors, which are matrices of one row.

    Attributes:
        blocks: what their blocks are (`Blocks`).
        number: how many they are.
        width: how many of these blocks, which are then columns, are one block of the tensor.
        is_matrix: whether the tensors are matrices or vectors already.
    """

    blocks: int
    number: int
    width: int
    is_matrix: bool


def division_of(shape: Sequence[int], block_dim: int | None) -> Division:
    """How tensors of a shape are taken whose blocks lie along a dimension."""
    dimensions = len(shape)
    is_matrix = 1 <= dimensions <= 2
    if dimensions == 0 or block_dim is None:
        return Division(ONE, 1, 1, is_matrix)
    if dimensions == 1:
        return Division(COLUMNS, shape[0], 1, is_matrix)
    if block_dim == 0:
        return Division(ROWS, shape[0], 1, is_matrix)
    width = math.prod(shape[2:])
    return Division(COLUMNS, shape[1] * width, max(width, 1), is_matrix)


def as_matrices(tensors: Sequence[Tensor], divisions: Sequence[Division]) -> list[Tensor]:
    """Tensors as matrices and vectors, in their memory but for those whose elements `_as_matrix` copies."""
    return [
        tensor if division.is_matrix else _as_matrix(tensor)
        for tensor, division in zip(tensors, divisions, strict=True)
    ]


def _as_matrix(tensor: Tensor) -> Tensor:
    """A tensor of no dimension, or of more than two, as a matrix or vector; a copy where elements lie out of order."""
    if tensor.dim() == 0:
        return tensor.view(1)
    return tensor.contiguous().view(len(tensor), math.prod(tensor.shape[1:]))
