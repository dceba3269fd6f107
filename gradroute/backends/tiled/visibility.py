"""Which keys the queries see, and the bands of rows that are computed together because they see nearly the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ...primitives.attention_pattern import Pattern
from . import tiling
from .tiling import Tiling, by_element, split

# Documents are not mixed in a band, unless they have fewer rows than this share of one.
SHARE_OF_A_BAND = 8


class Band(NamedTuple):
    """Some rows, the keys that any of them sees, and the keys that all of them see (none where stop < start)."""

    rows: slice
    keys: slice
    common: slice


class Visible(NamedTuple):
    """Which keys rows see: row n the keys `[first[n], end[n])`, without the hidden ones.

    Attributes:
        first: `[N, 1]` int32.
        end: `[N, 1]` int32.
        hidden: `[batch elements, K]` bool; or None.
        bands: all rows that see a key, in bands.
    """

    first: Tensor
    end: Tensor
    hidden: Tensor | None
    bands: list[Band]

    def hide_(self, tile: Tensor, value: float, keys: slice, band: Band) -> None:
        """Writes `value` into tile `[..., n, m]` where a row of the band does not see a key.

        Only columns of keys that some row does not see are touched: eager masked_fill_ is not vectorised on the CPU.
        """
        early, late = band.common.start - keys.start, max(band.common.stop - keys.start, 0)
        if early > 0 or late < tile.shape[-1]:
            positions = torch.arange(keys.start, keys.stop, dtype=torch.int32, device=tile.device)
            if early > 0:
                tile[..., :early].masked_fill_(positions[:early] < self.first[band.rows], value)
            if late < tile.shape[-1]:
                tile[..., late:].masked_fill_(positions[late:] >= self.end[band.rows], value)
        if self.hidden is not None:
            by_element(tile, self.hidden).masked_fill_(self.hidden[:, None, None, keys], value)


class Sight(NamedTuple):
    """Which keys queries see: query i the keys `[first[i], end[i])`, without the hidden ones.

    Attributes:
        first: `[S_q]` int64, does not decrease.
        end: `[S_q]` int64, does not decrease, nowhere less than first.
        hidden: `[batch elements, S_k]` bool; or None.
        host: first and end where the host may read them.
        is_exact: whether they are equal to first and end, or only bounds: documents are unknown to the host.
    """

    first: Tensor
    end: Tensor
    hidden: Tensor | None
    host: tuple[Tensor, Tensor]
    is_exact: bool

    @staticmethod
    def of(q: Tensor, k: Tensor, pattern: Pattern, batch: slice) -> Sight:
        """For q `[B, H, S_q, D]` and k `[B, G, S_k, D]`."""
        hidden = None if pattern.key_mask is None else ~pattern.key_mask[batch]
        lengths = q.shape[2], k.shape[2]
        bounds = _intervals(*lengths, pattern, pattern.cu_seqlens, q.device)
        if tiling.looks_at_data(q.device):
            return Sight(*bounds, hidden, bounds, True)
        host = _intervals(*lengths, pattern, None, torch.device("cpu"))
        return Sight(*bounds, hidden, host, pattern.cu_seqlens is None)

    def of_keys(self, chosen: Tensor | None) -> tuple[Tensor | None, Sight]:
        """The chosen keys `[S_k]` bool that are not hidden: their index, None for all, and who sees them.

        An interval of keys is one of the chosen keys, too.
        """
        if self.hidden is not None:
            (shown,) = ~self.hidden
            chosen = shown if chosen is None else chosen & shown
        if chosen is None or bool(chosen.all()):
            return None, self._replace(hidden=None)
        before = torch.cat([chosen.new_zeros(1, dtype=torch.int64), chosen.cumsum(0)])  # [S_k + 1]
        bounds = before[self.first], before[self.end]
        return chosen.nonzero()[:, 0], Sight(*bounds, None, bounds, True)

    def of_rows(self, index: Tensor | None, by: Tiling) -> Visible:
        """The keys that the rows `index [N]` of folded queries see; None: all rows."""

        def folded(bound: Tensor) -> Tensor:
            bound = bound.to(torch.int32)
            return bound.repeat_interleave(by.group) if index is None else bound[index // by.group]

        bands = list(_bands(folded(self.host[0]), folded(self.host[1]), by.rows))
        if not self.is_exact:
            bands = [band._replace(common=slice(band.keys.stop, band.keys.start)) for band in bands]
        return Visible(folded(self.first)[:, None], folded(self.end)[:, None], self.hidden, bands)


def _intervals(
    queries: int, keys: int, pattern: Pattern, cu_seqlens: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The first key that each query sees, and the end of those it sees, `[S_q]` each; equal where it sees none."""
    position = torch.arange(queries, device=device) + (keys - queries)
    first, end = torch.zeros_like(position), torch.full_like(position, keys)
    if pattern.causal:
        end = position + 1
    if pattern.window is not None:
        first = position - pattern.window + 1
        end = torch.minimum(end, position + pattern.window)
    if cu_seqlens is not None:
        bounds = cu_seqlens.long()
        document = torch.searchsorted(bounds[1:], position, right=True)
        first = torch.maximum(first, bounds[document])
        end = torch.minimum(end, bounds[document + 1])
    first = first.clamp(0, keys)
    return first, torch.maximum(first, end.clamp(0, keys))


def _bands(first: Tensor, end: Tensor, limit: int) -> Iterator[Band]:
    """Bands of at most `limit` rows with their keys, from first `[N]` and end `[N]`; those that see no key left out."""
    apart = (first[1:] >= end[:-1]).nonzero()[:, 0] + 1  # rows that share no key with the one before
    start = 0
    for stop in [*apart.tolist(), first.shape[0]]:
        if stop < first.shape[0] and stop - start < limit // SHARE_OF_A_BAND:
            continue
        for rows in split(slice(start, stop), limit):
            low, lower = int(end[rows.start]), int(first[rows.start])
            high, higher = int(end[rows.stop - 1]), int(first[rows.stop - 1])
            if lower < high:
                yield Band(rows, slice(lower, high), slice(higher, low))
        start = stop
