"""`python -m bench static`: compiles, reads and predicts."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import triton

from gradroute.backends.triton import INTERPRETED
from gradroute.kernels.configs import ARCHITECTURES

from .. import progress
from ..sources import git
from . import calibration, cuda, launches, rows, table
from .chips import CHIP_OF, CHIPS
from .compiling import TOOLS

LEFT_OUT = "they are read with --cuda where there is nvcc, in two minutes of a core for each architecture"
KERNELS = ("kernels", "csrc", "gradroute")  # the folders that machine code depends on


def main(name: str, architectures: Sequence[int], kernel: str, out: Path, with_cuda: bool) -> int:
    """Writes NAME.json and NAME.md.

    Args:
        name: of the files.
        architectures: those to compile for; none: all.
        kernel: only cases and kernels with this text in the name.
        out: the folder of the files.
        with_cuda: read the CUDA kernels too.

    Raises:
        ValueError: an argument has no such value, or Triton's functions are interpreted and cannot be compiled.
    """
    check(name, architectures, out, with_cuda)
    chosen = [case for case in launches.cases() if kernel in case.kernel or kernel in case.name]
    if not chosen:
        known = ", ".join(dict.fromkeys(case.kernel for case in launches.cases()))
        raise ValueError(f"kernel: got {kernel!r}, which is in no name of a case or a kernel: {known}")
    report = reported(name, architectures or ARCHITECTURES, chosen, with_cuda)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (out / f"{name}.md").write_text(table.page(report), encoding="utf-8")
    print(out / f"{name}.md")
    return 0


def check(name: str, architectures: Sequence[int], out: Path, with_cuda: bool) -> None:
    """Refuses what cannot be done before anything is compiled.

    Raises:
        ValueError: naming the argument, what came and what was expected.
    """
    if not name.isidentifier():
        raise ValueError(f"name: got {name!r}, expected letters, digits and underscores, such as after")
    for architecture in architectures:
        if architecture not in ARCHITECTURES:
            known = ", ".join(map(str, ARCHITECTURES))
            raise ValueError(f"architecture: got {architecture}, expected any of {known}")
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: got {out}, which is a file, expected a folder")
    if with_cuda and (why := cuda.missing()) is not None:
        raise ValueError(f"cuda: {why}, so the CUDA kernels cannot be compiled")
    if INTERPRETED:
        raise ValueError(
            "TRITON_INTERPRET: it is set, and functions of Triton's interpreter cannot be compiled"
        )


def reported(
    name: str, architectures: Sequence[int], chosen: Sequence[launches.Case], with_cuda: bool
) -> dict[str, Any]:
    """Everything that is written."""
    wanted = [(architecture, case) for architecture in architectures for case in chosen]
    kernels: dict[str, list[rows.Row]] = {str(architecture): [] for architecture in architectures}
    for number, (architecture, case) in enumerate(wanted, 1):
        progress.case(f"sm_{architecture}, {case.kernel}, {case.name}", number, len(wanted))
        kernels[str(architecture)].append(rows.row_of(case, architecture))
    return {
        "name": name,
        "command": "python -m bench " + " ".join(sys.argv[1:]),
        "predicted": True,
        "environment": environment(),
        "chips": {
            str(architecture): CHIPS[CHIP_OF[architecture]]._asdict()
            | {"peak": CHIPS[CHIP_OF[architecture]].peak}
            for architecture in ARCHITECTURES
        },
        "calibration": calibration.calibrated(),
        "kernels": kernels,
        "cuda": read_cuda(architectures) if with_cuda else {"missing": LEFT_OUT},
    }


def read_cuda(architectures: Sequence[int]) -> dict[str, Any]:
    """The rows of every CUDA kernel by architecture."""
    wanted = [(architecture, source) for architecture in architectures for source in cuda.sources()]
    found: dict[str, list[rows.Row]] = {str(architecture): [] for architecture in architectures}
    for number, (architecture, source) in enumerate(wanted, 1):
        progress.case(f"sm_{architecture}, {source.name}", number, len(wanted))
        found[str(architecture)] += cuda.rows_of(source, architecture)
    return {"kernels": found}


def environment() -> dict[str, Any]:
    """What the figures depend on."""
    changes = git("status", "--porcelain", "--", *KERNELS)
    return {
        "commit": git("rev-parse", "HEAD"),
        "kernels last changed in": git("log", "-1", "--format=%H", "--", *KERNELS),
        "kernels changed since": None if changes is None else changes != "",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "ptxas": release_of(TOOLS / "ptxas"),
        "ptxas for sm_100": release_of(TOOLS / "ptxas-blackwell"),
        "nvcc": release_of(Path(cuda.nvcc())) if cuda.nvcc() else None,
    }


def release_of(tool: Path) -> str | None:
    """The version of one of CUDA's tools; None where it is missing."""
    if not tool.exists():
        return None
    said = subprocess.run([tool, "--version"], capture_output=True, text=True).stdout
    return next((line.partition(", V")[2] for line in said.splitlines() if ", V" in line), None)
