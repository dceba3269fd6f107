"""The backward of an MLP's activation, with every mask folded in, and the bias gradient on the way."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...primitives.arguments import (
    ACTIVATION_SCHEMA,
    ActivationArguments,
    ActivationMasks,
    as_dtype,
    wanted,
)
from ...primitives.overwriting import may_overwrite
from ...primitives.registration import kernel_op
from ...routes import Routes
from .launch import launch, new_like, new_sums, summed
from .operands import ActivationOperands, MLPMasks, Routing, Weights


def activation_backward(
    dz: Tensor | None,
    a: Tensor,
    routes: Routes,
    masks: ActivationMasks,
    activation: str,
    *,
    want_z: bool,
    want_bias: bool,
    overwrite: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    dz = None if dz is None else as_dtype(dz, a.dtype)
    arguments = ActivationArguments.of(a, routes, masks, activation, want_z, want_bias)
    if overwrite and may_overwrite(a):
        db = activation_backward_in_place_op(dz, a, *arguments)
        return wanted((dz, True), (a, want_z), (db, want_bias))
    da, z, db = activation_backward_op(dz, a, *arguments)
    return wanted((da, dz is not None), (z, want_z), (db, want_bias))


@kernel_op(
    f"native_activation_backward(Tensor? dz, Tensor a, {ACTIVATION_SCHEMA}) -> (Tensor, Tensor, Tensor)"
)
def activation_backward_op(
    dz: Tensor | None,
    a: Tensor,
    *rest: Any,  # the fields of ActivationArguments
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs that are not wanted have no elements."""
    arguments = ActivationArguments(*rest)
    da, z = new_like(a, dz is not None), new_like(a, arguments.want_z)
    present = (da if dz is not None else None, z if arguments.want_z else None)
    return da, z, _activation_backward(dz, a, present, arguments)


@kernel_op(f"native_activation_backward_(Tensor(a!)? dz, Tensor(b!) a, {ACTIVATION_SCHEMA}) -> Tensor")
def activation_backward_in_place_op(
    dz: Tensor | None,
    a: Tensor,
    *rest: Any,  # the fields of ActivationArguments
) -> Tensor:
    """Leaves da in dz and, where it is wanted, z in a."""
    arguments = ActivationArguments(*rest)
    return _activation_backward(dz, a, (dz, a if arguments.want_z else None), arguments)


def _activation_backward(
    dz: Tensor | None, a: Tensor, outputs: tuple[Tensor | None, Tensor | None], arguments: ActivationArguments
) -> Tensor:
    """Fills the outputs da and z; the bias gradient `[F]`, without elements where it is not wanted."""
    sums = new_sums(a) if arguments.want_bias else None
    launch(
        "activation_backward",
        ActivationOperands(dz, a, *outputs, sums, masks_of(arguments), arguments.activation),
    )
    return as_dtype(summed(sums, a), a.dtype)


def masks_of(arguments: ActivationArguments) -> MLPMasks:
    """The masks that an MLP's backward applies."""
    groups = ((*arguments.dh, *arguments.da), arguments.z, arguments.update)
    return MLPMasks(
        Routing(arguments.ids, arguments.strength), *(tuple(map(Weights, group)) for group in groups)
    )
