"""Paired, interleaved timing: every round times each variant once, so what else the machine does slows all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from . import progress
from .cases import Step
from .results import Figure

WARMUP_ROUNDS = 2
FLUSH_BYTES = 1 << 28  # larger than any second-level cache

METHOD = (
    "every round runs each variant once, every other round in the opposite order, on the case's sets of random "
    "inputs in turn. Speed: the median and the 20th and 80th percentile of the rounds, on CUDA by events "
    f"around the pass after a write of {FLUSH_BYTES >> 20} MiB has emptied the second-level cache, on the CPU, "
    f"and for launches, by the host's clock. Relative speed: of the ratios of the same rounds. {WARMUP_ROUNDS} "
    "rounds before them are not counted. Memory: the peak beyond what was there before the pass (of models, "
    "with parameters and the optimizer's state), on the CPU in a process of its own"
)

Clock = Callable[[Step], float]  # runs a step and returns its seconds


def host_seconds(step: Step) -> float:
    """The seconds of one run of a step, by the host's clock."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def host_clock(device: torch.device) -> Clock:
    """The host's clock, for the cost of launching; it starts when the device has nothing to do."""

    def seconds(step: Step) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return host_seconds(step)

    return seconds


def device_clock() -> Clock:
    """The clock of the CUDA device, which times a run on a cold cache."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def seconds(step: Step) -> float:
        flush.zero_()
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3

    return seconds


def clock_of(device: torch.device) -> Clock:
    return device_clock() if device.type == "cuda" else host_seconds


def interleaved(
    variants: Mapping[str, Sequence[Step]], rounds: int, mode: str, clock: Clock = host_seconds
) -> dict[str, list[float]]:
    """Milliseconds of each round of a pass after warming up, by variant."""
    milliseconds: dict[str, list[float]] = {variant: [] for variant in variants}
    for round_ in progress.rounds(range(WARMUP_ROUNDS + rounds), f"timing {mode}"):
        for variant in list(variants)[:: 1 if round_ % 2 == 0 else -1]:
            steps = variants[variant]
            elapsed = clock(steps[round_ // 2 % len(steps)])
            if round_ >= WARMUP_ROUNDS:
                milliseconds[variant].append(1e3 * elapsed)
    return milliseconds


def figure(values: Sequence[float]) -> Figure:
    """The median of the rounds, and their 20th and 80th percentile."""
    if len(values) == 1:
        return Figure.single(values[0])
    p20, *_, p80 = statistics.quantiles(values, n=5, method="inclusive")
    return Figure(statistics.median(values), p20, p80)


def ratio(own: Sequence[float], base: Sequence[float]) -> Figure:
    """The figure of one variant's times, each divided by another's in the same round."""
    return figure([one / other for one, other in zip(own, base, strict=True)])
