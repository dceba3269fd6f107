"""The options of a group of parameters, checked when the group is added."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import backends


def check_group(group: Mapping[str, Any]) -> None:
    """Raises unless a group's options are in their ranges and its parameters can have them."""
    lr, betas, block_dim = group["lr"], group["betas"], group["block_dim"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr: got a tensor of shape {list(lr.shape)}, expected one element")
    for name in ("lr", "eps", "weight_decay"):
        if not group[name] >= 0:
            raise ValueError(f"{name}: got {group[name]}, expected 0 or more")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas: got {betas}, expected two numbers, 0 <= beta < 1")
    if isinstance(block_dim, bool) or block_dim not in (0, 1, None):
        raise ValueError(f"block_dim: got {block_dim!r}, expected 0, 1 or None")
    if not isinstance(group["fused"], bool):
        raise ValueError(f"fused: got {group['fused']!r}, expected True or False")
    for parameter in group["params"]:
        _check_parameter(parameter, block_dim)
        if group["fused"]:
            fused_backend(parameter.device, parameter.dtype)


def _check_parameter(parameter: Tensor, block_dim: int | None) -> None:
    shape = list(parameter.shape)
    if parameter.is_complex():
        raise TypeError(
            f"params: got a parameter of {parameter.dtype} and shape {shape}, expected real numbers: make the "
            "parameter real, and view it as complex in forward"
        )
    if block_dim == 1 and len(shape) < 2:
        raise ValueError(
            f"block_dim: got 1 for a parameter of shape {shape}, expected 0 or None: it has no columns"
        )


def fused_backend(device: torch.device, dtype: torch.dtype) -> str:
    """The backend whose kernel takes the steps of parameters; raises BackendError where there is none."""
    return backends.with_kernels("RoutedAdamW(fused=True)", device, dtype)
