"""Tensors of few rows that lie more than 2³¹ elements apart, for kernels that count in 32 bits."""

from __future__ import annotations

import math
import mmap

import torch
from torch import Tensor

# The third row then lies 2³¹ + 16 elements behind the first.
STRIDE = 2**30 + 8
#: Linux's flag for memory of which nobody promises that it is there; Python names it from 3.13 on.
_NO_RESERVE = 0x4000


class NotChecked(Exception):
    """Why something cannot be checked here; nothing is wrong with it."""


def far_apart(tensor: Tensor) -> Tensor:
    """A copy whose rows, along the last dimension but one, lie STRIDE elements apart.

    On the CPU that is virtual memory, of which only the pages of the rows are ever touched; on CUDA it is memory.

    Raises:
        NotChecked: there is not so much of it.
    """
    by_rows = tensor.movedim(-2, 0).contiguous()
    rows, *within = by_rows.shape
    memory = _memory((rows - 1) * STRIDE + math.prod(within), tensor)
    far = memory.as_strided(by_rows.shape, (STRIDE, *by_rows.stride()[1:])).movedim(0, -2)
    far.copy_(tensor)
    return far


def _memory(elements: int, like: Tensor) -> Tensor:
    size = elements * like.element_size()
    if like.device.type != "cpu":
        torch.cuda.empty_cache()  # what this process holds and does not use is free too
        free, _ = torch.cuda.mem_get_info(like.device)
        if free < size + 2**30:
            raise NotChecked(
                f"it takes {size / 2**30:.0f} GiB of the device, of which {free / 2**30:.1f} are free"
            )
        return torch.empty(elements, dtype=like.dtype, device=like.device)
    try:
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE)
    except (OSError, ValueError, OverflowError, AttributeError) as error:
        raise NotChecked(f"there are no {size / 2**30:.0f} GiB of virtual memory: {error}") from None
    return torch.frombuffer(pages, dtype=like.dtype)[:elements]
