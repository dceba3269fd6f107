"""How many blocks of a kernel a multiprocessor holds at a time, as CUDA's occupancy calculator counts them."""

from __future__ import annotations

from .chips import SCHEDULERS, WARP, Architecture


def blocks_per_multiprocessor(rates: Architecture, warps: int, registers: int, shared: int) -> int:
    """The number of resident blocks; 0 where not even one fits.

    Args:
        rates: the limits of a multiprocessor.
        warps: of a block.
        registers: of a thread.
        shared: bytes of shared memory of a block.
    """
    if shared > rates.shared_of_block:
        return 0
    of_warp = _rounded_up(registers * WARP, rates.register_unit)
    resident = rates.registers // SCHEDULERS // of_warp * SCHEDULERS
    by_shared = rates.shared_memory // _rounded_up(shared + rates.shared_reserved, 128)
    return min(rates.blocks, rates.warps // warps, resident // warps, by_shared)


def _rounded_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit
