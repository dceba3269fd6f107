"""From a kernel's machine code to its bound and its predicted share of a ceiling.

Two models, for two kinds of kernels:

- A kernel that moves matrices (`moved`): Little's law. A block waits for what it loads; the multiprocessor's blocks
  wait side by side; the longer memory's queue is, the longer each waits. The share of the bandwidth at which both fit
  is the prediction.
- A loop of products (`multiplied`): lock-step. Triton's compiler waits for each product that later instructions use,
  so the tensor cores and everything else take turns: a tile takes the sum of both, times LOCK_STEP. Other blocks of
  the multiprocessor may fill the gaps, down to the clocks of the busiest unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .chips import Chip
from .pipes import Clocks, clocks, products
from .sass import GLOBAL_STORES, Instruction, width
from .waits import waits

#: By how much a tile takes longer than products and the rest one after the other; from kernels whose speed is
#: published, see calibration.py.
LOCK_STEP = 1.20

#: The share of the stated bandwidth that a copy reaches: 4.3 of 4.8 TB/s, measured on an H200.
COPY = 0.9

#: The share of the stated clock that is left under a load of products.
LOADED_CLOCK = 0.9

STEPS = 16  # of halving, to find the share at which latency and bandwidth fit


class Prediction(NamedTuple):
    """What is predicted of a loop.

    Attributes:
        bound: what limits it.
        share: of a copy's bandwidth, or of the tensor cores' peak while the loop runs.
        took: clocks of a multiprocessor for one pass of one block.
        in_flight: bytes that a multiprocessor has loads under way for, at most.
    """

    bound: str
    share: float
    took: float
    in_flight: int


def moved(
    body: Sequence[Instruction], warps: int, blocks: int, repeats: bool, traffic: float, chip: Chip
) -> Prediction:
    """The prediction for a kernel that moves matrices.

    Args:
        body: the instructions of its loop, or all where it has none.
        warps: of a block.
        blocks: of a multiprocessor.
        repeats: whether the body is a loop.
        traffic: bytes that one block moves from and to memory in a pass.
        chip: the GPU.
    """
    units = clocks(body, warps, chip.rates)
    busiest, most = _busiest(units)
    low, high = 0.0, 1.0
    for _ in range(STEPS):
        share = (low + high) / 2
        latency = chip.rates.latency * (
            1 + share / (2 * (1 - share))
        )  # the mean wait in a queue, fixed service
        alone = waits(body, warps, latency, repeats)
        took = max(alone.clocks / blocks, most)
        low, high = (share, high) if traffic / took / chip.bytes_per_clock > share else (low, share)
    bound = busiest if took == most else "latency"
    bound = "bandwidth" if low >= COPY * COPY else bound
    return Prediction(bound, min(1.0, low / COPY), took, alone.in_flight * blocks)


def multiplied(body: Sequence[Instruction], warps: int, blocks: int, flop: float, chip: Chip) -> Prediction:
    """The prediction for a loop of products of so many FLOP a pass; arguments as for `moved`."""
    rates = chip.rates
    units = clocks(body, warps, rates)
    if units.tensor is None:
        units = units._replace(tensor=flop / rates.tensor)
    number = sum(products(body).values())
    product = max(units.tensor, units.shared) / number
    waiting, ready = (waits(body, warps, latency, True, product) for latency in (rates.l2_latency, 0))
    stalled = waiting.clocks - ready.clocks
    first, second = max(units.tensor, units.shared), max(units.issue, units.alu, units.mufu, units.fp32)
    alone = LOCK_STEP * (first + second) + stalled
    busiest, most = _busiest(units)
    took = max(alone / blocks, most)
    bound = busiest if took == most else f"{busiest}, in turn"
    if stalled > LOCK_STEP * (first + second):
        bound = "latency"
    return Prediction(bound, flop / rates.tensor / took, took, waiting.in_flight * blocks)


def _busiest(units: Clocks) -> tuple[str, float]:
    """The unit that a pass keeps busy longest, and its clocks."""
    names = {
        "tensor": "tensor cores",
        "shared": "shared memory",
        "alu": "ALU",
        "mufu": "MUFU",
        "fp32": "FP32",
    }
    found = {names.get(name, name): value for name, value in units._asdict().items() if value is not None}
    busiest = max(found, key=lambda name: found[name])
    return busiest, found[busiest]


def traffic(body: Sequence[Instruction], warps: int, reads: int, writes: int, tile_bytes: float) -> float:
    """Bytes that a block moves from and to memory in a pass: tables and routes come from a cache and do not count.

    Args:
        body: the instructions of a pass.
        warps: of a block.
        reads: how many matrices are read.
        writes: how many are written: their stores say how large a pass is.
        tile_bytes: the bytes of a tile of one matrix, which is a pass where nothing is written.
    """
    if not writes:
        return tile_bytes * reads
    stored = sum(width(one.operation) / 8 * 32 * warps for one in body if one.opcode in GLOBAL_STORES)
    return stored * (reads + writes) / writes
