"""How many bytes autograd keeps for a backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class SavedBytes(NamedTuple):
    """Bytes kept for the backward: every storage once, and once per tensor saved."""

    once: int
    packed: int


def saved_bytes(forward: Callable[[], object]) -> SavedBytes:
    """The bytes that autograd saves while `forward` runs, counted with `torch.autograd.graph.saved_tensors_hooks`."""
    storages: dict[int, int] = {}
    packed = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal packed
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        packed += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    del output
    return SavedBytes(sum(storages.values()), packed)
