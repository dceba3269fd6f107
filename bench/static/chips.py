"""The rates of the GPUs that predictions are made for, each with its source.

Rates per clock and multiprocessor are those of the table "Throughput of Native Arithmetic Instructions" in NVIDIA's
CUDA C++ Programming Guide; limits of a multiprocessor are those of its table "Technical Specifications per Compute
Capability". Latencies are measured by Luo et al., "Benchmarking and Dissecting the Nvidia Hopper GPU Architecture via
Microbenchmarking" (arXiv 2402.13499), without load: 466 clocks from global memory and 262 from the L2 cache on an A100,
479 and 263 on an H100.
"""

from __future__ import annotations

from typing import NamedTuple

KIB = 1024
WARP = 32  # threads
SCHEDULERS = 4  # of a multiprocessor, each of which issues one instruction of a warp a clock


class Architecture(NamedTuple):
    """What the multiprocessors of one compute capability have, by clock where a rate is meant.

    Attributes:
        tensor: FLOP of bf16 products with sums in fp32.
        fp32: additions, products or fused ones in fp32.
        alu: integer, logical, compare, select and pack instructions.
        mufu: exponentials, square roots and reciprocals; conversions of one value run there too.
        shared: bytes read from or written to shared memory.
        latency: clocks from a load to its value, from global memory without load.
        l2_latency: the same from the L2 cache.
        warps: the most resident warps.
        blocks: the most resident blocks.
        registers: 32-bit registers.
        register_unit: how many registers a warp is given at a time.
        shared_memory: bytes of shared memory.
        shared_of_block: the most bytes that a block may use.
        shared_reserved: bytes that the system keeps of each block.
    """

    tensor: int
    fp32: int
    alu: int
    mufu: int
    shared: int
    latency: int
    l2_latency: int
    warps: int = 64
    blocks: int = 32
    registers: int = 65536
    register_unit: int = 256
    shared_memory: int = 228 * KIB
    shared_of_block: int = 227 * KIB
    shared_reserved: int = KIB


class Chip(NamedTuple):
    """A GPU.

    Attributes:
        name: what NVIDIA calls it.
        architecture: compute capability times ten.
        multiprocessors: how many it has.
        clock: GHz, at which its peak is stated.
        bandwidth: GB/s of its memory, as stated.
        source: where multiprocessors, clock, peak and bandwidth are stated.
    """

    name: str
    architecture: int
    multiprocessors: int
    clock: float
    bandwidth: float
    source: str

    @property
    def rates(self) -> Architecture:
        """The rates of its multiprocessors."""
        return ARCHITECTURES[self.architecture]

    @property
    def peak(self) -> float:
        """TFLOP/s of dense bf16 products."""
        return self.multiprocessors * self.rates.tensor * self.clock / 1e3

    @property
    def bytes_per_clock(self) -> float:
        """Bytes of memory traffic that the stated bandwidth leaves to a multiprocessor in each clock."""
        return self.bandwidth / self.clock / self.multiprocessors


ARCHITECTURES = {
    80: Architecture(
        tensor=2048,
        fp32=64,
        alu=64,
        mufu=16,
        shared=128,
        latency=466,
        l2_latency=262,
        shared_memory=164 * KIB,
        shared_of_block=163 * KIB,
    ),
    90: Architecture(tensor=4096, fp32=128, alu=64, mufu=16, shared=128, latency=479, l2_latency=263),
    # No latency of a B200 is published by the same method: that of an H100 stands in.
    100: Architecture(tensor=8192, fp32=128, alu=64, mufu=16, shared=128, latency=479, l2_latency=263),
}

CHIPS = {
    "A100": Chip(
        "A100 SXM 80 GB",
        80,
        108,
        1.41,
        2039,
        "NVIDIA A100 Tensor Core GPU Architecture (whitepaper): 108 multiprocessors, 1410 MHz, 312 TFLOP/s; "
        "A100 80 GB datasheet: 2039 GB/s",
    ),
    "H100": Chip(
        "H100 SXM",
        90,
        132,
        1.83,
        3350,
        "NVIDIA H100 Tensor Core GPU Architecture (whitepaper): 132 multiprocessors, 989.4 TFLOP/s at 1830 MHz; "
        "H100 datasheet: 3.35 TB/s",
    ),
    "H200": Chip(
        "H200 SXM",
        90,
        132,
        1.83,
        4800,
        "NVIDIA H200 Tensor Core GPU (datasheet): 989 TFLOP/s, 4.8 TB/s; the multiprocessors and clock of the H100",
    ),
    "B200": Chip(
        "B200",
        100,
        148,
        1.85,
        8000,
        "NVIDIA DGX B200 (datasheet), an eighth of it: 2.25 PFLOP/s dense in bf16, 8 TB/s; 148 multiprocessors, "
        "which gives 1.85 GHz at 8192 FLOP a clock",
    ),
}

#: The chip that stands for an architecture where one is needed.
CHIP_OF = {80: "A100", 90: "H200", 100: "B200"}
