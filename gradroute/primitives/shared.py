"""Algorithms that backends share: made of their own primitives, so each backend passes itself."""

from __future__ import annotations

import torch
from torch import Tensor

from ..routes import Routes
from ..tables import Table
from .arguments import product_dtype
from .overwriting import plus
from .protocol import Primitives

# A masked copy of an operand is made for this share of the tokens at a time.
WORKSPACE_SHARE = 8
MIN_CHUNK = 1024


def input_grad(
    g: Tensor, weight: Tensor, routes: Routes, table: Table | None, primitives: Primitives
) -> Tensor:
    """m ⊙ (g W) as torch's product, then masked: g `[T, O]`, weight `[O, I]` → `[T, I]`."""
    return primitives.masked_product(g @ weight, routes, table, overwrite=True)


def weight_grad(
    g: Tensor,
    x: Tensor,
    routes: Routes,
    rows: Table | None,
    cols: Table | None,
    primitives: Primitives,
) -> Tensor:
    """(m_rows ⊙ g)ᵀ (m_cols ⊙ x) as torch's products: g `[T, O]`, x `[T, I]` → `[O, I]`.

    Masked copies are made of a share of the tokens at a time, never of a whole operand.
    """
    if rows is None and cols is None:
        return g.T @ x
    wide = product_dtype(g.dtype)
    total = torch.zeros(g.shape[1], x.shape[1], dtype=wide, device=g.device)
    chunk = max(MIN_CHUNK, -(-g.shape[0] // WORKSPACE_SHARE))
    for start in range(0, g.shape[0], chunk):
        tokens = slice(start, start + chunk)
        part = routes if chunk >= g.shape[0] else routes._at(tokens)
        masked_g = primitives.masked_product(g[tokens], part, rows)
        masked_x = primitives.masked_product(x[tokens], part, cols)
        if g.device.type == "cpu":
            # Rounded to half precision, a chunk's product could overflow before the sum.
            masked_g, masked_x = masked_g.to(wide), masked_x.to(wide)
        total = plus(total, masked_g.T @ masked_x)
    return total.to(g.dtype)
