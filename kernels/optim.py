"""The step of RoutedAdamW on one parameter, in one pass over it."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..primitives.arguments import ADAMW_SCHEMA, AdamWOptions
from ..primitives.registration import kernel_op
from .launch import config_of, launch
from .matrices import Matrix, load_tile, pointers
from .rounding import rounded

# Most columns of a tile with several rows.
MAX_COLUMNS = 256


@triton.jit
def adamw_step_kernel(
    p,  # Matrix [N, M]
    g,  # Matrix [N, M]
    m,  # Matrix [N, M], the mean of g
    v,  # Matrix [N, M], the mean of g²
    v_max,  # Matrix [N, M] or None, the largest v
    factors,  # [4, blocks]: the decay, the step size, the denominator's factor, whether a block is touched
    factors_stride,
    num_rows,
    num_cols,
    beta2,
    average_weight,  # 1 - β₁
    square_weight,  # 1 - β₂
    eps,
    sign,
    ROWS: tl.constexpr,  # whether each row is a block; without ROWS and COLUMNS the matrix is one block
    COLUMNS: tl.constexpr,  # whether each column is a block
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """One step of AdamW. Elements of blocks that are not touched are neither read nor written."""
    tile = tl.program_id(0).to(tl.int64)
    tiles_of_rows = tl.cdiv(num_cols, BLOCK_M)
    rows = tile // tiles_of_rows * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tile % tiles_of_rows * BLOCK_M + tl.arange(0, BLOCK_M)
    here, there = (rows < num_rows)[:, None], (cols < num_cols)[None, :]
    blocks, present = (rows * 0)[:, None], here
    if ROWS:
        blocks = rows[:, None]
    if COLUMNS:
        blocks, present = cols[None, :], there
    stride = tl.cast(factors_stride, tl.int64)
    decay = tl.load(factors + blocks, mask=present, other=1.0)
    size = tl.load(factors + stride + blocks, mask=present, other=0.0)
    scale = tl.load(factors + 2 * stride + blocks, mask=present, other=1.0)
    touched = here & there & (tl.load(factors + 3 * stride + blocks, mask=present, other=0.0) != 0.0)

    p_at, m_at, v_at = pointers(p, rows, cols), pointers(m, rows, cols), pointers(v, rows, cols)
    p_tile = tl.load(p_at, mask=touched, other=0.0).to(tl.float32)
    g_tile = load_tile(g, rows, cols, touched).to(tl.float32) * sign
    m_tile = tl.load(m_at, mask=touched, other=0.0).to(tl.float32)
    v_tile = tl.load(v_at, mask=touched, other=0.0).to(tl.float32)

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
        v_max_at = pointers(v_max, rows, cols)
        square = tl.maximum(
            tl.load(v_max_at, mask=touched, other=0.0).to(tl.float32), square, tl.PropagateNan.ALL
        )
        tl.store(v_max_at, rounded(square, v_max.pointer.dtype.element_ty), mask=touched)
    denominator = tl.sqrt_rn(square) * scale + eps
    p_tile = p_tile * decay - tl.div_rn(size * m_tile, denominator)
    tl.store(p_at, rounded(p_tile, p.pointer.dtype.element_ty), mask=touched)
    tl.store(m_at, rounded(m_tile, m.pointer.dtype.element_ty), mask=touched)
    tl.store(v_at, rounded(v_tile, v.pointer.dtype.element_ty), mask=touched)


def adamw_step(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    factors: Tensor,
    by_column: bool,
    options: AdamWOptions,
) -> None:
    """See `gradroute.primitives.protocol.Primitives`."""
    adamw_step_op(parameter, gradient, exp_avg, exp_avg_sq, max_exp_avg_sq, factors, by_column, *options)


@kernel_op(f"adamw_step{ADAMW_SCHEMA}")
def adamw_step_op(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    factors: Tensor,
    by_column: bool,
    *rest: Any,  # the fields of AdamWOptions
) -> None:
    options = AdamWOptions(*rest)
    rows, cols = parameter.shape
    config = _config(rows, cols, parameter.device)
    grid = (triton.cdiv(rows, config["BLOCK_N"]) * triton.cdiv(cols, config["BLOCK_M"]),)
    is_one = factors.shape[1] == 1
    launch(
        adamw_step_kernel,
        grid,
        config,
        p=Matrix.of(parameter),
        g=Matrix.of(gradient),
        m=Matrix.of(exp_avg),
        v=Matrix.of(exp_avg_sq),
        v_max=Matrix.of(max_exp_avg_sq),
        factors=factors,
        factors_stride=factors.stride(0),
        num_rows=rows,
        num_cols=cols,
        beta2=options.beta2,
        average_weight=1 - options.beta1,
        square_weight=1 - options.beta2,
        eps=options.eps,
        sign=-1.0 if options.maximize else 1.0,
        ROWS=not (by_column or is_one),
        COLUMNS=by_column and not is_one,
    )


def _config(rows: int, cols: int, device: torch.device) -> dict[str, int]:
    shipped = config_of(adamw_step_kernel, device)
    block_m = min(triton.next_power_of_2(cols), shipped["ELEMENTS"] if rows == 1 else MAX_COLUMNS)
    block_n = max(1, shipped["ELEMENTS"] // block_m)
    return {"BLOCK_N": block_n, "BLOCK_M": block_m, "num_warps": shipped["num_warps"]}
