"""The optimizer's state: moments, and one count of steps for every block of a parameter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .shards import is_distributed, local_part

#: Options of torch.optim.AdamW's groups that only change how it computes.
HOW_TORCH_COMPUTES = ("foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay")


#: The moments in a parameter's state; the last one with amsgrad alone.
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def block_shape(shape: torch.Size, block_dim: int | None) -> torch.Size:
    """The shape of a tensor with one number for every block of another tensor, against which it broadcasts."""
    if block_dim is None or not shape:
        return torch.Size(())
    return torch.Size(size if dim == block_dim else 1 for dim, size in enumerate(shape))


def new_steps(parameter: Tensor, block_dim: int | None, count: float = 0.0) -> Tensor:
    """Equal counts of steps for all blocks of a parameter; a DTensor where the parameter is one."""
    shape = block_shape(local_part(parameter).shape, block_dim)
    local = torch.full(shape, count, dtype=torch.float32, device=parameter.device)
    if not is_distributed(parameter):
        return local
    from torch.distributed.tensor import DTensor, Replicate

    whole = block_shape(parameter.shape, block_dim)
    placements = [
        placement if whole and getattr(placement, "dim", None) == block_dim else Replicate()
        for placement in parameter.placements
    ]
    stride = torch.empty(whole, dtype=torch.float32, device="meta").stride()
    return DTensor.from_local(
        local, parameter.device_mesh, placements, run_check=False, shape=whole, stride=stride
    )


def adopt_group(saved: dict[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a group takes over from a saved one, which may be one of torch.optim.AdamW.

    Args:
        saved: the saved group.
        own: the group that takes the options over.
    """
    if "block_dim" in saved:
        return {**saved, "fused": own["fused"]}  # how an optimizer computes is no state
    if not saved.get("decoupled_weight_decay", True):
        raise ValueError(
            "state_dict: got the state of an Adam that adds weight decay to the gradient, expected that of an AdamW"
        )
    options = {name: value for name, value in saved.items() if name not in HOW_TORCH_COMPUTES}
    return options | {"block_dim": own["block_dim"], "fused": own["fused"]}


def check_state(parameter: Tensor, block_dim: int | None, saved: Mapping[str, Any]) -> None:
    """Raises ValueError where a saved state does not have the shape of its parameter."""
    shape, blocks = parameter.shape, block_shape(parameter.shape, block_dim)
    steps = _as_tensor(saved.get("step", 0))
    if steps.dim() and steps.shape != blocks:
        raise ValueError(
            f"state_dict: got steps of shape {list(steps.shape)} for a parameter of shape {list(shape)} and "
            f"block_dim={block_dim}, expected {list(blocks)} or one number"
        )
    for name in MOMENTS:
        if name in saved and saved[name].shape != shape:
            raise ValueError(
                f"state_dict: got {name} of shape {list(saved[name].shape)} for a parameter of shape {list(shape)}, "
                "expected the parameter's"
            )


def _as_tensor(count: Tensor | float) -> Tensor:
    """A saved count of steps as a tensor; a number is not rounded to the default dtype."""
    return count if isinstance(count, Tensor) else torch.tensor(count, dtype=torch.float64, device="cpu")


def loaded_steps(parameter: Tensor, block_dim: int | None, saved: Tensor | float) -> Tensor:
    """Saved counts of steps on the parameter's device; a single number becomes the count of every block."""
    steps = _as_tensor(saved)
    has_blocks = len(block_shape(parameter.shape, block_dim)) > 0
    if steps.dim() == 0 and (has_blocks or is_distributed(parameter) != is_distributed(steps)):
        return new_steps(parameter, block_dim, float(local_part(steps)))
    return steps.to(device=parameter.device, dtype=torch.float32)
