"""The backward: delta, then dK with dV, and dQ, in passes of their own without atomics."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...primitives.arguments import tokens_of, wanted, weights_on
from ...primitives.attention_edges import EdgeBits, TileBits
from ...primitives.attention_pattern import PATTERN_SCHEMA, Pattern
from ...primitives.protocol import AttentionTables
from ...primitives.registration import kernel_op
from ...routes import Routes
from .arguments import BackwardArguments, Call, Queries
from .delta import delta_of
from .dkdv import dkdv_config, key_value_gradients
from .dq import dq_config, query_gradients
from .loads import Heads, readable
from .tiles import list_tiles


def attention_backward(
    dz: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    z: Tensor,
    saved: tuple[Tensor, ...],
    routes: Routes | None,
    sites: AttentionTables,
    pattern: Pattern,
    vendor: str | None,
    *,
    want_query: bool,
    want_key_value: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """See `gradroute.primitives.protocol.Primitives`."""
    by_head = (sites.heads, sites.forward_heads)
    strength = None if routes is None else routes.strength
    score_edges, value_edges = (
        EdgeBits.of(routes, edges) for edges in (sites.score_edges, sites.value_edges)
    )
    shape = (q.shape[0], q.shape[2])
    dq, dk, dv = attention_backward_op(
        dz,
        q,
        k,
        v,
        z,
        *saved,
        *((None, None) if routes is None else tokens_of(routes)),
        weights_on(q.device, *by_head, sites.query, sites.key, sites.value),
        (score_edges.bits, score_edges.values, value_edges.bits, value_edges.values),
        (score_edges.levels, value_edges.levels),
        (
            *TileBits.of(routes, shape, sites.score_edges, sites.value_edges),
            *TileBits.of(routes, shape, sites.score_edges),
        ),
        1 if routes is None else routes.num_routes,
        all(table is None or (table.binary and strength is None) for table in by_head),
        *pattern,
        want_query,
        want_key_value,
    )
    return wanted((dq, want_query), (dk, want_key_value), (dv, want_key_value))


@kernel_op(
    "attention_backward(Tensor dz, Tensor q, Tensor k, Tensor v, Tensor z, Tensor lse, Tensor? ids, Tensor? strength, "
    "Tensor?[] tables, Tensor?[] edges, int[] levels, Tensor?[] tile_bits, int num_routes, bool is_binary, "
    f"{PATTERN_SCHEMA}, bool want_query, bool want_key_value) -> (Tensor, Tensor, Tensor)"
)
def attention_backward_op(
    dz: Tensor, q: Tensor, k: Tensor, v: Tensor, z: Tensor, lse: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs that are not wanted have no elements."""
    arguments, head_dim = BackwardArguments(*rest), q.shape[3]
    call = Call.of(dz, q, k, v, arguments)
    key_reach, key_present, query_reach, query_present = arguments.tile_bits
    config = dkdv_config(call)
    delta, weights, live = delta_of(call, readable(z), config["BLOCK_Q"])
    queries = Queries(Heads.of(call.q), Heads.of(call.dz), lse, delta, weights)
    dq, dk, dv = (x.new_empty(0) for x in (q, k, v))
    if arguments.want_key_value:
        lists = list_tiles(call, key_reach, key_present, live, config, by_key=True)
        gradients = key_value_gradients(call, queries, lists, config)
        dk, dv = (gradient.narrow(3, 0, head_dim) for gradient in gradients)
    if arguments.want_query:
        config = dq_config(call)
        lists = list_tiles(call, query_reach, query_present, None, config, by_key=False)
        dq = query_gradients(call, queries, lists, config).narrow(3, 0, head_dim)
    return dq, dk, dv
