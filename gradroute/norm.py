"""routed_rms_norm and routed_layer_norm: norms whose weight and bias learn, per token, only where they may."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backends, reference
from .arguments import check_choice, check_number
from .checks import check_features, check_parameter, flat, unrouted
from .function import Function, RoutedContext
from .norm_forward import rms_norm_eps, rms_norm_value
from .primitives.arguments import NormArguments, as_dtype
from .primitives.protocol import Primitives
from .routes import Routes
from .sites import Site, Sites, site
from .transforms import first_order

#: Where an RMS norm rounds: as `torch.nn.functional.rms_norm`, as Llama, or as Gemma.
CASTING_MODES = ("torch", "llama", "gemma")


@dataclass(frozen=True, eq=False, repr=False)
class NormSites(Sites):
    """Where a norm masks gradients: a table `[R, D]` or `[R, 1]`, or None.

    Attributes:
        update: which entries of the weight and the bias a token may update (SGTM, arXiv 2512.05648). The gradient
            that flows on is not touched.
    """

    update: Site = site("features")


def routed_rms_norm(
    x: Tensor,
    weight: Tensor,
    routes: Routes | None,
    sites: NormSites | None,
    eps: float | None = 1e-6,
    offset: float = 0.0,
    casting_mode: str = "torch",
    *,
    backend: str | None = None,
) -> Tensor:
    """y = x̂ ⊙ (w + offset), x̂ = x / sqrt(mean(x²) + eps), bit for bit eager PyTorch's, with a routed weight gradient.

    dW = Σ_t m_update ⊙ dy ⊙ x̂; dx is the ordinary one. Masking who may update is the parameter routing of SGTM
    (arXiv 2512.05648), per token. Saved for backward: x (and the weight); x̂ is computed again. Under autocast it is
    what the ordinary norm is there, and gradients have their tensors' dtypes.

    Args:
        x: `[*tokens, D]`, fp32, bf16, fp16 or fp64.
        weight: `[D]`, in any dtype that the ordinary norm takes beside x's.
        routes: the batch's routes; None: the ordinary op.
        sites: where to mask; None: the ordinary op.
        eps: added to the mean square; None: the machine epsilon of the dtype that is computed in, as F.rms_norm does.
        offset: added to the weight: 1 where a model stores w - 1 (Gemma).
        casting_mode: "torch": `torch.nn.functional.rms_norm`; "llama": x̂ is rounded to x's dtype before the weight;
            "gemma": the weight multiplies in fp32, rounded last. Both compute in fp32 for fp64 too, as the models do;
            "torch" computes in fp64 there.
        backend: see `gradroute.use_backend`; default: the fastest that supports the call.

    Returns:
        `[*tokens, D]`.

    Raises:
        ValueError: shapes, devices or tables do not fit, or no such casting mode.
        BackendError: the requested backend cannot run the call.
        RuntimeError: in backward with create_graph=True.
    """
    if type(casting_mode) is not str or casting_mode not in CASTING_MODES:
        check_choice("casting_mode", casting_mode, CASTING_MODES)
    if eps is not None and (type(eps) is not float or not 0.0 <= eps < math.inf):
        check_number("eps", eps, 0)
    if type(offset) is not float or not -math.inf < offset < math.inf:
        check_number("offset", offset)
    if unrouted(routes, sites, NormSites):
        backends.check_backend(backend)
        return rms_norm_value(x, weight, eps, offset, casting_mode)
    assert routes is not None and sites is not None
    _check(x, weight, None, routes, sites)
    chosen = backends.choose("routed_rms_norm", backend, x)
    if chosen == "reference":
        return reference.routed_rms_norm(x, weight, routes, sites, eps, offset, casting_mode)
    return RMSNormFunction.apply(
        x, weight, routes, sites.effective, eps, offset, casting_mode, backends.primitives(chosen)
    )


def routed_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    routes: Routes | None,
    sites: NormSites | None,
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> Tensor:
    """y = x̂ ⊙ w + b, bit for bit `torch.nn.functional.layer_norm`, with routed weight and bias gradients.

    dW = Σ_t m_update ⊙ dy ⊙ x̂, db = Σ_t m_update ⊙ dy; dx is the ordinary one. Masking who may update is the parameter
    routing of SGTM (arXiv 2512.05648), per token. Saved for backward: x (and the weight); x̂ is computed again. Under
    autocast it is what the ordinary norm is there, and gradients have their tensors' dtypes.

    Args:
        x: `[*tokens, D]`, fp32, bf16, fp16 or fp64.
        weight: `[D]`, in any dtype that the ordinary norm takes beside x's.
        bias: `[D]` or None.
        routes: the batch's routes; None: the ordinary op.
        sites: where to mask; None: the ordinary op.
        eps: added to the variance.
        backend: see `gradroute.use_backend`; default: the fastest that supports the call.

    Returns:
        `[*tokens, D]`.

    Raises:
        ValueError: shapes, devices or tables do not fit.
        BackendError: the requested backend cannot run the call.
        RuntimeError: in backward with create_graph=True.
    """
    if type(eps) is not float or not 0.0 <= eps < math.inf:
        check_number("eps", eps, 0)
    if unrouted(routes, sites, NormSites):
        backends.check_backend(backend)
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    assert routes is not None and sites is not None
    _check(x, weight, bias, routes, sites)
    chosen = backends.choose("routed_layer_norm", backend, x)
    if chosen == "reference":
        return reference.routed_layer_norm(x, weight, bias, routes, sites, eps)
    return LayerNormFunction.apply(x, weight, bias, routes, sites.effective, eps, backends.primitives(chosen))


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, routes: Routes, sites: NormSites) -> None:
    check_parameter("weight", weight, -1)
    features = weight.shape[0]
    check_features("x", x, features, "weight is [D]", weight)
    if bias is not None:
        check_parameter("bias", bias, features)
    routes.check(x, "x")
    sites.check(routes, {"features": features})


# Both forwards run the ordinary op inside the Function, under the caller's autocast: x is saved as it came, and the
# gradients reach x and the parameters in their own dtypes, whichever dtype autocast computes in.


class RMSNormContext(RoutedContext[NormSites], Protocol):
    """The context of an RMS norm: what the public function was given, and the weight's dtype."""

    eps: float | None
    offset: float
    casting_mode: str
    weight_dtype: torch.dtype


class RMSNormFunction(Function):
    """routed_rms_norm on the primitives of a backend."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        routes: Routes,
        sites: NormSites,
        eps: float | None,
        offset: float,
        casting_mode: str,
        primitives: Primitives,
    ) -> Tensor:
        return rms_norm_value(x, weight, eps, offset, casting_mode)

    @staticmethod
    def setup_context(ctx: RMSNormContext, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, ctx.routes, ctx.sites, ctx.eps, ctx.offset, ctx.casting_mode, ctx.primitives = inputs
        ctx.weight_dtype = weight.dtype
        need_x, need_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if need_x or need_weight else None, weight if need_x else None)

    @staticmethod
    @first_order("routed_rms_norm")
    def backward(ctx: RMSNormContext, dy: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        eps = rms_norm_eps(ctx.eps, x, ctx.casting_mode)
        dx, dweight, _ = ctx.primitives.norm_backward(
            flat(dy),
            flat(x),
            weight,
            ctx.routes,
            ctx.sites.update,
            NormArguments(eps, ctx.offset, False, ctx.casting_mode == "llama"),
            want_weight=ctx.needs_input_grad[1],
            want_bias=False,
        )
        if dx is not None:
            dx = dx.view(x.shape)
        if dweight is not None:
            dweight = as_dtype(dweight, ctx.weight_dtype)
        return (
            dx,
            dweight,
            None,  # routes
            None,  # sites
            None,  # eps
            None,  # offset
            None,  # casting_mode
            None,  # primitives
        )


class LayerNormContext(RoutedContext[NormSites], Protocol):
    """The context of a layer norm: what the public function was given, and the dtypes of its parameters."""

    eps: float
    weight_dtype: torch.dtype
    bias_dtype: torch.dtype | None


class LayerNormFunction(Function):
    """routed_layer_norm on the primitives of a backend."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        routes: Routes,
        sites: NormSites,
        eps: float,
        primitives: Primitives,
    ) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)

    @staticmethod
    def setup_context(ctx: LayerNormContext, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias, ctx.routes, ctx.sites, ctx.eps, ctx.primitives = inputs
        ctx.weight_dtype = weight.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        need_x, need_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if need_x or need_weight else None, weight if need_x else None)

    @staticmethod
    @first_order("routed_layer_norm")
    def backward(ctx: LayerNormContext, dy: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        routes, update, primitives = ctx.routes, ctx.sites.update, ctx.primitives
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        if need_x or need_weight:
            dx, dweight, dbias = primitives.norm_backward(
                flat(dy),
                flat(x),
                weight,
                routes,
                update,
                NormArguments(ctx.eps, 0.0, True, False),
                want_weight=need_weight,
                want_bias=need_bias,
            )
        else:
            dx, dweight, dbias = None, None, primitives.bias_grad(flat(dy), routes, update)
        if dx is not None:
            dx = dx.view(x.shape)
        if dweight is not None:
            dweight = as_dtype(dweight, ctx.weight_dtype)
        if dbias is not None:
            dbias = dbias.to(ctx.bias_dtype)
        return (
            dx,
            dweight,
            dbias,
            None,  # routes
            None,  # sites
            None,  # eps
            None,  # primitives
        )
