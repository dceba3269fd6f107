"""What a figure depends on beside the code: versions, the commit, the processor and its ceilings."""

from __future__ import annotations

import re
import statistics
import subprocess
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gradroute import __main__ as report

from .timing import clock_of

ROUNDS = 7
COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 31}  # read and written
SOURCES = (
    *(f":/{name}" for name in ("gradroute", "kernels", "csrc", "bench", "examples")),
    ":!/bench/results",
)
GEMM_WIDTH = {"cpu": 2048, "cuda": 8192}


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, processors, and the commit; what a run that goes on must find unchanged."""
    found = report.versions() | report.cpu()
    found |= {name: report.version(name) for name in ("transformers", "liger_kernel")}
    if device.type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(), "cudnn": torch.backends.cudnn.version()}
        found |= {name: report.cuda()[name] for name in ("runtime", "driver")}
    commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--", *SOURCES)
    return found | {"commit": commit, "clean": None if changes is None else changes == ""}


def folder(device: torch.device) -> str:
    """The name of this machine's folder of results: "cpu-2-cores", "nvidia-h200"."""
    if device.type == "cpu":
        return f"cpu-{torch.get_num_threads()}-cores"
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")


def _git(*arguments: str) -> str | None:
    """What git says of this checkout; None outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def ceilings(device: torch.device, dtypes: Iterable[str]) -> dict[str, Any]:
    """GB/s of a copy ("copy"), and by dtype TFLOP/s of a square matrix product ("gemm"), both of random data."""
    gemm = {name: gemm_rate(device, getattr(torch, name)) for name in sorted(set(dtypes))}
    return {"copy": copy_rate(device), "gemm": gemm}


def copy_rate(device: torch.device) -> float:
    """GB/s, read and written."""
    size = COPY_BYTES[device.type]
    source = torch.randint(256, (size // 2,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return size / _milliseconds(device, lambda: target.copy_(source)) / 1e6


def gemm_rate(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s."""
    width = GEMM_WIDTH[device.type]
    a, b = (torch.randn(width, width, device=device, dtype=dtype) for _ in range(2))
    return 2 * width**3 / _milliseconds(device, partial(torch.mm, a, b)) / 1e9


def _milliseconds(device: torch.device, step: Any) -> float:
    """The median after a run to warm up."""
    clock = clock_of(device)
    clock(step)
    return 1e3 * statistics.median(clock(step) for _ in range(ROUNDS))
