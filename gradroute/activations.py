"""The activations of the MLPs: name → value (eager PyTorch's, bit for bit), derivative and backward."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .arguments import shown


class Activation(NamedTuple):
    """An elementwise activation.

    Attributes:
        value: act(a), with the rounding of eager PyTorch.
        derivative: act'(a), in the dtype of a.
        backward: (dh, a) → dh ⊙ act'(a), rounded once: by eager PyTorch's own kernel, where it has one.
        kernel: what backends with kernels know the function by; None: by its own name. Two activations are one
            function where they differ in nothing but the rounding of their forwards, which kernels do not compute.
    """

    value: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]
    kernel: str | None = None


def _silu_derivative(a: Tensor) -> Tensor:
    s = torch.sigmoid(a)
    return s * (1 + a * (1 - s))


def _gelu_derivative(a: Tensor) -> Tensor:
    density = torch.exp(-0.5 * a * a) * (1 / math.sqrt(2 * math.pi))
    return 0.5 * torch.erfc(-a * math.sqrt(0.5)) + a * density


# sqrt(2 / pi), and the ten digits of it that gelu_fast has.
_SLOPE, _SLOPE_OF_FAST = math.sqrt(2 / math.pi), 0.7978845608


def _gelu_tanh_derivative(a: Tensor, slope: float = _SLOPE) -> Tensor:
    cubic = 0.044715
    t = torch.tanh(slope * (a + cubic * a * a * a))
    return 0.5 * (1 + t) + 0.5 * a * (1 - t * t) * slope * (1 + 3 * cubic * a * a)


# The operations of transformers' NewGELUActivation and FastGELUActivation: each rounds, and under autocast some are
# computed in fp32.


def _gelu_new(a: Tensor) -> Tensor:
    return 0.5 * a * (1.0 + torch.tanh(_SLOPE * (a + 0.044715 * torch.pow(a, 3.0))))


def _gelu_fast(a: Tensor) -> Tensor:
    return 0.5 * a * (1.0 + torch.tanh(a * _SLOPE_OF_FAST * (1.0 + 0.044715 * a * a)))


def _gelu_fast_derivative(a: Tensor) -> Tensor:
    return _gelu_tanh_derivative(a, _SLOPE_OF_FAST)


def _gelu_fast_backward(dh: Tensor, a: Tensor) -> Tensor:
    if a.dtype == torch.float64:  # here alone do the digits tell
        return dh * _gelu_fast_derivative(a)
    return _gelu_tanh_backward(dh, a)


_aten = torch.ops.aten


def _gelu_tanh_backward(dh: Tensor, a: Tensor) -> Tensor:
    return _aten.gelu_backward(dh, a, approximate="tanh")


ACTIVATIONS = {
    "silu": Activation(F.silu, _silu_derivative, _aten.silu_backward),
    "gelu": Activation(F.gelu, _gelu_derivative, _aten.gelu_backward),
    "gelu_tanh": Activation(
        lambda a: F.gelu(a, approximate="tanh"),
        _gelu_tanh_derivative,
        _gelu_tanh_backward,
    ),
    "gelu_new": Activation(_gelu_new, _gelu_tanh_derivative, _gelu_tanh_backward, "gelu_tanh"),
    "gelu_fast": Activation(_gelu_fast, _gelu_fast_derivative, _gelu_fast_backward),
    "relu": Activation(
        F.relu, lambda a: (a > 0).to(a.dtype), lambda dh, a: _aten.threshold_backward(dh, a, 0)
    ),
    "relu2": Activation(
        lambda a: F.relu(a).square(), lambda a: 2 * F.relu(a), lambda dh, a: dh * (2 * F.relu(a))
    ),
}


def check_activation(name: str) -> None:
    """Raises unless `name` is one of the activations."""
    if not isinstance(name, str) or name not in ACTIVATIONS:
        kind: type[Exception] = ValueError if isinstance(name, str) else TypeError
        raise kind(f"activation: got {shown(name)}, expected one of {', '.join(ACTIVATIONS)}")


# The activation that a module is, by its class in torch.nn, transformers, minGPT (NewGELU).
_NAMES_OF_CLASSES = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELU": "gelu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_new",
    "AccurateGELUActivation": "gelu_new",
    "NewGELU": "gelu_new",
    "FastGELUActivation": "gelu_fast",
    "ReLU": "relu",
    "ReLUSquaredActivation": "relu2",
}


def name_of_module(module: nn.Module) -> str | None:
    """The name of the activation that `module` computes, bit for bit; None where it is none of these."""
    name = _NAMES_OF_CLASSES.get(type(module).__name__)
    if name == "gelu" and getattr(module, "approximate", "none") == "tanh":
        return "gelu_tanh"
    # transformers' "gelu_python" and "gelu_python_tanh" are options of the classes whose formulas they spell out.
    if name in ("gelu", "gelu_tanh") and getattr(getattr(module, "act", None), "__self__", None) is module:
        return "gelu_new" if name == "gelu_tanh" else None
    return name


def check_module(module: nn.Module) -> str:
    """`name_of_module`; raises TypeError where it is None."""
    name = name_of_module(module)
    if name is None:
        got = type(module).__name__
        if got in _NAMES_OF_CLASSES:
            got += " with a formula in Python"
        raise TypeError(f"got the activation {got}, expected one of {', '.join(_NAMES_OF_CLASSES)}")
    return name
