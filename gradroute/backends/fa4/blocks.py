"""Which blocks of queries and keys a pass computes: full ones as they are, others under a mask.

The lists are made on the device, by operations that wait for nothing, so that a CUDA graph can have them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .spans import Spans

#: Queries of a block, and keys: what the kernels for sm_90 and sm_100 take at every head dimension up to 128.
BLOCK = 128


class Blocks(NamedTuple):
    """For each block of keys the blocks of queries that are computed, in the form of `BlockSparseTensorsTorch`.

    A block is full where every query sees every key and has an edge to it. A block where no query can see or has no
    edge to any key is in neither list. The others are partial: under the mask that the kernel applies, some may turn
    out to be empty. N is the number of blocks.

    Attributes:
        partial_count: `[B, 1, N]` int32, how many blocks of queries are partial.
        partial_index: `[B, 1, N, N]` int32, their numbers ascending, then the others'.
        full_count: as partial_count, of full blocks.
        full_index: as partial_index, of full blocks.
    """

    partial_count: Tensor
    partial_index: Tensor
    full_count: Tensor
    full_index: Tensor

    @staticmethod
    def of(spans: Spans, query_routes: Tensor, key_routes: Tensor, has_edge: Tensor | None) -> Blocks:
        """The lists for S queries and keys of each batch element.

        Args:
            spans: which keys the queries see.
            query_routes: `[B, S]` int32.
            key_routes: `[B, S]` int32.
            has_edge: `[R, C]` bool, [query's route, key's route]; None: there is an edge everywhere.
        """
        batch = query_routes.shape[0]
        some, every = (flags.expand(batch, -1, -1) for flags in _seen(spans))
        if has_edge is not None:
            queries, keys = (
                _routes_of_blocks(routes, count).float()
                for routes, count in ((query_routes, has_edge.shape[0]), (key_routes, has_edge.shape[1]))
            )
            reached, missed = ((queries @ flags.float()).ne(0).float() for flags in (has_edge, ~has_edge))
            some = some & (reached @ keys.mT).ne(0)
            every = every & (missed @ keys.mT).eq(0)
        every = every & some
        return Blocks(*_listed(some & ~every), *_listed(every))


def _seen(spans: Spans) -> tuple[Tensor, Tensor]:
    """`[N, N]` bool by block of queries and of keys: whether any query sees any key, and whether all see all.

    What the queries of a block see is one range without gaps, because spans move on by less than their length: a
    document begins where the one before it ends.
    """
    length = len(spans.first)
    count = -(-length // BLOCK)
    begin = torch.arange(count, dtype=torch.int32, device=spans.first.device) * BLOCK
    last = (begin + (BLOCK - 1)).clamp(max=length - 1)
    first_key, last_key = begin, last
    some = (first_key < spans.stop[last][:, None]) & (last_key >= spans.first[begin][:, None])
    every = (first_key >= spans.first[last][:, None]) & (last_key < spans.stop[begin][:, None])
    return some, every


def _routes_of_blocks(routes: Tensor, count: int) -> Tensor:
    """`[B, N, count]` bool: which of `count` routes a block's tokens have."""
    batch, length = routes.shape
    padded = torch.nn.functional.pad(routes, (0, -length % BLOCK), value=-1)
    each = torch.arange(count, dtype=routes.dtype, device=routes.device)
    return (padded.view(batch, -1, BLOCK, 1) == each).any(2)


def _listed(flags: Tensor) -> tuple[Tensor, Tensor]:
    """For `[B, queries' blocks, keys' blocks]` bool how many there are by keys' block, and which ones first."""
    by_key = flags.mT.contiguous().unsqueeze(
        1
    )  # [B, 1, N, N]; argsort keeps strides, and the kernel reads rows
    index = by_key.logical_not().byte().argsort(dim=-1, stable=True)
    return by_key.sum(-1, dtype=torch.int32), index.int()
