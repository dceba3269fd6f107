"""Attention of the backends torch, cpu and cuda: masks by head around a vendor's kernels, or around tiles of products.

The backends share it, and give it their own primitives for the masks.
"""

from __future__ import annotations

from torch import Tensor

from ..primitives.arguments import wanted
from ..primitives.attention_kernels import AttentionKernels
from ..primitives.attention_pattern import Pattern
from ..primitives.protocol import AttentionTables, HeadPrimitives
from ..routes import Routes
from . import fa4, tiled
from .vendor import VENDORS


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routes: Routes | None,
    sites: AttentionTables,
    pattern: Pattern,
    kernels: AttentionKernels,
    primitives: HeadPrimitives,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """See `gradroute.primitives.protocol.Primitives.attention_forward`; without a vendor's kernel it runs in tiles."""
    if kernels.forward is None:
        o, *saved = tiled.attention_forward(q, k, v, pattern)
    elif kernels.backward == "vendor":
        o, *saved = VENDORS[kernels.forward].forward(q, k, v, pattern)
    else:
        o, *saved = output_and_lse(kernels.forward, q, k, v, pattern)
    if sites.forward_heads is None:
        return o, tuple(saved)
    return primitives.masked_heads(o, routes, sites.forward_heads), (o, *saved)


def output_and_lse(vendor: str, q: Tensor, k: Tensor, v: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """A vendor's forward for a backward that is not the vendor's.

    Args:
        vendor: the kernel's name.
        q: `[B, H, S_q, D]`.
        k: `[B, G, S_k, D]`.
        v: `[B, G, S_k, D]`.
        pattern: which keys a query sees.

    Returns:
        o `[B, H, S_q, D]`; lse `[B, H, S_q]` in a memory of its own size: some vendors' is a part of a longer one. What
        it is for a query that sees no key is not defined.
    """
    o, lse, *_ = VENDORS[vendor].forward(q, k, v, pattern)
    return o, lse.contiguous()


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
    kernels: AttentionKernels,
    primitives: HeadPrimitives,
    *,
    want_query: bool,
    want_key_value: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """See `gradroute.primitives.protocol.Primitives.attention_backward`."""
    o, *rest = (z, *saved) if sites.forward_heads is None else saved
    d_o, delta = primitives.attention_output_grad(
        dz, o, routes, sites, want_delta=kernels.backward == "tiles"
    )
    dq: Tensor | None
    dk: Tensor | None
    dv: Tensor | None
    edges = (routes, sites.score_edges, sites.value_edges, pattern)
    if kernels.backward == "tiles":
        dq, dk, dv = tiled.attention_backward(
            d_o, q, k, v, o, rest[0], *edges, delta, want_query=want_query, want_key_value=want_key_value
        )
    elif kernels.backward == "fa4":
        dq, dk, dv = fa4.attention_backward(d_o, q, k, v, o, rest[0], *edges)
    else:
        assert kernels.forward is not None
        dq, dk, dv = VENDORS[kernels.forward].backward(d_o, q, k, v, (o, *rest), pattern)
    dq, dk, dv = wanted((dq, want_query), (dk, want_key_value), (dv, want_key_value))
    if dq is not None:
        dq = primitives.masked_heads(dq, routes, sites.query, overwrite=True)
    if dk is not None and dv is not None:
        dk = primitives.masked_heads(dk, routes, sites.key, overwrite=True)
        dv = primitives.masked_heads(dv, routes, sites.value, overwrite=True)
    return dq, dk, dv
