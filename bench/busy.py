"""A busy process beside the one that is timed, as the worker of a data loader is."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# One thread of Python and NumPy: it draws tokens, sorts them, and goes through a batch of numbers.
WORK = """
import numpy
draw = numpy.random.default_rng(0)
print("busy", flush=True)
while True:
    sorted(draw.integers(0, 50000, 4096).tolist())
    batch = draw.random((128, 1024), dtype=numpy.float32)
    (batch * batch).sum()
"""
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


@contextmanager
def process() -> Iterator[subprocess.Popen[bytes]]:
    """Within it a process of the same priority keeps one core busy; it has begun when the body does.

    Raises:
        RuntimeError: the process ended by itself.
    """
    command = [sys.executable, "-c", WORK]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | ONE_THREAD) as worker:
        try:
            assert worker.stdout is not None
            worker.stdout.readline()
            yield worker
            if worker.poll() is not None:
                raise RuntimeError(f"the busy process ended by itself, with exit status {worker.returncode}")
        finally:
            worker.kill()
