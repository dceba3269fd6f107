"""Builds the CUDA kernels of csrc/ for the CPU, on the emulation of CUDA in tests/emulation/, with g++ alone.

The module is that of csrc/bindings.cpp, but its CUDA kernels stand where backend cpu looks for its own, and so run on
tensors of the CPU. tests/emulation/cuda_runtime.h says what is emulated, and what cannot be.
"""

import hashlib
import importlib.util
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from gradroute import backends
from gradroute.backends import native

CSRC = Path(__file__).parents[1] / "csrc"
EMULATION = Path(__file__).parent / "emulation"
HEADERS = sorted(CSRC.glob("*.cuh"))
KERNELS = sorted(CSRC.glob("*.cu"), key=lambda source: -source.stat().st_size)  # the longest takes longest
PROCESSES = 2

# With -iquote, because -I csrc would put its math.h in the place of the system's.
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-iquote", CSRC, "-I", EMULATION)

# Misaligned vectors and indices outside of arrays end a launch with an error, see emulate.cpp.
KERNEL_FLAGS = ("-fsanitize=alignment,bounds",)

# bindings.cpp then binds the functions of namespace cuda as those of the CPU's baseline.
BINDINGS_FLAGS = ("-Dcpu_baseline=cuda", "-DGRADROUTE_EMULATED_CUDA", '-DGRADROUTE_BUILD="{}"')


def missing_tools():
    """The tools that building needs and this machine lacks, in words; empty where nothing is missing."""
    missing = [] if sys.platform == "linux" else ["Linux"]  # makecontext
    missing += [] if shutil.which("g++") else ["g++"]
    missing += [] if Path(sysconfig.get_path("include"), "Python.h").exists() else ["Python.h"]
    return missing + ([] if importlib.util.find_spec("pybind11") else ["pybind11"])


def module_in(folder):
    return folder / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"


def identity():
    """A name for what a module is made of: the sources, the flags, and the Python and pybind11 that it is for."""
    import pybind11

    made_of = hashlib.sha256(
        repr((pybind11.__version__, sys.version, FLAGS, KERNEL_FLAGS, BINDINGS_FLAGS)).encode()
    )
    for source in filter(Path.is_file, sorted([*CSRC.iterdir(), *EMULATION.iterdir(), Path(__file__)])):
        made_of.update(source.name.encode() + source.read_bytes())
    return made_of.hexdigest()[:16]


def build(folder):
    """Compiles everything in `folder`."""
    import pybind11

    headers = ("-I", pybind11.get_include(), "-I", sysconfig.get_path("include"), "-iquote", folder)
    (folder / "build.h").touch()  # BINDINGS_FLAGS define what CMake writes there
    for header in HEADERS:
        (folder / header.name).write_text(adapted(header, header.read_text()))
    commands = [
        *(kernel_command(kernel, folder) for kernel in KERNELS),
        compile_command(CSRC / "bindings.cpp", folder, *BINDINGS_FLAGS, *headers),
        compile_command(EMULATION / "emulate.cpp", folder),
    ]
    with ThreadPoolExecutor(PROCESSES) as pool:
        list(pool.map(run, commands))
    link(folder, folder.glob("*.o"))


def build_changed(folder, built, name, old, new):
    """Makes in `folder` the module of `built`, except that in one file of kernels, or its headers, `old` is `new`."""
    texts = {source: source.read_text() for source in (*HEADERS, CSRC / name)}
    assert sum(text.count(old) for text in texts.values()) == 1, f"not once in {name} and its headers: {old}"
    for source, text in texts.items():
        (folder / source.name).write_text(adapted(source, text.replace(old, new)))
    run(compile_command(folder / name, folder, *KERNEL_FLAGS))
    changed = folder / f"{name}.o"
    link(folder, [changed, *(path for path in built.glob("*.o") if path.name != changed.name)])


def kernel_command(kernel, folder):
    """Writes the kernel's adapted source to `folder`, and returns the command that compiles it."""
    (folder / kernel.name).write_text(adapted(kernel, kernel.read_text()))
    return compile_command(folder / kernel.name, folder, *KERNEL_FLAGS)


def adapted(source, text):
    """A source's text with variables in shared memory as C++, because no header can give them a meaning."""
    text = re.sub(
        r"\bextern __shared__ (\w+) (\w+)\[\];",
        r"\1* const \2 = static_cast<\1*>(emulation::dynamic_shared_memory());",
        text,
    )
    text = re.sub(
        r"(?<!extern )\b__shared__ (\w+) (\w+)((?:\[[^]]*\])*);",
        r"static emulation::Shared<\1\3> \2_in_memory; auto& \2 = \2_in_memory.value;",
        text,
    )
    assert "__shared__" not in text, f"{source.name}: shared memory in a form that is not known here"
    return f'#line 1 "{source}"\n{text}'  # for messages


def compile_command(source, folder, *flags):
    return ["g++", *FLAGS, *flags, "-x", "c++", "-c", source, "-o", folder / f"{source.name}.o"]


def link(folder, objects):
    partial = folder / "partial"
    run(["g++", "-shared", *objects, "-o", partial])
    partial.rename(module_in(folder))  # there is never half a module


def run(command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


def load(folder):
    """The module in a folder, under a name of its own: pybind11 loads one module of a name."""
    spec = importlib.util.spec_from_file_location(f"{folder.name}._native", module_in(folder))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def use(module, monkeypatch):
    """Tensors of the CPU go to the emulated kernels."""
    monkeypatch.setattr(native.loading, "module", module)
    monkeypatch.setattr(native.loading, "instruction_set", "baseline")


def use_as_backend_cuda(module, monkeypatch):
    """As `use`; and backend cuda takes tensors of the CPU, in the dtypes that it takes on a GPU."""
    use(module, monkeypatch)
    real, meta = backends._BACKENDS["cuda"], torch.device("meta")
    monkeypatch.setattr(native, "why_not", lambda name: None)
    emulated = real._replace(why_not=lambda name, _, dtype: real.why_not(name, meta, dtype), home="cpu")
    monkeypatch.setitem(backends._BACKENDS, "cuda", emulated)
