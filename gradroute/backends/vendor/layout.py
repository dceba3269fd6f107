"""Tensors and masks as the vendors' kernels read them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...primitives.attention_pattern import Pattern


def is_causal(q: Tensor, pattern: Pattern) -> bool:
    """Whether a kernel whose mask is aligned at the top left is to be causal: a single query sees every key."""
    return pattern.causal and q.shape[2] != 1


def key_bias(pattern: Pattern, dtype: torch.dtype) -> Tensor | None:
    """`[B, 1, 1, S_k]`, 0 for keys and -inf for padding, in q's dtype: others may be read as if they were q's.

    Both kernels that take it give 0, with lse 0 and gradients 0, to a query that sees no key; were padding finite, such
    a query would attend to it. Rows begin at multiples of 16 elements, for 16-byte loads.
    """
    if pattern.key_mask is None:
        return None
    batch, keys = pattern.key_mask.shape
    padding = torch.nn.functional.pad(pattern.key_mask.logical_not(), (0, -keys % 16))
    rows = torch.zeros(padding.shape, dtype=dtype, device=padding.device).masked_fill(padding, -torch.inf)
    return rows.narrow(1, 0, keys).view(batch, 1, 1, keys)


def dense_rows(t: Tensor) -> Tensor:
    """The tensor with its last dimension dense: kernels for the CPU do not look at its stride."""
    return t if t.stride(-1) == 1 else t.clone(memory_format=torch.contiguous_format)


def readable(t: Tensor) -> Tensor:
    """t `[B, H, S, D]` as CUDA kernels read it, 16 bytes at a time.

    D is padded with zeros, which change no score and no value; rows begin at multiples of 16 bytes and do not overlap.
    PyTorch checks the last stride only. Traced code cannot see where a tensor begins: it is taken to be aligned.
    """
    step = 16 // t.element_size()
    if t.shape[-1] % step:
        return F.pad(t, (0, -t.shape[-1] % step))
    rows = zip(t.shape[:-1], t.stride()[:-1], strict=True)
    is_readable = (
        t.stride(-1) == 1
        and all(extent == 1 or (stride > 0 and stride % step == 0) for extent, stride in rows)
        and (torch.compiler.is_compiling() or t.storage_offset() % step == 0)
    )
    return t if is_readable else t.clone(memory_format=torch.contiguous_format)


def unpadded(t: Tensor, head_dim: int) -> Tensor:
    """The features that `readable` did not add."""
    return t if t.shape[-1] == head_dim else t.narrow(-1, 0, head_dim)


def repeated(t: Tensor, group: int) -> Tensor:
    """`[B, G, S, D]` → `[B, H, S, D]`, each key and value head for all query heads of its group."""
    return t.repeat_interleave(group, 1) if group > 1 else t


def summed(gradient: Tensor, group: int) -> Tensor:
    """`[B, H, S, D]` → `[B, G, S, D]`: summed in fp32 over each group, and rounded once."""
    return gradient.unflatten(1, (-1, group)).sum(2) if group > 1 else gradient
