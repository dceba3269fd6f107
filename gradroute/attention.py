"""routed_attention: attention whose gradients are masked per token, per head, and per edge between routes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from . import backends, reference
from .arguments import check_bool, check_int, check_number
from .backends import attention_plan
from .backends.attention_plan import Plan
from .checks import autocast, check_kind, check_shape, unrouted
from .context_parallel import refuse_context_parallel
from .documents import check_documents, check_packing
from .function import Context, Function
from .primitives import attention_edges
from .primitives.attention_kernels import AttentionKernels
from .primitives.attention_pattern import Pattern
from .primitives.protocol import Primitives
from .routes import Routes
from .sites import Site, Sites, site
from .transforms import first_order


@dataclass(frozen=True, eq=False, repr=False)
class AttentionSites(Sites):
    """Where attention masks. H query heads, G key and value heads; tables may be `[R, 1]`; None: no mask.

    Attributes:
        query: `[R, H]`, the gradient of q.
        key: `[R, G]`, the gradient of k.
        value: `[R, G]`, the gradient of v.
        heads: `[R, H]`, the gradient of each head's output.
        forward_heads: `[R, H]`, each head's output itself, in forward, and so its gradient.
        score_edges: `[R, R]`, [query token's route, key token's route]: whether the gradient of a score flows. Edges
            are between at most 64 routes; a strength has no part in them.
        value_edges: `[R, R]`: whether a value learns from the query that read it.
        update: shorthand for `update_q`, `update_kv` and `update_out`, where they are not given.
        update_q: `[R, H]`, which heads' rows of the query projection a token may update.
        update_kv: `[R, G]`, which heads' rows of the key and value projections a token may update.
        update_out: `[R, H]`, which heads' columns of the output projection a token may update.
        update_output_bias: `[R, d_model]`, which entries of the output projection's bias a token may update.
    """

    query: Site = site("heads")
    key: Site = site("kv_heads")
    value: Site = site("kv_heads")
    heads: Site = site("heads")
    forward_heads: Site = site("heads")
    score_edges: Site = site("num_routes")
    value_edges: Site = site("num_routes")
    update: Site = site("projections")
    update_q: Site = site("projections", default="update")
    update_kv: Site = site("projections", default="update")
    update_out: Site = site("projections", default="update")
    update_output_bias: Site = site("projections")

    def check_edges(self, num_routes: int) -> None:
        """Raises unless tables of edges are `[R, R]` and R is no more than edges can have."""
        for name in ("score_edges", "value_edges"):
            table = self.tables.get(name)
            if table is None:
                continue
            if table.features != num_routes:
                raise ValueError(
                    f"AttentionSites.{name}: got a table of {table.features} columns, expected [R, R] with a column "
                    f"per key's route, R = {num_routes}"
                )
            if num_routes > attention_edges.MAX_ROUTES:
                raise ValueError(
                    f"AttentionSites.{name}: got {num_routes} routes, expected at most "
                    f"{attention_edges.MAX_ROUTES} where there are edges"
                )

    @staticmethod
    def widths(num_routes: int, heads: int, kv_heads: int) -> dict[str, int | str]:
        """The widths of functional attention of this shape, as `check` takes them."""
        return {
            "heads": heads,
            "kv_heads": kv_heads,
            "num_routes": num_routes,
            "projections": "it concerns a projection, which only layers and models see",
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
    """z = m_forward_heads ⊙ softmax(scale q kᵀ) v, with routed gradients (Cloud et al. 2024, arXiv 2410.04332).

    From dz: do = m_forward_heads ⊙ m_heads ⊙ dz; dv = m_value ⊙ (E_value ⊙ P)ᵀ do; dS = P ⊙ (do vᵀ - rowsum(do ⊙ o));
    dS' = E_score ⊙ dS; dq = m_query ⊙ scale dS' k; dk = m_key ⊙ scale dS'ᵀ q, summed over the heads of a group.
    Saved for backward: q, k, v, the output, the unmasked one too where forward_heads asks for it, and the scores'
    log-sum-exp; memory grows with the sequence, not its square.
    `explain` says which kernels run a call, and why.

    Args:
        q: `[B, H, S_q, D]`, fp32, bf16, fp16 or fp64.
        k: `[B, G, S_k, D]`, of q's dtype; H is a multiple of G.
        v: `[B, G, S_k, D]`, of q's dtype.
        routes: the routes of the tokens `[B, S_q]`; None: ordinary attention.
        sites: where to mask; None: ordinary attention. With routes and sites S_q = S_k where a gradient is asked for.
        causal: a query sees no later key; aligned at the bottom right where S_q ≠ S_k.
        window: key j is visible only if i - j < window (and j - i < window when not causal).
        scale: the factor of the scores; default 1/√D.
        cu_seqlens: `[documents + 1]` int32, for a batch of one: attention stays inside documents. The bounds ascend
            from 0 to S, so padding at the end is a document too. On CUDA and in compiled code their values are checked
            without a wait, by `torch._assert_async`.
        key_mask: `[B, S_k]` bool; False keys are padding.
        dropout: the share of P that is dropped, in [0, 1), where a vendor's kernel on CUDA runs the call.
        backend: see `gradroute.use_backend`; default: the fastest that supports the call.

    Returns:
        `[B, H, S_q, D]`; a query that sees no key gives 0.

    Raises:
        TypeError: routes, sites or a tensor are not what they should be.
        ValueError: shapes, devices, dtypes, tables or options do not fit.
        BackendError: the requested backend, or none, can run the call.
        RuntimeError: in backward with create_graph=True; under torch's context_parallel.
    """
    refuse_context_parallel()
    pattern = checked_pattern(q, k, causal, window, scale, dropout, cu_seqlens, key_mask)
    call = AttentionCall.of(q, k, v, routes, sites, pattern)
    plan = attention_plan.plan(call, backend)
    if plan.backend == "reference":
        return _by_reference(call)
    if cu_seqlens is not None and not torch.compiler.is_compiling() and torch._C._is_tracing():
        raise ValueError(
            "cu_seqlens: got bounds of documents under torch.jit.trace, which cannot record what kernels keep of them, "
            "expected None, or backend='reference', or torch.compile"
        )
    kernels = AttentionKernels(plan.vendor, plan.backward)
    z, *_ = AttentionFunction.apply(*call, kernels, backends.primitives(plan.backend))
    return z


def explain(
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
) -> Plan:
    """Which kernels `routed_attention` runs the same call's forward and backward on, and why; runs nothing.

    It takes the same arguments and raises the same errors.

    Returns:
        The call's backend, the vendor's kernel of its forward (None: the backend's own, or tiles of torch's products),
        whose kernels run its backward ("vendor", "fa4", "own" or "tiles"), and the reason.
    """
    pattern = checked_pattern(q, k, causal, window, scale, dropout, cu_seqlens, key_mask)
    return attention_plan.plan(AttentionCall.of(q, k, v, routes, sites, pattern), backend)


def checked_pattern(
    q: Tensor,
    k: Tensor,
    causal: bool,
    window: int | None,
    scale: float | None,
    dropout: float,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
) -> Pattern:
    """The checked pattern of a call with q `[B, H, S_q, D]` and k `[B, G, S_k, D]`; no scale is 1/√D.

    Raises:
        ValueError: an option does not fit q and k, whose numbers of dimensions, batch and D are checked with it.
    """
    check_shape("q", q, -1, -1, -1, -1)
    check_shape("k", k, q.shape[0], -1, -1, q.shape[3])
    check_bool("causal", causal)
    if window is not None and (type(window) is not int or window < 1):
        check_int("window", window, 1)
    if scale is not None and (type(scale) is not float or not -math.inf < scale < math.inf):
        check_number("scale", scale)
    if type(dropout) is not float or not 0.0 <= dropout < 1.0:
        check_number("dropout", dropout)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: got {dropout}, expected a share of P in [0, 1)")
    if cu_seqlens is not None:
        check_packing(cu_seqlens, q, k)
    if key_mask is not None:
        check_shape("key_mask", key_mask, k.shape[0], k.shape[2])
        check_kind("key_mask", key_mask, torch.bool, q.device)
    return Pattern(
        causal, window, q.shape[3] ** -0.5 if scale is None else scale, dropout, cu_seqlens, key_mask
    )


class AttentionCall(NamedTuple):
    """One call of attention, checked: what decides which kernels run it, and what they are given.

    Attributes:
        q: `[B, H, S_q, D]`, in autocast's dtype where that is enabled.
        k: `[B, G, S_k, D]`, of q's dtype, on its device.
        v: `[B, G, S_k, D]`, of q's dtype, on its device.
        routes: the routes of the tokens `[B, S_q]`; None: ordinary attention.
        sites: effective ones, without a table where attention is ordinary.
        pattern: which keys a query sees.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    routes: Routes | None
    sites: AttentionSites
    pattern: Pattern

    @staticmethod
    def of(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        routes: Routes | None,
        sites: AttentionSites | None,
        pattern: Pattern,
    ) -> AttentionCall:
        """Checks what a public function was given, whose options `pattern` has checked.

        Raises:
            TypeError: routes or sites are not what they should be.
            ValueError: shapes, devices, dtypes or tables do not fit.
        """
        is_ordinary = unrouted(routes, sites, AttentionSites)
        heads, kv_heads, keys = q.shape[1], *k.shape[1:3]
        check_shape("v", v, q.shape[0], kv_heads, keys, q.shape[3])
        if kv_heads == 0 or heads % kv_heads:
            raise ValueError(f"k: got {kv_heads} heads, expected a divisor of q's {heads} heads")
        given = routes
        if is_ordinary:
            routes, sites = None, _NO_SITES
        else:
            assert routes is not None and sites is not None
            _check_routed(q, k, v, routes, sites)
        if pattern.cu_seqlens is not None:
            check_documents(pattern.cu_seqlens, keys, given)
        q, k, v = autocast(q, k, v)
        for name, other in (("k", k), ("v", v)):
            if other.dtype != q.dtype or other.device != q.device:
                raise ValueError(
                    f"{name}: got {other.dtype} on {other.device}, expected q's {q.dtype} on {q.device}"
                )
        return AttentionCall(q, k, v, routes, sites.effective, pattern)


_NO_SITES = AttentionSites()


def _check_routed(q: Tensor, k: Tensor, v: Tensor, routes: Routes, sites: AttentionSites) -> None:
    heads, queries, kv_heads, keys = *q.shape[1:3], *k.shape[1:3]
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    if queries != keys and needs_grad:
        raise ValueError(
            f"q: got {queries} queries for {keys} keys; routed attention expects as many where a gradient is asked for"
        )
    routes.check_tokens((q.shape[0], queries), q, "q")
    sites.check(routes, AttentionSites.widths(routes.num_routes, heads, kv_heads))
    sites.check_edges(routes.num_routes)


def _by_reference(call: AttentionCall) -> Tensor:
    q, k, v, routes, sites, pattern = call
    if routes is None:
        ids = torch.zeros(q.shape[0], q.shape[2], dtype=torch.int32, device=q.device)
        routes = Routes.of(ids, 1, validate=False)
    causal, window, scale, _, cu_seqlens, key_mask = pattern
    return reference.routed_attention(q, k, v, routes, sites, causal, window, scale, cu_seqlens, key_mask)


class AttentionContext(Context, Protocol):
    """The context of routed_attention's Function.

    Attributes:
        routes: the batch's routes, or None.
        sites: effective sites.
        pattern: which keys a query sees.
        kernels: the kernels that ran the forward and are to run the backward.
        primitives: the backend's.
        versions: how often what the backward reads of the pattern was written to, by name.
    """

    routes: Routes | None
    sites: AttentionSites
    pattern: Pattern
    kernels: AttentionKernels
    primitives: Primitives
    versions: dict[str, int]


def _versions(pattern: Pattern, kernels: AttentionKernels) -> dict[str, int]:
    """The versions of the tensors of a pattern that a backward reads again.

    Compiled code has its own check of what it keeps, and nobody counts what is written to inference tensors. Own
    kernels keep what the forward found of cu_seqlens.
    """
    if torch.compiler.is_compiling():
        return {}
    read = {"key_mask": pattern.key_mask}
    if kernels.backward != "own":
        read["cu_seqlens"] = pattern.cu_seqlens
    return {name: t._version for name, t in read.items() if t is not None and not t.is_inference()}


def _check_versions(before: dict[str, int], now: dict[str, int]) -> None:
    for name, version in before.items():
        if now.get(name, version) != version:
            raise RuntimeError(
                f"{name}: got a tensor that was written to after the forward (version {version}, now {now[name]}), "
                f"expected it as it was until the backward"
            )


class AttentionFunction(Function):
    """routed_attention on the primitives of a backend; what its backward needs of the forward are further outputs."""

    @staticmethod
    def forward(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        routes: Routes | None,
        sites: AttentionSites,
        pattern: Pattern,
        kernels: AttentionKernels,
        primitives: Primitives,
    ) -> tuple[Tensor, ...]:
        z, saved = primitives.attention_forward(q, k, v, routes, sites, pattern, kernels)
        return z, *saved

    @staticmethod
    def setup_context(ctx: AttentionContext, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        q, k, v, ctx.routes, ctx.sites, ctx.pattern, ctx.kernels, ctx.primitives = inputs
        z, *saved = output
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)  # the saved outputs' gradients would be zeros that nobody reads
        if any(ctx.needs_input_grad[:3]):
            ctx.save_for_backward(q, k, v, z, *saved)
            ctx.versions = _versions(ctx.pattern, ctx.kernels)

    @staticmethod
    @first_order("routed_attention")
    def backward(ctx: AttentionContext, dz: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        q, k, v, z, *saved = ctx.saved_tensors
        _check_versions(ctx.versions, _versions(ctx.pattern, ctx.kernels))
        need_q, need_k, need_v = ctx.needs_input_grad[:3]
        dq, dk, dv = ctx.primitives.attention_backward(
            torch.zeros_like(z) if dz is None else dz,
            q,
            k,
            v,
            z,
            tuple(saved),
            ctx.routes,
            ctx.sites,
            ctx.pattern,
            ctx.kernels,
            want_query=need_q,
            want_key_value=need_k or need_v,
        )
        return (
            dq,
            dk if need_k else None,
            dv if need_v else None,
            None,  # routes
            None,  # sites
            None,  # pattern
            None,  # kernels
            None,  # primitives
        )
