"""Which keys a query sees, and how scores are made of them, as the primitives of attention take it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Pattern(NamedTuple):
    """Which keys a query sees, and how scores are made of them.

    Attributes:
        causal: a query sees no later key; aligned at the bottom right where S_q ≠ S_k.
        window: key j is seen only if i - j < window (and j - i < window when not causal); None: no limit.
        scale: the factor of the scores.
        dropout: the share of P that is dropped.
        cu_seqlens: `[documents + 1]` int32, where documents of a batch of one begin and end, ascending from 0 to S; or
            None.
        key_mask: `[B, S_k]` bool, False where a key is padding; or None.
    """

    causal: bool
    window: int | None
    scale: float
    dropout: float = 0.0
    cu_seqlens: Tensor | None = None
    key_mask: Tensor | None = None
