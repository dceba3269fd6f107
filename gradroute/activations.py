"""The activations of the MLPs: name → value (eager PyTorch's, bit for bit), derivative and backward."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Activation(NamedTuple):
    """An elementwise activation.

    Attributes:
        value: act(a), with the rounding of eager PyTorch.
        derivative: act'(a), in the dtype of a.
        backward: (dh, a) → dh ⊙ act'(a), by eager PyTorch's own kernel: one pass, rounded once.
    """

    value: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


def _silu_derivative(a: Tensor) -> Tensor:
    s = torch.sigmoid(a)
    return s * (1 + a * (1 - s))


def _gelu_derivative(a: Tensor) -> Tensor:
    density = torch.exp(-0.5 * a * a) * (1 / math.sqrt(2 * math.pi))
    return 0.5 * torch.erfc(-a * math.sqrt(0.5)) + a * density


def _gelu_tanh_derivative(a: Tensor) -> Tensor:
    c, k = math.sqrt(2 / math.pi), 0.044715
    t = torch.tanh(c * (a + k * a * a * a))
    return 0.5 * (1 + t) + 0.5 * a * (1 - t * t) * c * (1 + 3 * k * a * a)


_aten = torch.ops.aten

ACTIVATIONS = {
    "silu": Activation(F.silu, _silu_derivative, _aten.silu_backward),
    "gelu": Activation(F.gelu, _gelu_derivative, _aten.gelu_backward),
    "gelu_tanh": Activation(
        lambda a: F.gelu(a, approximate="tanh"),
        _gelu_tanh_derivative,
        lambda dh, a: _aten.gelu_backward(dh, a, approximate="tanh"),
    ),
    "relu": Activation(
        F.relu, lambda a: (a > 0).to(a.dtype), lambda dh, a: _aten.threshold_backward(dh, a, 0)
    ),
    "relu2": Activation(
        lambda a: F.relu(a).square(), lambda a: 2 * F.relu(a), lambda dh, a: dh * (2 * F.relu(a))
    ),
}


def check_activation(name: str) -> None:
    """Raises ValueError unless `name` is one of the activations."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation: got {name!r}, expected one of {', '.join(ACTIVATIONS)}")
