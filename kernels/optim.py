"""The step of RoutedAdamW, in one pass over parameters: one launch for up to MOST of one shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..fake_tensors import has_data
from ..primitives.arguments import ADAMW_SCHEMA, AdamWOptions, Blocks, number_of_blocks
from ..primitives.registration import kernel_op
from .launch import config_of, launch
from .matrices import ACCESS, in_whole_vectors
from .rounding import rounded

# Most columns of a tile with several rows.
MAX_COLUMNS = 256

# Most parameters of a launch. Most of a model's parameters have one of few shapes, those of a layer.
MOST = 8

ROWS = tl.constexpr(int(Blocks.ROWS))
COLUMNS = tl.constexpr(int(Blocks.COLUMNS))


@triton.jit
def _number(old, touched, BLOCKS: tl.constexpr):
    """`old` in fp32; 0 in columns that are not touched: nothing is computed from these."""
    if BLOCKS == COLUMNS:
        old = tl.where(touched, old, 0.0)
    return old.to(tl.float32)


@triton.jit
def _result(x, old, touched, BLOCKS: tl.constexpr):
    """x rounded to the dtype of `old`; `old` itself, every bit of it, in columns that are not touched."""
    x = rounded(x, old.dtype)
    if BLOCKS == COLUMNS:
        x = tl.where(touched, x, old)
    return x


@triton.jit
def _bits(x):
    return x.to(tl.uint32, bitcast=True)


@triton.jit
def _random_bits(g, p, m, v, count):
    """32 random bits for each element's step; those of `random_bits` in csrc/math.h, which says of what."""
    h = _bits(g) * 0x9E3779B1 ^ _bits(p) * 0x85EBCA77 ^ _bits(m) * 0xC2B2AE3D ^ _bits(v) * 0x27D4EB2F
    h += count.to(tl.int32).to(tl.uint32) * 0x165667B1
    h = (h ^ h >> 16) * 0x85EBCA6B
    h = (h ^ h >> 13) * 0xC2B2AE35
    return h ^ h >> 16


@triton.jit
def _to_bfloat16_by(random, x):
    """x rounded to a bfloat16 below or above it by 16 random bits; infinity and NaN are themselves."""
    bits = _bits(x)
    moved = ((bits + (random & 0xFFFF)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return tl.where((bits & 0x7F800000) == 0x7F800000, x, moved)


@triton.jit
def _address(pointers, strides, one, rows, cols):
    """The addresses of a tile of the matrix number `one` of some that have the same strides, [BLOCK_N, BLOCK_M]."""
    pointer = pointers[0]
    for i in tl.static_range(1, len(pointers)):
        pointer = tl.where(one == i, pointers[i], pointer)
    return pointer + rows[:, None] * strides[0] + cols[None, :] * strides[1]


@triton.jit
def adamw_step_kernel(
    p,  # the pointers of several parameters of one shape [N, M] and the same strides
    g,  # those of their gradients
    m,  # of the means of g
    v,  # of the means of g²
    v_max,  # of the largest v, or None
    p_strides,  # of rows and of columns
    g_strides,
    m_strides,
    v_strides,
    v_max_strides,
    factors,  # [5, parameters * blocks]: decay, step size, the denominator's factor, whether a block is touched, t
    factors_stride,
    num_blocks,  # of one parameter
    num_rows,
    num_cols,
    beta2,
    average_weight,  # 1 - β₁
    square_weight,  # 1 - β₂
    eps,
    sign,
    BLOCKS: tl.constexpr,  # what a block is: `Blocks`
    STOCHASTIC: tl.constexpr,  # whether moments are rounded up or down at random
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """One step of AdamW of the parameter whose number the program has. Blocks that are not touched keep every bit.

    They are neither read nor written, but for columns beside a touched one in a vector: a thread reads and writes
    vectors whole, and writes back there what it has read.
    """
    tile = tl.program_id(0).to(tl.int64)
    one = tl.program_id(1)
    factors += one * num_blocks
    across = tl.cdiv(num_cols, BLOCK_M)
    rows = tile // across * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tile % across * BLOCK_M + tl.arange(0, BLOCK_M)
    here, there = (rows < num_rows)[:, None], (cols < num_cols)[None, :]
    stride = tl.cast(factors_stride, tl.int64)
    blocks, present = (rows * 0)[:, None], here
    if BLOCKS == ROWS:
        blocks = rows[:, None]
    if BLOCKS == COLUMNS:
        blocks, present = cols[None, :], there
    decay = tl.load(factors + blocks, mask=present, other=1.0)
    size = tl.load(factors + stride + blocks, mask=present, other=0.0)
    scale = tl.load(factors + 2 * stride + blocks, mask=present, other=1.0)
    touched = tl.load(factors + 3 * stride + blocks, mask=present, other=0.0) != 0.0
    accessed = here & there & touched
    if BLOCKS == COLUMNS:
        VECTOR: tl.constexpr = ACCESS // p[0].dtype.element_ty.primitive_bitwidth
        accessed = here & there & in_whole_vectors(touched, VECTOR)

    p_at = _address(p, p_strides, one, rows, cols)
    m_at = _address(m, m_strides, one, rows, cols)
    v_at = _address(v, v_strides, one, rows, cols)
    g_at = _address(g, g_strides, one, rows, cols)
    p_old = tl.load(p_at, mask=accessed, other=0.0)
    m_old = tl.load(m_at, mask=accessed, other=0.0)
    v_old = tl.load(v_at, mask=accessed, other=0.0)
    g_tile = _number(tl.load(g_at, mask=accessed, other=0.0), touched, BLOCKS)
    p_tile = _number(p_old, touched, BLOCKS)
    m_tile = _number(m_old, touched, BLOCKS)
    v_tile = _number(v_old, touched, BLOCKS)
    if STOCHASTIC:
        count = tl.load(factors + 4 * stride + blocks, mask=present, other=0.0)
        random = _random_bits(g_tile, p_tile, m_tile, v_tile, count)
    g_tile *= sign

    # The mean is formed as torch.lerp forms it.
    difference = g_tile - m_tile
    m_tile = tl.where(
        average_weight < 0.5,
        m_tile + average_weight * difference,
        g_tile - difference * (1.0 - average_weight),
    )
    v_tile = beta2 * v_tile + square_weight * g_tile * g_tile
    square = v_tile
    if v_max is not None:
        v_max_at = _address(v_max, v_max_strides, one, rows, cols)
        v_max_old = tl.load(v_max_at, mask=accessed, other=0.0)
        square = tl.maximum(_number(v_max_old, touched, BLOCKS), square, tl.PropagateNan.ALL)
        largest = square
        if STOCHASTIC:
            largest = _to_bfloat16_by(random >> 16, largest)
        tl.store(v_max_at, _result(largest, v_max_old, touched, BLOCKS), mask=accessed)
    denominator = tl.sqrt_rn(square) * scale + eps
    p_tile = p_tile * decay - tl.div_rn(size * m_tile, denominator)
    if STOCHASTIC:
        m_tile = _to_bfloat16_by(random, m_tile)
        v_tile = _to_bfloat16_by(random >> 16, v_tile)
    tl.store(p_at, _result(p_tile, p_old, touched, BLOCKS), mask=accessed)
    tl.store(m_at, _result(m_tile, m_old, touched, BLOCKS), mask=accessed)
    tl.store(v_at, _result(v_tile, v_old, touched, BLOCKS), mask=accessed)


def adamw_step(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    factors: Tensor,
    blocks: Sequence[int],
    options: AdamWOptions,
) -> None:
    """See `gradroute.primitives.protocol.Primitives`."""
    adamw_step_op(parameters, gradients, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, factors, blocks, *options)


@kernel_op(f"adamw_step{ADAMW_SCHEMA}")
def adamw_step_op(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    factors: Tensor,
    blocks: Sequence[int],
    *options: Any,  # the fields of AdamWOptions
) -> None:
    if not has_data(factors):
        return
    first = 0
    alike: dict[tuple[Any, ...], list[_Part]] = {}
    of_each = (parameters, gradients, exp_avgs, exp_avg_sqs, *([max_exp_avg_sqs] if max_exp_avg_sqs else []))
    for *tensors, kind in zip(*of_each, blocks, strict=True):
        part = _Part([tensor if tensor.dim() == 2 else tensor[None] for tensor in tensors], kind, first)
        alike.setdefault(part.key(), []).append(part)
        first += part.num_blocks
    for parts in alike.values():
        for start in range(0, len(parts), MOST):
            _launch_step(parts[start : start + MOST], factors, AdamWOptions(*options))


class _Part(NamedTuple):
    """One parameter of a step.

    Attributes:
        tensors: θ, g, m, v and with amsgrad the largest v, as matrices of one shape.
        kind: what its blocks are.
        first: the number of its first block among those of all.
    """

    tensors: list[Tensor]
    kind: int
    first: int

    @property
    def num_blocks(self) -> int:
        """How many blocks it has."""
        return number_of_blocks(self.tensors[0].shape, self.kind)

    def key(self) -> tuple[Any, ...]:
        """What parameters of one launch have in common; kernels are compiled for aligned pointers and for others."""
        of_each = [(tensor.stride(), tensor.data_ptr() % 16 == 0) for tensor in self.tensors]
        return self.kind, self.tensors[0].shape, *of_each


def _launch_step(parts: Sequence[_Part], factors: Tensor, options: AdamWOptions) -> None:
    """The step of some parameters with one key."""
    first = parts[0]
    rows, cols = first.tensors[0].shape
    if rows == 0 or cols == 0:
        return
    # A kernel has one pointer or MOST: else it would be compiled for every number of parameters.
    padded = [*parts, *[first] * (MOST - len(parts))] if len(parts) > 1 else parts
    pointers = [tuple(tensors) for tensors in zip(*(part.tensors for part in padded), strict=True)]
    strides = [tensor.stride() for tensor in first.tensors]
    p, g, m, v, v_max = (*pointers, None)[:5]
    p_strides, g_strides, m_strides, v_strides, v_max_strides = (*strides, None)[:5]
    own = _factors_of(parts, factors)
    config = _config(rows, cols, factors.device)
    tiles = triton.cdiv(rows, config["BLOCK_N"]) * triton.cdiv(cols, config["BLOCK_M"])
    launch(
        adamw_step_kernel,
        (tiles, len(parts)),
        config,
        p=p,
        g=g,
        m=m,
        v=v,
        v_max=v_max,
        p_strides=p_strides,
        g_strides=g_strides,
        m_strides=m_strides,
        v_strides=v_strides,
        v_max_strides=v_max_strides,
        factors=own,
        factors_stride=own.stride(0),
        num_blocks=first.num_blocks,
        num_rows=rows,
        num_cols=cols,
        beta2=options.beta2,
        average_weight=1 - options.beta1,
        square_weight=1 - options.beta2,
        eps=options.eps,
        sign=-1.0 if options.maximize else 1.0,
        BLOCKS=first.kind,
        STOCHASTIC=options.stochastic,
    )


def _factors_of(parts: Sequence[_Part], factors: Tensor) -> Tensor:
    """`[5, parameters * blocks]`: the factors of some parameters, side by side; a view where they are so already."""
    num_blocks = parts[0].num_blocks
    if all(part.first == parts[0].first + i * num_blocks for i, part in enumerate(parts)):
        return factors[:, parts[0].first :]
    return torch.cat([factors[:, part.first : part.first + num_blocks] for part in parts], dim=1)


def _config(rows: int, cols: int, device: torch.device) -> dict[str, int]:
    shipped = config_of(adamw_step_kernel, device)
    block_m = min(triton.next_power_of_2(cols), shipped["ELEMENTS"] if rows == 1 else MAX_COLUMNS)
    block_n = max(1, shipped["ELEMENTS"] // block_m)
    return {"BLOCK_N": block_n, "BLOCK_M": block_m, "num_warps": shipped["num_warps"]}
