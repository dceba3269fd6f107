"""The options of a group of parameters, checked when the group is added."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import backends
from ..arguments import check_bool, check_number, is_int, is_number, shown
from .quantised import EIGHT_BITS, prepare


def check_group(group: Mapping[str, Any]) -> None:
    """Raises unless a group's options are in their ranges, its parameters can have them, and packages are there."""
    lr, betas, block_dim = group["lr"], group["betas"], group["block_dim"]
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"lr: got a tensor of shape {list(lr.shape)}, expected one element")
        if type(lr) is Tensor and lr.is_cpu:  # elsewhere the host would wait for it
            check_number("lr", lr.item(), 0)
    else:
        check_number("lr", lr, 0)
    for name in ("eps", "weight_decay"):
        check_number(name, group[name], 0)
    if not isinstance(betas, (tuple, list)) or not all(is_number(beta) for beta in betas):
        raise TypeError(f"betas: got {shown(betas)}, expected two numbers, 0 <= beta < 1")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas: got {betas}, expected two numbers, 0 <= beta < 1")
    if block_dim is not None:
        if not is_int(block_dim):
            raise TypeError(f"block_dim: got {shown(block_dim)}, expected 0, 1 or None")
        if block_dim not in (0, 1):
            raise ValueError(f"block_dim: got {block_dim}, expected 0, 1 or None")
    for name in ("amsgrad", "maximize", "fused"):
        check_bool(name, group[name])
    state_dtype = group["state_dtype"]
    if state_dtype not in (None, torch.float32, torch.bfloat16, EIGHT_BITS):
        raise ValueError(
            f"state_dtype: got {shown(state_dtype)}, expected None, torch.float32, torch.bfloat16 or {EIGHT_BITS!r}"
        )
    for parameter in group["params"]:
        _check_parameter(parameter, block_dim)
        if state_dtype is not None and parameter.dtype == torch.float64:
            raise ValueError(
                f"state_dtype: got {state_dtype} for a parameter of torch.float64, expected None: moments of fewer "
                "bits would be what the step is made of"
            )
        if group["fused"]:
            fused_backend(parameter.device, parameter.dtype)
    if state_dtype == EIGHT_BITS:
        prepare(group["params"])


def checked_parameters(name: str, params: Any) -> list[Any]:
    """Parameters, pairs of a name and one, or groups of them, as a list; there must be some."""
    expected = "parameters, or dicts of them with options"
    if isinstance(params, (Tensor, str, dict)) or not isinstance(params, Iterable):
        raise TypeError(f"{name}: got {shown(params)}, expected {expected}")
    listed = list(params)
    for one in listed:
        parameter = one[-1] if isinstance(one, tuple) and len(one) == 2 else one
        if not isinstance(parameter, (Tensor, dict)):
            raise TypeError(f"{name}: got {shown(one)} among them, expected {expected}")
    if not listed:
        raise ValueError(f"{name}: got none, expected {expected}")
    return listed


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
