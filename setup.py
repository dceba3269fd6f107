"""Builds gradroute: its packages, and the native module gradroute._native, which is CMake's work.

GRADROUTE_NATIVE decides about the module: 1 makes a missing toolchain an error, 0 leaves the module out; by default it
is built where there is a toolchain.

GRADROUTE_CUDA decides about its CUDA kernels, which take most of the time to compile and need nvcc: 1 requires them, 0
leaves them out, auto compiles them where there is nvcc. The default is auto where a CUDA device is visible and inside
cibuildwheel, and 0 elsewhere; `make wheel` asks for auto.

CMAKE_ARGS and MAX_JOBS (how many compilers run at once) are read too, and by CMake the variables of CMAKE_READS.
Compiling says how far it is, but pip shows it only with -v: `pip install -v .`. What is compiled stays in build/, and
the next installation takes it from there. Everything else is in pyproject.toml and csrc/CMakeLists.txt.
"""

import ctypes
import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path, PurePosixPath

from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()
BUILD_COMMANDS = {"bdist_wheel", "build", "build_ext", "develop", "editable_wheel", "install"}
CXX_COMPILERS = ("c++", "g++", "clang++", "CC", "icpx")  # the names that CMake tries
CMAKE_READS = (
    "CXX",
    "CXXFLAGS",
    "LDFLAGS",
    "CUDACXX",
    "CUDAFLAGS",
    "CUDAHOSTCXX",
    "CUDA_HOME",
    "CUDA_PATH",
    "CMAKE_CUDA_ARCHITECTURES",
)

WHAT_IS_COMPILED = {
    "OFF": "CPU kernels only (GRADROUTE_CUDA=1 compiles the CUDA kernels too)",
    "AUTO": "with CUDA kernels where there is nvcc (minutes; GRADROUTE_CUDA=0 leaves them out)",
    "ON": "with CUDA kernels (minutes)",
}

# Measured peaks of one compiler: 0.38 GiB (g++ 12, bindings.cpp), 0.22 GiB (nvcc 13.0, any .cu, three architectures).
BYTES_PER_JOB = 1 << 30


def main():
    """Runs setuptools, with the native module unless it is not wanted or a tool for it is missing."""
    wanted = switch("GRADROUTE_NATIVE")
    if wanted is False and cuda() == "ON":
        raise SystemExit("gradroute: GRADROUTE_CUDA=1 contradicts GRADROUTE_NATIVE=0")
    missing = " and ".join([] if wanted is False else missing_tools())
    builds = not BUILD_COMMANDS.isdisjoint(sys.argv)
    if builds and missing and (wanted or cuda() == "ON"):
        raise SystemExit(f"gradroute: the native module is required, but this machine lacks {missing}")
    setup(
        packages=find_namespace_packages(include=["gradroute", "gradroute.*"]),
        ext_modules=[] if wanted is False or missing else [Extension("gradroute._native", sources=[])],
        cmdclass={"build_ext": CMakeBuild},
    )
    if builds and missing:
        print(
            f"gradroute: WARNING: pure Python only, without the backends cpu and cuda, because this machine lacks "
            f"{missing}. The backends reference, torch and triton work. GRADROUTE_NATIVE=1 makes this an error, "
            "GRADROUTE_NATIVE=0 silences it.",
            file=sys.stderr,
        )


def switch(name, also=()):
    """A variable that is 1 (required: True), 0 (left out: False), one of `also`, or absent (None)."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1", *also):
        expected = ", ".join(["1 (required)", "0 (left out)", *also])
        raise SystemExit(f"gradroute: {name}: got {value!r}, expected {expected} or nothing")
    return {"": None, "1": True, "0": False}.get(value, value)


def cuda():
    """CMake's GRADROUTE_CUDA: ON, OFF, or AUTO (where there is nvcc)."""
    chosen = switch("GRADROUTE_CUDA", also=("auto",))
    if chosen is None:
        chosen = "auto" if "CIBUILDWHEEL" in os.environ or sees_cuda_device() else False
    return {True: "ON", False: "OFF", "auto": "AUTO"}[chosen]


def sees_cuda_device():
    """Whether NVIDIA's driver lists a device for this process."""
    for name in ("libcuda.so.1", "nvcuda.dll"):
        try:
            driver = ctypes.CDLL(name)
        except OSError:
            continue
        count = ctypes.c_int(0)
        return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0
    return False


def missing_tools():
    """The tools that the native module needs and this machine lacks, in words."""
    missing = []
    compilers = shlex.split(os.environ.get("CXX", ""))[:1] or CXX_COMPILERS
    if "CMAKE_CXX_COMPILER" not in os.environ.get("CMAKE_ARGS", "") and not any(map(shutil.which, compilers)):
        missing.append(f"a C++ compiler ({', '.join(compilers)})")
    if not find_tool("cmake"):
        missing.append("CMake")
    if importlib.util.find_spec("pybind11") is None:
        missing.append("the Python package pybind11")
    headers = sysconfig.get_path("include")
    if not Path(headers, "Python.h").is_file():
        missing.append(f"Python's headers ({headers}/Python.h)")
    return missing


def find_tool(name):
    """A program beside this Python, whose environment need not be activated, or on PATH."""
    return shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)


class CMakeBuild(build_ext):
    """Has CMake build the module and install it where setuptools expects an extension."""

    def build_extension(self, ext):
        which = cuda()
        print(f"gradroute: compiling the native module, {WHAT_IS_COMPILED[which]}", flush=True)
        folder = configure(which)
        cmake("--build", folder, "--parallel", jobs())
        cmake("--install", folder, "--prefix", Path(self.get_ext_fullpath(ext.name)).resolve().parents[1])


def configure(which):
    """The build folder of these settings and compilers, configured: CMake would keep what it found under others."""
    import pybind11

    ninja = find_tool("ninja")
    settings = [
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DGRADROUTE_CUDA={which}",
        *(["-G", "Ninja"] if ninja else []),
        *shlex.split(os.environ.get("CMAKE_ARGS", "")),
    ]
    compilers = [shutil.which("nvcc"), *map(os.environ.get, CMAKE_READS)]
    key = hashlib.sha256(repr([settings, compilers]).encode()).hexdigest()[:8]
    folder = ROOT / "build" / f"native-{sys.implementation.cache_tag}-{sysconfig.get_platform()}-{key}"
    # These two are not part of the key: pip's build isolation puts them elsewhere each time.
    tools = [
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        *([f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []),
    ]
    cmake("-S", ROOT / "csrc", "-B", folder, *settings, *tools)
    return folder


def cmake(*arguments):
    """Runs CMake. A failure is loud, below the compiler's own words, and names the ways out."""
    try:
        subprocess.run([find_tool("cmake"), *map(str, arguments)], check=True)
    except subprocess.CalledProcessError as error:
        raise CompileError(
            "gradroute: building the native module failed, see the messages above. GRADROUTE_CUDA=0 leaves out its "
            "CUDA kernels, GRADROUTE_NATIVE=0 all of it (backends cpu and cuda)."
        ) from error


def jobs():
    """How many compilers run at once: MAX_JOBS or one a core, fewer where memory is short."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked = os.environ.get("MAX_JOBS") or str(cores)
    if not asked.isdigit() or int(asked) == 0:
        raise CompileError(f"gradroute: MAX_JOBS: got {asked!r}, expected a positive number")
    memory = available_memory()
    return int(asked) if memory is None else max(1, min(int(asked), memory // BYTES_PER_JOB))


def available_memory(root=Path("/")):
    """Bytes that a build may take: what is free, within this process's control groups; None where it is unknown."""
    try:
        meminfo = dict(line.split(":", 1) for line in (root / "proc/meminfo").read_text().splitlines())
        return min([int(meminfo["MemAvailable"].split()[0]) * 1024, *memory_limits(root)])
    except (OSError, KeyError):
        return None


def memory_limits(root):
    """The limits of the control groups around this process, of version 2 (memory.max) or 1."""
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, group = line.split(":", 2)
        folder, file = ("memory", "memory.limit_in_bytes") if controllers == "memory" else ("", "memory.max")
        for path in (group, *map(str, PurePosixPath(group).parents)):
            limit = root / "sys/fs/cgroup" / folder / path.lstrip("/") / file
            if limit.is_file() and (text := limit.read_text().strip()).isdigit():
                yield int(text)


if __name__ == "__main__":
    main()
