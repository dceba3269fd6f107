"""The clocks that a loop takes of each execution unit of a multiprocessor.

Each kind of instruction has a unit. One pass of a block through the loop takes of the unit: its warps × the threads of
a warp × the instructions / the unit's rate.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from .chips import SCHEDULERS, WARP, Architecture
from .sass import Instruction, width

_UNITS = {
    "tensor": "HGMMA HMMA IGMMA QGMMA UTCHMMA UTCQMMA",
    "mufu": "MUFU POPC FLO I2F F2I I2FP F2F BREV",
    "fp32": "FADD FMUL FFMA FADD2 FMUL2 FFMA2 HFMA2 HADD2 HMUL2",
    "imad": "IMAD",
    "alu": "FMNMX FMNMX3 FSETP FSEL FSET F2FP IADD IADD3 LOP LOP3 SHF ISETP IMNMX VIMNMX VIMNMX3 SEL PRMT MOV PLOP3 "
    "IABS LEA VIADD P2R R2P SGXT FCHK CS2R BMSK",
    "memory": "LDS LDSM STS STSM LDG STG LDGSTS SHFL LDL STL LDC ATOM ATOMG ATOMS RED LDTM STTM UBLKCP UTMALDG UTMASTG",
}
_UNIT_OF = {opcode: unit for unit, opcodes in _UNITS.items() for opcode in opcodes.split()}
_WGMMA = re.compile(r"^HGMMA\.(\d+)x(\d+)x(\d+)\.")
_MMA = re.compile(r"^HMMA\.(\d+)\.")

#: The products of one HMMA by its shape's name: rows × columns × depth.
_MMA_PRODUCTS = {"16816": 16 * 8 * 16, "1688": 16 * 8 * 8}


def unit_of(instruction: Instruction) -> str:
    """The unit of an instruction; "other" for those that are only issued (branches, barriers, uniform ones)."""
    return _UNIT_OF.get(instruction.opcode, "other")


class Clocks(NamedTuple):
    """The clocks that one pass of one block through a loop takes of each unit.

    Attributes:
        tensor: products. None where the code does not say how large they are (sm_100).
        shared: shared memory, products that read it included.
        issue: the schedulers.
        alu: integers, comparisons, selections, packing.
        mufu: exponentials and conversions.
        fp32: arithmetic in fp32.
    """

    tensor: float | None
    shared: float
    issue: float
    alu: float
    mufu: float
    fp32: float


def clocks(body: Sequence[Instruction], warps: int, rates: Architecture) -> Clocks:
    """The clocks of a loop's instructions for a block of so many warps."""
    counts = Counter(map(unit_of, body))
    threads = warps * WARP
    products = [flop_of(one) for one in body if unit_of(one) == "tensor"]
    is_known = all(flop is not None for flop in products)
    flop = sum(flop for flop in products if flop is not None)
    return Clocks(
        tensor=flop * warps / rates.tensor if is_known else None,
        shared=sum(shared_bytes(one) for one in body) * warps / rates.shared,
        issue=len(body) * warps / SCHEDULERS,
        alu=counts["alu"] * threads / rates.alu,
        mufu=counts["mufu"] * threads / rates.mufu,
        # IMAD runs beside FFMA, at half of the rate.
        fp32=(counts["fp32"] + 2 * counts["imad"]) * threads / rates.fp32,
    )


def flop_of(instruction: Instruction) -> float | None:
    """The FLOP of one product, for each warp that takes part; None where a descriptor in a register has the size."""
    if shape := _WGMMA.match(instruction.text):
        rows, columns, depth = map(int, shape.groups())
        return 2.0 * rows * columns * depth / SCHEDULERS  # four warps issue it together
    if shape := _MMA.match(instruction.text):
        return 2.0 * _MMA_PRODUCTS[shape[1]]
    return None


def shared_bytes(instruction: Instruction) -> float:
    """The bytes of shared memory that one warp's instruction reads or writes, in bf16 where it is a product."""
    if shape := _WGMMA.match(instruction.text):
        rows, columns, depth = map(int, shape.groups())
        from_shared = instruction.operands[1].startswith("gdesc")
        return 2.0 * depth * (columns + (rows if from_shared else 0)) / SCHEDULERS
    if instruction.opcode in ("LDSM", "STSM"):
        matrices = re.search(r"\.(?:M88\.|MT88\.)?([124])(?:\.|$)", instruction.operation)
        return 128.0 * int(matrices[1] if matrices else 1)
    if instruction.opcode in ("LDS", "STS", "LDGSTS"):
        return WARP * width(instruction.operation) / 8
    return 0.0


def products(body: Sequence[Instruction]) -> Counter[str]:
    """How many products there are, by instruction: wgmma (HGMMA), mma (HMMA), tcgen05 (UTCHMMA)."""
    names = {"HGMMA": "wgmma", "HMMA": "mma", "UTCHMMA": "tcgen05"}
    return Counter(names[one.opcode] for one in body if one.opcode in names)
