"""The work of every program of attention's kernels, in the order in which the programs start."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gradroute.kernels.attention.schedule import launch_order

from .launches import Case, attention_sites, document_ends, ids_in_runs


class Tiles(NamedTuple):
    """How many tiles a program has: those that all of its queries see whole, and the others that any of them sees."""

    whole: int
    partial: int


class Visible(NamedTuple):
    """Which tiles of a batch have work.

    Attributes:
        some: `[B, tiles of queries, tiles of keys]`, any query has work with any key.
        all: all have.
        pairs: how many queries and keys have work with each other, of all query heads.
    """

    some: Tensor
    all: Tensor
    pairs: int


def programs(case: Case, config: dict[str, int], parts: int = 1) -> list[Tiles]:
    """The tiles of each program of a case's kernel, in the order in which the programs start.

    Args:
        case: one of attention.
        config: the kernel's configuration.
        parts: into how many the query heads of a key head are split.
    """
    shape = case.shape
    assert shape is not None
    seen = visible(case, config)
    by_key = case.kernel == "attention_dkdv_kernel"
    some = seen.some.sum(1 if by_key else 2)  # [B, owners]
    whole = seen.all.sum(1 if by_key else 2)
    if by_key:  # dK and dV have one loop for all tiles
        whole = torch.zeros_like(some)
    heads = live_heads(case, shape.kv_heads * parts if by_key else shape.heads)
    return [
        Tiles(int(whole[batch, owner]) * heads[entry], int((some - whole)[batch, owner]) * heads[entry])
        for batch, entry, owner in places(case, some, heads)
    ]


def live_heads(case: Case, entries: int) -> list[int]:
    """How many query heads have work, of each entry of a batch element."""
    shape = case.shape
    assert shape is not None
    is_masked = "heads" in case.sites and case.kernel != "attention_fwd_kernel"
    live, members = shape.heads // 2 if is_masked else shape.heads, shape.heads // entries
    return [min(members, max(0, live - entry * members)) for entry in range(entries)]


def places(case: Case, tiles: Tensor, heads: list[int]) -> list[tuple[int, int, int]]:
    """Of each program its batch element, its entry there, and its owner, in the kernels' own order.

    Args:
        case: one of attention.
        tiles: `[B, owners]`, of one query head.
        heads: how many query heads have work, of each entry of a batch element.
    """
    by_key = case.kernel == "attention_dkdv_kernel"
    of_each_entry = by_key and "heads" in case.sites
    counts = tiles.tolist()
    if of_each_entry:
        counts = [[count * live for count in row] for row in counts for live in heads]
    by_count = (
        uses_edges(case) or of_each_entry or (case.documents > 1 and case.kernel != "attention_fwd_kernel")
    )
    order = launch_order(counts, len(tiles) * len(heads), by_count=by_count, last_first=not by_key)
    return [(*divmod(entry, len(heads)), owner) for entry, owner in order]


def uses_edges(case: Case) -> bool:
    """Whether a case's kernel leaves out tiles without edges: the forward is that of attention without them."""
    return "score_edges" in case.sites and case.kernel != "attention_fwd_kernel"


def visible(case: Case, config: dict[str, int]) -> Visible:
    """The tiles of a case at a configuration's sizes."""
    shape = case.shape
    assert shape is not None
    position = torch.arange(shape.length)
    seen = position[:, None] >= position[None, :]
    ends = document_ends(shape, case.documents)
    if ends is not None:
        document = torch.bucketize(position, ends[1:], right=True)
        seen &= document[:, None] == document[None, :]
    edges = attention_sites(shape, case.sites).score_edges if uses_edges(case) else None
    if edges is None:  # all batch elements are alike
        patterns = [seen]
    else:
        ids = ids_in_runs((shape.batch, shape.length))
        patterns = [seen & (edges.weights != 0)[own][:, own] for own in ids]
    of_tiles = [_of_tiles(pattern, config) for pattern in patterns]
    some, whole = (torch.stack(found).expand(shape.batch, -1, -1) for found in zip(*of_tiles, strict=True))
    pairs = sum(int(pattern.sum()) for pattern in patterns) * shape.batch // len(patterns)
    heads = shape.heads // 2 if "heads" in case.sites else shape.heads
    return Visible(some, whole, pairs * heads)


def _of_tiles(pattern: Tensor, config: dict[str, int]) -> tuple[Tensor, Tensor]:
    """Whether any and whether all of each tile's pairs have work: `[tiles of queries, tiles of keys]` of `[S, S]`."""
    block_q, block_k = config["BLOCK_Q"], config["BLOCK_K"]
    pairs = pattern.view(-1, block_q, len(pattern) // block_k, block_k).float().sum(3).sum(1)
    return pairs > 0, pairs == block_q * block_k
