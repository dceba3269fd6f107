"""The CUDA kernels of csrc/, compiled by nvcc for each architecture, as machine code."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .compiling import disassembled
from .sass import GLOBAL_LOADS, GLOBAL_STORES, Kernel, widths

CSRC = Path(__file__).parents[2] / "csrc"
ARCHITECTURES = {80: "sm_80", 90: "sm_90a", 100: "sm_100"}
FLAGS = ("-std=c++17", "-O3", "-cubin", "-DGRADROUTE_CUDA", "-DGRADROUTE_X86", "-Xptxas", "-v", f"-I{CSRC}")

_SAID = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def nvcc() -> str | None:
    """The CUDA compiler: on PATH, or in CUDA_HOME."""
    home = str(Path(os.environ.get("CUDA_HOME", "."), "bin"))
    return shutil.which("nvcc") or shutil.which("nvcc", path=home)


def sources() -> list[Path]:
    """The files of CUDA kernels."""
    return sorted(CSRC.glob("*.cu"))


def missing() -> str | None:
    """Why the kernels cannot be compiled here; None where they can."""
    return None if nvcc() else "there is no nvcc on PATH or in CUDA_HOME"


def rows_of(source: Path, architecture: int) -> list[dict[str, Any]]:
    """What the machine code of each kernel of a source has; of templates, those for bf16.

    Raises:
        ValueError: it does not compile.
    """
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernels.cubin")
        command = [str(nvcc()), *FLAGS, f"-arch={ARCHITECTURES[architecture]}", str(source), "-o", str(cubin)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise ValueError(f"nvcc {source.name}: {done.stderr.strip()[-2000:]}")
        kernels = {kernel.name: kernel for kernel in disassembled(cubin.read_bytes())}
    return list(_rows(source.name, done.stdout + done.stderr, kernels))


def _rows(source: str, said: str, kernels: dict[str, Kernel]) -> Iterator[dict[str, Any]]:
    names = _readable(tuple(kernels))
    for match in _SAID.finditer(said):
        everything = kernels[match["name"]].body(None)
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        name = names[match["name"]]
        if "<" not in name or "__nv_bfloat16" in name:
            yield {
                "source": source,
                "kernel": name,
                "registers": int(match["registers"]),
                "spilled": int(match["stores"]) + int(match["loads"]),
                "shared": int(shared[1]) if shared else 0,
                "loads": widths(everything, GLOBAL_LOADS),
                "stores": widths(everything, GLOBAL_STORES),
            }


def _readable(names: Sequence[str]) -> dict[str, str]:
    """The names as C++ has them, where there is c++filt."""
    tool = shutil.which("c++filt")
    if tool is None or not names:
        return {name: name for name in names}
    done = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True, check=True)
    return dict(zip(names, map(_without_arguments, done.stdout.splitlines()), strict=True))


def _without_arguments(name: str) -> str:
    """A function's name with its template's arguments, without its parameters, namespaces and result."""
    name = name.replace("(anonymous namespace)::", "").replace("gradroute::", "").removeprefix("void ")
    return name.rpartition("(")[0] or name
