"""Tensors that have values to read, and those of a FakeTensorMode, which have shapes alone."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor


def has_data(tensor: Tensor) -> bool:
    """Whether there is memory to read: not while tracing or estimating, nor on the meta device."""
    return not (isinstance(tensor, FakeTensor) or tensor.is_meta)


def in_fake_mode(tensor: Tensor) -> Tensor:
    """A constant as the FakeTensorMode that is active takes it, such as one that estimates memory; else itself."""
    if torch.compiler.is_compiling() or not torch._C._len_torch_dispatch_stack():
        return tensor
    mode = detect_fake_mode()
    return tensor if mode is None or isinstance(tensor, FakeTensor) else mode.from_tensor(tensor)
