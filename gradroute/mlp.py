"""routed_mlp: linear, activation, linear as one op with routed gradients; routed_activation: its middle alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
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
    check_tensor,
    flat,
    unrouted,
)
from .function import Function, RoutedContext
from .primitives.arguments import ActivationMasks
from .primitives.protocol import Primitives
from .routes import Routes
from .sites import Site, Sites, site
from .skipping.grouped_mlp import MLPTilings, tilings_of
from .skipping.mlp import Branch, MLPBackward, MLPProduct
from .skipping.plan import Plan, plan, unmasked
from .transforms import first_order


class _HiddenSites(Sites):
    """The base of sites on hidden activations, which stand in the order in which a forward meets them."""

    if TYPE_CHECKING:

        @property
        def masks(self) -> ActivationMasks:
            """The effective sites' tables, as the backward of the activation applies them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        masks = ActivationMasks.of(self.effective)
        for sites in (self, self.effective):
            object.__setattr__(sites, "masks", masks)


@dataclass(frozen=True, eq=False, repr=False)
class MLPSites(_HiddenSites):
    """Where an MLP masks. Each a table `[R, d_ff]`, the last two `[R, d_model]`, or `[R, 1]`, or None.

    Attributes:
        pre: the gradient of the pre-activations (gated: of both branches).
        hidden: the gradient of the hidden activations.
        forward: the hidden activations themselves, in forward, and so their gradient: zeroing in SGTM's sense.
        update: shorthand for `update_in` and `update_out`, where they are not given.
        update_in: which rows of the input weights (and biases) a token may update (SGTM, arXiv 2512.05648).
        update_out: which columns of the output weight a token may update.
        output: the gradient that arrives at the output, before everything else.
        update_output_bias: which entries of the output bias a token may update.
    """

    pre: Site = site("d_ff", masks=("da",))
    hidden: Site = site("d_ff", masks=("dh",))
    forward: Site = site("d_ff", masks=("z", "dh"))
    update: Site = site("d_ff")
    update_in: Site = site("d_ff", default="update", masks=("update",))
    update_out: Site = site("d_ff", default="update", masks=("z",))
    output: Site = site("d_model")
    update_output_bias: Site = site("output_bias")

    if TYPE_CHECKING:

        @property
        def tilings(self) -> MLPTilings | None:
            """How the effective sites group the products of a backward."""

    def __post_init__(self) -> None:
        super().__post_init__()
        # Code that is traced cannot cut tables: MLPs whose sites it makes have their products made whole.
        tilings = None if torch.compiler.is_compiling() else tilings_of(self.effective.masks)
        for sites in (self, self.effective):
            object.__setattr__(sites, "tilings", tilings)

    @staticmethod
    def widths(d_model: int, d_ff: int, output_bias: Tensor | None) -> dict[str, int | str]:
        """The widths of an MLP of this shape, as `check` takes them."""
        return {
            "d_ff": d_ff,
            "d_model": d_model,
            "output_bias": d_model if output_bias is not None else "the MLP has no output bias",
        }


@dataclass(frozen=True, eq=False, repr=False)
class ActivationSites(_HiddenSites):
    """Where the middle of an MLP masks. Each a table `[R, d_ff]` or `[R, 1]`, or None.

    Attributes:
        pre: the gradient of the pre-activations (gated: of both branches).
        hidden: the gradient of the hidden activations.
        forward: the hidden activations themselves, in forward, and so their gradient.
    """

    pre: Site = site("d_ff", masks=("da",))
    hidden: Site = site("d_ff", masks=("dh",))
    forward: Site = site("d_ff", masks=("z", "dh"))

    @staticmethod
    def widths(d_ff: int) -> dict[str, int | str]:
        """The widths of a middle of this shape, as `check` takes them."""
        return {"d_ff": d_ff}


def routed_mlp(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    routes: Routes | None,
    sites: MLPSites | None,
    activation: str = "gelu",
    *,
    backend: str | None = None,
) -> Tensor:
    """y = z W_outᵀ + b_out with z = m_forward ⊙ act(x W_inᵀ + b_in), and routed gradients.

    With g = m_output ⊙ dy: dW_out = gᵀ (m_update_out ⊙ z), db_out = Σ_t m_update_output_bias ⊙ g,
    dh = m_hidden ⊙ m_forward ⊙ (g W_out), da = m_pre ⊙ dh ⊙ act'(a), dx = da W_in, dW_in = (m_update_in ⊙ da)ᵀ x,
    db_in = Σ_t m_update_in ⊙ da. Saved for backward: x and the pre-activations; the activation is recomputed.
    Without a `forward` table the output equals eager PyTorch's bit for bit.

    Args:
        x: `[*tokens, d_model]`, fp32, bf16, fp16 or fp64.
        w_in: `[d_ff, d_model]`.
        b_in: `[d_ff]` or None.
        w_out: `[d_out, d_ff]`; d_out is usually d_model.
        b_out: `[d_out]` or None.
        routes: the batch's routes; None: the ordinary op.
        sites: where to mask; None: the ordinary op.
        activation: "silu", "gelu" (erf), "gelu_tanh", "gelu_new", "gelu_fast" (both tanh too, with the rounding of
            transformers' modules of these names), "relu" or "relu2" (squared ReLU).
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
        return F.linear(ACTIVATIONS[activation].value(F.linear(x, w_in, b_in)), w_out, b_out)
    assert routes is not None and sites is not None
    _check(x, w_in, b_in, w_out, b_out, routes, sites)
    x, w_in, b_in, w_out, b_out = autocast(x, w_in, b_in, w_out, b_out)
    chosen = backends.choose("routed_mlp", backend, x)
    if chosen == "reference":
        return reference.routed_mlp(x, w_in, b_in, w_out, b_out, routes, sites, activation)
    y, _ = MLPFunction.apply(
        x, w_out, b_out, routes, sites.effective, activation, backends.primitives(chosen), w_in, b_in
    )
    return y


def explain(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    routes: Routes | None,
    sites: MLPSites | None,
    activation: str = "gelu",
    *,
    backend: str | None = None,
) -> Plan:
    """Which backend `routed_mlp` runs the same call on, and how its backward makes its products; runs nothing.

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
    _check(x, w_in, b_in, w_out, b_out, routes, sites)
    (x,) = autocast(x)
    return plan("mlp", x, routes, {"all": MLPProduct(sites.effective, *w_in.shape, w_out.shape[0])}, backend)


def _check(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    routes: Routes,
    sites: MLPSites,
) -> None:
    d_ff, d_model = check_matrix("w_in", w_in)
    check_features("x", x, d_model, "w_in is [d_ff, d_model]", w_in)
    if x.dtype is not w_in.dtype:
        check_dtype("x", x, w_in)
    if b_in is not None:
        check_parameter("b_in", b_in, d_ff)
    d_out, _ = check_matrix("w_out", w_out, d_ff)
    if b_out is not None:
        check_parameter("b_out", b_out, d_out)
    routes.check(x, "x")
    sites.check(routes, MLPSites.widths(d_out, d_ff, b_out))


class MLPContext(RoutedContext[MLPSites], Protocol):
    """The context of an MLP.

    Attributes:
        activation: its name.
        output: shape and dtype of y.
    """

    activation: str
    output: tuple[torch.Size, torch.dtype]


class MLPFunction(Function):
    """An MLP on the primitives of a backend, for routed_mlp and routed_gated_mlp.

    Its hidden activations are act of one branch, or act of a gate's times another: `branches` are the weights of its
    input linears, then their biases. The branches' pre-activations are outputs too, so that they can be saved.
    """

    @staticmethod
    def forward(
        x: Tensor,
        w_out: Tensor,
        b_out: Tensor | None,
        routes: Routes,
        sites: MLPSites,
        activation: str,
        primitives: Primitives,
        *branches: Any,  # Tensor, or None for a bias
    ) -> tuple[Tensor, ...]:
        count = len(branches) // 2
        a = [F.linear(x, branches[i], branches[count + i]) for i in range(count)]
        up = a[1] if count > 1 else None
        z = primitives.activation_forward(a[0], up, routes, sites.forward, activation)
        return F.linear(z, w_out, b_out), *a

    @staticmethod
    def setup_context(ctx: MLPContext, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, w_out, _, ctx.routes, ctx.sites, ctx.activation, ctx.primitives, *branches = inputs
        y, *a = output
        ctx.output = (y.shape, y.dtype)
        ctx.mark_non_differentiable(*a)
        ctx.set_materialize_grads(False)  # the pre-activations' would be zeros that nobody reads
        need_x, need_w_out, _, _, _, _, _, *need_branches = ctx.needs_input_grad
        count = len(a)
        nothing = [None] * count
        need_a = need_x or True in need_branches
        ctx.save_for_backward(
            x if True in need_branches[:count] else None,
            w_out if need_a else None,
            *(a if need_a or need_w_out else nothing),
            *(branches[:count] if need_x else nothing),
        )

    @staticmethod
    @first_order(lambda ctx: "routed_mlp" if len(ctx.needs_input_grad) == 9 else "routed_gated_mlp")
    def backward(ctx: MLPContext, dy: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
        x, w_out, *saved = ctx.saved_tensors
        count = len(saved) // 2
        routes, sites, primitives = ctx.routes, ctx.sites, ctx.primitives
        needs = ctx.needs_input_grad
        if dy is None:
            shape, dtype = ctx.output
            dy = torch.zeros(shape, dtype=dtype, device=routes.device)
        g = primitives.masked_product(flat(dy), routes, sites.output)
        dx = dw_out = db_out = None
        grads: list[Tensor | None] = [None] * (2 * count)
        if saved[0] is not None:
            branches = [
                Branch(flat(saved[i]), saved[count + i], needs[7 + i], needs[7 + count + i])
                for i in range(count)
            ]
            backward = MLPBackward(g, branches, routes, sites, ctx.activation, primitives)
            dx, dw_out = backward.gradients(None if x is None else flat(x), w_out, needs[0], needs[1])
            grads = [branch.weight_grad for branch in branches] + [branch.bias_grad for branch in branches]
        if dx is not None:
            dx = dx.view(*dy.shape[:-1], dx.shape[1])
        if needs[2]:
            db_out = primitives.bias_grad(g, routes, sites.update_output_bias)
        return (
            dx,
            dw_out,
            db_out,
            None,  # routes
            None,  # sites
            None,  # activation
            None,  # primitives
            *grads,
        )


def routed_activation(
    a: Tensor,
    routes: Routes | None,
    sites: ActivationSites | None,
    activation: str,
    *,
    backend: str | None = None,
) -> Tensor:
    """z = m_forward ⊙ act(a) with da = m_pre ⊙ m_hidden ⊙ m_forward ⊙ dz ⊙ act'(a): the middle of an MLP alone.

    For models whose linears must be called, not read: LoRA, tensor-parallel or quantised modules.
    Saved for backward: a.

    Args:
        a: `[*tokens, d_ff]`, fp32, bf16, fp16 or fp64.
        routes: the batch's routes; None: the ordinary op.
        sites: where to mask; None: the ordinary op.
        activation: "silu", "gelu" (erf), "gelu_tanh", "gelu_new", "gelu_fast" (both tanh too, with the rounding of
            transformers' modules of these names), "relu" or "relu2" (squared ReLU).
        backend: see `gradroute.use_backend`; default: the fastest that supports the call.

    Returns:
        `[*tokens, d_ff]`.

    Raises:
        ValueError: shapes, devices, tables or the activation do not fit.
        BackendError: the requested backend cannot run the call.
        RuntimeError: in backward with create_graph=True.
    """
    check_activation(activation)
    if unrouted(routes, sites, ActivationSites):
        backends.check_backend(backend)
        return ACTIVATIONS[activation].value(a)
    assert routes is not None and sites is not None
    check_tensor("a", a)
    routes.check(a, "a")
    sites.check(routes, ActivationSites.widths(a.shape[-1]))
    chosen = backends.choose("routed_activation", backend, a)
    if chosen == "reference":
        return reference.routed_activation(a, routes, sites, activation)
    return ActivationFunction.apply(routes, sites.effective, activation, backends.primitives(chosen), a)


class ActivationContext(RoutedContext[ActivationSites], Protocol):
    """The context of the middle of an MLP.

    Attributes:
        activation: its name.
    """

    activation: str


class ActivationFunction(Function):
    """The middle of an MLP on the primitives of a backend, for routed_activation and routed_glu.

    It is act of the first of the pre-activations, times the second where there are two.
    """

    @staticmethod
    def forward(
        routes: Routes, sites: ActivationSites, activation: str, primitives: Primitives, *a: Tensor
    ) -> Tensor:
        up = a[1] if len(a) > 1 else None
        return primitives.activation_forward(a[0], up, routes, sites.forward, activation)

    @staticmethod
    def setup_context(ctx: ActivationContext, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.routes, ctx.sites, ctx.activation, ctx.primitives, *a = inputs
        ctx.save_for_backward(*a)

    @staticmethod
    @first_order(lambda ctx: "routed_activation" if len(ctx.needs_input_grad) == 5 else "routed_glu")
    def backward(ctx: ActivationContext, dz: Tensor) -> tuple[Any, ...]:
        a = ctx.saved_tensors
        call = (ctx.routes, ctx.sites.masks, ctx.activation)
        grads: tuple[Tensor | None, ...]
        if len(a) == 1:
            grads = ctx.primitives.activation_backward(
                flat(dz), flat(a[0]), *call, want_z=False, want_bias=False
            )
        else:
            grads = ctx.primitives.glu_backward(
                flat(dz), flat(a[0]), flat(a[1]), *call, want_z=False, want_bias=False
            )
        needs = ctx.needs_input_grad
        shaped = [
            grad.view(dz.shape) if grad is not None and needs[4 + i] else None
            for i, grad in enumerate(grads[: len(a)])
        ]
        return (
            None,  # routes
            None,  # sites
            None,  # activation
            None,  # primitives
            *shaped,
        )
