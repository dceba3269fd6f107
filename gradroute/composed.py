"""Backend `torch`: the leaf computations of the autograd.Functions, composed of PyTorch operations.

Any device, no build. Each function has the name and the signature of its counterpart in gradroute.kernels.
`None` in place of a table means no mask. Gradients are flat: `[T, F]`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .routes import Routes
from .tables import Table

# A masked copy of an operand is made for this share of the tokens at a time.
WORKSPACE_SHARE = 8
MIN_CHUNK = 1024


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which masked products are formed: fp32, and fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def mask(weights: Tensor, routes: Routes, dtype: torch.dtype, tokens: slice = slice(None)) -> Tensor:
    """m for the columns `weights [R, F]`: `[T, F]` in `dtype`, interpolated from row 0 by the strength."""
    weights = weights.to(dtype)
    m = weights[routes.ids[tokens].long()]  # [T, F]
    strength = routes.strength
    if strength is None:
        return m
    if strength.dim() > 0:
        strength = strength[tokens].unsqueeze(-1)
    return torch.lerp(weights[0], m, strength.to(dtype))


def pieces(
    g: Tensor, routes: Routes, table: Table, tokens: slice = slice(None)
) -> Iterator[tuple[slice, Tensor]]:
    """The masked features of `g [T, F]` with their masks: `[T, 1]` a constant segment, `[T, F]` if dense."""
    weights, dtype = table.on(g.device), product_dtype(g.dtype)
    if table.kind == "dense":
        yield slice(None), mask(weights, routes, dtype, tokens)
        return
    for start, stop in table.segments:
        features = slice(None) if table.features == 1 else slice(start, stop)
        yield features, mask(weights[:, start : start + 1], routes, dtype, tokens)


def _product(m: Tensor, g: Tensor) -> Tensor:
    """m ⊙ g rounded once to g's dtype, and 0 where m is 0."""
    return torch.where(m == 0, 0, m * g).to(g.dtype)


def masked_product(
    g: Tensor, routes: Routes, table: Table | None, tokens: slice = slice(None)
) -> Tensor:
    """m ⊙ g in a new tensor; `g` itself without a table."""
    if table is None:
        return g
    if table.kind == "dense":
        ((_, m),) = pieces(g, routes, table, tokens)
        return _product(m, g)
    out = g.clone(memory_format=torch.contiguous_format)
    for features, m in pieces(g, routes, table, tokens):
        out[:, features] = _product(m, g[:, features])
    return out


def masked_product_(g: Tensor, routes: Routes, table: Table | None) -> None:
    """m ⊙ g in place, on a gradient that the caller allocated."""
    if table is not None:
        for features, m in pieces(g, routes, table):
            g[:, features] = _product(m, g[:, features])


def input_grad(g: Tensor, weight: Tensor, routes: Routes, table: Table | None) -> Tensor:
    """m ⊙ (g W): g `[T, O]`, weight `[O, I]` → `[T, I]`."""
    dx = g @ weight
    masked_product_(dx, routes, table)
    return dx


def weight_grad(
    g: Tensor, x: Tensor, routes: Routes, rows: Table | None, cols: Table | None
) -> Tensor:
    """(m_rows ⊙ g)ᵀ (m_cols ⊙ x): g `[T, O]`, x `[T, I]` → `[O, I]`.

    Masked copies are made of a share of the tokens at a time, never of a whole operand.
    """
    if rows is None and cols is None:
        return g.T @ x
    total = torch.zeros(g.shape[1], x.shape[1], dtype=product_dtype(g.dtype), device=g.device)
    chunk = max(MIN_CHUNK, -(-g.shape[0] // WORKSPACE_SHARE))
    for start in range(0, g.shape[0], chunk):
        tokens = slice(start, start + chunk)
        masked_g = masked_product(g[tokens], routes, rows, tokens)
        masked_x = masked_product(x[tokens], routes, cols, tokens)
        total += masked_g.T @ masked_x
    return total.to(g.dtype)


def bias_grad(g: Tensor, routes: Routes, table: Table | None) -> Tensor:
    """Σ_t m ⊙ g: g `[T, O]` → `[O]`."""
    return masked_product(g, routes, table).sum(0)
