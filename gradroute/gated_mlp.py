"""routed_gated_mlp: a gated MLP (SwiGLU, GeGLU) as one op with routed gradients; routed_glu: its middle alone."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from . import backends, reference
from .activations import ACTIVATIONS, check_activation
from .checks import (
    autocast,
    check_dtype,
    check_features,
    check_matrix,
    check_parameter,
    check_shape,
    check_tensor,
    unrouted,
)
from .mlp import ActivationFunction, ActivationSites, MLPFunction, MLPSites
from .routes import Routes
from .skipping.mlp import MLPProduct
from .skipping.plan import Plan, plan, unmasked


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
        activation: "silu", "gelu" (erf), "gelu_tanh", "gelu_new", "gelu_fast" (both tanh too, with the rounding of
            transformers' modules of these names), "relu" or "relu2" (squared ReLU).
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
        backends.check_backend(backend)
        h = ACTIVATIONS[activation].value(F.linear(x, w_gate, b_gate)) * F.linear(x, w_up, b_up)
        return F.linear(h, w_down, b_down)
    assert routes is not None and sites is not None
    _check(x, w_gate, w_up, w_down, routes, sites, b_gate, b_up, b_down)
    x, w_gate, w_up, w_down, b_gate, b_up, b_down = autocast(x, w_gate, w_up, w_down, b_gate, b_up, b_down)
    chosen = backends.choose("routed_gated_mlp", backend, x)
    if chosen == "reference":
        return reference.routed_gated_mlp(
            x, w_gate, w_up, w_down, routes, sites, activation, b_gate, b_up, b_down
        )
    primitives = backends.primitives(chosen)
    y, _, _ = MLPFunction.apply(
        x, w_down, b_down, routes, sites.effective, activation, primitives, w_gate, w_up, b_gate, b_up
    )
    return y


def explain(
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
) -> Plan:
    """Which backend `routed_gated_mlp` runs the same call on, and how its backward makes its products; runs nothing.

    It takes the same arguments and raises gradroute's own errors about them. What PyTorch's op refuses is not checked:
    other dtypes of a weight, and without routes or sites all shapes. It describes a call in which every tensor needs a
    gradient; a product that no gradient needs is not made.

    Returns:
        The call's backend with the reason, and whether all products are made whole, as rectangles or grouped, why, how
        much of their work is done, and whether that was measured here. Compiled code, which depends on no counts, makes
        no rectangles.
    """
    check_activation(activation)
    if unrouted(routes, sites, MLPSites):
        return unmasked(("all",), backend)
    assert routes is not None and sites is not None
    _check(x, w_gate, w_up, w_down, routes, sites, b_gate, b_up, b_down)
    (x,) = autocast(x)
    product = MLPProduct(sites.effective, *w_gate.shape, w_down.shape[0])
    return plan("gated_mlp", x, routes, {"all": product}, backend)


def _check(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    routes: Routes,
    sites: MLPSites,
    b_gate: Tensor | None,
    b_up: Tensor | None,
    b_down: Tensor | None,
) -> None:
    d_ff, d_model = check_matrix("w_gate", w_gate)
    check_features("x", x, d_model, "w_gate is [d_ff, d_model]", w_gate)
    if x.dtype is not w_gate.dtype:
        check_dtype("x", x, w_gate)
    check_parameter("w_up", w_up, d_ff, d_model)
    d_out, _ = check_matrix("w_down", w_down, d_ff)
    if b_gate is not None:
        check_parameter("b_gate", b_gate, d_ff)
    if b_up is not None:
        check_parameter("b_up", b_up, d_ff)
    if b_down is not None:
        check_parameter("b_down", b_down, d_out)
    routes.check(x, "x")
    sites.check(routes, MLPSites.widths(d_out, d_ff, b_down))


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
        activation: "silu", "gelu" (erf), "gelu_tanh", "gelu_new", "gelu_fast" (both tanh too, with the rounding of
            transformers' modules of these names), "relu" or "relu2" (squared ReLU).
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
        backends.check_backend(backend)
        return ACTIVATIONS[activation].value(gate) * up
    assert routes is not None and sites is not None
    check_tensor("gate", gate)
    check_shape("up", up, *gate.shape)
    if up.dtype != gate.dtype:
        raise ValueError(f"up: got dtype {up.dtype}, expected gate's {gate.dtype}")
    routes.check(gate, "gate")
    sites.check(routes, ActivationSites.widths(gate.shape[-1]))
    chosen = backends.choose("routed_glu", backend, gate)
    if chosen == "reference":
        return reference.routed_glu(gate, up, routes, sites, activation)
    return ActivationFunction.apply(
        routes, sites.effective, activation, backends.primitives(chosen), gate, up
    )
