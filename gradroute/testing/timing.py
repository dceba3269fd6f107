"""Paired, interleaved timing: every round times each variant once, so what else the machine does slows all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch

Step = Callable[[], Any]
Clock = Callable[[Step], float]  # runs a step and returns its seconds
Timed = TypeVar("Timed")

WARMUP_ROUNDS = 2
FLUSH_BYTES = 1 << 28  # larger than any second-level cache


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


def device_clock(device: torch.device) -> Clock:
    """The clock of a CUDA device, which times a run on a cold cache."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def seconds(step: Step) -> float:
        with torch.cuda.device(device):
            flush.zero_()
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            step()
            stop.record()
            stop.synchronize()
            return start.elapsed_time(stop) / 1e3

    return seconds


def clock_of(device: torch.device) -> Clock:
    """The clock that times what the device does."""
    return device_clock(device) if device.type == "cuda" else host_seconds


def interleaved(
    variants: Mapping[str, Sequence[Timed]], rounds: Iterable[int], seconds: Callable[[Timed], float]
) -> dict[str, list[float]]:
    """Milliseconds of each round, by variant.

    Args:
        variants: of each what is timed on the sets of inputs, which take turns.
        rounds: their numbers from 0; those below WARMUP_ROUNDS are not counted, and every other one is in the opposite
            order.
        seconds: runs what is timed once, and returns how long it took.
    """
    milliseconds: dict[str, list[float]] = {variant: [] for variant in variants}
    for round_ in rounds:
        for variant in list(variants)[:: 1 if round_ % 2 == 0 else -1]:
            sets = variants[variant]
            elapsed = seconds(sets[round_ // 2 % len(sets)])
            if round_ >= WARMUP_ROUNDS:
                milliseconds[variant].append(1e3 * elapsed)
    return milliseconds
