"""routed_gated_mlp: a gated MLP (SwiGLU, GeGLU) as one op with routed gradients; routed_glu: its middle alone."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backends, reference
from .activations import ACTIVATIONS, check_activation
from .checks import (
    autocast,
    check_features,
    check_shape,
    flat,
    masked_forward,
    refuse_double_backward,
    unrouted,
)
from .function import Function
from .mlp import ActivationSites, MLPSites
from .primitives.protocol import Primitives
from .rectangles import Branch, mlp_backward
from .routes import Routes


def routed_gated_mlp(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    routes: Routes | None,
    sites: MLPSites | None,
    activation: str = "silu",
    b_gate: Tensor | None = None,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """y = z W_downᵀ + b_down with z = m_forward ⊙ (act(x W_gateᵀ + b_gate) * (x W_upᵀ + b_up)), and routed gradients.

    The gradients are those of `routed_mlp`, with both branches in the place of the pre-activations: `pre` masks and
    `update_in` confines the updates of both. Saved for backward: x and the two pre-activations; the product is
    recomputed. Without a `forward` table the output equals eager PyTorch's bit for bit.

    Args:
        x: `[*tokens, d_model]`, fp32, bf16, fp16 or fp64.
        w_gate: `[d_ff, d_model]`.
        w_up: `[d_ff, d_model]`.
        w_down: `[d_out, d_ff]`; d_out is usually d_model.
        routes: the batch's routes; None: the ordinary op.
        sites: where to mask; None: the ordinary op.
        activation: "silu", "gelu" (erf), "gelu_tanh", "relu" or "relu2" (squared ReLU).
        b_gate: `[d_ff]` or None.
        b_up: `[d_ff]` or None.
        b_down: `[d_out]` or None.
        backend: see `gradroute.use_backend`; default: the fastest that supports the call.

    Returns:
        `[*tokens, d_out]`.

    Raises:
        ValueError: shapes, devices, tables or the activation do not fit, or `update_output_bias` without a bias.
        BackendError: the requested backend cannot run the call.
        RuntimeError: in backward with create_graph=True.
    """
    check_activation(activation)
    if unrouted(routes, sites, MLPSites):
        h = ACTIVATIONS[activation].value(F.linear(x, w_gate, b_gate)) * F.linear(x, w_up, b_up)
        return F.linear(h, w_down, b_down)
    assert routes is not None and sites is not None
    check_shape("w_gate", w_gate, -1, -1)
    d_ff, d_model = w_gate.shape
    check_features("x", x, d_model, "w_gate is [d_ff, d_model]")
    check_shape("w_up", w_up, d_ff, d_model)
    check_shape("w_down", w_down, -1, d_ff)
    check_shape("b_gate", b_gate, d_ff)
    check_shape("b_up", b_up, d_ff)
    check_shape("b_down", b_down, w_down.shape[0])
    routes.check(x, "x")
    sites.check(routes, MLPSites.widths(w_down.shape[0], d_ff, b_down))
    x, w_gate, w_up, w_down, b_gate, b_up, b_down = autocast(x, w_gate, w_up, w_down, b_gate, b_up, b_down)
    chosen = backends.choose("routed_gated_mlp", backend, x)
    if chosen == "reference":
        return reference.routed_gated_mlp(
            x, w_gate, w_up, w_down, routes, sites, activation, b_gate, b_up, b_down
        )
    y, _, _ = GatedMLPFunction.apply(
        x,
        w_gate,
        w_up,
        w_down,
        b_gate,
        b_up,
        b_down,
        routes,
        sites.effective,
        activation,
        backends.primitives(chosen),
    )
    return y


class GatedMLPFunction(Function):
    """routed_gated_mlp on the primitives of a backend; the pre-activations are outputs too, to be saved."""

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
        primitives: Primitives,
    ) -> tuple[Tensor, Tensor, Tensor]:
        gate, up = F.linear(x, w_gate, b_gate), F.linear(x, w_up, b_up)
        z = (
            ACTIVATIONS[activation].value(gate).mul_(up)
        )  # in place: a fresh matrix costs as much as the product
        z = masked_forward(z, routes, sites.forward, primitives)
        return F.linear(z, w_down, b_down), gate, up

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        x, w_gate, w_up, w_down, _, _, _, ctx.routes, ctx.sites, ctx.activation, ctx.primitives = inputs
        y, gate, up = output
        ctx.output = (y.shape, y.dtype)
        ctx.mark_non_differentiable(gate, up)
        ctx.set_materialize_grads(False)  # of the pre-activations: zeros that nobody reads
        need_x, need_w_gate, need_w_up, need_w_down, need_b_gate, need_b_up, _ = ctx.needs_input_grad[:7]
        need_branches = need_x or need_w_gate or need_w_up or need_b_gate or need_b_up
        need_middle = need_branches or need_w_down
        ctx.save_for_backward(
            x if need_w_gate or need_w_up else None,
            w_gate if need_x else None,
            w_up if need_x else None,
            w_down if need_branches else None,
            gate if need_middle else None,
            up if need_middle else None,
        )

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Any, ...]:
        refuse_double_backward("routed_gated_mlp")
        x, w_gate, w_up, w_down, gate, up = ctx.saved_tensors
        routes, sites, primitives = ctx.routes, ctx.sites, ctx.primitives
        need_x, need_w_gate, need_w_up, need_w_down, need_b_gate, need_b_up, need_b_down = (
            ctx.needs_input_grad[:7]
        )
        dx: Any = None
        dw_gate = dw_up = dw_down = db_gate = db_up = db_down = None
        if dy is None:
            shape, dtype = ctx.output
            dy = torch.zeros(shape, dtype=dtype, device=routes.device)
        g = primitives.masked_product(flat(dy), routes, sites.output)
        if gate is not None:
            branches = [
                Branch(flat(gate), w_gate, need_w_gate, need_b_gate),
                Branch(flat(up), w_up, need_w_up, need_b_up),
            ]
            dx, dw_down = mlp_backward(
                g,
                None if x is None else flat(x),
                branches,
                w_down,
                routes,
                sites,
                ctx.activation,
                primitives.glu_backward,
                primitives,
                need_x=need_x,
                need_w_out=need_w_down,
            )
            (dw_gate, db_gate), (dw_up, db_up) = (branch.results() for branch in branches)
        if need_x:
            dx = dx.view(*dy.shape[:-1], dx.shape[1])
        if need_b_down:
            db_down = primitives.bias_grad(g, routes, sites.update_output_bias)
        return (
            dx,
            dw_gate,
            dw_up,
            dw_down,
            db_gate,
            db_up,
            db_down,
            None,  # routes
            None,  # sites
            None,  # activation
            None,  # primitives
        )


def routed_glu(
    gate: Tensor,
    up: Tensor,
    routes: Routes | None,
    sites: ActivationSites | None,
    activation: str = "silu",
    *,
    backend: str | None = None,
) -> Tensor:
    """z = m_forward ⊙ (act(gate) * up), with routed gradients: the middle of a gated MLP alone.

    With dh = m_hidden ⊙ m_forward ⊙ dz: dgate = m_pre ⊙ dh ⊙ up ⊙ act'(gate), dup = m_pre ⊙ dh ⊙ act(gate).
    For models whose linears must be called, not read: LoRA, tensor-parallel or quantised modules.
    Saved for backward: gate and up.

    Args:
        gate: `[*tokens, d_ff]`, fp32, bf16, fp16 or fp64.
        up: `[*tokens, d_ff]`, of gate's dtype.
        routes: the batch's routes; None: the ordinary op.
        sites: where to mask; None: the ordinary op.
        activation: "silu", "gelu" (erf), "gelu_tanh", "relu" or "relu2" (squared ReLU).
        backend: see `gradroute.use_backend`; default: the fastest that supports the call.

    Returns:
        `[*tokens, d_ff]`.

    Raises:
        ValueError: shapes, devices, dtypes, tables or the activation do not fit.
        BackendError: the requested backend cannot run the call.
        RuntimeError: in backward with create_graph=True.
    """
    check_activation(activation)
    if unrouted(routes, sites, ActivationSites):
        return ACTIVATIONS[activation].value(gate) * up
    assert routes is not None and sites is not None
    check_shape("up", up, *gate.shape)
    if up.dtype != gate.dtype:
        raise ValueError(f"up: got dtype {up.dtype}, expected gate's {gate.dtype}")
    routes.check(gate, "gate")
    sites.check(routes, ActivationSites.widths(gate.shape[-1]))
    chosen = backends.choose("routed_glu", backend, gate)
    if chosen == "reference":
        return reference.routed_glu(gate, up, routes, sites, activation)
    return GLUFunction.apply(gate, up, routes, sites.effective, activation, backends.primitives(chosen))


class GLUFunction(Function):
    """routed_glu on the primitives of a backend."""

    @staticmethod
    def forward(
        gate: Tensor,
        up: Tensor,
        routes: Routes,
        sites: ActivationSites,
        activation: str,
        primitives: Primitives,
    ) -> Tensor:
        z = ACTIVATIONS[activation].value(gate) * up
        return masked_forward(z, routes, sites.forward, primitives)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        gate, up, ctx.routes, ctx.sites, ctx.activation, ctx.primitives = inputs
        ctx.save_for_backward(gate, up)

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Any, ...]:
        refuse_double_backward("routed_glu")
        gate, up = ctx.saved_tensors
        need_gate, need_up = ctx.needs_input_grad[:2]
        dgate, dup, _, _, _ = ctx.primitives.glu_backward(
            flat(dz),
            flat(gate),
            flat(up),
            ctx.routes,
            ctx.sites,
            ctx.activation,
            want_z=False,
            want_bias=False,
        )
        return (
            dgate.view(gate.shape) if need_gate else None,
            dup.view(up.shape) if need_up else None,
            None,  # routes
            None,  # sites
            None,  # activation
            None,  # primitives
        )
