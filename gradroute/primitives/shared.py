"""Algorithms that backends share: each passes what of its own they are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from ..activations import ACTIVATIONS
from ..checks import flat
from ..routes import Routes
from ..tables import Table
from .arguments import as_dtype
from .overwriting import times
from .products import plus_wide_product, product


class MaskedProduct(Protocol):
    """A backend's `masked_product`."""

    def __call__(self, g: Tensor, routes: Routes, table: Table | None, *, overwrite: bool = False) -> Tensor:
        """m ⊙ g; see `Primitives.masked_product`."""


# A masked copy of an operand is made for this share of the tokens at a time.
WORKSPACE_SHARE = 8
MIN_CHUNK = 1024


def activation_forward(
    a: Tensor,
    up: Tensor | None,
    routes: Routes,
    table: Table | None,
    activation: str,
    masked_product: Callable[..., Tensor],
) -> Tensor:
    """m ⊙ (act(a) * up) by PyTorch's operations and the backend's masked product: a, up `[*tokens, F]`."""
    z = ACTIVATIONS[activation].value(a)
    if up is not None:
        z = times(z, up)  # a fresh matrix costs as much as the product
    if table is None:
        return z
    z = z.contiguous()
    rows = flat(z)
    masked = masked_product(rows, routes, table, overwrite=True)
    return z if masked is rows else masked.view(z.shape)


def input_grad(
    g: Tensor, weight: Tensor, routes: Routes, table: Table | None, masked_product: MaskedProduct
) -> Tensor:
    """m ⊙ (g W) as torch's product, then masked: g `[T, O]`, weight `[O, I]` → `[T, I]`."""
    return masked_product(product(g, weight), routes, table, overwrite=True)


def weight_grad(
    g: Tensor,
    x: Tensor,
    routes: Routes,
    rows: Table | None,
    cols: Table | None,
    masked_product: MaskedProduct,
) -> Tensor:
    """(m_rows ⊙ g)ᵀ (m_cols ⊙ x) as torch's products: g `[T, O]`, x `[T, I]` → `[O, I]`.

    Masked copies are made of a share of the tokens at a time, never of a whole operand.
    """
    if rows is None and cols is None:
        return product(g.T, x)
    total: Tensor | None = None
    chunk = max(MIN_CHUNK, -(-g.shape[0] // WORKSPACE_SHARE))
    for start in range(0, g.shape[0], chunk):
        tokens = slice(start, start + chunk)
        part = routes if chunk >= g.shape[0] else routes._at(tokens)
        masked_g = masked_product(g[tokens], part, rows)
        masked_x = masked_product(x[tokens], part, cols)
        if chunk >= g.shape[0]:
            return product(masked_g.T, masked_x)
        total = plus_wide_product(total, masked_g.T, masked_x)
    return g.new_zeros(g.shape[1], x.shape[1]) if total is None else as_dtype(total, g.dtype)
