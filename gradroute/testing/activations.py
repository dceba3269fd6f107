"""The activations in plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..activations import ACTIVATIONS

PLAIN_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda a: F.gelu(a, approximate="tanh"),
    # As transformers' NewGELUActivation and FastGELUActivation write them.
    "gelu_new": lambda a: (
        0.5 * a * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (a + 0.044715 * torch.pow(a, 3.0))))
    ),
    "gelu_fast": lambda a: 0.5 * a * (1.0 + torch.tanh(a * 0.7978845608 * (1.0 + 0.044715 * a * a))),
    "relu": F.relu,
    "relu2": lambda a: F.relu(a).square(),
}


ACTIVATION_VARIANTS = tuple({"activation": name} for name in ACTIVATIONS)
