"""Fills Triton's cache, without a GPU, with kernels and launchers that the runtime of a GPU machine then finds there.

`python tools/gpu_kernels.py FOLDER [ARCHITECTURE]` compiles, for sm_90 by default, every launch that tests/offline.py
records, and says how many there are. It goes through Triton's own runtime, `kernel.run(warmup=True)`, on a driver that
claims to have such a device: the keys are the runtime's, and only the same version of Triton, of Python and of these
sources has them. What is in the folder already is not compiled again, so that an interrupted command goes on.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SHOWN = 25  # compiled kernels from one line of progress to the next


class Driver:
    """A driver of Triton with one device of an architecture, on which nothing can run."""

    def __init__(self, architecture: int):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target


class NotLoaded:
    """Stands for a C module that was compiled for a driver which this machine lacks, so that it cannot be loaded."""

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: None


def prepare_launchers(folder: Path) -> None:
    """Lets Triton link its launchers with an empty libcuda, in `folder`, and keeps it from loading them."""
    from triton import knobs
    from triton.runtime import build

    command = ["gcc", "-shared", "-Wl,-soname,libcuda.so.1", "-x", "c", os.devnull]
    subprocess.run([*command, "-o", str(folder / "libcuda.so.1")], check=True)
    knobs.nvidia.libcuda_path = str(folder)
    build._load_module_from_path = lambda name, path: NotLoaded()


def unlike(launches: Iterable[Any]) -> list[Any]:
    """One launch of every specialisation."""
    import offline

    found = {}
    for launch in launches:
        options = {name: launch.config[name] for name in offline.OPTIONS if name in launch.config}
        key = repr((launch.kernel.__name__, *offline.compile_arguments(launch), options))
        found.setdefault(key, launch)
    return list(found.values())


def compile_launch(launch: Any) -> str:
    """Compiles a launch's kernel and its launcher, unless the cache has them; returns the kernel's key in the cache."""
    from triton.backends.nvidia.driver import CudaLauncher

    compiled = launch.kernel.run(grid=(1,), warmup=True, **launch.arguments, **launch.config)
    CudaLauncher(compiled.src, compiled.metadata)
    return compiled.hash


_launches: list[Any] = []  # of this process and of those that it forks: launches cannot be pickled


def compile_number(number: int) -> str:
    return compile_launch(_launches[number])


def main(folder: str, architecture: str = "90") -> int:
    os.environ["TRITON_CACHE_DIR"] = os.path.abspath(folder)
    os.environ["TRITON_STORE_BINARY_ONLY"] = "1"
    os.environ.pop("TRITON_INTERPRET", None)
    sys.path[:0] = [str(ROOT / part) for part in ("", "tests", "tests/ops", "tests/toolkit")]
    import offline
    from triton.backends.nvidia.driver import CudaUtils
    from triton.runtime import driver

    start = time.monotonic()
    _launches[:] = unlike(offline.recorded(int(architecture)))
    print(f"{len(_launches)} specialisations, recorded in {time.monotonic() - start:.0f} s", flush=True)
    driver.set_active(Driver(int(architecture)))
    keys = set()
    with tempfile.TemporaryDirectory() as scratch:
        prepare_launchers(Path(scratch))
        CudaUtils()
        with multiprocessing.get_context("fork").Pool(len(os.sched_getaffinity(0))) as pool:
            for key in pool.imap_unordered(compile_number, range(len(_launches))):
                keys.add(key)
                if len(keys) % SHOWN == 0:
                    print(f"{len(keys)} kernels, {time.monotonic() - start:.0f} s", flush=True)
    print(f"{len(keys)} kernels in {folder}, {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
