"""Builds on a machine without a GPU what is carried to one, and installs it there: `make gpu-prepare`.

`prepare` fills build/gpu: the native module with CUDA kernels for one Python, the commit (commit.json), and Triton's
cache, where that Python has torch and Triton. `install`, the first stage of `make gpu-1`, takes from the folder what
fits the sources and this Python, compiles what it lacks, and says why.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench import sources  # noqa: E402

CARRIED = ROOT / sources.CARRIED.parent
MODULE, CACHE, BUILT = CARRIED / "native", CARRIED / "triton.tar.xz", CARRIED / "built.json"
COMPILED = ROOT / "build" / "gpu-triton"  # CACHE is packed from it, and an interrupted build goes on with it
TOOLS = ROOT / "build" / "gpu-tools"  # environments of the tools that compile, one for each Python
NATIVE_SOURCES, KERNEL_SOURCES = ("csrc",), ("kernels", "gradroute")
GROUP = "__grp__"  # Triton's files with the absolute paths of the files of a kernel
ASK_PYTHON = (
    "import sys, sysconfig; print(sys.implementation.cache_tag, sysconfig.get_config_var('EXT_SUFFIX'))"
)
ASK_TRITON = "import torch, triton; print(triton.__version__)"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python tools/gpu_carried.py", description=str(__doc__).splitlines()[0]
    )
    commands = parser.add_subparsers(required=True)
    making = commands.add_parser("prepare", help="build what is carried")
    making.add_argument("--python", default="python3.12", help="the Python of the GPU machine (%(default)s)")
    making.add_argument("--architectures", default="90", help="CMAKE_CUDA_ARCHITECTURES (%(default)s)")
    making.set_defaults(command=lambda parsed: prepare(parsed.python, parsed.architectures))
    commands.add_parser("install", help="install what was carried").set_defaults(
        command=lambda parsed: install()
    )
    parsed = parser.parse_args(arguments)
    try:
        parsed.command(parsed)
    except (ValueError, OSError, subprocess.CalledProcessError) as error:
        print(f"make gpu-prepare: {error}", file=sys.stderr)
        return 1
    return 0


def prepare(python: str, architectures: str) -> None:
    """Builds all of it, and prints the seconds and the sizes."""
    CARRIED.mkdir(parents=True, exist_ok=True)
    tag, suffix = asked(python, ASK_PYTHON).split()
    known = sources.description(ROOT)
    (ROOT / sources.CARRIED).write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    timed("the native module", build_module, python, tag, suffix, architectures)
    timed("Triton's cache", build_cache, python, architectures)
    for file in sorted(CARRIED.rglob("*")):
        if file.is_file():
            print(f"{file.stat().st_size / 1e6:8.1f} MB  {file.relative_to(ROOT)}")
    state = "clean" if known["clean"] else "changed since"
    print(f"{CARRIED}: {size(CARRIED) / 1e6:.1f} MB, of commit {known['described']}, {state}")


def timed(what: str, build: Any, *arguments: str) -> None:
    start = time.monotonic()
    build(*arguments)
    print(f"{what}: {time.monotonic() - start:.0f} s", flush=True)


def asked(python: str, code: str) -> str:
    """The output of a Python.

    Raises:
        ValueError: it cannot run.
    """
    try:
        return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", "") or str(error)
        raise ValueError(f"GPU_PYTHON: {python} does not run: {said.strip()}") from None


def build_module(python: str, tag: str, suffix: str, architectures: str) -> None:
    """The native module, with tools from an environment of their own; nothing where it is there already."""
    known = {"module": f"_native{suffix}", "architectures": architectures, "sources": native_digest()}
    if (
        BUILT.is_file()
        and json.loads(BUILT.read_text(encoding="utf-8")) == known
        and (MODULE / known["module"]).is_file()
    ):
        print(f"the native module is there: {known['module']}")
        return
    environment = TOOLS / tag
    if not (environment / "complete").is_file():
        shutil.rmtree(environment, ignore_errors=True)
        subprocess.run([python, "-m", "venv", environment], check=True)
        needed = ["setuptools", "pybind11", "cmake", "ninja", "-c", "constraints.txt"]
        subprocess.run(
            [environment / "bin" / "python", "-m", "pip", "install", "-q", *needed], check=True, cwd=ROOT
        )
        (environment / "complete").touch()
    BUILT.unlink(missing_ok=True)
    shutil.rmtree(MODULE, ignore_errors=True)
    variables = {"GRADROUTE_CUDA": "1", "CMAKE_CUDA_ARCHITECTURES": architectures}
    command = [environment / "bin" / "python", "setup.py", "-q", "build_ext", "--build-lib", CARRIED / "lib"]
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | variables)
    MODULE.mkdir()
    shutil.move(CARRIED / "lib" / "gradroute" / known["module"], MODULE)
    shutil.rmtree(CARRIED / "lib")
    BUILT.write_text(json.dumps(known) + "\n", encoding="utf-8")


def native_digest() -> str:
    """The digest of what the module is compiled from."""
    return sources.combined(sources.digests(NATIVE_SOURCES, ROOT))


def build_cache(python: str, architectures: str) -> None:
    """Triton's cache, packed; none where the Python has no torch or no Triton."""
    try:
        version = asked(python, ASK_TRITON)
    except ValueError:
        CACHE.unlink(missing_ok=True)
        print(f"no Triton cache: {python} lacks torch or triton, whose kernels only the same version finds")
        return
    folder = COMPILED / sources.combined(sources.digests(KERNEL_SOURCES, ROOT))
    for other in COMPILED.glob("*"):
        if other != folder:  # changed sources have other keys
            shutil.rmtree(other)
    command = [python, "tools/gpu_kernels.py", folder, architectures.partition(";")[0]]
    subprocess.run(command, check=True, cwd=ROOT)
    pack(folder)
    print(f"Triton {version}: {size(folder) / 1e6:.1f} MB, packed {CACHE.stat().st_size / 1e6:.1f} MB")


def pack(folder: Path) -> None:
    """Writes CACHE."""
    with tarfile.open(CACHE, "w:xz") as archive:
        archive.add(folder, arcname=".", filter=without_sources)


def without_sources(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """Leaves out the intermediate text of kernels, which Triton writes and never reads."""
    return None if entry.name.endswith(".source") else entry


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def install() -> None:
    """Makes the checkout importable with its native module, and fills Triton's cache with what was carried."""
    why_not = take_module()
    if why_not:
        print(f"the native module is compiled here: {why_not}", flush=True)
    variables = {} if why_not else {"GRADROUTE_NATIVE": "0"}
    verbose = ["-v"] if why_not else []
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        *verbose,
        "--no-deps",
        "--no-build-isolation",
        "-e",
        ".",
    ]
    subprocess.run(command, check=True, cwd=ROOT, env=os.environ | variables)
    unpack_cache(Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache"))


def take_module() -> str:
    """Copies the carried module into the package; returns why it does not, or ""."""
    suffix = asked(sys.executable, ASK_PYTHON).split()[1]
    module = MODULE / f"_native{suffix}"
    if not module.is_file() or not BUILT.is_file():
        return f"{CARRIED} has no {module.name}, which make gpu-prepare builds"
    if json.loads(BUILT.read_text(encoding="utf-8"))["sources"] != native_digest():
        return f"{module} was built from another csrc"
    place = ROOT / "gradroute" / module.name
    place.unlink(missing_ok=True)  # a module that is loaded, or linked to, is not written into
    shutil.copyfile(module, place)
    why = why_not_loaded(place)
    if why:
        place.unlink()
        return f"{module} does not load here: {why}"
    print(f"the native module was carried: {module.name}", flush=True)
    return ""


def why_not_loaded(module: Path) -> str:
    """Why this Python cannot load a native module, in a process of its own; "" where it can."""
    code = (
        "import importlib.util as util, sys\n"
        "util.module_from_spec(util.spec_from_file_location('_native', sys.argv[1]))"
    )
    done = subprocess.run((sys.executable, "-c", code, module), capture_output=True, text=True)
    if not done.returncode:
        return ""
    return (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def unpack_cache(place: Path) -> None:
    """Adds the carried kernels to Triton's cache, whose groups have absolute paths."""
    if not CACHE.is_file():
        print(f"Triton compiles every kernel here: {CACHE} is missing, which make gpu-prepare builds")
        return
    place.mkdir(parents=True, exist_ok=True)
    with tarfile.open(CACHE) as archive:
        archive.extractall(place, filter="data")
        groups = [place / name for name in archive.getnames() if Path(name).name.startswith(GROUP)]
    for group in groups:
        files = json.loads(group.read_text(encoding="utf-8"))["child_paths"]
        moved = {name: str(group.parent / name) for name in files if (group.parent / name).is_file()}
        group.write_text(json.dumps({"child_paths": moved}), encoding="utf-8")
    print(f"{len(groups)} kernels were carried into {place}")


if __name__ == "__main__":
    sys.exit(main())
