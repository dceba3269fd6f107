"""The gradients of a linear layer whose masks cannot be folded into something that runs anyway.

Large products stay with torch. The two GEMMs here take tokens sorted by route, so that tiles are of one route where
possible, and skip tiles whose weights are all zero.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..primitives.arguments import tokens_of, weights_on
from ..primitives.registration import kernel_op
from ..routes import Routes
from ..tables import Table
from .launch import config_of, dot_precision, launch
from .masks import Routing, Weights, load_tokens, load_weights, masked
from .matrices import Matrix, load_tile
from .rounding import dot, rounded
from .route_grad import masked_product

# An irregular input table below this density is applied in the GEMM's epilogue, where zero tiles are skipped; above
# it, the vendor's GEMM and a pass in place do less work. An estimate from tile counts, not yet measured.
SKIP_BELOW = 0.5

# Tokens that one program of a bias gradient's first stage sums.
TOKENS_PER_PARTIAL = 512


@triton.jit
def bias_grad_kernel(
    g,  # Matrix [T, F]
    partial,  # [ceil(T / TOKENS), F] fp32
    routing,  # Routing of [T]
    weights,  # Weights [R, F]
    num_tokens,
    num_features,
    TOKENS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """partial[p, f] = Σ m ⊙ g over the p-th run of TOKENS tokens."""
    features = tl.program_id(1).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = features < num_features
    total = tl.zeros([BLOCK_F], dtype=tl.float32)
    first = tl.program_id(0).to(tl.int64) * TOKENS
    for start in range(0, tl.minimum(TOKENS, num_tokens - first), BLOCK_T):
        rows = first + start + tl.arange(0, BLOCK_T)
        present = rows < num_tokens
        valid = present[:, None] & inside[None, :]
        tokens = load_tokens(routing, rows, present)
        g_tile = load_tile(g, rows, features, valid).to(tl.float32)
        total += tl.sum(masked(g_tile, weights, routing, tokens, features, inside), axis=0)
    partial_row = tl.program_id(0).to(tl.int64) * num_features
    tl.store(partial + partial_row + features, total, mask=inside)


def bias_grad(g: Tensor, routes: Routes, table: Table | None) -> Tensor:
    """Σ_t m ⊙ g: g `[T, O]` → `[O]`."""
    if table is None:
        return g.sum(0)
    return bias_grad_op(g, *tokens_of(routes), table.on(g.device))


@kernel_op("bias_grad(Tensor g, Tensor ids, Tensor? strength, Tensor weights) -> Tensor")
def bias_grad_op(g: Tensor, ids: Tensor, strength: Tensor | None, weights: Tensor) -> Tensor:
    tokens, features = g.shape
    config = config_of(bias_grad_kernel, g.device)
    partial = g.new_empty(triton.cdiv(tokens, TOKENS_PER_PARTIAL), features, dtype=torch.float32)
    launch(
        bias_grad_kernel,
        (partial.shape[0], triton.cdiv(features, config["BLOCK_F"])),
        config,
        g=Matrix.of(g),
        partial=partial,
        routing=Routing.of(ids, strength),
        weights=Weights.of(weights),
        num_tokens=tokens,
        num_features=features,
        TOKENS=TOKENS_PER_PARTIAL,
    )
    return partial.sum(0).to(g.dtype)


def product_config(kernel: triton.JITFunction, *matrices: Tensor) -> dict[str, int]:
    """The configuration of a product of `matrices` of one dtype.

    Triton reads halves 16 bytes at a time where features are dense and rows apart by multiples of 16. Elsewhere it
    reads single elements, each with an address of its own: these need so many registers that tiles are smaller
    (".narrow"). Those of fp32 are small anyway.
    """
    first = matrices[0]
    is_wide = all(
        matrix.stride(1) == 1 and matrix.stride(0) % 16 == 0 and matrix.storage_offset() % 16 == 0
        for matrix in matrices
    )
    variant = "" if is_wide or first.element_size() > 2 else ".narrow"
    return config_of(kernel, first.device, first.dtype, variant)


@triton.jit
def weight_grad_kernel(
    g,  # Matrix [T, O]
    x,  # Matrix [T, I]
    out,  # [O, I]
    order,  # [T], tokens sorted by route
    routing,  # Routing of [T]
    row_weights,  # Weights [R, O] or None
    col_weights,  # Weights [R, I] or None
    num_tokens,
    num_outputs,
    num_inputs,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """out = (m_rows ⊙ g)ᵀ (m_cols ⊙ x), masks in the prologue; token tiles with all-zero weights are skipped."""
    outputs = tl.program_id(0).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    inputs = tl.program_id(1).to(tl.int64) * BLOCK_I + tl.arange(0, BLOCK_I)
    outputs_inside, inputs_inside = outputs < num_outputs, inputs < num_inputs
    total = tl.zeros([BLOCK_O, BLOCK_I], dtype=tl.float32)
    for start in range(0, num_tokens, BLOCK_T):
        positions = start + tl.arange(0, BLOCK_T)
        present = positions < num_tokens
        rows = tl.load(order + positions, mask=present, other=0).to(tl.int64)
        tokens = load_tokens(routing, rows, present)
        g_valid = present[:, None] & outputs_inside[None, :]
        x_valid = present[:, None] & inputs_inside[None, :]
        live = True
        if row_weights is not None:
            m_rows = load_weights(row_weights, routing, tokens, outputs, outputs_inside)
            g_valid = g_valid & (m_rows != 0.0)
            live = tl.max(g_valid.to(tl.int32)) > 0
        if col_weights is not None:
            m_cols = load_weights(col_weights, routing, tokens, inputs, inputs_inside)
            x_valid = x_valid & (m_cols != 0.0)
            live = live & (tl.max(x_valid.to(tl.int32)) > 0)
        if live:
            g_tile = load_tile(g, rows, outputs, g_valid)
            x_tile = load_tile(x, rows, inputs, x_valid)
            if row_weights is not None:
                g_tile = rounded(m_rows * g_tile.to(tl.float32), g.pointer.dtype.element_ty)
            if col_weights is not None:
                x_tile = rounded(m_cols * x_tile.to(tl.float32), x.pointer.dtype.element_ty)
            total = dot(tl.trans(g_tile), x_tile, total, PRECISION)
    tl.store(
        out + outputs[:, None] * num_inputs + inputs[None, :],
        rounded(total, out.dtype.element_ty),
        mask=outputs_inside[:, None] & inputs_inside[None, :],
    )


def weight_grad(g: Tensor, x: Tensor, routes: Routes, rows: Table | None, cols: Table | None) -> Tensor:
    """(m_rows ⊙ g)ᵀ (m_cols ⊙ x): g `[T, O]`, x `[T, I]` → `[O, I]`; no copy of either."""
    if rows is None and cols is None:
        return g.T @ x
    row_weights, col_weights = weights_on(g.device, rows, cols)
    return weight_grad_op(g, x, *tokens_of(routes), routes.order, row_weights, col_weights)


@kernel_op(
    "weight_grad(Tensor g, Tensor x, Tensor ids, Tensor? strength, Tensor order, "
    "Tensor? row_weights, Tensor? col_weights) -> Tensor"
)
def weight_grad_op(
    g: Tensor,
    x: Tensor,
    ids: Tensor,
    strength: Tensor | None,
    order: Tensor,
    row_weights: Tensor | None,
    col_weights: Tensor | None,
) -> Tensor:
    outputs, inputs = g.shape[1], x.shape[1]
    out = g.new_empty(outputs, inputs)
    config = product_config(weight_grad_kernel, g, x, out)
    launch(
        weight_grad_kernel,
        (triton.cdiv(outputs, config["BLOCK_O"]), triton.cdiv(inputs, config["BLOCK_I"])),
        config,
        g=Matrix.of(g),
        x=Matrix.of(x),
        out=out,
        order=order,
        routing=Routing.of(ids, strength),
        row_weights=Weights.of(row_weights),
        col_weights=Weights.of(col_weights),
        num_tokens=g.shape[0],
        num_outputs=outputs,
        num_inputs=inputs,
        PRECISION=dot_precision(),
    )
    return out


@triton.jit
def input_grad_kernel(
    g,  # Matrix [T, O]
    weight,  # Matrix [O, I]
    out,  # [T, I]
    order,  # [T], tokens sorted by route
    routing,  # Routing of [T]
    table,  # Weights [R, I]
    num_tokens,
    num_outputs,
    num_inputs,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """out = m ⊙ (g W), the mask in the epilogue; tiles whose weights are all zero are not computed."""
    positions = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    inputs = tl.program_id(1).to(tl.int64) * BLOCK_I + tl.arange(0, BLOCK_I)
    present, inside = positions < num_tokens, inputs < num_inputs
    rows = tl.load(order + positions, mask=present, other=0).to(tl.int64)
    m = load_weights(table, routing, load_tokens(routing, rows, present), inputs, inside)
    total = tl.zeros([BLOCK_T, BLOCK_I], dtype=tl.float32)
    if tl.max((m != 0.0).to(tl.int32)) > 0:
        for start in range(0, num_outputs, BLOCK_O):
            outputs = (start + tl.arange(0, BLOCK_O)).to(tl.int64)
            g_tile = load_tile(g, rows, outputs, present[:, None] & (outputs < num_outputs)[None, :])
            weight_tile = load_tile(
                weight, outputs, inputs, (outputs < num_outputs)[:, None] & inside[None, :]
            )
            total = dot(g_tile, weight_tile, total, PRECISION)
    total = m * tl.where(m == 0.0, 0.0, total)
    tl.store(
        out + rows[:, None] * num_inputs + inputs[None, :],
        rounded(total, out.dtype.element_ty),
        mask=present[:, None] & inside[None, :],
    )


def input_grad(g: Tensor, weight: Tensor, routes: Routes, table: Table | None) -> Tensor:
    """m ⊙ (g W): g `[T, O]`, weight `[O, I]` → `[T, I]`."""
    if table is not None and table.kind == "dense" and table.density < SKIP_BELOW:
        return input_grad_op(g, weight, *tokens_of(routes), routes.order, table.on(g.device))
    return masked_product(g @ weight, routes, table, overwrite=True)


@kernel_op(
    "input_grad(Tensor g, Tensor weight, Tensor ids, Tensor? strength, Tensor order, Tensor table) -> Tensor"
)
def input_grad_op(
    g: Tensor, weight: Tensor, ids: Tensor, strength: Tensor | None, order: Tensor, table: Tensor
) -> Tensor:
    tokens, (outputs, inputs) = g.shape[0], weight.shape
    out = g.new_empty(tokens, inputs)
    config = product_config(input_grad_kernel, g, weight, out)
    launch(
        input_grad_kernel,
        (triton.cdiv(tokens, config["BLOCK_T"]), triton.cdiv(inputs, config["BLOCK_I"])),
        config,
        g=Matrix.of(g),
        weight=Matrix.of(weight),
        out=out,
        order=order,
        routing=Routing.of(ids, strength),
        table=Weights.of(table),
        num_tokens=tokens,
        num_outputs=outputs,
        num_inputs=inputs,
        PRECISION=dot_precision(),
    )
    return out
