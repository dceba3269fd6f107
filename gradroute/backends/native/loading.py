"""The native module gradroute._native: whether it is there, whether it fits, and which instruction set it runs."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

from ...machine import identity
from .operands import STRUCTS

_PACKAGE = Path(__file__).parents[2]


def _load() -> tuple[Any, str | None]:
    """The module, or None and the reason. torch is imported by now: they share its OpenMP runtime."""
    try:
        found = importlib.import_module("gradroute._native")
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "gradroute._native"
        return None, _why_missing() if missing else f"the native module fails to load: {error}"
    if not fits(found):
        return None, (
            f"the native module {found.__file__} was built from other sources than this package: build it again, "
            "by pip install"
        )
    return found, None


def _why_missing() -> str:
    """Why there is no module beside the package; another copy's module is named, and never taken."""
    why = "the native module was not built"
    elsewhere = _installed_elsewhere()
    if elsewhere is None:
        return f"{why} (docs/install.md says what it needs)"
    return (
        f"{why} for the copy of gradroute in {_PACKAGE}, which Python found first; the copy installed in {elsewhere} "
        "has it: run from outside of the checkout, or build it there by `pip install -e . -c constraints.txt`"
    )


def _installed_elsewhere() -> Path | None:
    """The folder of another copy of the package, behind this one on sys.path, that has the module."""
    for entry in sys.path:
        folder = Path(entry or ".").resolve() / "gradroute"
        if folder != _PACKAGE.resolve() and any(folder.glob("_native*")):
            return folder
    return None


def fits(found: Any) -> bool:
    """Whether a module's kernels take the operands of operands.py, field by field."""
    built = getattr(found, "STRUCTS", {})
    return all(built.get(struct.__name__) == struct._fields for struct in STRUCTS)


module, load_error = _load()


def _instruction_set() -> str | None:
    """The best one that this machine runs, or the one that GRADROUTE_CPU_CAPABILITY names."""
    if module is None:
        return None
    chosen = os.environ.get("GRADROUTE_CPU_CAPABILITY")
    if chosen and chosen not in module.INSTRUCTION_SETS:
        raise ValueError(
            f"GRADROUTE_CPU_CAPABILITY: got {chosen!r}, expected one of {', '.join(module.INSTRUCTION_SETS)}"
        )
    return chosen or module.INSTRUCTION_SETS[0]


#: The instruction set of the CPU's kernels: "avx512", "avx2" or "baseline".
instruction_set = identity.instruction_set = _instruction_set()


def why_not(name: str) -> str | None:
    """Why the native module has no kernels for backend `name`, "cpu" or "cuda"; None when it has."""
    if module is None:
        return load_error
    if name == "cuda" and not hasattr(module, "cuda"):
        return "the native module was built without CUDA: build it where a GPU is visible, or with GRADROUTE_CUDA=1"
    return None


def why_not_on(capability: tuple[int, int]) -> str | None:
    """Why the CUDA kernels do not run on a device of this compute capability; None when they do."""
    built = json.loads(module.BUILD)["cuda_architectures"].split()
    if any(runs_on(architecture, capability) for architecture in built):
        return None
    major, minor = capability
    return f"the native module was built for {' '.join(built)}, and the device is sm_{major}{minor}"


def runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether code for nvcc's `architecture` runs on a device.

    80-real runs on 8.0 to 8.9, 90a-real on 9.0, and 100 (with PTX) on anything from 10.0.
    """
    number, _, kind = architecture.partition("-")
    major, minor = divmod(int(number.rstrip("af")), 10)
    if number[-1] in "af":
        return capability == (major, minor)
    if kind == "real":
        return capability[0] == major and capability[1] >= minor
    return capability >= (major, minor)
