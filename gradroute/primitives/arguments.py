"""The flat arguments of primitives, as torch.library and launchers take them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..routes import Routes
from ..tables import Table


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which masked products are formed: fp32, and fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def has_data(tensor: Tensor) -> bool:
    """Whether there is memory to read: not while tracing, nor on the meta device."""
    return not (isinstance(tensor, FakeTensor) or tensor.is_meta)


def weights_on(device: torch.device, *tables: Table | None) -> tuple[Tensor | None, ...]:
    """The tables' device copies."""
    return tuple(None if table is None else table.on(device) for table in tables)


def tokens_of(routes: Routes) -> tuple[Tensor, Tensor | None]:
    """What a launcher passes of the routes: ids `[T]` and strength."""
    return routes.ids, routes.strength


class Middle(NamedTuple):
    """What the backward of an MLP's middle takes after its matrices: ids `[T]`, strength, tables, what is wanted."""

    ids: Tensor
    strength: Tensor | None
    pre: Tensor | None
    hidden: Tensor | None
    forward: Tensor | None
    update_out: Tensor | None
    update_in: Tensor | None
    activation: str
    want_z: bool
    want_bias: bool

    @staticmethod
    def of(a: Tensor, routes: Routes, sites: Any, activation: str, want_z: bool, want_bias: bool) -> Middle:
        """From what a leaf computation takes."""
        ids, strength = tokens_of(routes)
        pre, hidden, forward = weights_on(a.device, sites.pre, sites.hidden, sites.forward)
        (update_out,) = weights_on(a.device, sites.update_out if want_z else None)
        (update_in,) = weights_on(a.device, sites.update_in if want_bias else None)
        return Middle(
            ids, strength, pre, hidden, forward, update_out, update_in, activation, want_z, want_bias
        )

    @property
    def tables(self) -> dict[str, Tensor | None]:
        """By name, in the order in which kernels take them."""
        names = ("pre", "hidden", "forward", "update_out", "update_in")
        return {name: getattr(self, name) for name in names}


#: The fields of Middle in a schema of torch.library.
MIDDLE_SCHEMA = (
    "Tensor ids, Tensor? strength, Tensor? pre, Tensor? hidden, Tensor? forward, Tensor? update_out, "
    "Tensor? update_in, str activation, bool want_z, bool want_bias"
)


class AdamWOptions(NamedTuple):
    """What a step of AdamW takes that is the same for all elements: β₁, β₂, ε, whether to ascend."""

    beta1: float
    beta2: float
    eps: float
    maximize: bool


#: What a step of AdamW takes, and changes, in a schema of torch.library.
ADAMW_SCHEMA = (
    "(Tensor(a!) parameter, Tensor gradient, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!)? max_exp_avg_sq, "
    "Tensor factors, bool by_column, float beta1, float beta2, float eps, bool maximize) -> ()"
)


def wanted(*outputs: tuple[Tensor | None, bool]) -> tuple[Any, ...]:
    """The outputs of an op, None in place of those that are not wanted: an op returns empty tensors for them."""
    return tuple(output if is_wanted else None for output, is_wanted in outputs)


def norm_leaves(norm_backward_op: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """The leaf computations rms_norm_backward and layer_norm_backward, which one op makes.

    Args:
        norm_backward_op: (dy, x, weight, ids, strength, update, eps, offset, centered, round_x_hat, want_weight,
            want_bias) → dx, dW, db.
    """

    def rms_norm_backward(
        dy: Tensor,
        x: Tensor,
        weight: Tensor | None,
        routes: Routes,
        update: Table | None,
        eps: float,
        offset: float,
        casting_mode: str,
        *,
        want_weight: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """See `gradroute.composed.rms_norm_backward`."""
        masks = (*tokens_of(routes), *weights_on(x.device, update))
        round_x_hat = casting_mode == "llama"
        dx, dweight, _ = norm_backward_op(
            dy, x, weight, *masks, eps, offset, False, round_x_hat, want_weight, False
        )
        return wanted((dx, weight is not None), (dweight, want_weight))

    def layer_norm_backward(
        dy: Tensor,
        x: Tensor,
        weight: Tensor | None,
        routes: Routes,
        update: Table | None,
        eps: float,
        *,
        want_weight: bool,
        want_bias: bool,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """See `gradroute.composed.layer_norm_backward`."""
        masks = (*tokens_of(routes), *weights_on(x.device, update))
        dx, dweight, dbias = norm_backward_op(
            dy, x, weight, *masks, eps, 0.0, True, False, want_weight, want_bias
        )
        return wanted((dx, weight is not None), (dweight, want_weight), (dbias, want_bias))

    return rms_norm_backward, layer_norm_backward
