"""One row of the table: what is read from a kernel's machine code, and what is predicted from it."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

from gradroute.kernels.attention.schedule import balance
from gradroute.kernels.launch import Launch

from . import attention, model
from .chips import CHIP_OF, CHIPS, Chip
from .compiling import Compiled, compiled, specialisation
from .launches import Case, recorded
from .occupancy import blocks_per_multiprocessor
from .pipes import clocks, products
from .sass import GLOBAL_LOADS, GLOBAL_STORES, Instruction, Kernel, Loop, widths

#: Clocks that a program of attention takes before and after its loop.
AROUND_THE_LOOP = 4000

#: The sides of a tile as configurations and kernels name them.
_ROWS, _COLUMNS = ("BLOCK_T", "BLOCK_N", "BLOCK_Q"), ("BLOCK_F", "BLOCK_M", "BLOCK_D")

Row = dict[str, Any]
_compiled: dict[str, Compiled] = {}


class Machine(NamedTuple):
    """A compiled kernel on a multiprocessor.

    Attributes:
        code: the compiled kernel.
        blocks: how many of it a multiprocessor holds.
        chip: the GPU.
    """

    code: Compiled
    blocks: int
    chip: Chip


def row_of(case: Case, architecture: int) -> Row:
    """The row of a case on an architecture."""
    launch = recorded(case, architecture)
    chip = CHIPS[CHIP_OF[architecture]]
    code = code_of(launch, architecture)
    blocks = blocks_per_multiprocessor(chip.rates, code.warps, code.registers, code.shared)
    machine = Machine(code, blocks, chip)
    return _read(case, launch, machine) | _predicted(case, launch, machine)


def code_of(launch: Launch, architecture: int) -> Compiled:
    """The compiled kernel of a launch; launches of the same specialisation share it."""
    key = repr((launch.kernel.__name__, specialisation(launch), launch.config, architecture))
    if key not in _compiled:
        _compiled[key] = compiled(launch, architecture)
    return _compiled[key]


def _read(case: Case, launch: Launch, machine: Machine) -> Row:
    """What the machine code says by itself."""
    code, rates = machine.code, machine.chip.rates
    loops = product_loops(code.kernel)
    loop = loops[0] if loops else moving_loop(code.kernel)
    body, everything = code.kernel.body(loop), code.kernel.body(None)
    return {
        "case": case.name,
        "kernel": case.kernel,
        "configuration": launch.config,
        "registers": code.registers,
        "spilled": code.spilled,
        "shared": code.shared,
        "warps": code.warps,
        "blocks": machine.blocks,
        "serialized": code.is_serialized,
        "loads": widths(everything, GLOBAL_LOADS),
        "stores": widths(everything, GLOBAL_STORES),
        "loop": loop is not None,
        "products": dict(products(body)),
        "clocks": clocks(body, code.warps, rates)._asdict(),
    }


def _predicted(case: Case, launch: Launch, machine: Machine) -> Row:
    """What follows from it."""
    if not machine.blocks:
        return {"bound": "does not fit"}
    if case.shape is not None:
        return _attention(case, launch, machine)
    if loops := product_loops(machine.code.kernel):
        found = _multiplied(case, launch, machine, loops[0])
        return found._asdict() | {"ceiling": "tensor"}
    if not case.reads:
        return {}
    loop = moving_loop(machine.code.kernel)
    body, warps = machine.code.kernel.body(loop), machine.code.warps
    bytes_of_pass = model.traffic(body, warps, case.reads, case.writes, _tile_bytes(launch))
    found = model.moved(body, warps, machine.blocks, loop is not None, bytes_of_pass, machine.chip)
    return found._asdict() | {"ceiling": "copy"}


def _multiplied(case: Case, launch: Launch, machine: Machine, loop: Loop) -> model.Prediction:
    body = machine.code.kernel.body(loop)
    return model.multiplied(body, machine.code.warps, machine.blocks, case.flop(launch.config), machine.chip)


def _attention(case: Case, launch: Launch, machine: Machine) -> Row:
    """The loop of whole tiles, or the only one; and the time of the launch, whose programs have more and less work."""
    loops = product_loops(machine.code.kernel)
    first, last = (_multiplied(case, launch, machine, loop) for loop in (loops[0], loops[-1]))
    seen, tiles = _programs(case, launch)
    work = [
        whole * first.took + partial * last.took + AROUND_THE_LOOP / machine.blocks
        for whole, partial in tiles
    ]
    chip = machine.chip
    evenly = balance(work, chip.multiprocessors * machine.blocks)
    seconds = sum(work) / chip.multiprocessors / evenly / (chip.clock * model.LOADED_CLOCK * 1e9)
    config = launch.config
    flop = case.flop(config) / (config["BLOCK_Q"] * config["BLOCK_K"]) * seen.pairs
    rest = {"balance": evenly, "milliseconds": seconds * 1e3, "tflops": flop / seconds / 1e12}
    return first._asdict() | {"ceiling": "tensor"} | rest


def _programs(case: Case, launch: Launch) -> tuple[attention.Visible, list[attention.Tiles]]:
    key = case._replace(call=_same, flop=_same)
    parts = launch.arguments.get("parts", 1)
    return _programs_of(key, launch.config["BLOCK_Q"], launch.config["BLOCK_K"], parts)


def _same(*arguments: Any) -> Any:
    """Stands in for functions, which would tell two equal cases apart."""


@cache
def _programs_of(
    case: Case, block_q: int, block_k: int, parts: int
) -> tuple[attention.Visible, list[attention.Tiles]]:
    config = {"BLOCK_Q": block_q, "BLOCK_K": block_k}
    return attention.visible(case, config), attention.programs(case, config, parts)


def _tile_bytes(launch: Launch) -> float:
    """The bytes of a tile in bf16."""
    sides = launch.arguments | launch.config
    rows, columns = (next(sides[name] for name in names if name in sides) for names in (_ROWS, _COLUMNS))
    return 2.0 * rows * columns


def product_loops(kernel: Kernel) -> list[Loop]:
    """The innermost loops that have products."""
    return [loop for loop in innermost(kernel) if products(kernel.body(loop))]


def moving_loop(kernel: Kernel) -> Loop | None:
    """The innermost loop that moves most of global memory; None: no loop moves any."""
    moving = {loop: _moved_bits(kernel.body(loop)) for loop in innermost(kernel)}
    return max((loop for loop in moving if moving[loop]), key=lambda loop: moving[loop], default=None)


def innermost(kernel: Kernel) -> list[Loop]:
    """The loops that have no other in them."""
    loops = kernel.loops
    return [loop for loop in loops if not any(loop[0] <= first and last < loop[1] for first, last in loops)]


def _moved_bits(body: list[Instruction]) -> int:
    found = widths(body, (*GLOBAL_LOADS, *GLOBAL_STORES))
    return sum(bits * number for bits, number in found.items())
