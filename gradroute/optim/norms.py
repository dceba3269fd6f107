"""The norm of all gradients, of ordinary ones and of DTensors side by side."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .gradients import Gradient
from .shards import Ranks, reduced, shards


def total_norm(gradients: Sequence[Gradient], norm_type: float) -> Tensor:
    """The norm of all gradients, by one collective for every process group and all gradients that are sharded alike.

    torch's own norm of DTensors has no largest entry where a shard is empty, and cannot be combined with the norm of
    ordinary tensors.
    """
    alike: dict[tuple[Ranks, ...], list[Tensor]] = {}
    for gradient in gradients:
        groups = tuple(group for _, group in shards(gradient.parameter))
        alike.setdefault(groups, []).append(gradient.local)
    norms = [_norm_of_ranks(tensors, norm_type, groups) for groups, tensors in alike.items()]
    return norms[0] if len(norms) == 1 else nn.utils.get_total_norm(norms, norm_type)


def _norm_of_ranks(tensors: Sequence[Tensor], norm_type: float, groups: tuple[Ranks, ...]) -> Tensor:
    """The norm of tensors, parts of which lie on all ranks of some process groups."""
    if not groups:
        return nn.utils.get_total_norm(tensors, norm_type)
    # Another rank may have other empty parts, and so other dtypes among the rest.
    dtype = functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
    norm = nn.utils.get_total_norm([tensor for tensor in tensors if tensor.numel()], norm_type)
    norm = norm.to(tensors[0].device, dtype)
    for group in groups:
        # Every rank adds its norm to a list: the largest of several numbers need not be NaN where one of them is.
        norms = norm.new_zeros(group.size)
        norms[group.number] = norm
        norm = torch.linalg.vector_norm(reduced(norms, "sum", group), norm_type)
    return norm
