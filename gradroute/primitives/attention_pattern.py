"""Which keys a query sees, and how scores are made of them: checked once, in the public functions of attention."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_shape
from .schema import schema


class Pattern(NamedTuple):
    """Which keys a query sees, and how scores are made of them.

    Attributes:
        causal: a query sees no later key; aligned at the bottom right where S_q ≠ S_k.
        window: key j is seen only if i - j < window (and j - i < window when not causal); None: no limit.
        scale: the factor of the scores.
        dropout: the share of P that is dropped.
        cu_seqlens: `[documents + 1]` int32, where documents of a batch of one begin and end; or None.
        key_mask: `[B, S_k]` bool, False where a key is padding; or None.
    """

    causal: bool
    window: int | None
    scale: float
    dropout: float = 0.0
    cu_seqlens: Tensor | None = None
    key_mask: Tensor | None = None

    @staticmethod
    def of(
        q: Tensor,
        k: Tensor,
        causal: bool,
        window: int | None,
        scale: float | None,
        dropout: float,
        cu_seqlens: Tensor | None,
        key_mask: Tensor | None,
    ) -> Pattern:
        """The checked pattern of a call with q `[B, H, S_q, D]` and k `[B, G, S_k, D]`; no scale is 1/√D.

        Raises:
            ValueError: an option does not fit q and k, whose numbers of dimensions, batch and D are checked with it.
        """
        check_shape("q", q, -1, -1, -1, -1)
        check_shape("k", k, q.shape[0], -1, -1, q.shape[3])
        if window is not None and window < 1:
            raise ValueError(f"window: got {window}, expected a positive number of keys or None")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: got {dropout}, expected a share of P in [0, 1)")
        if cu_seqlens is not None:
            _check_cu_seqlens(cu_seqlens, q, k)
        if key_mask is not None:
            check_shape("key_mask", key_mask, k.shape[0], k.shape[2])
            _check_mask("key_mask", key_mask, torch.bool, q)
        return Pattern(
            causal, window, q.shape[3] ** -0.5 if scale is None else scale, dropout, cu_seqlens, key_mask
        )


#: The fields of Pattern in a schema of torch.library.
PATTERN_SCHEMA = schema(Pattern)


def _check_cu_seqlens(cu_seqlens: Tensor, q: Tensor, k: Tensor) -> None:
    check_shape("cu_seqlens", cu_seqlens, -1)
    _check_mask("cu_seqlens", cu_seqlens, torch.int32, q)
    if q.shape[0] != 1:
        raise ValueError(f"cu_seqlens: got a batch of {q.shape[0]}, expected a batch of one packed sequence")
    if q.shape[2] != k.shape[2]:
        raise ValueError(
            f"cu_seqlens: got {q.shape[2]} queries for {k.shape[2]} keys, expected as many: documents are of both"
        )


def _check_mask(name: str, mask: Tensor, dtype: torch.dtype, q: Tensor) -> None:
    if mask.dtype != dtype or mask.device != q.device:
        raise ValueError(f"{name}: got {mask.dtype} on {mask.device}, expected {dtype} on {q.device}")
