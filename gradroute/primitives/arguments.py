"""The flat arguments of primitives, as torch.library and launchers take them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..routes import Routes
from ..tables import Table
from .schema import schema_of

if TYPE_CHECKING:
    from .protocol import ActivationTables


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
    """The routing that a launcher passes: ids `[T]` and strength."""
    return routes.ids, routes.strength


class ActivationArguments(NamedTuple):
    """The arguments of an activation's backward after its matrices: the routing, the masks, and what is wanted.

    Attributes:
        ids: `[T]` int32.
        strength: `[T]`, 0-dim or None.
        pre: m_pre's weights, like those that follow `[R, F]`, `[R, 1]` or None.
        hidden: m_hidden's.
        forward: m_forward's.
        update_out: m_update_out's, None where z is not wanted.
        update_in: m_update_in's, None where the bias gradient is not wanted.
        activation: its name.
        want_z: recompute m_update_out ⊙ z.
        want_bias: sum the bias gradient.
    """

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
    def of(
        a: Tensor, routes: Routes, sites: ActivationTables, activation: str, want_z: bool, want_bias: bool
    ) -> ActivationArguments:
        """The arguments on the device of `a`, from those of the primitive."""
        pre, hidden, forward, update_out, update_in = weights_on(
            a.device,
            sites.pre,
            sites.hidden,
            sites.forward,
            sites.update_out if want_z else None,
            sites.update_in if want_bias else None,
        )
        return ActivationArguments(
            *tokens_of(routes), pre, hidden, forward, update_out, update_in, activation, want_z, want_bias
        )

    @property
    def tables(self) -> dict[str, Tensor | None]:
        """The masks by name, in the order in which kernels take them."""
        return {
            "pre": self.pre,
            "hidden": self.hidden,
            "forward": self.forward,
            "update_out": self.update_out,
            "update_in": self.update_in,
        }


class NormArguments(NamedTuple):
    """Which norm it is.

    Attributes:
        eps: added to the mean square, or to the variance.
        offset: added to the weight.
        centered: a layer norm, which subtracts the mean; else an RMS norm.
        round_x_hat: the weight met x̂ rounded to x's dtype.
    """

    eps: float
    offset: float
    centered: bool
    round_x_hat: bool


class AdamWOptions(NamedTuple):
    """The options of a step of AdamW, the same for all elements: β₁, β₂, ε, whether to ascend."""

    beta1: float
    beta2: float
    eps: float
    maximize: bool


#: The arguments of a step of AdamW in a schema of torch.library; those that it changes are marked.
ADAMW_SCHEMA = (
    "(Tensor(a!) parameter, Tensor gradient, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor(d!)? max_exp_avg_sq, "
    "Tensor factors, bool by_column, float beta1, float beta2, float eps, bool maximize) -> ()"
)


def wanted(*outputs: tuple[Tensor | None, bool]) -> tuple[Any, ...]:
    """The outputs of an op, None in place of those that are not wanted: an op returns empty tensors for them."""
    return tuple(output if is_wanted else None for output, is_wanted in outputs)


ACTIVATION_SCHEMA = schema_of(ActivationArguments)
NORM_SCHEMA = schema_of(NormArguments)
