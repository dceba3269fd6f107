"""The flat arguments of primitives, as torch.library and launchers take them."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..activations import ACTIVATIONS
from ..routes import Routes
from ..sites import Sites
from ..tables import Table
from .schema import schema_of


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which masked products are formed: fp32, and fp64 for fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def as_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in a dtype; `Tensor.to` takes 0.7 µs to find out that there is nothing to do."""
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def weights_on(device: torch.device, *tables: Table | None) -> tuple[Tensor | None, ...]:
    """The tables' device copies."""
    return tuple(None if table is None else table.on(device) for table in tables)


def tokens_of(routes: Routes) -> tuple[Tensor, Tensor | None]:
    """The routing that a launcher passes: ids `[T]` and strength."""
    return routes.ids, routes.strength


class ActivationMasks(NamedTuple):
    """The tables that the backward of an activation applies, by what they mask, each field in the order of application.

    Which sites' tables these are, their declarations say: `site(…, masks=…)` in `gradroute.mlp`. So the primitives and
    their kernels know no sites of the MLPs.

    Attributes:
        dh: masks of the hidden activations' gradient.
        da: masks of the pre-activations' gradients, those of both branches where there are two.
        z: masks of the hidden activations, as the output weight's gradient needs them.
        update: masks of the pre-activations' gradients on their way to the input weights and biases.
    """

    dh: tuple[Table, ...] = ()
    da: tuple[Table, ...] = ()
    z: tuple[Table, ...] = ()
    update: tuple[Table, ...] = ()

    @staticmethod
    def of(sites: Sites) -> ActivationMasks:
        """The masks of effective sites. Values meet them in the order of declaration, gradients in the reverse."""
        dh, da, z, update = (
            tuple(table for name, table in sites.tables.items() if field in sites.declared[name]["masks"])
            for field in ActivationMasks._fields
        )
        return ActivationMasks(dh[::-1], da[::-1], z, update[::-1])


class ActivationArguments(NamedTuple):
    """The arguments of an activation's backward after its matrices: the routing, the masks, and what is wanted.

    Attributes:
        ids: `[T]` int32.
        strength: `[T]`, 0-dim or None.
        dh: the weights of the masks of the hidden activations' gradient, like those that follow `[R, F]` or `[R, 1]`.
        da: those of the pre-activations' gradients.
        z: those of the hidden activations; none where z is not wanted.
        update: those of the input parameters' updates; none where the bias gradient is not wanted.
        activation: what kernels know it by.
        want_z: recompute the masked hidden activations.
        want_bias: sum the bias gradient.
    """

    ids: Tensor
    strength: Tensor | None
    dh: list[Tensor]
    da: list[Tensor]
    z: list[Tensor]
    update: list[Tensor]
    activation: str
    want_z: bool
    want_bias: bool

    @staticmethod
    def of(
        a: Tensor, routes: Routes, masks: ActivationMasks, activation: str, want_z: bool, want_bias: bool
    ) -> ActivationArguments:
        """The arguments on the device of `a`, from those of the primitive."""
        device = a.device
        return ActivationArguments(
            *tokens_of(routes),
            [table.on(device) for table in masks.dh],
            [table.on(device) for table in masks.da],
            [table.on(device) for table in masks.z] if want_z else [],
            [table.on(device) for table in masks.update] if want_bias else [],
            ACTIVATIONS[activation].kernel or activation,
            want_z,
            want_bias,
        )


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


class Blocks(enum.IntEnum):
    """What a block of a parameter `[N, M]` is: a row, a column, or all of it. A vector `[M]` is a matrix of one row."""

    ROWS = 0
    COLUMNS = 1
    ONE = 2


# Plain integers, which an op of torch.library takes at once. With them `number_of_blocks` takes a third of the time
# that it takes with the members of the enum.
ROWS, COLUMNS, ONE = (int(kind) for kind in (Blocks.ROWS, Blocks.COLUMNS, Blocks.ONE))


def number_of_blocks(shape: Sequence[int], kind: int) -> int:
    """How many blocks a matrix, or a vector, of a shape has."""
    if kind == ONE:
        return 1
    if kind == COLUMNS:
        return shape[-1]
    return shape[0] if len(shape) == 2 else 1


class AdamWOptions(NamedTuple):
    """The options of a step of AdamW, the same for all elements.

    Attributes:
        beta1: β₁.
        beta2: β₂.
        eps: ε.
        maximize: whether to ascend.
        stochastic: whether moments, which are then of bfloat16 beside parameters of at most 32 bits, are rounded up or
            down at random, with the probabilities that make the expectation right.
    """

    beta1: float
    beta2: float
    eps: float
    maximize: bool
    stochastic: bool = False


#: The arguments of a step of AdamW in a schema of torch.library; those that it changes are marked.
ADAMW_SCHEMA = (
    "(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] max_exp_avg_sqs, Tensor factors, int[] blocks, "
    "float beta1, float beta2, float eps, bool maximize, bool stochastic) -> ()"
)

TOUCHED_SCHEMA = "(Tensor[] gradients, int[] blocks) -> Tensor"


def wanted(*outputs: tuple[Tensor | None, bool]) -> tuple[Any, ...]:
    """The outputs of an op, None in place of those that are not wanted: an op returns empty tensors for them."""
    return tuple(output if is_wanted else None for output, is_wanted in outputs)


ACTIVATION_SCHEMA = schema_of(ActivationArguments)
NORM_SCHEMA = schema_of(NormArguments)
