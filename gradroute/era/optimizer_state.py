"""An optimizer's state, when a parameter changes its shape or a block of it is ablated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import Piece


def hand_over(optimizer: torch.optim.Optimizer, old: nn.Parameter, new: nn.Parameter) -> dict[str, Any]:
    """Puts a parameter in the place of another one; returns its state, which is the old one's until it is changed."""
    for group in optimizer.param_groups:
        group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
    if old not in optimizer.state:
        return {}
    state: dict[str, Any] = optimizer.state.pop(old)
    optimizer.state[new] = state
    return state


def change_state(
    state: dict[str, Any], shape: torch.Size, dim: int, change: Callable[[Tensor], Tensor]
) -> None:
    """Changes a parameter's state as the parameter was, one value after the other.

    State is changed where it has the old parameter's size along the dimension `dim`: moments, and step counts of rows
    or columns (RoutedAdamW's, which broadcast against the parameter). Other state is kept, such as one step count for
    all elements.

    Args:
        state: the state, whose values are replaced, so that an old one is free before the next one changes.
        shape: the old parameter's.
        dim: along which dimension it changed.
        change: an old value → the new one.
    """
    for key in state:
        if _runs_along(key, state[key], shape, dim):
            state[key] = change(state[key])


def _runs_along(key: str, value: object, shape: torch.Size, dim: int) -> bool:
    """Whether a value of an optimizer's state has an element for each index of a parameter along a dimension."""
    if not isinstance(value, Tensor) or value.dim() != len(shape):
        return False
    if key == "step" and len(shape) > 1:  # [n, 1] or [1, m]
        return value.numel() == value.shape[dim] == shape[dim] > 1
    return value.shape == shape


def zero_state(parameter: nn.Parameter, piece: Piece, optimizer: torch.optim.Optimizer | None) -> None:
    """Makes an optimizer's state of a piece 0."""
    if optimizer is None:
        return
    for key, value in optimizer.state.get(parameter, {}).items():
        if _runs_along(key, value, parameter.shape, piece.dim):
            piece.write(value, 0.0)


def check_zeros(optimizer: torch.optim.Optimizer | None, parameters: Mapping[str, nn.Parameter]) -> None:
    """Raises where `zero_state` would write to codes, of which 0 does not stand for 0."""
    if optimizer is None:
        return
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                _refuse_codes(name, key, value)


def _refuse_codes(name: str, key: str, value: Tensor) -> None:
    """Raises where a value of a parameter's state is the codes of a quantised moment."""
    if value.dtype == torch.uint8:
        raise TypeError(
            f"optimizer: got state {key!r} of {name} in {value.dtype}, the codes of quantised moments, expected "
            "floating point: load the state into an optimizer without state_dtype='8bit', change the model with that "
            "one, and load its state back"
        )


def check_states(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> None:
    """Raises unless an optimizer's state is laid out like its parameters, given by their names."""
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor) or value.dim() == 0 or key == "step":
                continue
            _refuse_codes(name, key, value)
            if value.shape != parameter.shape or not value.is_floating_point():
                raise TypeError(
                    f"optimizer: got state {key!r} of shape {list(value.shape)} and {value.dtype} for {name} of shape "
                    f"{list(parameter.shape)}, expected floating point of its shape; make the optimizer anew"
                )
