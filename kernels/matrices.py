"""Matrices as kernels take them: a pointer with its strides.

Kernels take what belongs together as one tuple. Triton specialises each element of a tuple as it does an argument:
pointers and strides that are multiples of 16 keep their wide accesses, 1 and None become constants. A kernel with
tuples and its twin without have the same accesses and registers, with Triton 3.6 and 3.7
(tests/build/test_offline.py). On the host Triton 3.7 binds masked_product_kernel in 4.4 µs instead of 3.5, and
attention_fwd_kernel, of 17 arguments instead of 41, in 8 instead of more than 60.

A number that must be a constant is wrapped in tl.constexpr on the host. No device function returns a tuple that holds
None or a constant, of which Triton 3.6 makes tensors. No kernel hands a tuple of tuples that it was given to a device
function, which would not find the constants of the inner ones with Triton 3.6. No tuple that holds None is compared
with None, which Triton 3.6 cannot compile. No field is called `values` or `type`, which are attributes of Triton's own
tuples.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

# Bits that a thread reads or writes at once where rows allow it.
ACCESS = tl.constexpr(128)


class Matrix(NamedTuple):
    """A matrix `[rows, columns]` in memory: the address of its first element and the steps in elements."""

    pointer: Tensor
    row_stride: int
    col_stride: int

    @staticmethod
    def of(tensor: Tensor | None) -> Matrix | None:
        """The argument for a tensor `[rows, columns]`, or None for none."""
        return None if tensor is None else Matrix(tensor, *tensor.stride())


@triton.jit
def pointers(
    matrix,  # Matrix
    rows,  # [BLOCK_R]
    columns,  # [BLOCK_C]
):
    """The addresses of a tile of a matrix, [BLOCK_R, BLOCK_C]."""
    return matrix.pointer + rows[:, None] * matrix.row_stride + columns[None, :] * matrix.col_stride


@triton.jit
def load_tile(matrix, rows, columns, valid):
    """The elements of a tile of a matrix that are `valid`, 0 in place of the others: [BLOCK_R, BLOCK_C]."""
    return tl.load(pointers(matrix, rows, columns), mask=valid, other=0.0)


@triton.jit
def in_whole_vectors(
    condition,  # [BLOCK_R, BLOCK_C], or [BLOCK_R, 1]
    LENGTH: tl.constexpr,
):
    """Where the condition holds for any element of a vector, a run of LENGTH columns; of the condition's shape.

    The compiler is told that it is constant within a vector: one predicate then serves one wide access.
    """
    ROWS: tl.constexpr = condition.shape[0]
    COLUMNS: tl.constexpr = condition.shape[1]
    if COLUMNS >= LENGTH:
        by_vector = condition.to(tl.int32).reshape([ROWS, COLUMNS // LENGTH, LENGTH])
        spread = tl.broadcast_to(tl.max(by_vector, axis=2)[:, :, None], [ROWS, COLUMNS // LENGTH, LENGTH])
        condition = tl.max_constancy(spread.reshape([ROWS, COLUMNS]) > 0, [1, LENGTH])
    return condition
