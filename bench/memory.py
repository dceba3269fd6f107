"""The memory that a step needs at its peak, beyond what there was before it.

On the CPU the step runs in a process of its own, `python -m bench.memory`, which reads its own pages from Linux: the
largest number resident since `/proc/self/clear_refs` reset it (VmHWM), less those resident before the step (VmRSS).
`resource.getrusage` does not do: its ru_maxrss starts at that of the process that started this one.
"""

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from .cases import Step

CLEAR_REFS, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def on_device(step: Step) -> int:
    """Bytes that a step needs at its peak, by torch's allocator for CUDA."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def on_cpu(make: Callable[[], Step]) -> int | None:
    """Bytes that a step needs in a process of its own, where a picklable function makes it; None outside of Linux."""
    if not CLEAR_REFS.exists():
        return None
    environment = os.environ | {
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        # Freed memory is returned at once; otherwise what `make` freed would be used again, uncounted.
        "MALLOC_MMAP_THRESHOLD_": str(1 << 16),
    }
    done = subprocess.run(
        [sys.executable, "-m", "bench.memory"],
        input=pickle.dumps(make),
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parent.parent,
        env=environment,
        check=True,
        start_new_session=True,  # Ctrl-C reaches this process alone, which then kills the other
    )
    return int(done.stdout)


def measure(step: Step) -> int:
    """Bytes that a step needs at its peak in this process."""
    before = resident("VmRSS")
    CLEAR_REFS.write_text("5", encoding="ascii")
    step()
    return resident("VmHWM") - before


def saved(forward: Callable[[], Tensor], weights: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages that autograd keeps for a backward, those of weights aside."""
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        kept_alive = forward()  # otherwise a freed address could stand for two tensors
    for weight in weights:
        sizes.pop(weight.untyped_storage().data_ptr(), None)
    del kept_alive
    return sum(sizes.values())


def resident(field: str) -> int:
    """Bytes of a field of /proc/self/status, from a line such as `VmHWM:    13552 kB`."""
    lines = STATUS.read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    print(measure(pickle.load(sys.stdin.buffer)()))
