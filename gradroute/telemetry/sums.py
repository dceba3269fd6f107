"""Names, dtypes and sums that the other files of telemetry share."""

from __future__ import annotations

import torch
from torch import Tensor

#: The name of the sum over all watched modules, which no module or route of the user's may have.
ALL = "all"

#: The name of the parameters outside of all blocks, which no block of the user's may have.
REST = "rest"

#: The label of tokens without a loss, as in transformers.
IGNORED_LABEL = -100


def wide(tensor: Tensor) -> torch.dtype:
    """The dtype in which norms and losses are computed: fp32, or fp64 for fp64."""
    return torch.promote_types(tensor.dtype, torch.float32)


def zeros(shape: int | tuple[int, ...], device: torch.device) -> Tensor:
    """Zeros in fp64, which sums of many squares need."""
    return torch.zeros(shape, dtype=torch.float64, device=device)
