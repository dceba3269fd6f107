"""Paired, interleaved timing (`gradroute.testing.timing`) with a bar, and the figures of its rounds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from gradroute.testing import timing
from gradroute.testing.timing import FLUSH_BYTES, WARMUP_ROUNDS, Clock, clock_of, host_clock, host_seconds

from . import progress
from .cases import Step
from .results import Figure

__all__ = ["METHOD", "Clock", "clock_of", "figure", "host_clock", "host_seconds", "interleaved", "ratio"]

METHOD = (
    "every round runs each variant once, every other round in the opposite order, on the case's sets of random "
    "inputs in turn. Speed: the median and the 20th and 80th percentile of the rounds, on CUDA by events "
    f"around the pass after a write of {FLUSH_BYTES >> 20} MiB has emptied the second-level cache, on the CPU, "
    f"and for launches, by the host's clock. Relative speed: of the ratios of the same rounds. {WARMUP_ROUNDS} "
    "rounds before them are not counted. Memory: the peak beyond what was there before the pass (of models, "
    "with parameters and the optimizer's state), on the CPU in a process of its own"
)


def interleaved(
    variants: Mapping[str, Sequence[Step]], rounds: int, mode: str, clock: Clock = host_seconds
) -> dict[str, list[float]]:
    """Milliseconds of each round of a pass after warming up, by variant."""
    numbers = progress.rounds(range(WARMUP_ROUNDS + rounds), f"timing {mode}")
    return timing.interleaved(variants, numbers, clock)


def figure(values: Sequence[float]) -> Figure:
    """The median of the rounds, and their 20th and 80th percentile."""
    if len(values) == 1:
        return Figure.single(values[0])
    p20, *_, p80 = statistics.quantiles(values, n=5, method="inclusive")
    return Figure(statistics.median(values), p20, p80)


def ratio(own: Sequence[float], base: Sequence[float]) -> Figure:
    """The figure of one variant's times, each divided by another's in the same round."""
    return figure([one / other for one, other in zip(own, base, strict=True)])
