"""Questions about the order of an op's backends."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from ... import backends
from ...backends.attention_plan import OWN
from ...skipping.rule import PRODUCTS
from .measuring import Effort, Judged, Measuring, Trial, ranking
from .question import Outcome, Question
from .workloads import activation_of, call_of, sizes_of


class Backends(Question):
    """In which order the automatic choice tries an op's backends, by size."""

    decides = "the order in which the automatic choice tries an op's backends, by the size of the activation"

    def __init__(self, op: str, dtype: torch.dtype, names: tuple[str, ...]) -> None:
        super().__init__("backends", op, dtype, shipped=[[None, list(names)]])
        self.op = op
        self.dtype = dtype
        self.names = names

    def measure(self, measuring: Measuring) -> Outcome:
        """Forward and backward of a call of every size on every backend."""
        outcome, orders = Outcome(), []
        for size in sizes_of(measuring.device, measuring.effort):
            calls = [
                call_of(self.op, size, self.dtype, measuring.device, seed)
                for seed in range(measuring.effort.sets)
            ]
            judged = [Judged(call) for call in calls]
            contest = measuring.contest(
                {
                    name: [
                        Trial(
                            partial(each.call.run, name),
                            partial(each.check, name, self._is_deterministic(name, measuring.device)),
                            is_launch_bound=size.is_launch_bound,
                        )
                        for each in judged
                    ]
                    for name in self.names
                }
            )
            elements = activation_of(calls[0]).numel()
            outcome.add(contest, f"{size.name}, {elements} elements: ")
            orders.append((elements, ranking(contest.milliseconds)))
        outcome.answer = by_size(orders)
        return outcome

    def _is_deterministic(self, backend: str, device: torch.device) -> bool:
        """Whether a backend promises the same bits again: vendors' kernels of attention on CUDA do not."""
        return self.op != "routed_attention" or device.type == "cpu" or backend in OWN


def by_size(orders: list[tuple[int, list[str]]]) -> list[list[Any]]:
    """The answer for orders that were found at some numbers of elements, which grow: each holds half way to the next.

    Half way on a logarithmic scale; neighbours that agree are one.
    """
    found: list[list[Any]] = []
    for (elements, order), (following, other) in pairwise(orders):
        if order != other:
            found.append([math.isqrt(elements * following), order])
    return [*found, [None, orders[-1][1]]]


def questions(device: torch.device, dtype: torch.dtype, effort: Effort) -> Iterator[Question]:
    """Those about ops with several backends on a device; products and attention, which take the longest, come first."""
    by_worth = sorted(backends.OPS, key=lambda op: op not in (*PRODUCTS.values(), "routed_attention"))
    for op in by_worth:
        names = backends.candidates(op, torch.empty(0, dtype=dtype, device=device))
        if len(names) > 1:
            yield Backends(op, dtype, names)
