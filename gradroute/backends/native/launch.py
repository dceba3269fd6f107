"""Launching a kernel of the native module, and the sums over tokens that kernels leave behind."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...fake_tensors import has_data
from ...primitives.arguments import product_dtype
from . import loading
from .operands import taken


def launch(name: str, operands: NamedTuple) -> None:
    """Calls a kernel of csrc/kernels.inc with its operands, on the device of the first tensor.

    Nothing happens where that has no memory or no elements: while tracing, and for empty batches.

    Raises:
        TypeError: a tensor subclass that wraps others, such as DTensor: it has no memory of its own.
        ValueError: a tensor of a dtype that no kernel takes, on another device than the first, without memory, or not
            aligned to its elements.
        RuntimeError: CUDA refuses; the message names the kernel.
    """
    first = next(operand for operand in operands if isinstance(operand, Tensor))
    if not has_data(first) or first.numel() == 0:
        return
    call(name, first.device, operands)


def call(name: str, device: torch.device, operands: NamedTuple) -> None:
    """`launch` on a device, for operands that have memory."""
    given = taken(operands, device)
    if device.type == "cpu":
        getattr(getattr(loading.module, f"cpu_{loading.instruction_set}"), name)(given, (0, 0))
        return
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        getattr(loading.module.cuda, name)(given, (device.index, stream))


def new_sums(g: Tensor) -> Tensor:
    """Memory for the sums of each run of tokens: `[runs, F]`."""
    runs = -(-g.shape[0] // loading.module.TOKENS_PER_SUM)
    return g.new_empty(runs, g.shape[1], dtype=product_dtype(g.dtype))


def summed(sums: Tensor | None, g: Tensor) -> Tensor:
    """The sums over all tokens `[F]`; without elements where they are not wanted."""
    return g.new_empty(0) if sums is None else sums.sum(0)


def new_like(a: Tensor, is_wanted: bool) -> Tensor:
    """An output `[T, F]` in a's dtype; without tokens where it is not wanted."""
    return a.new_empty(a.shape[0] if is_wanted else 0, a.shape[1])
