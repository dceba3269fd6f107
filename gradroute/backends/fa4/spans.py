"""The keys that each query sees, as a range."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...primitives.attention_pattern import Pattern


class Spans(NamedTuple):
    """Query i sees the keys first[i] ≤ j < stop[i], padding aside. Neither decreases from query to query.

    Attributes:
        first: `[S]` int32.
        stop: `[S]` int32, greater than first, for there are as many queries as keys.
    """

    first: Tensor
    stop: Tensor

    @staticmethod
    def of(pattern: Pattern, length: int, device: torch.device) -> Spans:
        """The spans of S queries for S keys."""
        position = torch.arange(length, dtype=torch.int32, device=device)
        first, stop = torch.zeros_like(position), torch.full_like(position, length)
        if pattern.cu_seqlens is not None:
            bounds = pattern.cu_seqlens.contiguous()
            document = torch.searchsorted(bounds[1:], position, right=True)
            first, stop = bounds[document], bounds[document + 1]
        if pattern.causal:
            stop = torch.minimum(stop, position + 1)
        if pattern.window is not None:
            first = torch.maximum(first, position - (pattern.window - 1))
            if not pattern.causal:
                stop = torch.minimum(stop, position + pattern.window)
        return Spans(first, stop)
