"""What the other files share: names, dtypes and sums."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: What is summed over all watched modules: no name of the user's.
ALL = "all"

#: The parameters outside of all blocks: no name of the user's.
REST = "rest"

IGNORED_LABEL = -100  # transformers takes no loss of it


def wide(tensor: Tensor) -> torch.dtype:
    """fp32, or fp64 for fp64: what norms and losses are computed in."""
    return torch.promote_types(tensor.dtype, torch.float32)


def zeros(shape: Any, device: torch.device) -> Tensor:
    """In fp64: sums of many squares."""
    return torch.zeros(shape, dtype=torch.float64, device=device)
