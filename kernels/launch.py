"""How a launcher reaches its kernel: configurations, launching, recording."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..fake_tensors import has_data
from ..machine import answers
from .configs import ARCHITECTURES, CONFIGS, nearest

# CUDA's limit on a grid's y and z; the interpreter has none.
MAX_GRID_YZ = 65535

# What a configuration asks of Triton's compiler; all else in it is the kernel's own.
OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")

# By architecture, where there is no device to ask: A100, H100 and H200, B200.
MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}

INTERPRETED = bool(triton.knobs.runtime.interpret)


class Launch(NamedTuple):
    """A recorded launch, for compiling offline what would have run."""

    kernel: triton.JITFunction
    config: dict[str, int]
    arguments: dict[str, Any]


class _Recorder(NamedTuple):
    architecture: int
    launches: list[Launch]


_recorder: _Recorder | None = None


def recording() -> bool:
    """Whether launches are recorded instead of run."""
    return _recorder is not None


@contextmanager
def record(architecture: int) -> Iterator[list[Launch]]:
    """Inside, launches are recorded with the configurations shipped for `architecture` (80, 90, 100), not run."""
    global _recorder
    _recorder = _Recorder(architecture, [])
    try:
        yield _recorder.launches
    finally:
        _recorder = None


def config_of(
    kernel: triton.JITFunction, device: torch.device, dtype: torch.dtype | None = None, variant: str = ""
) -> dict[str, int]:
    """The configuration of `kernel` that was measured on this machine, else the one shipped for such a device.

    Shipped is one for the device's architecture, or for the nearest older one. Entries called
    `kernel{variant}.dtype`, `kernel{variant}` and `kernel` are tried in this order.
    """
    name = kernel.fn.__name__
    suffix = f"{variant}.{str(dtype).removeprefix('torch.')}"
    entry = next(key for key in (name + suffix, name + variant, name) if key in CONFIGS)
    measured = None if _recorder is not None else answers.launch(entry, device)
    if measured is not None:
        return measured
    return shipped_config(entry, device)


def launch(
    kernel: triton.JITFunction, grid: tuple[int, ...], config: dict[str, int], **arguments: Any
) -> None:
    """Runs `kernel` on its tensors' device; nothing for tensors without data or an empty grid."""
    first = next(_tensors(arguments.values()))
    if not has_data(first):
        return
    assert all(programs <= MAX_GRID_YZ for programs in grid[1:]), f"{kernel}: a grid of {grid}"
    if _recorder is not None:
        _recorder.launches.append(Launch(kernel, config, arguments))
    elif 0 not in grid:
        with torch.cuda.device_of(first):
            kernel[grid](**arguments, **config)


def _tensors(arguments: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among arguments and in their tuples."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, tuple):
            yield from _tensors(argument)


def dot_precision() -> str:
    """The precision of fp32 products, which is torch's own: tf32 only where the user allowed it."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


@cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def architecture_of(device: torch.device) -> int:
    """The compute capability times ten: that which launches are recorded for, else the device's."""
    if _recorder is not None:
        return _recorder.architecture
    return _capability(device) if device.type == "cuda" else ARCHITECTURES[0]


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors the device has; without a GPU, those of the architecture that is recorded for."""
    if _recorder is None and device.type == "cuda":
        return _multiprocessors(device)
    return MULTIPROCESSORS[architecture_of(device)]


def shipped_config(entry: str, device: torch.device) -> dict[str, int]:
    """The configuration of an entry that is shipped for the device's architecture, or for the nearest older one."""
    shipped = CONFIGS[entry]
    return nearest(shipped, architecture_of(device)) or shipped[ARCHITECTURES[0]]


def _read_config(what: answers.What, value: Any) -> dict[str, int]:
    """A configuration with what the kernel of the entry asks for, and any of the compiler's options."""
    answers.check_what(what, CONFIGS)
    found = {str(name): answers.count(number) for name, number in value.items()}
    asked = CONFIGS[str(what[0])][ARCHITECTURES[0]].keys() - set(OPTIONS)
    if found.keys() - set(OPTIONS) != asked:
        raise ValueError(
            f"got {', '.join(found)}, expected {', '.join(sorted(asked))} and any of {', '.join(OPTIONS)}"
        )
    return found


answers.read_by("launch", _read_config)
