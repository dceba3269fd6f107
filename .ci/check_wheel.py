"""Checks a wheel as a cluster meets it: `make check-wheel`, or `python .ci/check_wheel.py [WHEEL]`.

By default it is the newest wheel in dist/ that this Python can install.

The wheel goes into an empty environment, beside the torch of constraints.txt, on a machine that seems to have no CUDA
toolkit; the report and a smoke test run there. Then the native module is taken apart: it must need nothing of torch, of
CUDA's libraries or of a driver. Needs readelf, nm and ldd, and ninja for what the build included.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parent.parent.resolve()
MEGABYTES = 20
# The libraries that the module may need: the C and C++ runtimes, and the OpenMP runtime that torch brings along.
RUNTIMES = re.compile(
    r"(libc|libm|libstdc\+\+|libgcc_s|libgomp|libpthread|libdl|librt|ld-linux-[\w-]+)\.so(\.\d+)*"
)
FOREIGN = re.compile(r"lib(torch|c10|cudart|cuda|cublas|cudnn|nvidia|nvrtc)")
FOREIGN_SYMBOL = re.compile(r"\b(torch|c10|at|caffe2)::|\b_*cu(da)?[A-Z]")
TORCH_HEADER = re.compile(r"/torch/include/|/torch/csrc/|/ATen/|/c10/")


def main():
    """Stops at the first thing that is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path, nargs="?")
    wheel = (parser.parse_args().wheel or newest_wheel(ROOT / "dist")).resolve()
    print(f"{wheel.name}, {wheel.stat().st_size / 1e6:.1f} MB", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        built = use(wheel, folder)
        modules = list(folder.rglob("gradroute/_native*.so"))
        if wheel.name.endswith("-none-any.whl"):
            check("a pure-Python wheel has no native module", not modules, modules)
            return
        check("the native module was installed, and loads", len(modules) == 1 and "error" not in built, built)
        check_links(modules[0], wheel)
        check_headers()
        check_size(modules[0])
        print(f"CPU instruction sets: {built['instruction_sets']}")
        check_architectures(modules[0], built, folder)


def newest_wheel(folder):
    """The newest wheel for this Python: for its own version, or pure Python."""
    python = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    wheels = [
        *folder.glob(f"gradroute-*-{python}-{python}-*.whl"),
        *folder.glob("gradroute-*-py3-none-any.whl"),
    ]
    check(f"dist/ has a wheel for {python}; make wheel builds one", wheels, "none")
    return max(wheels, key=lambda wheel: wheel.stat().st_mtime)


def check(what, holds, found=""):
    """Prints what holds, or stops with what does not and what was found instead."""
    if not holds:
        sys.exit(f"check-wheel: FAILED: {what}: {found}")
    print(f"ok: {what}", flush=True)


def use(wheel, folder):
    """Installs the wheel and its dependencies into an empty environment and uses it there.

    Returns: the native module's part of the report.
    """
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", wheel)
    installed = partial(run, python, cwd=folder, env=without_toolkit())
    installed("-m", "gradroute")
    installed(ROOT / ".ci" / "smoke.py")
    return json.loads(installed("-m", "gradroute", "--json", stdout=subprocess.PIPE))["native"]


def run(*command, **options):
    """Runs a program, whose output it returns where that is captured; stops where the program fails."""
    done = subprocess.run([str(c) for c in command], text=True, **options)
    check(" ".join(map(str, command[1:])), done.returncode == 0, f"exit code {done.returncode}")
    return done.stdout


def without_toolkit():
    """The environment of a machine without nvcc, and without this one's settings of gradroute and Python."""
    hidden = re.compile(r"CUDA.*|GRADROUTE_.*|TRITON_.*|PYTHON.*|LD_LIBRARY_PATH|LD_PRELOAD")
    kept = {name: value for name, value in os.environ.items() if not hidden.fullmatch(name)}
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    return kept | {"PATH": os.pathsep.join(f for f in folders if not shutil.which("nvcc", path=f))}


def check_links(module, wheel):
    """Checks the libraries that the module links, the symbols that it leaves undefined, and its neighbours."""
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", output("readelf", "-d", module))
    foreign = [name for name in needed if not RUNTIMES.fullmatch(name)]
    check(f"it needs the runtimes of C, C++ and OpenMP only: {' '.join(needed)}", not foreign, foreign)
    loaded = [line.split()[0] for line in output("ldd", module).splitlines()]
    foreign = list(filter(FOREIGN.match, loaded))
    check("nothing of torch, CUDA or a driver is loaded with it", not foreign, foreign)
    symbols = output("nm", "-D", "-C", "--undefined-only", module).splitlines()
    foreign = list(filter(FOREIGN_SYMBOL.search, symbols))
    check(f"{len(symbols)} symbols are undefined, none of torch or CUDA", not foreign, foreign)
    vendored = [name for name in zipfile.ZipFile(wheel).namelist() if "libgomp" in name]
    check("no OpenMP runtime is inside: torch's is shared", not vendored, vendored)


def check_headers():
    """Checks the headers that the compilers read, as ninja recorded them in the build folders."""
    folders = [file.parent for file in ROOT.glob("build/native-*/build.ninja")]
    scripts = sysconfig.get_path("scripts")
    ninja = shutil.which("ninja", path=os.pathsep.join([scripts, os.environ.get("PATH", os.defpath)]))
    lines = [line for folder in folders for line in output(ninja, "-C", folder, "-t", "deps").splitlines()]
    read = {line.strip() for line in lines if line.startswith("    ")}
    check("ninja recorded what was included", read, f"nothing in {ROOT / 'build'}: run make wheel")
    foreign = sorted(filter(TORCH_HEADER.search, read))
    check(f"{len(read)} files were included, none of torch", not foreign, foreign)


def check_size(module):
    """Checks that the module stays small."""
    size = module.stat().st_size / 1e6
    check(f"the module has {size:.1f} MB, less than {MEGABYTES}", size < MEGABYTES)


def check_architectures(module, built, folder):
    """Prints the CUDA architectures inside, and checks that none is missing that the build asked for."""
    if not built["cuda"]:
        print("CUDA architectures: none, built without CUDA")
        return
    bundled = folder.rglob("triton/backends/nvidia/bin/cuobjdump")
    cuobjdump = shutil.which("cuobjdump") or next(bundled, None)
    check("there is a cuobjdump, in the CUDA toolkit or in triton", cuobjdump)
    code = sorted(set(re.findall(r"sm_\w+", output(cuobjdump, "--list-elf", module))))
    ptx = sorted(set(re.findall(r"sm_\w+", output(cuobjdump, "--list-ptx", module))))
    asked = {f"sm_{architecture.split('-')[0]}" for architecture in built["cuda_architectures"].split()}
    what = f"CUDA {built['cuda']}, architectures: {' '.join(code)}, PTX: {' '.join(ptx)}"
    check(what, asked <= {*code, *ptx}, f"asked for {asked}")


def output(*command):
    """A program's standard output."""
    return subprocess.run([str(c) for c in command], check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main()
