"""Compiles, without a GPU, FlashAttention-4's backward with all that gradroute gives it, for one architecture.

`python tests/offline_fa4.py sm_90 [FIRST STEP]` prints one JSON line for each call: its kind of pass, what queries see,
the head dimension, the dtype, the heads of a group, and of the kernel's machine code the registers and the bytes of
stack; of all calls every STEP-th from the FIRST. It needs the packages of tests/fa4.txt, and a process of its own for
each architecture.
"""

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

ARCHITECTURE = sys.argv[1]
FOLDER = tempfile.TemporaryDirectory()
# Read when the library is imported. It would ask a GPU for its number of multiprocessors, which changes no kernel.
os.environ |= {
    "FLASH_ATTENTION_ARCH": ARCHITECTURE,
    "CUTE_DSL_ARCH": f"{ARCHITECTURE}a",
    "FLASH_ATTENTION_NUM_SMS": "132",
    "FLASH_ATTENTION_FAKE_TENSOR": "1",
    "CUTE_DSL_KEEP": "cubin",
    "CUTE_DSL_DUMP_DIR": FOLDER.name,
}
warnings.simplefilter("ignore")  # the library's own

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode

from gradroute import Routes, Table, testing
from gradroute.backends.fa4 import device
from gradroute.backends.fa4.operands import Operands
from gradroute.backends.fa4.passes import passes
from gradroute.backends.fa4.refusals import HEAD_DIMS
from gradroute.primitives.attention_pattern import Pattern

BATCH, LENGTH, HEADS = 2, 512, 8
BINARY = Table(torch.eye(4))
FRACTIONAL = Table(torch.eye(4) / 2)
POSITIVE = Table(torch.eye(4) + 0.5)
MANY_ROUTES = Table(torch.eye(40))

#: The tables of scores and of values whose last pass is compiled differently.
KINDS = {
    "both, binary": (BINARY, BINARY),
    "both, fractional": (FRACTIONAL, FRACTIONAL),
    "scores": (BINARY, None),
    "values, positive": (None, POSITIVE),
    "values, binary": (None, BINARY),  # its first pass is that of both
    "both, many routes": (MANY_ROUTES, MANY_ROUTES),
}
PATTERNS = {
    "causal": Pattern(True, None, 0.1),
    "window": Pattern(True, 100, 0.1),
}


def calls():
    """Every two values of all axes together; bits of 64 routes once."""
    *kinds, many_routes = KINDS
    axes = {
        "kind": kinds,
        "pattern": tuple(PATTERNS),
        "head_dim": HEAD_DIMS,
        "dtype": (torch.bfloat16, torch.float16),
        "group": (1, 4),
    }
    yield from testing.covering(axes, strength=2)
    yield {name: many_routes if name == "kind" else values[0] for name, values in axes.items()}


def on_fake_gpu(value):
    """The tensors of a tuple in shapes, strides and dtypes alone."""
    if isinstance(value, torch.Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")
    return type(value)(*map(on_fake_gpu, value)) if isinstance(value, tuple) else value


def compiled(kind, pattern, head_dim, dtype, group):
    """Compiles a pass, and says what its kernel takes."""
    score, value = KINDS[kind]
    routes = Routes.of(torch.zeros(BATCH, LENGTH, dtype=torch.int32), (score or value).num_routes)
    operands = Operands.of(passes(score, value)[-1], routes, (BATCH, LENGTH), PATTERNS[pattern])
    with FakeTensorMode():
        (q, o, d_o, dq), (k, v, dk, dv) = (
            [torch.empty(BATCH, LENGTH, heads, head_dim, dtype=dtype, device="cuda") for _ in range(4)]
            for heads in (HEADS, HEADS // group)
        )
        lse = torch.empty(BATCH, HEADS, LENGTH, device="cuda")
        device.run(q, k, v, o, d_o, lse, dq, dk, dv, 0.1, on_fake_gpu(operands))
    return resources()


def resources():
    """The registers and the bytes of stack of the backward's kernel, whose file is removed."""
    (cubin,) = Path(FOLDER.name).glob(f"*flash_bwd_{ARCHITECTURE.replace('_', '')}*.cubin")
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    done = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True)
    cubin.unlink()
    registers, stack, local = (
        int(re.search(rf"{name}:(\d+)", done.stdout)[1]) for name in ("REG", "STACK", "LOCAL")
    )
    return {"registers": registers, "stack": stack + local}


if __name__ == "__main__":
    torch.set_num_threads(1)
    first, step = map(int, sys.argv[2:4] or (0, 1))
    for call in itertools.islice(calls(), first, None, step):
        print(json.dumps(call | {"dtype": str(call["dtype"])} | compiled(**call)), flush=True)
