"""Reading and writing heads: tiles of rows, and the weights of tokens at one head."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..masks import load_tokens, load_weights
from ..rounding import rounded


class Heads(NamedTuple):
    """A tensor `[B, H, S, D]` in memory: the address of its first element and the steps in elements."""

    pointer: Tensor
    stride_b: int
    stride_h: int
    stride_s: int
    stride_d: int

    @staticmethod
    def of(tensor: Tensor) -> Heads:
        """The argument for a tensor `[B, H, S, D]`."""
        return Heads(tensor, *tensor.stride())


def readable(t: Tensor) -> Tensor:
    """t `[B, H, S, D]` as the kernels read it, 16 bytes at a time: features dense, rows apart by multiples of 16.

    Triton sees such multiples and no others; without them loads are of single elements, and spill registers. D is
    padded with zeros, which change no score and no value.
    """
    if t.shape[3] % 16:
        return torch.nn.functional.pad(t, (0, -t.shape[3] % 16))
    is_aligned = t.stride(3) == 1 and all(
        stride % 16 == 0 for stride in (*t.stride()[:3], t.storage_offset())
    )
    return t if is_aligned else t.clone(memory_format=torch.contiguous_format)


@triton.jit
def of_head(heads, batch, head):
    """The address of one head's matrix `[S, D]`."""
    return heads.pointer + (batch * heads.stride_b + head * heads.stride_h)


@triton.jit
def load_rows(matrix, start, present, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """The rows [start, start + BLOCK) of a matrix, 0 in place of those that are not `present`."""
    rows, features = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    valid = present[:, None]
    if HEAD_DIM < BLOCK_D:
        valid = valid & (features < HEAD_DIM)[None, :]
    tile = matrix.pointer + tl.cast(start, tl.int64) * matrix.row_stride
    return tl.load(
        tile + rows[:, None] * matrix.row_stride + features[None, :] * matrix.col_stride,
        mask=valid,
        other=0.0,
    )


@triton.jit
def store_rows(
    matrix, start, present, tile, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Stores a tile [BLOCK, BLOCK_D] fp32, as far as `present`, as the rows [start, start + BLOCK) of a matrix."""
    rows, features = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    valid = present[:, None]
    if HEAD_DIM < BLOCK_D:
        valid = valid & (features < HEAD_DIM)[None, :]
    pointers = (
        matrix.pointer
        + tl.cast(start, tl.int64) * matrix.row_stride
        + rows[:, None] * matrix.row_stride
        + features[None, :] * matrix.col_stride
    )
    tl.store(pointers, rounded(tile, matrix.pointer.dtype.element_ty), mask=valid)


@triton.jit
def head_weights(weights, routing, rows, present, head):
    """m of the tokens `rows` at one head, [BLOCK, 1] fp32; ones where there is no table (weights is None)."""
    m = present.to(tl.float32)[:, None]
    if weights is not None:
        column = head + tl.arange(0, 1)
        m = load_weights(weights, routing, load_tokens(routing, rows, present), column, column >= 0)
    return m


@triton.jit
def masked_rows(tile, m, weights):
    """m ⊙ tile, exactly 0 where m is 0; the tile itself where there is no table (weights is None)."""
    if weights is not None:
        tile = m * tl.where(m == 0.0, 0.0, tile)
    return tile
