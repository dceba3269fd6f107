"""Routed attention's own kernels beside those of attention: masks by (token, head), and delta = rowsum(do ⊙ o)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...primitives.arguments import product_dtype, tokens_of, weights_on
from ...primitives.attention_kernels import AttentionKernels
from ...primitives.attention_pattern import Pattern
from ...primitives.overwriting import may_overwrite
from ...primitives.protocol import AttentionTables
from ...primitives.registration import kernel_op
from ...routes import Routes
from ...tables import Table
from .. import attention, composed
from . import attention as primitives  # this module, as the shared algorithm takes it
from .launch import launch
from .operands import DeltaOperands, HeadMasks, HeadOperands, Mask, Routing, Weights


def masked_heads(x: Tensor, routes: Routes | None, table: Table | None, *, overwrite: bool = False) -> Tensor:
    if table is None:
        return x
    assert routes is not None
    masks = (*tokens_of(routes), table.on(x.device))
    if overwrite and may_overwrite(x):
        masked_heads_in_place_op(x, *masks)
        return x
    return masked_heads_op(x, *masks)


@kernel_op("native_masked_heads(Tensor x, Tensor ids, Tensor? strength, Tensor weights) -> Tensor")
def masked_heads_op(x: Tensor, ids: Tensor, strength: Tensor | None, weights: Tensor) -> Tensor:
    """The op behind `masked_heads`."""
    out = torch.empty_like(x)
    launch("masked_heads", HeadOperands(x, out, Mask.of(ids, strength, weights)))
    return out


@kernel_op("native_masked_heads_(Tensor(a!) x, Tensor ids, Tensor? strength, Tensor weights) -> ()")
def masked_heads_in_place_op(x: Tensor, ids: Tensor, strength: Tensor | None, weights: Tensor) -> None:
    """The op behind `masked_heads` where it overwrites."""
    launch("masked_heads", HeadOperands(x, x, Mask.of(ids, strength, weights)))


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routes: Routes | None,
    sites: AttentionTables,
    pattern: Pattern,
    kernels: AttentionKernels,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    return attention.forward(q, k, v, routes, sites, pattern, kernels, primitives)


def attention_output_grad(
    dz: Tensor, o: Tensor, routes: Routes | None, sites: AttentionTables, *, want_delta: bool
) -> tuple[Tensor, Tensor | None]:
    """Both masks and delta in one pass; otherwise as `gradroute.backends.composed.attention_output_grad`."""
    has_both = sites.heads is not None and sites.forward_heads is not None
    if routes is None or not (want_delta or has_both):
        return composed.attention_output_grad(dz, o, routes, sites, want_delta=False)
    has_any = sites.heads is not None or sites.forward_heads is not None
    tables = weights_on(dz.device, sites.heads, sites.forward_heads)
    d_o, delta = attention_delta_op(dz, o, *tokens_of(routes), *tables)
    return d_o if has_any else dz, delta


@kernel_op(
    "native_attention_delta(Tensor dz, Tensor o, Tensor ids, Tensor? strength, Tensor? heads, Tensor? forward_heads) "
    "-> (Tensor, Tensor)"
)
def attention_delta_op(
    dz: Tensor,
    o: Tensor,
    ids: Tensor,
    strength: Tensor | None,
    heads: Tensor | None,
    forward_heads: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The op behind `attention_output_grad`; d_o has no elements where there is no table."""
    has_tables = heads is not None or forward_heads is not None
    d_o = torch.empty_like(dz) if has_tables else dz.new_empty(0)
    delta = dz.new_empty(dz.shape[:3], dtype=product_dtype(dz.dtype))
    masks = HeadMasks(Routing(ids, strength), Weights(heads), Weights(forward_heads))
    launch(
        "attention_delta",
        DeltaOperands(dz, o, d_o if has_tables else None, delta.flatten(0, 1), masks),
    )
    return d_o, delta


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
    return attention.backward(
        dz,
        q,
        k,
        v,
        z,
        saved,
        routes,
        sites,
        pattern,
        kernels,
        primitives,
        want_query=want_query,
        want_key_value=want_key_value,
    )
