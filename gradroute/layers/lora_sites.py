"""The meaning of the sites of a linear layer or of an embedding for PEFT's LoRA around it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..arguments import ordinary_tensors
from ..embedding import EmbeddingSites
from ..linear import LinearSites
from ..sites import Sites, given
from ..tables import Table


class LoRASites(NamedTuple):
    """The meaning of a layer's sites for LoRA around it; None: the ordinary op.

    Attributes:
        base: the sites of the base layer, without the masks that it shares with the adapters.
        a: the sites of every A: of a linear layer's as LinearSites, of an embedding's as EmbeddingSites.
        b: the sites of every B.
    """

    base: Any
    a: Any
    b: LinearSites | None


def adapter_sites(
    rows: Table | None, cols: Table | None, bias: Table | None = None, adapter: Table | None = None
) -> tuple[LinearSites | None, LinearSites | None]:
    """The sites of a linear layer's A, and those of its B.

    B's rows are the outputs and A's columns the inputs, as the layer's own are. What A and B share is the rank, so a
    token may update A if it may update anything by `rows`, and B if it may by `cols`.

    Args:
        rows: `[R, O]`, which rows of the weight a token may update.
        cols: `[R, I]`, which columns.
        bias: `[R, O]`, which entries of B's bias, where it has one.
        adapter: `[R, 1]`, who may train this adapter at all.
    """
    a = given(LinearSites, update_rows=product(anything(rows), adapter), update_cols=cols)
    b = given(
        LinearSites,
        update_rows=rows,
        update_cols=product(anything(cols), adapter),
        update_bias=product(bias, adapter),
    )
    return a, b


def sites_around(sites: Sites) -> LoRASites:
    """The meaning of the sites of a linear layer or of an embedding for LoRA around it, derived once."""
    if not isinstance(sites, (LinearSites, EmbeddingSites)):
        return LoRASites(None, None, None)
    found: LoRASites | None = sites.groups.get("lora")
    if found is None:
        found = sites.groups["lora"] = _derived(sites)
    return found


def _derived(sites: LinearSites | EmbeddingSites) -> LoRASites:
    if isinstance(sites, EmbeddingSites):
        update = sites.update
        by_token = None if update is None else EmbeddingSites(anything(update))
        return LoRASites(sites, by_token, given(LinearSites, update_rows=update))
    tables = {name: table for name, table in sites.tables.items() if name.startswith("update")}
    a, b = adapter_sites(sites.update_rows, sites.update_cols)
    return LoRASites(given(LinearSites, **tables), a, b)


@ordinary_tensors()
def anything(table: Table | None) -> Table | None:  # [R, 1]
    """1 for the routes that may update anything at all, else 0."""
    return None if table is None else Table((table.weights != 0).any(dim=1, keepdim=True).to(torch.float32))


@ordinary_tensors()
def product(*tables: Table | None) -> Table | None:
    """The product of several masks; None masks nothing."""
    given_tables = [table for table in tables if table is not None]
    if len(given_tables) < 2:
        return given_tables[0] if given_tables else None
    weights = given_tables[0].weights
    for other in given_tables[1:]:
        weights = weights * other.weights
    return Table(weights)
