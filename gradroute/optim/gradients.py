"""The gradients of a step, and which blocks of the parameters they touch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .arithmetic import flat, split
from .shards import Ranks, is_distributed, local_part, reduced, shards
from .state import block_shape

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class Gradient(NamedTuple):
    """The gradient of one parameter.

    Attributes:
        group: the parameter's options.
        parameter: the parameter, which may be a DTensor.
        local: this rank's part of the gradient.
    """

    group: Mapping[str, Any]
    parameter: Tensor
    local: Tensor

    @classmethod
    def of(cls, group: Mapping[str, Any], parameter: Tensor) -> Gradient:
        """The gradient of a parameter whose `grad` is not None, placed as the parameter is."""
        assert parameter.grad is not None
        if parameter.grad.layout != torch.strided:
            raise RuntimeError(
                f"params: got a sparse gradient for a parameter of shape {list(parameter.shape)}, expected a dense "
                "one, whose zeros say what is not touched"
            )
        if is_distributed(parameter):
            _place_gradient(parameter)
        return cls(group, parameter, local_part(parameter.grad))


def _place_gradient(parameter: DTensor) -> None:
    """Gives a parameter's gradient the placements of the parameter."""
    gradient = parameter.grad
    assert gradient is not None and is_distributed(gradient)
    if gradient.placements != parameter.placements:
        parameter.grad = gradient.redistribute(placements=parameter.placements)


def touched_blocks(gradients: Sequence[Gradient]) -> list[Tensor]:
    """Which blocks of this rank's part have an element on any rank that is not 0; for each gradient a bool tensor."""
    touched = [_touched_here(gradient.local, gradient.group["block_dim"]) for gradient in gradients]
    shared: dict[Ranks, list[int]] = {}  # processes → the gradients of whose blocks each of them has a part
    for index, gradient in enumerate(gradients):
        for dim, group in shards(gradient.parameter):
            if dim != gradient.group["block_dim"]:
                shared.setdefault(group, []).append(index)
    for group, indices in shared.items():
        parts = [touched[index] for index in indices]
        on_any = reduced(flat(parts).to(torch.uint8), "max", group).bool()
        for index, part in zip(indices, split(on_any, parts), strict=True):
            touched[index] = part
    return touched


def _touched_here(gradient: Tensor, block_dim: int | None) -> Tensor:
    """Which blocks of a gradient have an element that is not 0, bool."""
    shape = block_shape(gradient.shape, block_dim)
    if gradient.numel() == 0:
        return torch.zeros(shape, dtype=torch.bool, device=gradient.device)
    if shape == gradient.shape:
        return gradient != 0
    # On the CPU amin and amax took 0.04 ms for 2¹⁸ elements, and `(gradient != 0).any(...)` 0.37. Both hand on NaN,
    # which is true.
    within = [dim for dim in range(gradient.dim()) if not shape or dim != block_dim]
    least, most = (reduce(gradient, within, keepdim=bool(shape)) for reduce in (torch.amin, torch.amax))
    return torch.logical_or(least, most)
