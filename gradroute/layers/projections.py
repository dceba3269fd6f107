"""AttentionSites split among the ops of an attention layer: its linear layers, and attention itself."""

from __future__ import annotations

from typing import NamedTuple

from .. import tables
from ..attention import AttentionSites
from ..linear import LinearSites
from ..sites import given
from ..tables import Table


class ProjectionSites(NamedTuple):
    """The sites of each op of an attention layer; None: the ordinary op.

    Attributes:
        query: the query projection's sites: whose rows (and biases) a token may update.
        key_value: the sites of both the key projection and the value projection.
        output: the output projection's sites: whose columns a token may update, and which entries of its bias.
        attention: the sites of attention itself.
    """

    query: LinearSites | None
    key_value: LinearSites | None
    output: LinearSites | None
    attention: AttentionSites | None

    @classmethod
    def of(cls, sites: AttentionSites, head_dim: int) -> ProjectionSites:
        """Splits checked sites of a layer whose heads are `head_dim` wide."""
        by_name = sites.tables
        by_head = [sites.table(name) for name in ("update_q", "update_kv", "update_out")]
        by_feature = {table: _by_feature(table, head_dim) for table in by_head}  # one table may serve several
        query, key_value, output = (by_feature[table] for table in by_head)
        masks = {name: table for name, table in by_name.items() if not name.startswith("update")}
        return cls(
            given(LinearSites, update_rows=query),
            given(LinearSites, update_rows=key_value),
            given(LinearSites, update_cols=output, update_bias=by_name.get("update_output_bias")),
            given(AttentionSites, **masks),
        )


def _by_feature(table: Table | None, head_dim: int) -> Table | None:
    """A table `[R, heads]` for the rows or columns of a projection; `[R, 1]` and None are for all of them."""
    return table if table is None or table.features == 1 else tables.heads(table, head_dim)


def check_sites(sites: AttentionSites, heads: int, kv_heads: int, output_bias: int | str) -> None:
    """Raises unless the sites fit an attention layer; `output_bias` is its width, or why there is none."""
    by_name = sites.tables
    if kv_heads < heads and "update" in by_name and "update_kv" not in by_name:
        raise ValueError(
            f"AttentionSites.update_kv: got None beside update, expected a table [R, {kv_heads}] or [R, 1]: "
            f"with {heads} query heads and {kv_heads} key and value heads, update cannot stand for it"
        )
    num_routes = next((table.num_routes for table in by_name.values()), 1)
    sites.check(None, widths(num_routes, heads, kv_heads, output_bias))
    sites.check_edges(num_routes)


def widths(num_routes: int, heads: int, kv_heads: int, output_bias: int | str) -> dict[str, int | str]:
    """The number of features of each site of an attention layer, or why it cannot be honoured."""
    return AttentionSites.widths(num_routes, heads, kv_heads) | {
        "update": heads,
        "update_q": heads,
        "update_kv": kv_heads,
        "update_out": heads,
        "update_output_bias": output_bias,
    }
