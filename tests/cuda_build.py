"""Compiles the CUDA kernels as the build does, without a GPU, and reads what the assembler says of each of them."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from pathlib import Path
from typing import NamedTuple

CSRC = Path(__file__).parents[1] / "csrc"

KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<architecture>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)

ARCHITECTURE = re.compile(r"^arch = (\w+)")
FUNCTION = re.compile(r"Function : (\w+)")
STORE = re.compile(r"\bSTG\.E(?:\.EF)?(?:\.(U8|U16|64|128))?")
WIDTHS = {"U8": 8, "U16": 16, "64": 64, "128": 128}


class Report(NamedTuple):
    """One kernel on one architecture: registers a thread; bytes of stack frame and spills a thread, shared a block."""

    kernel: str
    architecture: str
    registers: int
    stack: int
    spilled: int
    shared: int


def missing_tools():
    """The tools that compiling needs and this machine lacks, in words; empty where nothing is missing."""
    missing = [name for name, found in (("nvcc", find_nvcc()), ("cmake", find_tool("cmake"))) if not found]
    return missing + ([] if importlib.util.find_spec("pybind11") else ["pybind11"])


def find_nvcc():
    """The CUDA compiler on PATH, or in CUDA_HOME."""
    return shutil.which("nvcc") or shutil.which("nvcc", path=Path(os.environ.get("CUDA_HOME", "."), "bin"))


def find_cuobjdump():
    """The disassembler: of the CUDA toolkit on PATH, or the one in Triton's wheels; None where there is none."""
    triton = importlib.util.find_spec("triton")
    bundled = [] if triton is None else [Path(triton.origin).parent / "backends" / "nvidia" / "bin"]
    return shutil.which("cuobjdump") or next(
        (str(path) for folder in bundled if (path := folder / "cuobjdump").exists()), None
    )


def find_tool(name):
    """A program beside this Python, or on PATH."""
    return shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)


def commands(folder):
    """Each source's command, as the build compiles it for a wheel's architectures. Runs CMake in `folder`."""
    environment = {name: value for name, value in os.environ.items() if name != "CMAKE_CUDA_ARCHITECTURES"}
    ninja = find_tool("ninja")
    done = subprocess.run(
        [
            find_tool("cmake"),
            *("-S", CSRC, "-B", folder, "-DGRADROUTE_CUDA=ON", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON"),
            *(f"-DCMAKE_CUDA_COMPILER={find_nvcc()}", f"-DPython_EXECUTABLE={sys.executable}"),
            *(["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []),
        ],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    entries = json.loads((folder / "compile_commands.json").read_text())
    return {
        Path(entry["file"]).name: shlex.split(entry["command"])
        for entry in entries
        if entry["file"].endswith(".cu")
    }


def compiled(command, folder):
    """A report for each kernel of a source and each architecture."""
    arguments = [*command, "-Xptxas", "-v"]
    at = arguments.index("-o") + 1
    (folder / arguments[at]).parent.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(arguments, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return [report_of(match) for match in KERNEL.finditer(done.stdout + done.stderr)]


def stores(command, folder):
    """How many stores to global memory a compiled source has: {(kernel, architecture): {bits: number}}."""
    program = folder / command[command.index("-o") + 1]
    done = subprocess.run([find_cuobjdump(), "-sass", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    found, kernel, architecture = {}, None, None
    for line in done.stdout.splitlines():
        if match := ARCHITECTURE.search(line):
            architecture = match[1]
        elif match := FUNCTION.search(line):
            kernel = found.setdefault((match[1], architecture), Counter())
        elif match := STORE.search(line):
            kernel[WIDTHS.get(match[1], 32)] += 1
    return found


def report_of(match):
    shared = re.search(r"(\d+) bytes smem", match["rest"])
    return Report(
        kernel=match["name"],
        architecture=match["architecture"],
        registers=int(match["registers"]),
        stack=int(match["stack"]),
        spilled=int(match["stores"]) + int(match["loads"]),
        shared=int(shared[1]) if shared else 0,
    )
