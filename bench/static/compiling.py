"""A recorded Triton launch as machine code: compiled as the runtime would, without a GPU, and disassembled."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gradroute.kernels.launch import OPTIONS, Launch

from . import sass

TOOLS = Path(nvidia.__file__).parent / "bin"  # nvdisasm and ptxas as Triton brings them

TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}

SERIALIZED = "C7512"  # ptxas's warning that it makes products of warp groups wait for each other


class Specialisation(NamedTuple):
    """What Triton's runtime makes a kernel of: types by parameter; constants and attributes by path.

    A path is the index of an argument, then those of an element in its tuples.
    """

    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], list[list[Any]]]


class Compiled(NamedTuple):
    """A compiled kernel.

    Attributes:
        kernel: its machine code.
        registers: of a thread.
        spilled: bytes of a thread, stores and loads together.
        shared: bytes of a block.
        warps: of a block.
        said: all that the assembler said, its warnings too.
    """

    kernel: sass.Kernel
    registers: int
    spilled: int
    shared: int
    warps: int
    said: str

    @property
    def is_serialized(self) -> bool:
        """Whether the assembler makes products wait for each other (C7512)."""
        return SERIALIZED in self.said


def specialisation(launch: Launch) -> Specialisation:
    """The signature, constants and attributes with which the runtime would specialise this launch."""
    special = Specialisation({}, {}, {})
    values = launch.arguments | {k: v for k, v in launch.config.items() if k not in OPTIONS}
    for index, parameter in enumerate(launch.kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr:
            special.signature[parameter.name] = "constexpr"
            special.constants[(index,)] = value
        else:
            special.signature[parameter.name] = _specialised(value, (index,), special)
    return special


def _specialised(value: Any, path: tuple[int, ...], special: Specialisation) -> Any:
    """The type of an argument, or of an element in a tuple, in a signature; adds to constants and attributes."""
    if isinstance(value, tuple):
        types = [_specialised(own, (*path, i), special) for i, own in enumerate(value)]
        return type(value)(*types) if hasattr(value, "_fields") else tuple(types)
    if value is None or isinstance(value, tl.constexpr) or (type(value) is int and value == 1):
        special.constants[path] = value
        return "constexpr"
    address = value.data_ptr() if isinstance(value, torch.Tensor) else value
    if isinstance(address, int) and address % 16 == 0:
        special.attributes[path] = [["tt.divisibility", 16]]
    return _type_of(value)


def _type_of(value: Any) -> str:
    """The type of a number or a tensor in a signature."""
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def options_of(launch: Launch) -> dict[str, int]:
    """What a launch's configuration asks of Triton's compiler."""
    return {name: launch.config[name] for name in OPTIONS if name in launch.config}


def compiled(launch: Launch, architecture: int) -> Compiled:
    """The launch's kernel for an architecture."""
    special = specialisation(launch)
    source = ASTSource(launch.kernel, *special)
    binary, said = assembled(source, architecture, {"enable_fp_fusion": True} | options_of(launch))
    (kernel,) = disassembled(binary.asm["cubin"])
    registers, spilled = resources(said)
    return Compiled(
        kernel, registers, spilled, binary.metadata.shared, binary.metadata.num_warps, _without_times(said)
    )


def assembled(source: ASTSource, architecture: int, options: dict[str, Any]) -> tuple[Any, str]:
    """Triton's binary, and what the assembler said as Triton calls it."""
    said = io.StringIO()
    with _from_the_beginning(), contextlib.redirect_stdout(said):
        binary = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    return binary, said.getvalue()


@contextlib.contextmanager
def _from_the_beginning() -> Iterator[None]:
    """Inside, kernels are compiled whatever Triton's cache has, of which the assembler says nothing."""
    with triton.knobs.nvidia.scope(), triton.knobs.compilation.scope():
        triton.knobs.nvidia.dump_ptxas_log = True
        triton.knobs.compilation.always_compile = True
        yield


def resources(said: str) -> tuple[int, int]:
    """Registers and spilled bytes of a thread in what the assembler said.

    Raises:
        ValueError: it did not say them.
    """
    registers = re.search(r"Used (\d+) registers", said)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", said)
    if registers is None or len(spills) != 2:
        raise ValueError(f"ptxas: got {said!r}, expected one kernel's registers and spills")
    return int(registers[1]), sum(map(int, spills))


def _without_times(said: str) -> str:
    return "\n".join(line for line in said.splitlines() if line.strip() and "Compile time" not in line)


def disassembled(cubin: bytes) -> list[sass.Kernel]:
    """The kernels of a binary."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        return sass.parse(nvdisasm("-c", str(file)))


def nvdisasm(*arguments: str) -> str:
    """What nvdisasm prints."""
    done = subprocess.run([TOOLS / "nvdisasm", *arguments], capture_output=True, text=True)
    if done.returncode != 0:
        raise ValueError(f"nvdisasm {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout
