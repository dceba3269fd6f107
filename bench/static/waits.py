"""How long one block waits for memory in a pass through its loop, and how many bytes it has in flight.

A block's warps run through the same instructions side by side. Each instruction is issued in order, when what it reads
is there; a load's value comes a latency later. What other blocks do on the multiprocessor meanwhile is left out here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from .chips import SCHEDULERS, WARP
from .pipes import unit_of
from .sass import GLOBAL_LOADS, Instruction, width

# Clocks from an instruction to its result: dependent arithmetic, shared memory and shuffles, exponentials (Luo et al.,
# as in chips.py: 29 clocks for shared memory).
ARITHMETIC, SHARED, MUFU = 4, 29, 18

_SLOW = ("LDS", "LDSM", "SHFL")
_MULTIPLES = {"32": 1, "64": 2, "128": 4, "256": 8}
# Passes through a loop until it is in a steady state, and those after it whose mean is taken: several, since a loop may
# wait in every other pass alone.
WARM, TIMED = 3, 6


class Waits(NamedTuple):
    """One block's pass through its loop.

    Attributes:
        clocks: how long it takes alone.
        in_flight: the most bytes that it has loads under way for.
    """

    clocks: float
    in_flight: int


class _Block:
    """The state of a block that runs through its instructions."""

    def __init__(self, warps: int, latency: float, product: float) -> None:
        self.warps = warps
        self.latency = latency
        self.product = product
        self.now = 0.0
        self.ready: dict[str, float] = {}  # when the value of a register is there
        self.loads: dict[
            str, tuple[float, int]
        ] = {}  # by the first register of a load under way: when, bytes
        self.groups: deque[tuple[float, int]] = deque()  # of asynchronous copies: when, bytes
        self.open_bytes = 0  # of the group that is not closed yet
        self.most = 0

    def pass_through(self, body: Sequence[Instruction]) -> None:
        """Issues all instructions once."""
        for instruction in body:
            self.run(instruction)

    def run(self, instruction: Instruction) -> None:
        """Issues one instruction, after it has waited for what it reads."""
        results, sources = _results(instruction), _sources(instruction)
        for register in sources:
            self.now = max(self.now, self.ready.get(register, 0.0))
        is_product = unit_of(instruction) == "tensor"
        self.now += self.product if is_product else self.warps / SCHEDULERS * _issue_slots(instruction)
        if instruction.opcode == "DEPBAR":
            self._wait_for_copies(instruction)
        self._retire()
        end = self.now + self._delay(instruction)
        for register in results:
            self.ready[register] = end
        self._account(instruction, results, end)

    def _delay(self, instruction: Instruction) -> float:
        if instruction.opcode in GLOBAL_LOADS:
            return self.latency
        if instruction.opcode in _SLOW:
            return SHARED
        return MUFU if unit_of(instruction) == "mufu" else ARITHMETIC

    def _account(self, instruction: Instruction, results: Sequence[str], end: float) -> None:
        """Adds a load to what is in flight."""
        size = width(instruction.operation) // 8 * WARP * self.warps
        if instruction.opcode == "LDG" and results:
            self.loads[results[0]] = (end, size)
        elif instruction.opcode == "LDGSTS":
            self.open_bytes += size
        elif instruction.opcode == "LDGDEPBAR":
            self.groups.append((self.now + self.latency, self.open_bytes))
            self.open_bytes = 0
        flying = sum(size for _, size in self.loads.values()) + sum(size for _, size in self.groups)
        self.most = max(self.most, flying + self.open_bytes)

    def _wait_for_copies(self, instruction: Instruction) -> None:
        """Waits until only so many groups of copies are under way as the instruction says."""
        allowed = int(instruction.operands[-1], 16)
        while len(self.groups) > allowed:
            self.now = max(self.now, self.groups.popleft()[0])

    def _retire(self) -> None:
        """Forgets the loads whose values have come."""
        self.loads = {first: load for first, load in self.loads.items() if load[0] > self.now}
        while self.groups and self.groups[0][0] <= self.now:
            self.groups.popleft()


def waits(
    body: Sequence[Instruction], warps: int, latency: float, repeats: bool, product: float = 0.0
) -> Waits:
    """One block's pass through the instructions of a loop (`repeats`), or of a whole kernel.

    Args:
        body: the instructions.
        warps: of a block.
        latency: clocks from a load to its value.
        repeats: whether they are a loop.
        product: clocks that the block's warps take together for one instruction of a product.
    """
    block = _Block(warps, latency, product)
    if not repeats:
        block.pass_through(body)
        return Waits(
            max([block.now, *block.ready.values()]), block.most
        )  # it leaves when its last load has come
    for _ in range(WARM):
        block.pass_through(body)
    began = block.now
    for _ in range(TIMED):
        block.pass_through(body)
    return Waits((block.now - began) / TIMED, block.most)


@cache
def _issue_slots(instruction: Instruction) -> int:
    """The clocks that a warp's instruction keeps its scheduler's unit busy."""
    return {"alu": 2, "imad": 2, "mufu": 8}.get(unit_of(instruction), 1)


@cache
def _results(instruction: Instruction) -> list[str]:
    """The registers that an instruction writes."""
    registers = instruction.registers
    if not registers or instruction.opcode in ("STG", "STS", "STSM", "LDGSTS", "BAR", "BRA", "DEPBAR"):
        return []
    first = registers[0]
    if not first or not first[0].startswith("R"):
        return first
    number = int(first[0][1:])
    results = [f"R{number + more}" for more in range(_result_registers(instruction))]
    if len(registers) > 1 and instruction.operands[1].startswith("P"):  # a carry
        results += registers[1]
    return results


def _result_registers(instruction: Instruction) -> int:
    parts = instruction.operation.split(".")
    if instruction.opcode in ("LDG", "LDS"):
        return next((_MULTIPLES[part] for part in parts[1:] if part in _MULTIPLES), 1)
    if instruction.opcode == "LDSM":
        return 4
    if instruction.opcode == "IMAD" and "WIDE" in parts:
        return 2
    return 2 if "64" in parts or instruction.opcode == "CS2R" else 1


@cache
def _sources(instruction: Instruction) -> list[str]:
    """The registers that an instruction reads, its predicate among them."""
    registers = instruction.registers
    skipped = 0 if instruction.opcode in ("STG", "STS", "STSM", "LDGSTS", "BAR", "BRA") else 1
    read = [register for operand in registers[skipped:] for register in operand]
    if instruction.opcode == "STG":  # the value has as many registers as the access is wide
        read += _stored(instruction)
    if instruction.predicate:
        read.append(instruction.predicate.removeprefix("!"))
    return read


def _stored(instruction: Instruction) -> list[str]:
    value = instruction.registers[-1]
    if not value:
        return []
    first = int(value[0].lstrip("UR"))
    return [f"R{first + more}" for more in range(max(1, width(instruction.operation) // 32))]
