"""An optimizer's state, when a parameter changes its shape or a block of it is ablated."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ..blocks import Piece


def hand_over(
    optimizer: torch.optim.Optimizer,
    old: nn.Parameter,
    new: nn.Parameter,
    dim: int,
    change: Callable[[Tensor], Tensor],
) -> None:
    """Puts a parameter in the place of another one, with its state changed in the same way.

    State is changed where it has the old parameter's size along the dimension `dim`: moments, and step counts of rows
    or columns (RoutedAdamW's, which broadcast against the parameter). Other state is kept, such as one step count for
    all elements.
    """
    for group in optimizer.param_groups:
        group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
    if old not in optimizer.state:
        return
    state = optimizer.state.pop(old)
    optimizer.state[new] = {
        key: change(value) if _runs_along(key, value, old, dim) else value for key, value in state.items()
    }


def _runs_along(key: str, value: object, parameter: Tensor, dim: int) -> bool:
    """Whether a value of an optimizer's state has an element for each index of a parameter along a dimension."""
    if not isinstance(value, Tensor) or value.dim() != parameter.dim():
        return False
    if key == "step" and parameter.dim() > 1:  # [n, 1] or [1, m]
        return value.numel() == value.shape[dim] == parameter.shape[dim] > 1
    return value.shape == parameter.shape


def zero_state(parameter: nn.Parameter, piece: Piece, optimizer: torch.optim.Optimizer | None) -> None:
    """Makes an optimizer's state of a piece 0."""
    if optimizer is None:
        return
    for key, value in optimizer.state.get(parameter, {}).items():
        if _runs_along(key, value, parameter, piece.dim):
            piece.write(value, 0.0)


def check_states(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> None:
    """Raises unless an optimizer's state is laid out like its parameters, given by their names."""
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor) or value.dim() == 0 or key == "step":
                continue
            if value.shape != parameter.shape or not value.is_floating_point():
                raise TypeError(
                    f"optimizer: got state {key!r} of shape {list(value.shape)} and {value.dtype} for {name} of shape "
                    f"{list(parameter.shape)}, expected floating point of its shape; make the optimizer anew"
                )
