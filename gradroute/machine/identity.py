"""What this machine is: versions, the processor, the CUDA devices, and what findings about a device depend on."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..version import __version__

# Other tools, whose versions matter where they are installed.
TOOLS = (
    *("transformers", "peft", "accelerate", "trl", "lightning", "liger-kernel", "torchao", "bitsandbytes"),
    "transformer-lens",
)
#: The instruction set of the CPU's kernels: the native module says it when it is loaded; None: there are no kernels.
instruction_set: str | None = None
DRIVER_VERSION = r"\s(\d+\.\d+(?:\.\d+)?)\s"


def versions() -> dict[str, str | None]:
    """The versions of gradroute and of the packages it runs on; None: not installed."""
    return {
        "gradroute": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # its metadata may lack the build, such as "+cu130"
        "triton": version("triton"),
        "numpy": version("numpy"),
        **{tool: version(tool) for tool in TOOLS},
    }


@cache
def version(package: str) -> str | None:
    """The installed version, if any."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpu() -> dict[str, Any]:
    """The processor, torch's threads on it, and the instruction set that backend cpu uses."""
    return {
        "model": _cpu_model(),
        "threads": torch.get_num_threads(),
        "instruction_set": instruction_set,
    }


@cache
def _cpu_model() -> str:
    found = first_match("/proc/cpuinfo", r"model name\s*: (.+)")
    return found or platform.processor() or platform.machine()


def cuda() -> dict[str, Any]:
    """The CUDA that torch was built with, the driver, and every device that torch sees."""
    return {
        "runtime": torch.version.cuda,
        "driver": driver(),
        "devices": [
            {
                "name": device.name,
                "capability": f"{device.major}.{device.minor}",
                "memory_gib": round(device.total_memory / 2**30, 1),
            }
            for device in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        ],
    }


@cache
def driver() -> str | None:
    """The version of NVIDIA's kernel driver; None where there is none, or none that says so."""
    return first_match("/proc/driver/nvidia/version", DRIVER_VERSION)


def first_match(file: str, pattern: str) -> str | None:
    """The pattern's group where it first matches in a file; None where there is neither."""
    try:
        match = re.search(pattern, Path(file).read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None
    return match[1] if match else None


def keeps_findings(device: torch.device) -> bool:
    """Whether findings about a device are kept: of the CPU and of CUDA devices that are there."""
    return device.type == "cpu" or (device.type == "cuda" and torch.cuda.is_available())


def name_of(device: torch.device) -> str:
    """The name of a device's model, as its maker calls it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_model()


def of(device: torch.device, *, with_threads: bool) -> dict[str, Any]:
    """All that findings about a device depend on; those made where any of it was different do not count.

    Args:
        device: the CPU, or a CUDA device that is there.
        with_threads: on the CPU, how many threads torch uses too: speed depends on it, and correctness does not.
    """
    found: dict[str, Any] = {
        "device": name_of(device),
        "gradroute": __version__,
        "torch": str(torch.__version__),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return found | {
            "capability": f"{properties.major}.{properties.minor}",
            "driver": driver(),
            "triton": version("triton"),
        }
    processor = cpu()
    found["instruction_set"] = processor["instruction_set"]
    return found | ({"threads": processor["threads"]} if with_threads else {})
