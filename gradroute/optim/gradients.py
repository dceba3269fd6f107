"""The gradients of a step, and which blocks of the parameters they touch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import backends
from .arithmetic import flat, split
from .matrices import Division, as_matrices, division_of
from .options import fused_backend
from .shards import Ranks, is_distributed, local_part, reduced, shards

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class Gradient(NamedTuple):
    """The gradient of one parameter.

    Attributes:
        number: the number of the parameter's group.
        group: the parameter's options.
        parameter: the parameter, which may be a DTensor.
        local: this rank's part of the gradient.
        division: how that is divided into blocks.
    """

    number: int
    group: Mapping[str, Any]
    parameter: Tensor
    local: Tensor
    division: Division

    @classmethod
    def of(cls, number: int, group: Mapping[str, Any], parameter: Tensor) -> Gradient:
        """The gradient of a parameter whose `grad` is not None, placed as the parameter is."""
        gradient = parameter.grad
        assert gradient is not None
        if gradient.layout != torch.strided:
            raise RuntimeError(
                f"params: got a sparse gradient for a parameter of shape {list(parameter.shape)}, expected a dense "
                "one, whose zeros say what is not touched"
            )
        if is_distributed(parameter):
            _place_gradient(parameter)
            gradient = parameter.grad
            assert gradient is not None
        local = local_part(gradient)
        return cls(number, group, parameter, local, division_of(local.shape, group["block_dim"]))


def _place_gradient(parameter: DTensor) -> None:
    """Gives a parameter's gradient the placements of the parameter."""
    gradient = parameter.grad
    assert gradient is not None and is_distributed(gradient)
    if gradient.placements != parameter.placements:
        parameter.grad = gradient.redistribute(placements=parameter.placements)


def touched_blocks(gradients: Sequence[Gradient]) -> list[Tensor]:
    """Which blocks of this rank's part have an element on any rank that is not 0; for each gradient bool `[blocks]`."""
    touched = _touched_here(gradients)
    shared: dict[Ranks, list[int]] = {}  # processes → the gradients of whose blocks each of them has a part
    for index, gradient in enumerate(gradients):
        if is_distributed(gradient.parameter):
            for dim, group in shards(gradient.parameter):
                if dim != gradient.group["block_dim"]:
                    shared.setdefault(group, []).append(index)
    for group, indices in shared.items():
        parts = [touched[index] for index in indices]
        on_any = reduced(flat(parts).to(torch.uint8), "max", group).bool()
        for index, part in zip(indices, split(on_any, parts), strict=True):
            touched[index] = part
    return touched


def _touched_here(gradients: Sequence[Gradient]) -> list[Tensor]:
    """Which blocks of this rank's gradients have an element that is not 0; for each gradient bool `[blocks]`."""
    touched: list[Any] = [None] * len(gradients)
    alike: dict[tuple[torch.device, torch.dtype, bool], list[int]] = {}
    for index, gradient in enumerate(gradients):
        local = gradient.local
        alike.setdefault((local.device, local.dtype, gradient.group["fused"]), []).append(index)
    for (device, dtype, is_fused), indices in alike.items():
        primitives = backends.primitives(fused_backend(device, dtype) if is_fused else "torch")
        divisions = [gradients[index].division for index in indices]
        matrices = as_matrices([gradients[index].local for index in indices], divisions)
        found = primitives.touched_blocks(matrices, [division.blocks for division in divisions])
        parts = found.split([division.number for division in divisions])
        for index, part, division in zip(indices, parts, divisions, strict=True):
            touched[index] = part if division.width == 1 else part.view(-1, division.width).any(1)
    return touched
