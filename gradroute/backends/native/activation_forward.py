"""The hidden activations of an MLP in one pass on CUDA, with the bits of eager PyTorch; else by its operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...primitives import shared
from ...primitives.fused_forward import (
    FORWARD_SCHEMA,
    ForwardArguments,
    fused_forward,
    has_eager_bits,
    is_worthwhile,
)
from ...primitives.registration import kernel_op
from ...routes import Routes
from ...tables import Table
from ...tracing import constant_when_traced
from .launch import launch
from .operands import ForwardOperands, Mask
from .route_grad import masked_product


def activation_forward(
    a: Tensor, up: Tensor | None, routes: Routes, table: Table | None, activation: str
) -> Tensor:
    if is_worthwhile(a, up, table, activation) and _has_eager_bits(activation, a.dtype, a.device):
        return fused_forward(activation_forward_op, a, up, routes, table, activation)
    return shared.activation_forward(a, up, routes, table, activation, masked_product)


@constant_when_traced
def _has_eager_bits(activation: str, dtype: torch.dtype, device: torch.device) -> bool:
    return has_eager_bits("cuda", activation_forward_op, activation, dtype, device)


@kernel_op(f"native_activation_forward({FORWARD_SCHEMA}) -> Tensor")
def activation_forward_op(
    a: Tensor,
    up: Tensor | None,
    *rest: Any,  # the fields of ForwardArguments
) -> Tensor:
    """z `[T, F]`."""
    ids, strength, weights, activation = ForwardArguments(*rest)
    z = a.new_empty(a.shape)
    launch("activation_forward", ForwardOperands(a, up, z, Mask.of(ids, strength, weights), activation))
    return z
