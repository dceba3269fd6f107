"""Backend `reference`: the meaning of every op, in plain PyTorch, one autograd.Function each.

The backwards are the definition line by line: `masked(table, g)` is the masked product m ⊙ g (Cloud et al. 2024,
arXiv 2410.04332, section 3; the update sites are the parameter routing of SGTM, arXiv 2512.05648, per token).
Nothing is fast or small here; in fp64 it is the tests' oracle. T is all tokens; `update_*` sites have their defaults.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import ACTIVATIONS
from .checks import flat
from .function import Context, Function, SitesT
from .norm_forward import rms_norm_eps, rms_norm_value
from .routes import Routes
from .tables import Table
from .transforms import first_order

if TYPE_CHECKING:
    from .attention import AttentionSites
    from .embedding import EmbeddingSites
    from .linear import LinearSites
    from .mlp import ActivationSites, MLPSites
    from .norm import NormSites

Masked = Callable[["Table | None", Tensor], Tensor]


def wide(x: Tensor) -> Tensor:
    """x in the dtype in which products are formed: fp32, or fp64 for fp64."""
    return x if x.dtype == torch.float64 else x.float()


def mask(table: Table, routes: Routes, dtype: torch.dtype) -> Tensor:
    """m[t, f] = W[r_t, f]; with strength lerp(W[0, f], W[r_t, f], s_t). `[T, F]` (or `[T, 1]`)."""
    weights = table.on(routes.device).to(dtype)
    m = weights[routes.ids.long()]
    if routes.strength is None:
        return m
    strength = routes.strength.to(dtype)
    return torch.lerp(weights[0], m, strength[:, None] if strength.dim() else strength)


def masked_by(routes: Routes) -> Masked:
    """The masked product of a batch: m ⊙ g, rounded once to g's dtype, exactly 0 where m = 0; g where no table."""

    def masked(table: Table | None, g: Tensor) -> Tensor:  # g [T, F]
        if table is None:
            return g
        m = mask(table, routes, wide(g).dtype)
        return torch.where(m == 0, 0, m * wide(g)).to(g.dtype)

    return masked


def _shaped(gradient: Tensor, like: Tensor) -> Tensor:
    return gradient.reshape(*like.shape[:-1], gradient.shape[-1])


class Kept(Context, Protocol[SitesT]):
    """The context of an op's Function: the arguments that are no tensors, each where the op has it."""

    routes: Routes
    sites: SitesT
    table: Table
    activation: str
    eps: float
    offset: float
    casting_mode: str
    padding_idx: int | None
    scale: float


class RouteGrad(Function):
    """y = x; dx = m ⊙ dy."""

    @staticmethod
    def forward(x: Tensor, routes: Routes, table: Table) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Kept[Any], inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.routes, ctx.table = inputs

    @staticmethod
    @first_order("route_grad")
    def backward(ctx: Kept[Any], dy: Tensor) -> tuple[Any, ...]:
        masked = masked_by(ctx.routes)
        dx = masked(ctx.table, flat(dy))
        return _shaped(dx, dy), None, None  # ..., routes, table


class Linear(Function):
    """y = x Wᵀ + b."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, routes: Routes, sites: LinearSites) -> Tensor:
        return F.linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Kept[LinearSites], inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, ctx.routes, ctx.sites = inputs
        ctx.save_for_backward(x, weight, bias)

    @staticmethod
    @first_order("routed_linear")
    def backward(ctx: Kept[LinearSites], dy: Tensor) -> tuple[Any, ...]:
        x, weight, bias = ctx.saved_tensors
        masked, sites = masked_by(ctx.routes), ctx.sites
        g = masked(sites.output, flat(dy))
        dx = masked(sites.input, g @ weight)
        dweight = masked(sites.update_rows, g).T @ masked(sites.update_cols, flat(x))
        dbias = None if bias is None else masked(sites.update_bias, g).sum(0)
        return _shaped(dx, x), dweight, dbias, None, None  # ..., routes, sites


class Activation(Function):
    """z = m_forward ⊙ act(a)."""

    @staticmethod
    def forward(a: Tensor, routes: Routes, sites: MLPSites | ActivationSites, activation: str) -> Tensor:
        masked = masked_by(routes)
        h = ACTIVATIONS[activation].value(a)
        return _shaped(masked(sites.forward, flat(h)), a)

    @staticmethod
    def setup_context(ctx: Kept[ActivationSites], inputs: tuple[Any, ...], output: Tensor) -> None:
        a, ctx.routes, ctx.sites, ctx.activation = inputs
        ctx.save_for_backward(a)

    @staticmethod
    @first_order("routed_activation")
    def backward(ctx: Kept[ActivationSites], dz: Tensor) -> tuple[Any, ...]:
        (a,) = ctx.saved_tensors
        masked, sites, act = masked_by(ctx.routes), ctx.sites, ACTIVATIONS[ctx.activation]
        dh = masked(sites.hidden, masked(sites.forward, wide(flat(dz))))
        da = masked(sites.pre, dh * act.derivative(wide(flat(a))))
        return _shaped(da.to(a.dtype), a), None, None, None  # ..., routes, sites, activation


class GLU(Function):
    """z = m_forward ⊙ (act(gate) * up)."""

    @staticmethod
    def forward(
        gate: Tensor, up: Tensor, routes: Routes, sites: MLPSites | ActivationSites, activation: str
    ) -> Tensor:
        masked = masked_by(routes)
        h = ACTIVATIONS[activation].value(gate) * up
        return _shaped(masked(sites.forward, flat(h)), gate)

    @staticmethod
    def setup_context(ctx: Kept[ActivationSites], inputs: tuple[Any, ...], output: Tensor) -> None:
        gate, up, ctx.routes, ctx.sites, ctx.activation = inputs
        ctx.save_for_backward(gate, up)

    @staticmethod
    @first_order("routed_glu")
    def backward(ctx: Kept[ActivationSites], dz: Tensor) -> tuple[Any, ...]:
        gate, up = ctx.saved_tensors
        masked, sites, act = masked_by(ctx.routes), ctx.sites, ACTIVATIONS[ctx.activation]
        gate_wide, up_wide = wide(flat(gate)), wide(flat(up))
        dh = masked(sites.hidden, masked(sites.forward, wide(flat(dz))))
        dgate = masked(sites.pre, dh * up_wide * act.derivative(gate_wide))
        dup = masked(sites.pre, dh * act.value(gate_wide))
        return (
            _shaped(dgate.to(gate.dtype), gate),
            _shaped(dup.to(up.dtype), up),
            None,  # routes
            None,  # sites
            None,  # activation
        )


class MLP(Function):
    """a = x W_inᵀ + b_in; z = m_forward ⊙ act(a); y = z W_outᵀ + b_out."""

    @staticmethod
    def forward(
        x: Tensor,
        w_in: Tensor,
        b_in: Tensor | None,
        w_out: Tensor,
        b_out: Tensor | None,
        routes: Routes,
        sites: MLPSites,
        activation: str,
    ) -> Tensor:
        z = Activation.forward(F.linear(x, w_in, b_in), routes, sites, activation)
        return F.linear(z, w_out, b_out)

    @staticmethod
    def setup_context(ctx: Kept[MLPSites], inputs: tuple[Any, ...], output: Tensor) -> None:
        x, w_in, b_in, w_out, b_out, ctx.routes, ctx.sites, ctx.activation = inputs
        ctx.save_for_backward(x, w_in, b_in, w_out, b_out)

    @staticmethod
    @first_order("routed_mlp")
    def backward(ctx: Kept[MLPSites], dy: Tensor) -> tuple[Any, ...]:
        x, w_in, b_in, w_out, b_out = ctx.saved_tensors
        masked, sites, act = masked_by(ctx.routes), ctx.sites, ACTIVATIONS[ctx.activation]
        a = flat(F.linear(x, w_in, b_in))
        z = masked(sites.forward, act.value(a))
        g = masked(sites.output, flat(dy))
        dw_out = g.T @ masked(sites.update_out, z)
        db_out = None if b_out is None else masked(sites.update_output_bias, g).sum(0)
        dh = masked(sites.hidden, masked(sites.forward, wide(g @ w_out)))
        da = masked(sites.pre, dh * act.derivative(wide(a))).to(a.dtype)
        dx = da @ w_in
        da_update = masked(sites.update_in, da)
        dw_in = da_update.T @ flat(x)
        db_in = None if b_in is None else da_update.sum(0)
        return (
            _shaped(dx, x),
            dw_in,
            db_in,
            dw_out,
            db_out,
            None,  # routes
            None,  # sites
            None,  # activation
        )


class GatedMLP(Function):
    """z = m_forward ⊙ (act(x W_gateᵀ + b_gate) * (x W_upᵀ + b_up)); y = z W_downᵀ + b_down."""

    @staticmethod
    def forward(
        x: Tensor,
        w_gate: Tensor,
        w_up: Tensor,
        w_down: Tensor,
        b_gate: Tensor | None,
        b_up: Tensor | None,
        b_down: Tensor | None,
        routes: Routes,
        sites: MLPSites,
        activation: str,
    ) -> Tensor:
        z = GLU.forward(F.linear(x, w_gate, b_gate), F.linear(x, w_up, b_up), routes, sites, activation)
        return F.linear(z, w_down, b_down)

    @staticmethod
    def setup_context(ctx: Kept[MLPSites], inputs: tuple[Any, ...], output: Tensor) -> None:
        *parameters, ctx.routes, ctx.sites, ctx.activation = inputs
        ctx.save_for_backward(*parameters)

    @staticmethod
    @first_order("routed_gated_mlp")
    def backward(ctx: Kept[MLPSites], dy: Tensor) -> tuple[Any, ...]:
        x, w_gate, w_up, w_down, b_gate, b_up, b_down = ctx.saved_tensors
        masked, sites, act = masked_by(ctx.routes), ctx.sites, ACTIVATIONS[ctx.activation]
        gate, up = flat(F.linear(x, w_gate, b_gate)), flat(F.linear(x, w_up, b_up))
        z = masked(sites.forward, act.value(gate) * up)
        g = masked(sites.output, flat(dy))
        dw_down = g.T @ masked(sites.update_out, z)
        db_down = None if b_down is None else masked(sites.update_output_bias, g).sum(0)
        dh = masked(sites.hidden, masked(sites.forward, wide(g @ w_down)))
        dgate = masked(sites.pre, dh * wide(up) * act.derivative(wide(gate))).to(gate.dtype)
        dup = masked(sites.pre, dh * act.value(wide(gate))).to(up.dtype)
        dx = dgate @ w_gate + dup @ w_up
        dgate_update, dup_update = masked(sites.update_in, dgate), masked(sites.update_in, dup)
        dw_gate, dw_up = dgate_update.T @ flat(x), dup_update.T @ flat(x)
        db_gate = None if b_gate is None else dgate_update.sum(0)
        db_up = None if b_up is None else dup_update.sum(0)
        return (
            _shaped(dx, x),
            dw_gate,
            dw_up,
            dw_down,
            db_gate,
            db_up,
            db_down,
            None,  # routes
            None,  # sites
            None,  # activation
        )


class RMSNorm(Function):
    """y = x̂ ⊙ (w + offset), x̂ = x / sqrt(mean(x²) + eps)."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        routes: Routes,
        sites: NormSites,
        eps: float | None,
        offset: float,
        casting_mode: str,
    ) -> Tensor:
        return rms_norm_value(x, weight, eps, offset, casting_mode)

    @staticmethod
    def setup_context(ctx: Kept[NormSites], inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, ctx.routes, ctx.sites, ctx.eps, ctx.offset, ctx.casting_mode = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    @first_order("routed_rms_norm")
    def backward(ctx: Kept[NormSites], dy: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        masked = masked_by(ctx.routes)
        x_wide, g = wide(flat(x)), wide(flat(dy))
        rstd = torch.rsqrt(x_wide.pow(2).mean(-1, keepdim=True) + rms_norm_eps(ctx.eps, x, ctx.casting_mode))
        x_hat = x_wide * rstd
        x_seen = wide(x_hat.to(x.dtype)) if ctx.casting_mode == "llama" else x_hat  # as it met the weight
        dweight = masked(ctx.sites.update, g * x_seen).sum(0)
        dx_hat = g * (wide(weight) + ctx.offset)
        dx = rstd * (dx_hat - x_hat * (dx_hat * x_hat).mean(-1, keepdim=True))
        return (
            _shaped(dx.to(x.dtype), x),
            dweight.to(weight.dtype),
            None,  # routes
            None,  # sites
            None,  # eps
            None,  # offset
            None,  # casting_mode
        )


class LayerNorm(Function):
    """y = x̂ ⊙ w + b, x̂ = (x - mean(x)) / sqrt(var(x) + eps)."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, routes: Routes, sites: NormSites, eps: float
    ) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)

    @staticmethod
    def setup_context(ctx: Kept[NormSites], inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, ctx.routes, ctx.sites, ctx.eps = inputs
        ctx.save_for_backward(x, weight, bias)

    @staticmethod
    @first_order("routed_layer_norm")
    def backward(ctx: Kept[NormSites], dy: Tensor) -> tuple[Any, ...]:
        x, weight, bias = ctx.saved_tensors
        masked, update = masked_by(ctx.routes), ctx.sites.update
        x_wide, g = wide(flat(x)), wide(flat(dy))
        centered = x_wide - x_wide.mean(-1, keepdim=True)
        rstd = torch.rsqrt(centered.pow(2).mean(-1, keepdim=True) + ctx.eps)
        x_hat = centered * rstd
        dweight = masked(update, g * x_hat).sum(0)
        dbias = None if bias is None else masked(update, g).sum(0).to(bias.dtype)
        dx_hat = g * wide(weight)
        dx = rstd * (dx_hat - dx_hat.mean(-1, keepdim=True) - x_hat * (dx_hat * x_hat).mean(-1, keepdim=True))
        return (
            _shaped(dx.to(x.dtype), x),
            dweight.to(weight.dtype),
            dbias,
            None,  # routes
            None,  # sites
            None,  # eps
        )


class Embedding(Function):
    """y_t = W[token_t]; dW[v] = Σ_{t: token_t = v} m_update ⊙ dy_t, none for padding_idx."""

    @staticmethod
    def forward(
        tokens: Tensor, weight: Tensor, routes: Routes, sites: EmbeddingSites, padding_idx: int | None
    ) -> Tensor:
        return F.embedding(tokens, weight, padding_idx)

    @staticmethod
    def setup_context(ctx: Kept[EmbeddingSites], inputs: tuple[Any, ...], output: Tensor) -> None:
        tokens, weight, ctx.routes, ctx.sites, ctx.padding_idx = inputs
        ctx.save_for_backward(tokens, weight)

    @staticmethod
    @first_order("routed_embedding")
    def backward(ctx: Kept[EmbeddingSites], dy: Tensor) -> tuple[Any, ...]:
        tokens, weight = ctx.saved_tensors
        masked = masked_by(ctx.routes)
        dweight = torch.zeros_like(wide(weight))
        dweight.index_put_(
            (tokens.reshape(-1).long(),), masked(ctx.sites.update, wide(flat(dy))), accumulate=True
        )
        if ctx.padding_idx is not None:
            dweight[ctx.padding_idx] = 0
        return None, dweight.to(weight.dtype), None, None, None  # tokens; ..., routes, sites, padding_idx


def visible_keys(
    queries: int,
    keys: int,
    device: torch.device,
    causal: bool,
    window: int | None,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
) -> Tensor:
    """Which keys a query sees, bool `[B or 1, 1, S_q, S_k]`; causal is aligned at the bottom right."""
    i = torch.arange(queries, device=device)[:, None] + (keys - queries)
    j = torch.arange(keys, device=device)[None, :]
    visible = torch.ones(queries, keys, dtype=torch.bool, device=device)
    if causal:
        visible &= j <= i
    if window is not None:
        visible &= i - j < window
        if not causal:
            visible &= j - i < window
    if cu_seqlens is not None:
        document = torch.searchsorted(cu_seqlens.long()[1:].contiguous(), j.flatten(), right=True)
        visible &= document[i] == document[None, :]
    visible = visible[None, None]
    return visible if key_mask is None else visible & key_mask[:, None, None, :]


def _heads_first(m: Tensor, batch: int) -> Tensor:  # [T, H] → [B, H, S, 1]
    return m.reshape(batch, -1, m.shape[-1]).transpose(1, 2).unsqueeze(-1)


class Attention(Function):
    """S = scale q kᵀ; P = softmax(S); o = P v; z = m_forward_heads ⊙ o."""

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, routes: Routes, sites: AttentionSites, visible: Tensor, scale: float
    ) -> Tensor:
        masked = Attention.masked_by_head(routes, q)
        _, o = Attention.probabilities_and_output(q, k, v, visible, scale)
        return masked(sites.forward_heads, o.to(q.dtype))

    @staticmethod
    def masked_by_head(routes: Routes, q: Tensor) -> Masked:
        """The masked product for `[B, H, S, D]` and tables `[R, H]`."""

        def masked(table: Table | None, g: Tensor) -> Tensor:
            if table is None:
                return g
            m = _heads_first(mask(table, routes, wide(g).dtype), q.shape[0])
            return torch.where(m == 0, 0, m * wide(g)).to(g.dtype)

        return masked

    @staticmethod
    def probabilities_and_output(
        q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """P `[B, H, S, S]` and o `[B, H, S, D]`, in fp32 or fp64; a query that sees no key gives 0."""
        group = q.shape[1] // k.shape[1]
        k_wide, v_wide = (wide(t).repeat_interleave(group, 1) for t in (k, v))
        scores = scale * wide(q) @ k_wide.mT
        p = torch.softmax(scores.masked_fill(~visible, float("-inf")), -1)
        p = torch.where(visible.any(-1, keepdim=True), p, 0)
        return p, p @ v_wide

    @staticmethod
    def setup_context(ctx: Kept[AttentionSites], inputs: tuple[Any, ...], output: Tensor) -> None:
        q, k, v, ctx.routes, ctx.sites, visible, ctx.scale = inputs
        ctx.save_for_backward(q, k, v, visible)

    @staticmethod
    @first_order("routed_attention")
    def backward(ctx: Kept[AttentionSites], dz: Tensor) -> tuple[Any, ...]:
        q, k, v, visible = ctx.saved_tensors
        masked, sites, scale = Attention.masked_by_head(ctx.routes, q), ctx.sites, ctx.scale
        group = q.shape[1] // k.shape[1]
        p, o = Attention.probabilities_and_output(q, k, v, visible, scale)
        do = masked(sites.heads, masked(sites.forward_heads, wide(dz)))
        dv = Attention.edged(sites.value_edges, ctx.routes, p).mT @ do
        dp = do @ wide(v).repeat_interleave(group, 1).mT
        ds = p * (dp - (do * o).sum(-1, keepdim=True))
        ds = Attention.edged(sites.score_edges, ctx.routes, ds)
        dq = masked(sites.query, scale * ds @ wide(k).repeat_interleave(group, 1))
        dk = scale * ds.mT @ wide(q)
        dk, dv = (t.unflatten(1, (-1, group)).sum(2) for t in (dk, dv))
        dk, dv = masked(sites.key, dk), masked(sites.value, dv)
        return (
            dq.to(q.dtype),
            dk.to(k.dtype),
            dv.to(v.dtype),
            None,  # routes
            None,  # sites
            None,  # visible
            None,  # scale
        )

    @staticmethod
    def edged(table: Table | None, routes: Routes, a: Tensor) -> Tensor:
        """E[query's route, key's route] ⊙ a, `[B, H, S, S]`; ids alone, strength has no part in it."""
        if table is None:
            return a
        ids = routes.ids.reshape(a.shape[0], -1).long()
        edges = table.on(a.device).to(a.dtype)[ids[:, :, None], ids[:, None, :]].unsqueeze(1)
        return torch.where(edges == 0, 0, edges * a)


# The ops with the public functions' arguments, less `backend`. Arguments are checked by the public functions.


def route_grad(x: Tensor, routes: Routes, table: Table) -> Tensor:
    """See `gradroute.route_grad`."""
    return RouteGrad.apply(x, routes, table)


def routed_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, routes: Routes, sites: LinearSites
) -> Tensor:
    """See `gradroute.routed_linear`."""
    return Linear.apply(x, weight, bias, routes, sites.effective)


def routed_activation(a: Tensor, routes: Routes, sites: ActivationSites, activation: str) -> Tensor:
    """See `gradroute.routed_activation`."""
    return Activation.apply(a, routes, sites.effective, activation)


def routed_glu(
    gate: Tensor, up: Tensor, routes: Routes, sites: ActivationSites, activation: str = "silu"
) -> Tensor:
    """See `gradroute.routed_glu`."""
    return GLU.apply(gate, up, routes, sites.effective, activation)


def routed_mlp(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    routes: Routes,
    sites: MLPSites,
    activation: str = "gelu",
) -> Tensor:
    """See `gradroute.routed_mlp`."""
    return MLP.apply(x, w_in, b_in, w_out, b_out, routes, sites.effective, activation)


def routed_gated_mlp(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    routes: Routes,
    sites: MLPSites,
    activation: str = "silu",
    b_gate: Tensor | None = None,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
) -> Tensor:
    """See `gradroute.routed_gated_mlp`."""
    return GatedMLP.apply(x, w_gate, w_up, w_down, b_gate, b_up, b_down, routes, sites.effective, activation)


def routed_rms_norm(
    x: Tensor,
    weight: Tensor,
    routes: Routes,
    sites: NormSites,
    eps: float | None = 1e-6,
    offset: float = 0.0,
    casting_mode: str = "torch",
) -> Tensor:
    """See `gradroute.routed_rms_norm`."""
    return RMSNorm.apply(x, weight, routes, sites.effective, eps, offset, casting_mode)


def routed_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, routes: Routes, sites: NormSites, eps: float = 1e-5
) -> Tensor:
    """See `gradroute.routed_layer_norm`."""
    return LayerNorm.apply(x, weight, bias, routes, sites.effective, eps)


def routed_embedding(
    tokens: Tensor, weight: Tensor, routes: Routes, sites: EmbeddingSites, padding_idx: int | None = None
) -> Tensor:
    """See `gradroute.routed_embedding`."""
    return Embedding.apply(tokens, weight, routes, sites.effective, padding_idx)


def routed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    routes: Routes,
    sites: AttentionSites,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """See `gradroute.routed_attention`."""
    visible = visible_keys(q.shape[2], k.shape[2], q.device, causal, window, cu_seqlens, key_mask)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return Attention.apply(q, k, v, routes, sites.effective, visible, scale)
