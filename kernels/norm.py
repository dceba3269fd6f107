"""The backward of RMS norm and layer norm, the update mask folded in: dx and the partial sums of dW, db in one launch.

A program walks over tiles of whole rows and keeps its own sums, so nothing is atomic and the result depends on the
device's number of multiprocessors alone.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..primitives.arguments import NORM_SCHEMA, NormArguments, tokens_of, wanted, weights_on
from ..primitives.registration import kernel_op
from ..routes import Routes
from ..tables import Table
from .launch import config_of, launch
from .masks import Routing, Weights, load_tokens, masked
from .matrices import Matrix, load_tile
from .rounding import rounded

# Rows up to this long stay in registers: 16 warps have 128 registers a thread, and compiled for sm_80, sm_90 and sm_100
# twice as long rows spill on one chip or another. The limit is half of it where x or dy is fp32, where rows are not
# aligned, so that every element has its address, and where a bias is summed under a table that a strength interpolates,
# which would spill 16 bytes on sm_100. Longer rows are read again from the cache, by chunks.
MAX_ROW_IN_REGISTERS = 8192
MAX_WARPS = 16
REGISTERS_PER_MULTIPROCESSOR = 65536

# Each program costs a row of partial sums, so there are only as many as a chip holds at once, with 128 registers a
# thread. While one computes, the rows that it reads next are on their way: 2 programs where a row has 4096 halves.
WARPS_PER_MULTIPROCESSOR = 16


@triton.jit
def _load(matrix, rows, features, valid):
    """The elements of a tile that are `valid`, 0 in place of the others: [BLOCK_T, BLOCK_F] fp32."""
    return load_tile(matrix, rows, features, valid).to(tl.float32)


@triton.jit
def _load_scale(weight, offset, features, num_features):
    """weight + offset of a tile's features, [1, BLOCK_F] fp32."""
    scale = tl.load(weight + features, mask=features < num_features, other=0.0).to(tl.float32) + offset
    return scale[None, :]


@triton.jit
def norm_bwd_kernel(
    dy,  # Matrix [T, D]
    x,  # Matrix [T, D]
    weight,  # [D], or None where dx is not wanted
    dx,  # [T, D] or None
    weight_partial,  # [programs, D] fp32 or None
    bias_partial,  # [programs, D] fp32 or None
    routing,  # Routing of [T]
    update,  # Weights [R, D] or None
    num_tokens,
    num_features,
    eps,
    offset,
    CENTERED: tl.constexpr,
    ROUND_X_HAT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dx of x̂ ⊙ (w + offset), x̂ = (x - mean, where CENTERED) / rms; partial sums of m ⊙ dy ⊙ x̂ and m ⊙ dy."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_T
    features = tl.arange(0, BLOCK_F).to(tl.int64)
    inside = features < num_features
    weight_total = tl.zeros([BLOCK_T, BLOCK_F], dtype=tl.float32)
    bias_total = tl.zeros([BLOCK_T, BLOCK_F], dtype=tl.float32)
    if dx is not None:
        scale = _load_scale(weight, offset, features, num_features)
    for start in tl.range(first, num_tokens, tl.num_programs(0) * BLOCK_T, num_stages=STAGES):
        rows = start + tl.arange(0, BLOCK_T).to(tl.int64)
        present = rows < num_tokens
        valid = present[:, None] & inside[None, :]
        tokens = load_tokens(routing, rows, present)
        x_hat = _load(x, rows, features, valid)
        g = _load(dy, rows, features, valid)
        if CENTERED:
            x_hat = tl.where(valid, x_hat - tl.sum(x_hat, axis=1)[:, None] / num_features, 0.0)
        rstd = tl.rsqrt(tl.sum(x_hat * x_hat, axis=1)[:, None] / num_features + eps)
        x_hat = tl.where(valid, x_hat * rstd, 0.0)
        if dx is not None:  # ahead of the sums, whose weights would hold registers through the reductions
            dx_hat = g * scale
            if CENTERED:
                dx_hat -= tl.sum(dx_hat, axis=1)[:, None] / num_features
            projection = tl.sum(dx_hat * x_hat, axis=1)[:, None] / num_features
            dx_tile = rounded(rstd * (dx_hat - x_hat * projection), dx.dtype.element_ty)
            tl.store(dx + rows[:, None] * num_features + features[None, :], dx_tile, mask=valid)
        if weight_partial is not None:
            x_seen = x_hat
            if ROUND_X_HAT:
                x_seen = rounded(x_hat, x.pointer.dtype.element_ty).to(tl.float32)
            weight_total += masked(g * x_seen, update, routing, tokens, features, inside)
        if bias_partial is not None:
            bias_total += masked(g, update, routing, tokens, features, inside)
    partial = tl.program_id(0).to(tl.int64) * num_features + features
    if weight_partial is not None:
        tl.store(weight_partial + partial, tl.sum(weight_total, axis=0), mask=inside)
    if bias_partial is not None:
        tl.store(bias_partial + partial, tl.sum(bias_total, axis=0), mask=inside)


@triton.jit
def norm_bwd_chunked_kernel(
    dy,  # Matrix [T, D]
    x,  # Matrix [T, D]
    weight,  # [D], or None where dx is not wanted
    dx,  # [T, D] or None
    weight_partial,  # [programs, D] fp32 or None
    bias_partial,  # [programs, D] fp32 or None
    routing,  # Routing of [T]
    update,  # Weights [R, D] or None
    num_tokens,
    num_features,
    eps,
    offset,
    CENTERED: tl.constexpr,
    ROUND_X_HAT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    STAGES: tl.constexpr,
):
    """norm_bwd_kernel for rows of any length: it reads chunks twice (CENTERED: thrice) and keeps its sums in memory."""
    # Every loop copies its next chunks while one is computed, earlier sums too: no other chunk's store changes them.
    first = tl.program_id(0).to(tl.int64) * BLOCK_T
    for start in range(first, num_tokens, tl.num_programs(0) * BLOCK_T):
        rows = start + tl.arange(0, BLOCK_T).to(tl.int64)
        present = rows < num_tokens
        tokens = load_tokens(routing, rows, present)
        mean = tl.zeros([BLOCK_T, 1], dtype=tl.float32)
        if CENTERED:
            for chunk in tl.range(0, num_features, BLOCK_F, num_stages=STAGES):
                features = chunk + tl.arange(0, BLOCK_F).to(tl.int64)
                valid = present[:, None] & (features < num_features)[None, :]
                mean += tl.sum(_load(x, rows, features, valid), axis=1)[:, None]
            mean = mean / num_features
        squares = tl.zeros([BLOCK_T, 1], dtype=tl.float32)  # Σ (x - mean)²
        total = tl.zeros([BLOCK_T, 1], dtype=tl.float32)  # Σ dx̂
        projection = tl.zeros([BLOCK_T, 1], dtype=tl.float32)  # Σ dx̂ (x - mean)
        for chunk in tl.range(0, num_features, BLOCK_F, num_stages=STAGES):
            features = chunk + tl.arange(0, BLOCK_F).to(tl.int64)
            inside = features < num_features
            valid = present[:, None] & inside[None, :]
            centered = _load(x, rows, features, valid) - mean
            centered = tl.where(valid, centered, 0.0)
            squares += tl.sum(centered * centered, axis=1)[:, None]
            if dx is not None:
                dx_hat = _load(dy, rows, features, valid)
                dx_hat *= _load_scale(weight, offset, features, num_features)
                total += tl.sum(dx_hat, axis=1)[:, None]
                projection += tl.sum(dx_hat * centered, axis=1)[:, None]
        rstd = tl.rsqrt(squares / num_features + eps)
        total = total / num_features
        projection = projection * rstd / num_features
        for chunk in tl.range(0, num_features, BLOCK_F, num_stages=STAGES):
            features = chunk + tl.arange(0, BLOCK_F).to(tl.int64)
            inside = features < num_features
            valid = present[:, None] & inside[None, :]
            centered = _load(x, rows, features, valid) - mean
            x_hat = tl.where(valid, centered * rstd, 0.0)
            g = _load(dy, rows, features, valid)
            partial = tl.program_id(0).to(tl.int64) * num_features + features
            summed = inside & (start > first)  # where earlier tiles of this program have left a sum
            if weight_partial is not None:
                x_seen = x_hat
                if ROUND_X_HAT:
                    x_seen = rounded(x_hat, x.pointer.dtype.element_ty).to(tl.float32)
                product = masked(g * x_seen, update, routing, tokens, features, inside)
                earlier = tl.load(weight_partial + partial, mask=summed, other=0.0)
                tl.store(weight_partial + partial, earlier + tl.sum(product, axis=0), mask=inside)
            if bias_partial is not None:
                product = masked(g, update, routing, tokens, features, inside)
                earlier = tl.load(bias_partial + partial, mask=summed, other=0.0)
                tl.store(bias_partial + partial, earlier + tl.sum(product, axis=0), mask=inside)
            if dx is not None:
                dx_hat = g * _load_scale(weight, offset, features, num_features)
                if CENTERED:
                    dx_hat -= total
                dx_tile = rounded(rstd * (dx_hat - x_hat * projection), dx.dtype.element_ty)
                tl.store(dx + rows[:, None] * num_features + features[None, :], dx_tile, mask=valid)
        tl.debug_barrier()  # the next tile's sums read what other threads may have written


@kernel_op(
    "norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor ids, Tensor? strength, Tensor? update, "
    f"{NORM_SCHEMA}, bool want_weight, bool want_bias) -> (Tensor, Tensor, Tensor)"
)
def norm_backward_op(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    ids: Tensor,
    strength: Tensor | None,
    update: Tensor | None,
    eps: float,
    offset: float,
    centered: bool,
    round_x_hat: bool,
    want_weight: bool,
    want_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs that are not wanted have no elements."""
    tokens = x.shape[0]
    features = int(x.shape[1])  # a constant under tracing too, since it chooses the kernel
    is_heavy = want_bias and update is not None and strength is not None
    is_light = features % 16 == 0 and _in_whole_vectors(x) and _in_whole_vectors(dy) and not is_heavy
    fits = features <= (MAX_ROW_IN_REGISTERS if is_light else MAX_ROW_IN_REGISTERS // 2)
    kernel, config = _whole_rows(features, is_light, x.device) if fits else _chunks(x.device)
    programs = _multiprocessors(x.device) * WARPS_PER_MULTIPROCESSOR // config["num_warps"]
    # With symbolic shapes nothing runs, and a minimum would be a guard that the number of programs does not need.
    if isinstance(tokens, int):
        programs = min(programs, triton.cdiv(tokens, config["BLOCK_T"]))
    want_dx = weight is not None
    dx = x.new_empty(tokens if want_dx else 0, features)
    weight_partial = x.new_empty(programs if want_weight else 0, features, dtype=torch.float32)
    bias_partial = x.new_empty(programs if want_bias else 0, features, dtype=torch.float32)
    launch(
        kernel,
        (programs,),
        config,
        dy=Matrix.of(dy),
        x=Matrix.of(x),
        weight=None if weight is None else weight.contiguous(),
        dx=dx if want_dx else None,
        weight_partial=weight_partial if want_weight else None,
        bias_partial=bias_partial if want_bias else None,
        routing=Routing.of(ids, strength),
        update=Weights.of(update),
        num_tokens=tokens,
        num_features=features,
        eps=eps,
        offset=offset,
        CENTERED=centered,
        ROUND_X_HAT=round_x_hat,
    )
    dweight = weight_partial.sum(0) if want_weight else weight_partial
    dbias = bias_partial.sum(0) if want_bias else bias_partial
    return dx, dweight, dbias


def norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    routes: Routes,
    update: Table | None,
    norm: NormArguments,
    *,
    want_weight: bool,
    want_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """See `gradroute.primitives.protocol.Primitives`; one op serves both norms."""
    masks = (*tokens_of(routes), *weights_on(x.device, update))
    dx, dweight, dbias = norm_backward_op(dy, x, weight, *masks, *norm, want_weight, want_bias)
    return wanted((dx, weight is not None), (dweight, want_weight), (dbias, want_bias))


def _in_whole_vectors(rows: Tensor) -> bool:
    """Whether rows `[T, D]` are of 16 bits an element and begin where wide accesses may."""
    return rows.element_size() <= 2 and rows.stride(1) == 1 and rows.stride(0) % 16 == 0


def _whole_rows(
    features: int, is_light: bool, device: torch.device
) -> tuple[triton.JITFunction, dict[str, int]]:
    """The configuration for rows that stay in registers; light ones leave room for twice as much a thread."""
    shipped = config_of(norm_bwd_kernel, device)
    block_f = max(16, triton.next_power_of_2(features))
    block_t = max(1, shipped["ELEMENTS"] // block_f)
    elements = block_t * block_f
    is_doubled = is_light and elements > shipped["ELEMENTS"]
    elements_per_warp = shipped["ELEMENTS_PER_WARP"] * (2 if is_doubled else 1)
    # Short rows, of which a tile has several, need more registers for the routes and weights of each.
    warps = WARPS_PER_MULTIPROCESSOR if block_t == 1 else WARPS_PER_MULTIPROCESSOR // 2
    return norm_bwd_kernel, {
        "BLOCK_T": block_t,
        "BLOCK_F": block_f,
        "STAGES": shipped["STAGES"] if elements <= shipped["PREFETCHED"] else 1,
        "num_warps": min(MAX_WARPS, elements // elements_per_warp),
        "maxnreg": min(255, REGISTERS_PER_MULTIPROCESSOR // (32 * warps)),
    }


def _chunks(device: torch.device) -> tuple[triton.JITFunction, dict[str, int]]:
    return norm_bwd_chunked_kernel, config_of(norm_bwd_chunked_kernel, device)


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
