"""Compiles the kernels of `bench/static/launches.py` without a GPU and prints what their machine code has.

`python tests/machine_code.py ARCHITECTURE` prints one JSON line a case: resources, what the assembler warned of, how
many blocks a multiprocessor holds, the products of each loop and how many a tile needs, and every access to global
memory with its width and the instruction. It must run without TRITON_INTERPRET, whose functions cannot be compiled.
"""

import json
import sys

from bench.static import chips, launches, pipes, rows, sass
from bench.static.occupancy import blocks_per_multiprocessor


def report(case, architecture):
    """What the machine code of a case's kernel has."""
    launch = launches.recorded(case, architecture)
    code = rows.code_of(launch, architecture)
    rates = chips.ARCHITECTURES[architecture]
    return {
        "case": case.name,
        "kernel": case.kernel,
        "architecture": architecture,
        "configuration": launch.config,
        "registers": code.registers,
        "spilled": code.spilled,
        "blocks": blocks_per_multiprocessor(rates, code.warps, code.registers, code.shared),
        "said": code.said,
        "loads": accesses(code.kernel, sass.GLOBAL_LOADS),
        "stores": accesses(code.kernel, sass.GLOBAL_STORES),
        "loops": [products(code, loop, rates) for loop in rows.product_loops(code.kernel)],
        "tile": case.flop(launch.config),
    }


def accesses(kernel, opcodes):
    """Width and instruction of every access to global memory."""
    found = [one for one in kernel.body(None) if one.opcode in opcodes]
    return [[sass.width(one.operation), str(one)] for one in found]


def products(code, loop, rates):
    """The products of a loop by kind, their FLOP (None where the code does not say), and where the loop is."""
    body = code.kernel.body(loop)
    tensor = pipes.clocks(body, code.warps, rates).tensor
    flop = None if tensor is None else tensor * rates.tensor
    return {"kinds": dict(pipes.products(body)), "flop": flop, "at": [str(body[0]), str(body[-1])]}


if __name__ == "__main__":
    for one in launches.cases():
        print(json.dumps(report(one, int(sys.argv[1]))), flush=True)
