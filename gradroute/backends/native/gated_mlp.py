"""The backward of act(gate) * up, with every mask of a gated MLP folded in, and the bias gradients on the way."""

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
from .mlp import masks_of
from .operands import GluOperands


def glu_backward(
    dz: Tensor | None,
    gate: Tensor,
    up: Tensor,
    routes: Routes,
    masks: ActivationMasks,
    activation: str,
    *,
    want_z: bool,
    want_bias: bool,
    overwrite: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    dz = None if dz is None else as_dtype(dz, gate.dtype)
    arguments = ActivationArguments.of(gate, routes, masks, activation, want_z, want_bias)
    has_grad = dz is not None
    dgate, dup, z = dz, up, gate
    if overwrite and may_overwrite(gate):
        db_gate, db_up = glu_backward_in_place_op(dz, gate, up, *arguments)
    else:
        dgate, dup, z, db_gate, db_up = glu_backward_op(dz, gate, up, *arguments)
    return wanted((dgate, has_grad), (dup, has_grad), (z, want_z), (db_gate, want_bias), (db_up, want_bias))


@kernel_op(
    f"native_glu_backward(Tensor? dz, Tensor gate, Tensor up, {ACTIVATION_SCHEMA}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
def glu_backward_op(
    dz: Tensor | None,
    gate: Tensor,
    up: Tensor,
    *rest: Any,  # the fields of ActivationArguments
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Outputs that are not wanted have no elements."""
    arguments = ActivationArguments(*rest)
    has_grad = dz is not None
    dgate, dup, z = new_like(gate, has_grad), new_like(gate, has_grad), new_like(gate, arguments.want_z)
    present = (dgate if has_grad else None, dup if has_grad else None, z if arguments.want_z else None)
    return dgate, dup, z, *_glu_backward(dz, gate, up, present, arguments)


@kernel_op(
    f"native_glu_backward_(Tensor(a!)? dz, Tensor(b!) gate, Tensor(c!) up, {ACTIVATION_SCHEMA}) -> (Tensor, Tensor)"
)
def glu_backward_in_place_op(
    dz: Tensor | None,
    gate: Tensor,
    up: Tensor,
    *rest: Any,  # the fields of ActivationArguments
) -> tuple[Tensor, Tensor]:
    """Leaves dgate in dz, dup in up and, where it is wanted, z in gate."""
    arguments = ActivationArguments(*rest)
    outputs = (dz, None if dz is None else up, gate if arguments.want_z else None)
    return _glu_backward(dz, gate, up, outputs, arguments)


def _glu_backward(
    dz: Tensor | None,
    gate: Tensor,
    up: Tensor,
    outputs: tuple[Tensor | None, Tensor | None, Tensor | None],
    arguments: ActivationArguments,
) -> tuple[Tensor, Tensor]:
    """Fills the outputs dgate, dup and z; the bias gradients `[F]`, without elements where they are not wanted."""
    gate_sums, up_sums = (new_sums(gate), new_sums(gate)) if arguments.want_bias else (None, None)
    launch(
        "glu_backward",
        GluOperands(dz, gate, up, *outputs, gate_sums, up_sums, masks_of(arguments), arguments.activation),
    )
    return as_dtype(summed(gate_sums, gate), gate.dtype), as_dtype(summed(up_sums, gate), gate.dtype)
