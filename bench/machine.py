"""The machine that figures depend on: versions, the commit, the processor, and the ceilings of its rates."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import Any, TypedDict

import torch

from gradroute.machine import identity

from . import progress, sources
from .cases import Step
from .timing import clock_of


class Ceilings(TypedDict):
    """GB/s of a copy ("copy"), and by dtype TFLOP/s of a matrix product ("gemm")."""

    copy: float
    gemm: dict[str, float]


ROUNDS = 7
PROBE = (256, 256, 256)  # a product that tells whether larger ones would take too long
MOST_SECONDS = 0.5  # a CPU without instructions for fp16 would take minutes for the products below
COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 31}  # read and written
GEMM_SHAPES = {  # (m, n, k): products run at other rates in other shapes, and the ceiling is the highest
    "cpu": ((2048, 2048, 2048), (8192, 1024, 1024)),
    "cuda": ((8192, 8192, 8192), (16384, 14336, 4096)),
}


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, processors, the commit and the sources: a run that goes on must find all of it unchanged."""
    found = identity.versions() | identity.cpu()
    found |= {name: identity.version(name) for name in ("transformers", "liger_kernel")}
    if device.type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(), "cudnn": torch.backends.cudnn.version()}
        found |= {name: identity.cuda()[name] for name in ("runtime", "driver")}
    return found | sources.commit()


def ceilings(device: torch.device, dtypes: Iterable[str]) -> Ceilings:
    """The highest rates found, of random data: a ceiling is the fastest of some rounds and not their median."""
    progress.stage("measuring the ceilings: a copy")
    copy = copy_rate(device)
    gemm = {}
    for name in sorted(set(dtypes)):
        progress.stage(f"measuring the ceilings: products in {name}")
        gemm[name] = gemm_rate(device, getattr(torch, name))
    return {"copy": copy, "gemm": gemm}


def higher(one: Ceilings, other: Ceilings) -> Ceilings:
    """The higher of two measurements, for a shared machine is not always equally fast."""
    names = dict.fromkeys([*one["gemm"], *other["gemm"]])
    gemm = {name: max(of["gemm"].get(name, 0.0) for of in (one, other)) for name in names}
    return {"copy": max(one["copy"], other["copy"]), "gemm": gemm}


def copy_rate(device: torch.device) -> float:
    """GB/s read and written by a copy."""
    size = COPY_BYTES[device.type]
    source = torch.randint(256, (size // 2,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return size / _milliseconds(device, lambda: target.copy_(source)) / 1e6


def gemm_rate(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of a matrix product in the fastest of the shapes, smaller ones where a product would take seconds."""
    rate = _product_rate(device, dtype, PROBE)
    for shape in GEMM_SHAPES[device.type]:
        while 2 * math.prod(shape) / rate / 1e12 > MOST_SECONDS:
            shape = tuple(-(-side // 2) for side in shape)
        rate = max(rate, _product_rate(device, dtype, shape))
    return rate


def _product_rate(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> float:
    """TFLOP/s of a product (m, n, k)."""
    m, n, k = shape
    a, b = (torch.randn(*size, device=device).to(dtype) for size in ((m, k), (k, n)))
    return 2 * m * n * k / _milliseconds(device, partial(torch.mm, a, b)) / 1e9


def _milliseconds(device: torch.device, step: Step) -> float:
    """Milliseconds of the fastest round of a step, after one that warms up."""
    clock = clock_of(device)
    clock(step)
    return 1e3 * min(clock(step) for _ in range(ROUNDS))
