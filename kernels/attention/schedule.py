"""How the work of a pass is spread over a GPU: the order of its programs, and how many share a group of query heads.

A GPU starts programs in the order of their ids, each as soon as a multiprocessor is free. The last ones to start decide
how long some multiprocessors wait for the others, so the heaviest tiles of all heads and batches come first. Where a
few programs are longer than the mean load of a multiprocessor, no order helps: then several programs share the query
heads of one key head, and their partial sums are added afterwards.

Words: an owner is the tile that a program sums for; an entry is a head, or a part of a group of heads, of one batch
element; a weight is a number of tiles that an owner has work with. Nothing here needs Triton or a device, so that tests
and benchmarks compute the same order as the kernels (`gradroute.kernels.attention.tiles.place_of`).
"""

from __future__ import annotations

import functools
import heapq
from collections.abc import Sequence

# What costs time beside the queries that a tile of keys meets, in such queries: 64 of them take about 4000 clocks where
# a tile has 128 keys of head dimension 128, as predicted from machine code. A program's own tile of keys is loaded and
# stored; a partial sum is written in fp32 and read again, 262 kB at a multiprocessor's share of the bandwidth; adding
# the parts is a few more launches.
PROGRAM_COST = 64
PARTIAL_COST = 192
SUM_COST = 256

# How much later than the best number of parts a smaller one may be expected to end.
TOLERANCE = 0.03


def count_tiles_of_queries(
    num_queries: int, num_keys: int, causal: bool, window: int | None, block_q: int, block_k: int
) -> list[int]:
    """How many tiles of queries see each tile of keys, documents and padding aside."""
    past = num_keys - num_queries
    counts = []
    for start in range(0, num_keys, block_k):
        last = min(start + block_k, num_keys) - 1
        first, stop = start if causal else 0, num_keys
        if window is not None:
            first = first if causal else start - window + 1
            stop = min(num_keys, last + window)
        begin = max(first - past, 0) // block_q
        counts.append(max(-(-min(stop - past, num_queries) // block_q) - begin, 0))
    return counts


def launch_order(
    counts: Sequence[Sequence[int]], entries: int, *, by_count: bool, last_first: bool = False
) -> list[tuple[int, int]]:
    """The (entry, owner) of each program, in the order of their ids.

    Args:
        counts: the weights `[lists, owners]`; a list serves `entries / lists` consecutive entries.
        entries: how many entries there are.
        by_count: whether the owners of all lists are sorted by weight, heaviest first, equal ones in their order; else
            they come in their order, each for all entries.
        last_first: without by_count, whether the last owner comes first.
    """
    owners = range(len(counts[0]))
    if not by_count:
        return [
            (entry, owner) for owner in (owners[::-1] if last_first else owners) for entry in range(entries)
        ]
    slots = [(counts[one][owner], one, owner) for one in range(len(counts)) for owner in owners]
    slots.sort(key=lambda slot: -slot[0])
    shared = entries // len(counts)
    return [(one * shared + entry, owner) for _, one, owner in slots for entry in range(shared)]


def program_work(
    counts: Sequence[Sequence[int]],
    entries: int,
    members: int,
    *,
    by_count: bool,
    last_first: bool = False,
    cost: float = 1,
    overhead: float = 0,
) -> list[float]:
    """What each program has to do, in the order of their ids, see `launch_order`.

    Args:
        counts: the tiles `[lists, owners]` of one query head, or of all of an entry where members is 1.
        entries: how many entries there are.
        members: query heads of an entry.
        by_count: whether owners are sorted by weight.
        last_first: whether the last owner comes first.
        cost: of a tile.
        overhead: of a program.
    """
    shared = entries // len(counts)
    order = launch_order(counts, entries, by_count=by_count, last_first=last_first)
    return [counts[entry // shared][owner] * members * cost + overhead for entry, owner in order]


def balance(work: Sequence[float], multiprocessors: int) -> float:
    """The mean load of a multiprocessor over the longest, where each program starts on the first that is free."""
    loads = [0.0] * multiprocessors
    for cost in work:
        heapq.heapreplace(loads, loads[0] + cost)
    return sum(loads) / multiprocessors / max(loads)


@functools.lru_cache(maxsize=1024)
def parts_of(weights: tuple[int, ...], entries: int, group: int, multiprocessors: int) -> int:
    """Into how many equal parts the query heads of a key head are split, each for a program.

    It is the fewest parts that are expected to end at most TOLERANCE later than the best number of them.

    Args:
        weights: of each owner, how many queries of one head its tiles have.
        entries: the key heads of all batch elements that have work.
        group: query heads of a key head.
        multiprocessors: how many programs run at a time.
    """
    divisors = [parts for parts in range(1, group + 1) if group % parts == 0]
    costs = tuple(sorted(weights, reverse=True))
    times = {
        parts: _time(costs, entries * parts, group // parts, multiprocessors, partial=parts > 1)
        for parts in divisors
    }
    best = min(times.values())
    return next(parts for parts, time in times.items() if time <= best * (1 + TOLERANCE))


def _time(
    weights: Sequence[int], entries: int, members: int, multiprocessors: int, *, partial: bool
) -> float:
    """When the last program ends, in queries: the largest of lower bounds, which heaviest first comes near.

    No order ends before the mean load; and of the k * multiprocessors + 1 heaviest programs, one multiprocessor runs
    k + 1.
    """
    overhead = PROGRAM_COST + PARTIAL_COST * partial
    costs = [weight * members + overhead for weight in weights]
    mean = sum(costs) * entries / multiprocessors
    heaviest = range(0, len(costs) * entries, multiprocessors)
    longest = max(((k + 1) * costs[program // entries] for k, program in enumerate(heaviest)), default=0)
    return max(mean, longest) + SUM_COST * partial
