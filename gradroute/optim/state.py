"""The optimizer's state: moments, and one count of steps for every block of a parameter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .quantised import (
    CODES,
    EIGHT_BITS,
    SCALES,
    Layout,
    dequantise,
    is_quantised,
    layout_in,
    layout_of,
    new_codes,
    quantise,
    require_torchao,
)
from .shards import is_distributed, local_part, sharded_like

#: Options of torch.optim.AdamW's groups that only change how it computes.
HOW_TORCH_COMPUTES = ("foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay")


#: The moments in a parameter's state; the last one with amsgrad alone.
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def block_shape(shape: torch.Size, block_dim: int | None) -> tuple[int, ...]:
    """The shape of a tensor with one number for every block of another tensor, against which it broadcasts."""
    if block_dim is None or not shape:
        return ()
    blocks = [1] * len(shape)
    blocks[block_dim] = shape[block_dim]
    return tuple(blocks)


def new_steps(parameter: Tensor, block_dim: int | None, count: float = 0.0) -> Tensor:
    """Equal counts of steps for all blocks of a parameter; a DTensor where the parameter is one."""
    shape = block_shape(local_part(parameter).shape, block_dim)
    local = torch.full(shape, count, dtype=torch.float32, device=parameter.device)
    if not is_distributed(parameter):
        return local
    from torch.distributed.tensor import Replicate

    whole = torch.Size(block_shape(parameter.shape, block_dim))
    placements = [
        placement if whole and getattr(placement, "dim", None) == block_dim else Replicate()
        for placement in parameter.placements
    ]
    return sharded_like(parameter, local, whole, placements)


def new_moments(parameter: Tensor, group: Mapping[str, Any]) -> dict[str, Tensor]:
    """Moments of zeros, as a parameter's state has them; DTensors where the parameter is one."""
    moments: dict[str, Tensor] = {}
    layout, dtype = _layout(parameter, group), _dtype(parameter, group)
    for name in MOMENTS[: 3 if group["amsgrad"] else 2]:
        if layout is None:
            moments[name] = torch.zeros_like(parameter, dtype=dtype, memory_format=torch.preserve_format)
        else:
            moments |= new_codes(name, parameter, layout)
    return moments


def _layout(parameter: Tensor, group: Mapping[str, Any]) -> Layout | None:
    """How a parameter's moments are quantised; None: they are not."""
    return layout_of(parameter, group["block_dim"]) if group["state_dtype"] == EIGHT_BITS else None


def _dtype(parameter: Tensor, group: Mapping[str, Any]) -> torch.dtype:
    """The dtype of moments that are not quantised."""
    dtype = group["state_dtype"]
    if dtype == EIGHT_BITS:
        return torch.float32
    return parameter.dtype if dtype is None else dtype


def adopt_group(saved: dict[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a group takes over from a saved one, which may be one of torch.optim.AdamW.

    Args:
        saved: the saved group.
        own: the group that takes the options over.
    """
    kept = {name: own[name] for name in ("fused", "state_dtype")}
    saved = {"maximize": own["maximize"], **saved}  # torchao's optimizers have no such option
    if "block_dim" in saved:
        return {**saved, **kept}  # how an optimizer computes and stores is no state
    if not saved.get("decoupled_weight_decay", True):
        raise ValueError(
            "state_dict: got the state of an Adam that adds weight decay to the gradient, expected that of an AdamW"
        )
    options = {name: value for name, value in saved.items() if name not in HOW_TORCH_COMPUTES}
    return options | {"block_dim": own["block_dim"]} | kept


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
        for key in (name, name + CODES):
            if key in saved and saved[key].shape != shape:
                raise ValueError(
                    f"state_dict: got {key} of shape {list(saved[key].shape)} for a parameter of shape {list(shape)}, "
                    "expected the parameter's"
                )
        if name + CODES in saved:
            _check_codes(name, saved)


def _check_codes(name: str, saved: Mapping[str, Any]) -> None:
    """Raises ValueError where what was saved of a quantised moment is not as `quantised` stores it."""
    codes, scales = saved[name + CODES], saved.get(name + SCALES)
    expected = "fp32 of the same shape, but for one dimension with one for every few codes"
    if scales is None:
        raise ValueError(f"state_dict: got {name + CODES} without {name + SCALES}, expected them: {expected}")
    if codes.dtype != torch.uint8:
        raise ValueError(f"state_dict: got {name + CODES} in {codes.dtype}, expected torch.uint8")
    if scales.dtype != torch.float32 or layout_in(codes.shape, scales.shape) is None:
        raise ValueError(
            f"state_dict: got {name + SCALES} of shape {list(scales.shape)} in {scales.dtype} beside codes of shape "
            f"{list(codes.shape)}, expected {expected}"
        )


@torch.no_grad()
def loaded_moments(
    parameter: Tensor, group: Mapping[str, Any], saved: Mapping[str, Any]
) -> dict[str, Tensor] | None:
    """Saved moments as the parameter's group stores them; None: torch converts them, as of any optimizer.

    Codes and scales are copied bit for bit where the same elements share scales. Else the values are converted.

    Raises:
        ImportError: torchao, which is needed for that, is missing.
        ValueError: ordinary moments for a DTensor, or the other way round, where one of both are codes.
    """
    if group["state_dtype"] is None and not is_quantised(saved) and not any(map(_is_wrapped, saved.values())):
        return None
    layout, dtype, device = _layout(parameter, group), _dtype(parameter, group), parameter.device
    loaded: dict[str, Tensor] = {}
    for name in MOMENTS:
        keys = name + CODES, name + SCALES
        if name not in saved and keys[0] not in saved:
            continue
        is_coded = keys[0] in saved
        if is_coded or layout is not None:
            _check_placements(name, saved[keys[0] if is_coded else name], parameter)
        if is_coded and layout == layout_in(*(saved[key].shape for key in keys)):
            loaded |= {key: saved[key].to(device, copy=True) for key in keys}
            continue
        if is_coded:
            require_torchao()
            values = dequantise(name, saved, device)
        else:
            values = saved[name].dequantize() if _is_wrapped(saved[name]) else saved[name]
        if layout is None:
            loaded[name] = values.to(device, dtype, copy=values is saved.get(name))
        else:
            loaded |= quantise(name, parameter, layout, values)
    return loaded


def _is_wrapped(value: Any) -> bool:
    """Whether a class of its own has a moment's values, as in the states of torchao's optimizers."""
    return isinstance(value, Tensor) and type(value).dequantize is not Tensor.dequantize


def _check_placements(name: str, saved: Tensor, parameter: Tensor) -> None:
    """Raises ValueError where a saved moment is not sharded as its parameter is."""
    got, expected = (tensor.placements if is_distributed(tensor) else None for tensor in (saved, parameter))
    if got != expected:
        kinds = ["an ordinary tensor" if one is None else f"a DTensor of {one}" for one in (got, expected)]
        raise ValueError(
            f"state_dict: got {name} in {kinds[0]}, expected {kinds[1]}, as the parameter is; "
            "torch.distributed.checkpoint.state_dict.set_optimizer_state_dict shards what was saved whole"
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
