"""Machine code (SASS) as nvdisasm prints it: instructions, loops, and the widths of accesses to global memory."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

_INSTRUCTION = re.compile(r"^\s+/\*(?P<address>[0-9a-f]+)\*/\s+(?P<text>.*?)\s*;")
_LABEL = re.compile(r"^(?P<label>\.L_\w+):")
_PREDICATE = re.compile(r"^@(?P<predicate>!?U?P[T\d]+)\s+(?P<rest>.*)")
_TARGET = re.compile(r"`\((?P<label>\.L_\w+)\)")
_FUNCTION = re.compile(r"^\.text\.(?P<name>\w+):")
_REGISTER = re.compile(r"(?<![\w.])(?P<kind>U?R|U?P)(?P<number>\d+)(?P<wide>\.64)?")

NEVER = ("!PT", "!UPT")  # predicates under which an instruction is only a place holder


class Instruction(NamedTuple):
    """One instruction.

    Attributes:
        address: where it stands, in bytes from the kernel's start.
        text: without its predicate, such as "LDG.E.128 R4, desc[UR4][R26.64]".
        predicate: such as "!P1", or "".
        target: the place of the instruction that a branch goes to; None for others.
    """

    address: int
    text: str
    predicate: str = ""
    target: int | None = None

    @property
    def operation(self) -> str:
        """The operation with its modifiers, such as "LDG.E.128"."""
        return self.text.split()[0]

    @property
    def opcode(self) -> str:
        """The operation alone, such as "LDG"."""
        return self.operation.partition(".")[0]

    @property
    def operands(self) -> list[str]:
        """What follows the operation."""
        return [operand.strip() for operand in self.text[len(self.operation) :].split(",") if operand.strip()]

    @property
    def registers(self) -> list[list[str]]:
        """The registers and predicates of every operand; those of addresses of 64 bits are two."""
        return [_registers(operand) for operand in self.operands]

    def __str__(self) -> str:
        predicate = f"@{self.predicate} " if self.predicate else ""
        return f"/*{self.address:04x}*/ {predicate}{self.text}"


def _registers(operand: str) -> list[str]:
    found = []
    for match in _REGISTER.finditer(operand):
        first = int(match["number"])
        found += [f"{match['kind']}{first + more}" for more in range(2 if match["wide"] else 1)]
    return found


Loop = tuple[int, int]  # the places of its first and its last instruction


class Kernel(NamedTuple):
    """A kernel's instructions in the order of their addresses."""

    name: str
    instructions: list[Instruction]

    @property
    def loops(self) -> list[Loop]:
        """Every branch backwards with what it repeats, in the order of the branches.

        Behind the kernel's end the assembler puts what is seldom needed, such as repeated tests of barriers. Their
        branches lead back into the kernel and are no loops.
        """
        ends = [place for place, one in enumerate(self.instructions) if one.opcode == "EXIT"]
        return [
            (one.target, place)
            for place, one in enumerate(self.instructions)
            if one.target is not None
            and one.target < place
            and not any(one.target < end < place for end in ends)
        ]

    def body(self, loop: Loop | None) -> list[Instruction]:
        """The instructions of a loop, or all of them; without those that never run."""
        first, last = loop or (0, len(self.instructions) - 1)
        return [one for one in self.instructions[first : last + 1] if one.predicate not in NEVER]


def parse(text: str) -> list[Kernel]:
    """The kernels in what `nvdisasm -c` prints.

    Raises:
        ValueError: there is no kernel in it.
    """
    kernels: list[Kernel] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if function := _FUNCTION.match(line):
            kernels.append(Kernel(function["name"], []))
        elif label := _LABEL.match(line):
            labels[label["label"]] = len(kernels[-1].instructions) if kernels else 0
        elif (instruction := _INSTRUCTION.match(line)) and kernels:
            kernels[-1].instructions.append(_instruction(instruction))
    if not kernels:
        raise ValueError(f"sass: got {text[:80]!r}, expected what `nvdisasm -c` prints of a kernel")
    return [Kernel(name, [_linked(one, labels) for one in listed]) for name, listed in kernels]


def _instruction(match: re.Match[str]) -> Instruction:
    text, predicate = match["text"], ""
    if predicated := _PREDICATE.match(text):
        predicate, text = predicated["predicate"], predicated["rest"]
    return Instruction(int(match["address"], 16), text, predicate)


def _linked(instruction: Instruction, labels: dict[str, int]) -> Instruction:
    """A branch with its target; everything else as it is."""
    label = _TARGET.search(instruction.text) if instruction.opcode == "BRA" else None
    return instruction if label is None else instruction._replace(target=labels.get(label["label"]))


GLOBAL_LOADS = ("LDG", "LDGSTS")
GLOBAL_STORES = ("STG",)


def width(operation: str) -> int:
    """The bits that a thread reads or writes by a load or store, 32 where its operation does not say."""
    sizes = {"256": 256, "128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}
    return next((sizes[part] for part in operation.split(".")[1:] if part in sizes), 32)


def widths(instructions: Iterable[Instruction], opcodes: Sequence[str]) -> dict[int, int]:
    """How many of some instructions access how many bits, the widest first."""
    counted = Counter(width(one.operation) for one in instructions if one.opcode in opcodes)
    return dict(sorted(counted.items(), reverse=True))
