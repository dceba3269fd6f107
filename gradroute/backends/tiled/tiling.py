"""How much is computed together, and in what: folds of heads, tiles of scores, and the products that make them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...machine import answers
from ...primitives.arguments import product_dtype
from ...primitives.attention_pattern import Pattern

# Rows and keys of a tile on the CPU: two tiles of fp32 and their operands fit into the second-level caches of two
# cores (2 MiB). Causal backward of 4 heads, 4096 tokens: 183 ms with 384 × 512, 207 with 256 × 256, 229 with 512 × 1024
# in two threads; in one thread 304 to 315, whatever the tile.
ROWS, KEYS = 384, 512
# Heads of fewer scores than this are computed together on the CPU, as they are elsewhere: there is too little to leave
# out. One thread, forward and backward, two routes: four heads of 64 elements of 64 tokens take 25 ms together and 279
# apart, of 16 elements of 256 tokens 72 and 116; eight heads of 2 elements of 1024 tokens 206 and 201.
FEW_SCORES = 1 << 17
# Elsewhere: rows and keys of a tile, and how many scores of all heads are computed together, if one batch element is
# not more.
DEVICE_ROWS, DEVICE_KEYS, DEVICE_SCORES = 1024, 1024, 1 << 24
# A tile's number of keys is a multiple of this, where it can be: a cache line, a vector register.
LANES = 16

LOG2_E = math.log2(math.e)


def looks_at_data(device: torch.device) -> bool:
    """Whether the host may branch on values: elsewhere it would wait for the device."""
    return device.type == "cpu"


def largest_tile(device: torch.device, dtype: torch.dtype) -> tuple[int, int]:
    """The most rows and keys of a tile for q of this dtype: on the CPU as measured here, else as shipped."""
    if not looks_at_data(device):
        return DEVICE_ROWS, DEVICE_KEYS
    return answers.tiles(device, dtype) or (ROWS, KEYS)


def operand_dtype(q: Tensor) -> torch.dtype:
    """The dtype of products' operands: q's own where products of half precision can be fp32, else fp32 or fp64."""
    return q.dtype if q.device.type == "cuda" else product_dtype(q.dtype)


def split(whole: slice, limit: int, multiple: int = 1) -> Iterator[slice]:
    """Equal parts of at most `limit`, each but the last a multiple of `multiple` where the limit allows."""
    length = whole.stop - whole.start
    if length <= 0:
        return
    step = -(-length // -(-length // limit))
    step = min(limit, -(-step // multiple) * multiple)
    for start in range(whole.start, whole.stop, step):
        yield slice(start, min(start + step, whole.stop))


def exp_(tile: Tensor) -> Tensor:
    """exp in place. As exp2 it takes half of the time on the CPU: 26 μs for 256 × 512 elements where exp takes 60."""
    return tile.mul_(LOG2_E).exp2_()


def by_element(tile: Tensor, of_elements: Tensor) -> Tensor:
    """Tile `[n, m]` or `[elements · G, n, m]` as `[elements, G, n, m]`, to meet a tensor `[elements, ...]`."""
    return tile.view(of_elements.shape[0], -1, *tile.shape[-2:])


class Fold(NamedTuple):
    """One key/value head of a batch element, or all heads of some elements: n matrices, `[N, D]` or `[n, N, D]`.

    Attributes:
        batch: the batch elements.
        head: the key/value head; None: all.
        group: how many query heads share a key/value head; N = S_q · group.
    """

    batch: slice
    head: int | None
    group: int

    def rows(self, t: Tensor) -> Tensor:  # [B, H, S_q, X] → [N, X] or [n, N, X]
        """The part of a tensor of queries that belongs to the fold, position by position."""
        rows = self._by_position(t).flatten(-3, -2)
        return rows if self.head is not None else rows.flatten(0, 1)

    def keys(self, t: Tensor) -> Tensor:  # [B, G, S_k, D] → [S_k, D] or [n, S_k, D]
        """The part of a tensor of keys that belongs to the fold."""
        return t[self.batch.start, self.head] if self.head is not None else t[self.batch].flatten(0, 1)

    def put_rows(self, out: Tensor, rows: Tensor | None, factor: float = 1.0) -> None:
        """Writes factor · rows `[N, X]` or `[n, N, X]` into `out [B, H, S_q, X]`; nothing without rows."""
        if rows is not None:
            place = self._by_position(out)
            place.copy_(rows.mul_(factor).view(place.shape))

    def put_keys(self, out: Tensor, keys: Tensor | None, factor: float = 1.0) -> None:
        """Writes factor · keys `[S_k, D]` or `[n, S_k, D]` into `out [B, G, S_k, D]`; nothing without keys."""
        if keys is not None:
            place = out[self.batch] if self.head is None else out[self.batch.start, self.head]
            place.copy_(keys.mul_(factor).view(place.shape))

    def _by_position(self, t: Tensor) -> Tensor:  # [B, H, S_q, X] → [..., S_q, group, X]
        if self.head is None:
            return t[self.batch].unflatten(1, (-1, self.group)).transpose(2, 3)
        heads = slice(self.head * self.group, (self.head + 1) * self.group)
        return t[self.batch.start, heads].transpose(0, 1)


class Tiling(NamedTuple):
    """How a call is computed in tiles.

    Attributes:
        heads: G.
        group: how many query heads share a key/value head.
        scale: the factor of the scores.
        rows: the most rows of a tile.
        keys: the most keys of a tile.
        elements: how many elements of the batch have their heads computed together.
        dtype: the dtype of products' operands.
        memory: room for the tiles `[rows, keys]` that are in use together, where heads are computed one by one.
    """

    heads: int
    group: int
    scale: float
    rows: int
    keys: int
    elements: int
    dtype: torch.dtype
    memory: tuple[Tensor, ...]

    @staticmethod
    def of(q: Tensor, k: Tensor, pattern: Pattern, tiles: int) -> Tiling:
        """For q `[B, H, S_q, D]` and k `[B, G, S_k, D]`, and a computation that uses so many `tiles` together."""
        heads, group = k.shape[1], q.shape[1] // k.shape[1]
        on_host = looks_at_data(q.device)
        limits = largest_tile(q.device, q.dtype)
        rows, keys = min(limits[0], q.shape[2] * group), min(limits[1], k.shape[2])
        wide = product_dtype(q.dtype)
        memory: tuple[Tensor, ...] = ()
        if on_host and q.shape[2] * group * k.shape[2] >= FEW_SCORES:
            memory = tuple(q.new_empty(rows * keys, dtype=wide) for _ in range(tiles))
        scores = limits[0] * limits[1] if on_host else DEVICE_SCORES
        elements = 1 if memory else max(1, scores // (heads * rows * keys))
        return Tiling(heads, group, pattern.scale, *limits, elements, operand_dtype(q), memory)

    @property
    def picks(self) -> bool:
        """Whether rows and keys are picked by looking at data, head by head."""
        return len(self.memory) > 0

    def batches(self, batch: int) -> Iterator[slice]:
        """The batch elements that are computed together."""
        return split(slice(0, batch), self.elements)

    def folds(self, batch: slice) -> Iterator[Fold]:
        """The folds of these batch elements."""
        for head in range(self.heads) if self.picks else [None]:
            yield Fold(batch, head, self.group)

    def parts(self, keys: slice) -> Iterator[slice]:
        """An interval of keys, a tile's keys at a time."""
        return split(keys, self.keys, LANES)

    def operand(self, t: Tensor) -> Tensor:
        """`t` as products take it."""
        return t.to(self.dtype).contiguous()

    @property
    def is_half(self) -> bool:
        """Whether operands are of half precision, which nothing may be multiplied into."""
        return self.dtype not in (torch.float32, torch.float64)

    def scaled(self, q: Tensor) -> Tensor:  # [..., N, D]
        """scale · q as products take it; in half precision q, which scaling would round again."""
        return self.operand(q) if self.is_half else q.to(self.dtype) * self.scale

    @property
    def key_scale(self) -> float:
        """The factor that dSᵀ · scaled(q) still lacks."""
        return self.scale if self.is_half else 1.0

    def scores(self, q: Tensor, k: Tensor) -> Tensor:  # [..., n, D], [..., m, D] → [..., n, m]
        """scale q kᵀ in fp32 or fp64."""
        scores = self.product(q, k, 0)
        return scores.mul_(self.scale) if self.is_half else scores

    def product(self, a: Tensor, b: Tensor, tile: int) -> Tensor:
        """a bᵀ in fp32 or fp64: a `[..., n, D]`, b `[..., m, D]` → `[..., n, m]`, in a tile where there is memory."""
        if self.is_half:
            return torch.bmm(a, b.mT, out_dtype=torch.float32)
        if not self.picks:
            return torch.bmm(a, b.mT)
        out = self.memory[tile][: a.shape[0] * b.shape[0]].view(a.shape[0], b.shape[0])
        return torch.mm(a, b.T, out=out)

    def accumulate(self, total: Tensor, a: Tensor, b: Tensor) -> None:
        """total += a b: a `[..., n, m]` in fp32 or fp64, b `[..., m, D]`, total `[..., n, D]` in fp32 or fp64."""
        if self.is_half:
            total.add_(torch.bmm(a.to(self.dtype), b, out_dtype=torch.float32))
        elif self.picks:
            total.addmm_(a, b)
        else:
            total.baddbmm_(a, b)


def _read_tiles(what: answers.What, value: Any) -> answers.Tiles:
    answers.check_what(what, answers.DTYPES)
    return answers.Tiles(answers.count(value["rows"]), answers.count(value["keys"]))


answers.read_by("tiles", _read_tiles)
