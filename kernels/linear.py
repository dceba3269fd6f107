"""The gradients of a linear layer: its products are torch's, with masked gradients."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..primitives import shared
from ..primitives.arguments import tokens_of
from ..primitives.registration import kernel_op
from ..routes import Routes
from ..tables import Table
from .launch import config_of, launch
from .masks import Routing, Weights, load_tokens, masked
from .matrices import Matrix, load_tile
from .route_grad import masked_product

# Tokens that one program of a bias gradient's first stage sums.
TOKENS_PER_PARTIAL = 128


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


def input_grad(g: Tensor, weight: Tensor, routes: Routes, table: Table | None) -> Tensor:
    return shared.input_grad(g, weight, routes, table, masked_product)


def weight_grad(g: Tensor, x: Tensor, routes: Routes, rows: Table | None, cols: Table | None) -> Tensor:
    return shared.weight_grad(g, x, routes, rows, cols, masked_product)
