"""Attention of the backends torch, cpu and cuda: masks by head around a vendor's kernel, or around tiles of products.

The backends share it, and give it their own primitives for the masks.
"""

from __future__ import annotations

from torch import Tensor

from ..primitives.arguments import wanted
from ..primitives.attention_pattern import Pattern
from ..primitives.protocol import AttentionTables, HeadPrimitives
from ..routes import Routes
from . import tiled
from .vendor import VENDORS


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routes: Routes | None,
    sites: AttentionTables,
    pattern: Pattern,
    vendor: str | None,
    primitives: HeadPrimitives,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """See `gradroute.primitives.protocol.Primitives.attention_forward`; without a vendor's kernel it runs in tiles."""
    if vendor is None:
        o, *saved = tiled.attention_forward(q, k, v, pattern)
    else:
        o, *saved = VENDORS[vendor].forward(q, k, v, pattern)
    if sites.forward_heads is None:
        return o, tuple(saved)
    return primitives.masked_heads(o, routes, sites.forward_heads), (o, *saved)


def backward(
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
    primitives: HeadPrimitives,
    *,
    want_query: bool,
    want_key_value: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """See `gradroute.primitives.protocol.Primitives.attention_backward`; with edges it runs in tiles."""
    o, *rest = (z, *saved) if sites.forward_heads is None else saved
    in_tiles = vendor is None or sites.score_edges is not None or sites.value_edges is not None
    d_o, delta = primitives.attention_output_grad(dz, o, routes, sites, want_delta=in_tiles)
    dq: Tensor | None
    dk: Tensor | None
    dv: Tensor | None
    if vendor is None or in_tiles:
        dq, dk, dv = tiled.attention_backward(
            d_o,
            q,
            k,
            v,
            o,
            rest[0],
            routes,
            sites.score_edges,
            sites.value_edges,
            pattern,
            delta,
            want_query=want_query,
            want_key_value=want_key_value,
        )
    else:
        dq, dk, dv = VENDORS[vendor].backward(d_o, q, k, v, (o, *rest), pattern)
    dq, dk, dv = wanted((dq, want_query), (dk, want_key_value), (dv, want_key_value))
    if dq is not None:
        dq = primitives.masked_heads(dq, routes, sites.query, overwrite=True)
    if dk is not None and dv is not None:
        dk = primitives.masked_heads(dk, routes, sites.key, overwrite=True)
        dv = primitives.masked_heads(dv, routes, sites.value, overwrite=True)
    return dq, dk, dv
