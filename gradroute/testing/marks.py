"""Sites in plain PyTorch under ordinary autograd: what the formulas of `gradroute.testing.ops` are written on."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ..routes import Routes
from ..tables import Table


class Marks:
    """The sites of one call in plain PyTorch under ordinary autograd; without tables, nothing.

    An op's formula marks its tensors: `gradient` where a site masks a gradient, `forward` where it masks an activation,
    `parameter` and `linear` where it decides who updates a parameter.

    Args:
        routes: the batch's routes; None when there are no tables.
        tables: the tables by site.
        copies: the detach idiom as it is published, m * x + (1 - m) * x.detach(), and a copy per token of a routed
            parameter, so that its update is literally the token's: the definition, `[T, O, I]` large. Otherwise with
            the bits of the ordinary forward, and parameters updated by a second product that adds zero.
    """

    def __init__(self, routes: Routes | None, tables: Mapping[str, Table], copies: bool = False) -> None:
        self.routes, self.tables, self.copies = routes, tables, copies

    def table(self, site: str, shorthand: str | None = None) -> Table | None:
        """The table of a site; where it has none, that of the site named by `shorthand`."""
        found = self.tables.get(site)
        return self.tables.get(shorthand) if found is None and shorthand else found

    def mask(self, table: Table, dtype: torch.dtype, tokens: torch.Size) -> Tensor:
        """The mask m `[*tokens, F]` of a table, computed as its formula says."""
        assert self.routes is not None
        wide = torch.promote_types(dtype, torch.float32)
        weights = table.weights.to(device=self.routes.device, dtype=wide)
        m = weights[self.routes.ids.long()]
        if self.routes.strength is not None:
            s = self.routes.strength.to(wide).reshape(-1, 1)
            m = weights[0] + s * (m - weights[0])
        return m.to(dtype).reshape(*tokens, m.shape[-1])

    def detached(self, m: Tensor, x: Tensor) -> Tensor:
        """x, with its gradient multiplied by m."""
        return m * x + (1 - m) * x.detach() if self.copies else x.detach() + _only_gradient(m * x)

    def gradient(self, site: str, x: Tensor) -> Tensor:
        """x, with its gradient masked at `site`."""
        table = self.table(site)
        return x if table is None else self.detached(self.mask(table, x.dtype, x.shape[:-1]), x)

    def forward(self, site: str, x: Tensor) -> Tensor:
        """x masked at `site`, and its gradient with it."""
        table = self.table(site)
        return x if table is None else self.mask(table, x.dtype, x.shape[:-1]) * x

    def by_head(self, site: str, x: Tensor, forward: bool = False) -> Tensor:
        """As `gradient` (or `forward`), for x `[B, H, S, D]` and a table `[R, H]`."""
        table = self.table(site)
        if table is None:
            return x
        m = self.mask(table, x.dtype, torch.Size((x.shape[0], x.shape[2]))).transpose(1, 2).unsqueeze(-1)
        return m * x if forward else self.detached(m, x)

    def edges(self, site: str, batch: int, dtype: torch.dtype) -> Tensor | None:
        """The edges E[query's route, key's route] `[B, 1, S, S]`; None where the site has no table."""
        table = self.table(site)
        if table is None:
            return None
        assert self.routes is not None
        ids = self.routes.ids.long().reshape(batch, -1)
        weights = table.weights.to(device=ids.device, dtype=dtype)
        return weights[ids.unsqueeze(2), ids.unsqueeze(1)].unsqueeze(1)

    def parameter(self, parameter: Tensor, tokens: torch.Size, *tables: Table | None) -> Tensor:
        """A parameter, or every token's copy of it, `[*tokens, *parameter.shape]`, where it is routed.

        Args:
            parameter: the parameter.
            tokens: the leading shape of the activations.
            tables: for each dimension of the parameter, who may update what along it, or None.
        """
        masks = [
            _along(dimension, parameter.dim(), self.mask(table, parameter.dtype, tokens))
            for dimension, table in enumerate(tables)
            if table is not None
        ]
        return self.detached(functools.reduce(torch.mul, masks), parameter) if masks else parameter

    def linear(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: Table | None = None,
        cols: Table | None = None,
        bias_rows: Table | None = None,
    ) -> Tensor:
        """A linear layer, some entries of whose weight and bias some tokens may not update."""
        if rows is None and cols is None and bias_rows is None:
            return F.linear(x, weight, bias)
        tokens = x.shape[:-1]
        if self.copies:
            y = (self.parameter(weight, tokens, rows, cols) @ x.unsqueeze(-1)).squeeze(-1)
            return y if bias is None else y + self.parameter(bias, tokens, bias_rows)
        seen = x.detach() if cols is None else self.mask(cols, x.dtype, tokens) * x.detach()
        update = F.linear(seen, weight)
        if rows is not None:
            update = self.mask(rows, x.dtype, tokens) * update
        y = F.linear(x, weight.detach(), None if bias is None else bias.detach()) + _only_gradient(update)
        if bias is None:
            return y
        copied = bias if bias_rows is None else self.mask(bias_rows, x.dtype, tokens) * bias
        return y + _only_gradient(copied)


def _only_gradient(x: Tensor) -> Tensor:
    """Zeros, with the gradient of x."""
    return x - x.detach()


def _along(dimension: int, dimensions: int, m: Tensor) -> Tensor:
    """m `[*tokens, F]` with F at one of the dimensions of a parameter, and 1 at the others."""
    ones = (1,) * dimensions
    return m.reshape(*m.shape[:-1], *ones[:dimension], m.shape[-1], *ones[dimension + 1 :])
