"""The backward: delta, then dK with dV, and dQ, in passes of their own without atomics."""

from __future__ import annotations

import torch
from torch import Tensor

from ...primitives.arguments import tokens_of, wanted, weights_on
from ...primitives.attention_edges import EdgeBits, TileBits
from ...primitives.attention_kernels import AttentionKernels
from ...primitives.attention_pattern import Pattern
from ...primitives.protocol import AttentionTables
from ...primitives.registration import kernel_op
from ...primitives.schema import Flat, flat, schema_of, unflat
from ...routes import Routes
from .arguments import BackwardArguments, Call, PerQuery
from .delta import delta_of
from .dkdv import dkdv_config, dkdv_parts, key_value_gradients
from .dq import dq_config, query_gradients
from .loads import readable
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
    kernels: AttentionKernels,
    *,
    want_query: bool,
    want_key_value: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """See `gradroute.primitives.protocol.Primitives`; `gradroute.kernels.attention.forward.saved_with` made `saved`."""
    lse, *documents = saved
    ids, strength = (None, None) if routes is None else tokens_of(routes)
    heads, forward_heads, query, key, value = weights_on(
        q.device, sites.heads, sites.forward_heads, sites.query, sites.key, sites.value
    )
    shape = (q.shape[0], q.shape[2])
    arguments = BackwardArguments(
        ids,
        strength,
        heads,
        forward_heads,
        query,
        key,
        value,
        score_edges=EdgeBits.of(routes, sites.score_edges),
        value_edges=EdgeBits.of(routes, sites.value_edges),
        key_tiles=TileBits.of(routes, shape, sites.score_edges, sites.value_edges),
        query_tiles=TileBits.of(routes, shape, sites.score_edges),
        num_routes=1 if routes is None else routes.num_routes,
        is_binary=all(
            table is None or (table.binary and strength is None)
            for table in (sites.heads, sites.forward_heads)
        ),
        pattern=pattern,
        documents=documents[0] if documents else None,
        want_query=want_query,
        want_key_value=want_key_value,
    )
    dq, dk, dv = attention_backward_op(dz, q, k, v, z, lse, *flat(arguments))
    return wanted((dq, want_query), (dk, want_key_value), (dv, want_key_value))


@kernel_op(
    "attention_backward(Tensor dz, Tensor q, Tensor k, Tensor v, Tensor z, Tensor lse, "
    f"{schema_of(BackwardArguments)}) -> (Tensor, Tensor, Tensor)"
)
def attention_backward_op(
    dz: Tensor, q: Tensor, k: Tensor, v: Tensor, z: Tensor, lse: Tensor, *fields: Flat
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs that are not wanted have no elements."""
    arguments, head_dim = unflat(BackwardArguments, fields), q.shape[3]
    call = Call.of(dz, q, k, v, arguments)
    config = dkdv_config(call)
    delta, weights, live = delta_of(call, readable(z), config["BLOCK_Q"])
    size = None
    if weights is not None and weights.numel() > 0 and q.dtype == torch.float16 and not call.is_binary:
        # A product of a small weight and a probability is 0 in fp16. All gradients are linear in the weights, so that
        # the kernels may have those whose largest is 1.
        size = weights.abs().amax()
        size = torch.where(size > 0, size, 1.0)
        delta, weights = delta / size, weights / size
    per_query = PerQuery(lse, delta, weights)
    dq, dk, dv = (x.new_empty(0) for x in (q, k, v))
    if arguments.want_key_value:
        is_listed = arguments.key_tiles.reach is not None or live is not None
        parts = dkdv_parts(call, config, is_listed)
        entries = k.shape[1] * parts
        lists = list_tiles(call, arguments.key_tiles, live, config, by_key=True, entries=entries)
        gradients = key_value_gradients(call, per_query, lists, config, parts)
        dk, dv = (gradient.narrow(3, 0, head_dim) for gradient in gradients)
    if arguments.want_query:
        config = dq_config(call)
        lists = list_tiles(call, arguments.query_tiles, None, config, by_key=False, entries=q.shape[1])
        dq = query_gradients(call, per_query, lists, config).narrow(3, 0, head_dim)
    for gradient in (dq, dk, dv):
        if size is not None:
            gradient.mul_(size)
    return dq, dk, dv
