"""Paired, interleaved timing: every round times each variant once, so what else the machine does slows all alike."""

import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from gradroute import __main__ as machine

WARMUP_ROUNDS = 2
FLUSH_BYTES = 1 << 28  # more than any second-level cache holds

Step = Callable[[], Any]
Clock = Callable[[Step], float]  # runs a step and returns its seconds


class Timing(NamedTuple):
    """Milliseconds of one variant: the median, and the 20th and 80th percentile of its rounds."""

    p50: float
    p20: float
    p80: float


def host_seconds(step: Step) -> float:
    """One run, by the host's clock."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


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


def interleaved(
    variants: Mapping[str, Step], rounds: int, name: str, clock: Clock = host_seconds
) -> dict[str, list[float]]:
    """Milliseconds of each round after warming up, by variant."""
    milliseconds: dict[str, list[float]] = {variant: [] for variant in variants}
    for round_ in tqdm(
        range(WARMUP_ROUNDS + rounds), desc=f"{name:<44}", unit="round", leave=False, disable=None
    ):
        for variant, step in variants.items():
            elapsed = clock(step)
            if round_ >= WARMUP_ROUNDS:
                milliseconds[variant].append(1e3 * elapsed)
    return milliseconds


def timing(milliseconds: list[float]) -> Timing:
    p20, *_, p80 = statistics.quantiles(milliseconds, n=5)
    return Timing(statistics.median(milliseconds), p20, p80)


def ratio(milliseconds: list[float], base: list[float]) -> float:
    """The median over the rounds of one variant's time divided by another's in the same round."""
    return statistics.median(own / other for own, other in zip(milliseconds, base, strict=True))


def environment() -> dict[str, Any]:
    """What a figure depends on beside the code's own version."""
    commit = {
        "commit": _git("rev-parse", "HEAD"),
        "clean": _git("status", "--porcelain", "--untracked-files=no") == "",
    }
    return machine.versions() | machine.cpu() | commit


def _git(*arguments: str) -> str | None:
    """What git says of this checkout; None outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
