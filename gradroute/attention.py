"""routed_attention: attention whose gradients are masked per token, per head, and per edge between routes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from . import backends, reference
from .border import check_shape, unrouted
from .routes import Routes
from .sites import Sites
from .tables import TableLike


@dataclass(frozen=True, eq=False, repr=False)
class AttentionSites(Sites):
    """Where attention masks. H query heads, G key and value heads; tables may be `[R, 1]`; None: no mask.

    Attributes:
        query: `[R, H]`, the gradient of q.
        key: `[R, G]`, the gradient of k.
        value: `[R, G]`, the gradient of v.
        heads: `[R, H]`, the gradient of each head's output.
        forward_heads: `[R, H]`, each head's output itself, in forward, and so its gradient.
        score_edges: `[R, R]`, [query token's route, key token's route]: whether the gradient of a score flows.
        value_edges: `[R, R]`: whether a value learns from the query that read it.
        update: shorthand for `update_q`, `update_kv` and `update_out`, where they are not given.
        update_q: `[R, H]`, which heads' rows of the query projection a token may update.
        update_kv: `[R, G]`, which heads' rows of the key and value projections a token may update.
        update_out: `[R, H]`, which heads' columns of the output projection a token may update.
        update_output_bias: `[R, d_model]`, which entries of the output projection's bias a token may update.
    """

    query: TableLike | None = None
    key: TableLike | None = None
    value: TableLike | None = None
    heads: TableLike | None = None
    forward_heads: TableLike | None = None
    score_edges: TableLike | None = None
    value_edges: TableLike | None = None
    update: TableLike | None = None
    update_q: TableLike | None = None
    update_kv: TableLike | None = None
    update_out: TableLike | None = None
    update_output_bias: TableLike | None = None

    defaults: ClassVar[dict[str, str]] = {
        "update_q": "update",
        "update_kv": "update",
        "update_out": "update",
    }

    @staticmethod
    def widths(num_routes: int, heads: int, kv_heads: int) -> dict[str, int | str]:
        """Each site's number of columns, or the reason why functional attention cannot honour it."""
        projections = ("update", "update_q", "update_kv", "update_out", "update_output_bias")
        reason = "it concerns a projection, which only layers and models see"
        return dict.fromkeys(projections, reason) | {
            "query": heads,
            "key": kv_heads,
            "value": kv_heads,
            "heads": heads,
            "forward_heads": heads,
            "score_edges": num_routes,
            "value_edges": num_routes,
        }


def routed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routes: Routes | None,
    sites: AttentionSites | None,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    key_mask: Tensor | None = None,
    dropout: float = 0.0,
    *,
    backend: str | None = None,
) -> Tensor:
    """z = m_forward_heads ⊙ softmax(scale q kᵀ) v, with routed gradients.

    From dz: do = m_forward_heads ⊙ m_heads ⊙ dz; dv = m_value ⊙ (E_value ⊙ P)ᵀ do; dS = P ⊙ (do vᵀ - rowsum(do ⊙ o));
    dS' = E_score ⊙ dS; dq = m_query ⊙ scale dS' k; dk = m_key ⊙ scale dS'ᵀ q, summed over the heads of a group.
    Only the backend `reference` exists so far: its memory grows with S², and it says so once.

    Args:
        q: `[B, H, S_q, D]`, fp32, bf16, fp16 or fp64.
        k: `[B, G, S_k, D]`; H is a multiple of G.
        v: `[B, G, S_k, D]`.
        routes: of the tokens `[B, S]`, with S_q = S_k; None: ordinary attention.
        sites: where to mask; None: ordinary attention.
        causal: a query sees no later key; aligned at the bottom right where S_q ≠ S_k.
        window: key j is visible only if i - j < window (and j - i < window when not causal).
        scale: of the scores; default 1/√D.
        cu_seqlens: `[documents + 1]` int32, for a batch of one: attention stays inside documents.
        key_mask: `[B, S_k]` bool; False keys are padding.
        dropout: must be 0: no backend applies it yet.
        backend: see `gradroute.use_backend`; default: the fastest that supports the call.

    Returns:
        `[B, H, S_q, D]`; a query that sees no key gives 0.

    Raises:
        ValueError: shapes, devices, tables or options do not fit.
        BackendError: the requested backend cannot run the call.
        RuntimeError: in backward with create_graph=True.
    """
    is_ordinary = unrouted(routes, sites, AttentionSites)
    check_shape("q", q, -1, -1, -1, -1)
    batch, heads, queries, head_dim = q.shape
    check_shape("k", k, batch, -1, -1, head_dim)
    kv_heads, keys = k.shape[1:3]
    check_shape("v", v, batch, kv_heads, keys, head_dim)
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"k: got {kv_heads} heads, expected a divisor of q's {heads} heads")
    _check_options(batch, keys, window, cu_seqlens, key_mask, dropout)
    if is_ordinary:
        routes = Routes.of(torch.zeros(batch, queries, dtype=torch.int32, device=q.device), 1, validate=False)
        sites = AttentionSites()
    assert routes is not None and sites is not None
    if not is_ordinary:
        if queries != keys:
            raise ValueError(
                f"q: got {queries} queries for {keys} keys; routed attention expects as many as keys"
            )
        routes.check(q[:, 0], "q[:, 0]")
        _check_sites(sites, routes, heads, kv_heads)
    backends.choose("routed_attention", backend, q)
    return reference.routed_attention(q, k, v, routes, sites, causal, window, scale, cu_seqlens, key_mask)


def _check_options(
    batch: int,
    keys: int,
    window: int | None,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
    dropout: float,
) -> None:
    if window is not None and window < 1:
        raise ValueError(f"window: got {window}, expected a positive number of keys or None")
    if dropout != 0.0:
        raise ValueError(
            f"dropout: got {dropout}, expected 0.0: no backend of routed_attention applies dropout"
        )
    if cu_seqlens is not None:
        check_shape("cu_seqlens", cu_seqlens, -1)
        if batch != 1:
            raise ValueError(f"cu_seqlens: got a batch of {batch}, expected a batch of one packed sequence")
    if key_mask is not None:
        check_shape("key_mask", key_mask, batch, keys)
        if key_mask.dtype != torch.bool:
            raise ValueError(f"key_mask: got dtype {key_mask.dtype}, expected torch.bool")


def _check_sites(sites: AttentionSites, routes: Routes, heads: int, kv_heads: int) -> None:
    sites.check(routes, AttentionSites.widths(routes.num_routes, heads, kv_heads))
    for name in ("score_edges", "value_edges"):
        table = sites.tables.get(name)
        if table is not None and table.features != routes.num_routes:
            raise ValueError(
                f"AttentionSites.{name}: got a table of {table.features} columns, expected [R, R] with a column per "
                f"key's route, R = {routes.num_routes}"
            )
