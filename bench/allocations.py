"""What memory calls take beyond what there was before, counted by PyTorch's CPU allocator, allocation by allocation.

The allocator reports memory that is freed only if it reported it when it was taken, so that a meter is begun before the
tensors are made.
"""

import gc
from typing import NamedTuple

import torch


class Reading(NamedTuple):
    """The memory of one call in bytes.

    Attributes:
        peak: the most, beyond what there was before the call.
        left: what there was after the call, less what there was before.
    """

    peak: int
    left: int


class Meter:
    """Counts the allocations of the calls that `measured` runs, between `with` and its end."""

    def __init__(self):
        self._profile = torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        )
        self._names = []
        self.readings = {}

    def __enter__(self):
        gc.collect()
        gc.freeze()  # what there was before need not be looked through after each call
        self._profile.__enter__()
        return self

    def measured(self, name, call):
        """Runs a call, whose reading will be in `readings` by its name."""
        self._names.append(name)
        with torch.profiler.record_function(f"measured {len(self._names) - 1}"):
            result = call()
            gc.collect()
        return result

    def __exit__(self, *error):
        self._profile.__exit__(*error)
        gc.unfreeze()
        events = self._profile.profiler.kineto_results.events()
        memory = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        for event in events:
            if event.name().startswith("measured "):
                begin, end = event.start_ns(), event.start_ns() + event.duration_ns()
                name = self._names[int(event.name().split()[1])]
                self.readings[name] = _reading([n for at, n in memory if begin <= at <= end])


def _reading(changes):
    live = peak = 0
    for nbytes in changes:
        live += nbytes
        peak = max(peak, live)
    return Reading(peak, live)


def nbytes(tensors):
    """The bytes of some tensors' memory: what they share once, and the whole of what they are parts of."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
