"""Arguments as tensors, and the checks of arguments that the other files share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from .. import arguments
from ..arguments import check_int, is_number

__all__ = [
    "MAX_VOCABULARY",
    "Values",
    "as_bounds",
    "as_integers",
    "as_labels",
    "as_numbers",
    "as_row",
    "as_tensor",
    "as_vocabulary_ids",
    "check_all",
    "check_int",
    "check_like",
    "check_range",
    "check_row",
    "is_number",
    "on_host",
]

#: A tensor, an array, a number, or nested sequences of numbers.
Values = Tensor | np.ndarray | Sequence[object] | float

# Tables over the vocabulary are as long as the largest token id: one beyond this is a mistake, not a vocabulary.
MAX_VOCABULARY = 1 << 24


def as_tensor(name: str, value: Values) -> Tensor:
    """`value` as a tensor; arrays and lists are copied to the CPU. Python's floats are fp64."""
    try:
        return arguments.as_tensor(value, "a tensor, an array, or numbers in rows of one length")
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None


def as_integers(name: str, value: Values) -> Tensor:
    """`value` as int32 or int64, which indexing takes; other integers become int64."""
    tensor = as_tensor(name, value)
    if tensor.dtype == torch.bool or tensor.is_floating_point() or tensor.is_complex():
        raise TypeError(f"{name}: got dtype {tensor.dtype}, expected integers")
    return tensor if tensor.dtype in (torch.int32, torch.int64) else tensor.long()


def on_host(name: str, tensor: Tensor) -> Tensor:
    """A tensor's values on the CPU, for which the host waits; raises where it is on the meta device and has none."""
    _check_values(name, tensor)
    return tensor.cpu()


def _check_values(name: str, tensor: Tensor) -> None:
    if tensor.is_meta:
        raise ValueError(f"{name}: got a tensor on the meta device, expected one with values")


def as_numbers(name: str, value: Values, bools: bool = False) -> Tensor:
    """`value` as real numbers; integers as in `as_integers`."""
    tensor = as_tensor(name, value)
    if tensor.is_complex() or (tensor.dtype == torch.bool and not bools):
        raise TypeError(f"{name}: got dtype {tensor.dtype}, expected real numbers")
    return tensor if tensor.is_floating_point() or tensor.dtype == torch.bool else as_integers(name, tensor)


def as_labels(name: str, value: Values) -> Tensor:
    """`value` as ids, strengths or bools; strengths in a list, which has no dtype, are fp32."""
    tensor = as_numbers(name, value, bools=True)
    return tensor.float() if tensor.is_floating_point() and not hasattr(value, "dtype") else tensor


def as_row(name: str, value: Values) -> Tensor:
    """`value` as `[n]` ids, strengths or bools."""
    tensor = as_labels(name, value)
    check_row(name, tensor, None, "")
    return tensor


def as_vocabulary_ids(name: str, value: Values | Iterable[int]) -> Tensor:
    """`value` as int64 `[n]` on the CPU, n at least 1, all of them indices of a vocabulary."""
    if isinstance(value, Iterable) and not isinstance(value, (Tensor, np.ndarray)):
        value = list(value)
    ids = on_host(name, as_integers(name, value)).long()
    check_row(name, ids, None, "")
    if len(ids) == 0:
        raise ValueError(f"{name}: got none, expected at least one token id")
    check_all(name, ids, (ids >= 0) & (ids < MAX_VOCABULARY), f"token ids from 0 to {MAX_VOCABULARY - 1}")
    return ids


def as_bounds(cu_seqlens: Values, tokens: Tensor) -> Tensor:
    """`cu_seqlens` of the one row of `tokens` as int64 `[documents + 1]` on their device, checked on the host."""
    if tokens.numel() != (tokens.shape[-1] if tokens.dim() else 0):
        raise ValueError(
            f"cu_seqlens: got tokens of shape {list(tokens.shape)}, expected one packed row, [T] or [1, T]"
        )
    bounds = as_integers("cu_seqlens", cu_seqlens).long()
    check_row("cu_seqlens", bounds, None, "")
    if bounds.device.type == "cpu":
        falling = bool((bounds.diff() < 0).any())
        if len(bounds) == 0 or falling or int(bounds[0]) != 0 or int(bounds[-1]) != tokens.numel():
            raise ValueError(
                f"cu_seqlens: got {_shown(bounds)}, expected ascending bounds from 0 to {tokens.numel()}, the number "
                "of tokens"
            )
    return bounds.to(tokens.device)


def _shown(values: Tensor, most: int = 6) -> str:
    listed = [str(value) for value in values.reshape(-1)[:most].tolist()]
    return f"[{', '.join(listed)}{', ...' if values.numel() > most else ''}]"


def check_row(name: str, tensor: Tensor, length: int | None, expected: str) -> None:
    """Raises unless a tensor is `[length]`, or `[n]` where length is None."""
    if tensor.dim() != 1:
        raise ValueError(f"{name}: got shape {list(tensor.shape)}, expected one dimension")
    if length is not None and len(tensor) != length:
        raise ValueError(f"{name}: got {len(tensor)}, expected {length}, {expected}")


def check_like(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raises unless a tensor has another's shape and device."""
    if tensor.shape != other.shape:
        raise ValueError(
            f"{name}: got shape {list(tensor.shape)}, expected that of {other_name} {list(other.shape)}"
        )
    if tensor.device != other.device:
        raise ValueError(
            f"{name}: got a tensor on {tensor.device}, expected the device of {other_name} {other.device}"
        )


def check_range(name: str, ids: Tensor, size: int, what: str) -> None:
    """Raises unless all ids are in `[0, size)`; waits for their device."""
    if ids.numel() == 0:
        return
    _check_values(name, ids)
    low, high = torch.aminmax(ids)  # one pass of 1 ms for 10M ids on two cores; comparisons take 8
    if bool((low < 0) | (high >= size)):
        wrong = ids[(ids < 0) | (ids >= size)]
        raise ValueError(
            f"{name}: got {wrong.numel()} of {ids.numel()} out of range, values {_shown(wrong.unique())}; "
            f"expected 0 <= id < {size}, the {what}"
        )


def check_all(name: str, values: Tensor, valid: Tensor, expected: str) -> None:
    """Raises unless all values are `valid`; waits for their device."""
    _check_values(name, values)
    if not bool(valid.all()):
        first = (~valid).nonzero()[0].tolist()
        raise ValueError(f"{name}: got {values[tuple(first)].item()} at {first}, expected {expected}")
