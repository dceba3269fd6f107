"""The cases of the tests that iterate the table of ops: every op × backend, and covering samples of the other axes."""

import itertools
import random

import pytest
import torch

from gradroute import backends, testing
from gradroute.backends import native

#: Every op on every backend that implements it.
OP_BACKENDS = [(op, backend) for op, row in backends.OPS.items() for backend in row]

#: The pairs whose op is an autograd.Function of its own: all but the reference's.
FUNCTION_BACKENDS = [(op, backend) for op, backend in OP_BACKENDS if backend != "reference"]

TOKENS = (0, 1, 37, 130, (2, 19))

every_op_backend = pytest.mark.parametrize(
    ("op", "backend"), OP_BACKENDS, ids=["-".join(pair) for pair in OP_BACKENDS]
)
every_function_backend = pytest.mark.parametrize(
    ("op", "backend"), FUNCTION_BACKENDS, ids=["-".join(pair) for pair in FUNCTION_BACKENDS]
)

#: The cases of every_function_backend for a test that takes seconds: one op a backend is in the first tier of tests.
every_function_backend_in_tiers = pytest.mark.parametrize(
    ("op", "backend"),
    [
        pytest.param(
            op, backend, marks=[] if op == "routed_linear" else pytest.mark.slow, id=f"{op}-{backend}"
        )
        for op, backend in FUNCTION_BACKENDS
    ],
)


def tiered(values):
    """Values of a parameter whose cases take seconds: all but the first are in the second tier of tests."""
    first, *others = values
    return [first, *(pytest.param(value, marks=pytest.mark.slow) for value in others)]


def dtypes(backend):
    """The dtypes that a backend takes, see design: fp64 on the reference, torch and cpu only."""
    narrow = (torch.float32, torch.bfloat16, torch.float16)
    return (*narrow, torch.float64) if backend in ("reference", "torch", "cpu") else narrow


def require(backend, device):
    """Skips what this machine cannot do: with a GPU Triton's interpreter is off; the native module may be missing.

    A backend for this device runs, or fails with its reason; one for another device is skipped where it cannot run.
    """
    if backend is None:
        return  # the automatic choice takes one that runs
    if backend == "cpu" and native.module is None:
        pytest.skip(native.load_error)
    home = backends._BACKENDS[backend].home
    if home in (None, device.type):
        return
    reason = backends.unavailable_backends(device=device).get(backend)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")


def make(op, **options):
    """`testing.sample`; attention takes a batch of one sequence where a number of tokens is asked for."""
    tokens = options.pop("tokens", 37)
    if op == "routed_attention" and isinstance(tokens, int):
        tokens = (1, tokens)
    return testing.sample(op, tokens=tokens, **options)


def covering(axes, strength=2, seed=0):
    """Few cases, dicts of one value per axis, in which every `strength` values of different axes meet."""
    names, generator = list(axes), random.Random(seed)
    missing = {
        pair
        for chosen in itertools.combinations(names, strength)
        for pair in itertools.product(
            *([(name, index) for index in range(len(axes[name]))] for name in chosen)
        )
    }
    while missing:
        yield {name: axes[name][index] for name, index in _row(axes, names, strength, missing, generator)}


def _row(axes, names, strength, missing, generator):
    """The next case: it starts from a missing combination and grows by the value that completes most others."""
    row = list(min(missing))
    for name in generator.sample(names, len(names)):
        if any(name == taken for taken, _ in row):
            continue
        options = [(name, index) for index in range(len(axes[name]))]
        generator.shuffle(options)
        row.append(
            max(options, key=lambda option: len(_combinations([*row, option], names, strength) & missing))
        )
    missing -= _combinations(row, names, strength)
    return row


def _combinations(row, names, strength):
    ordered = sorted(row, key=lambda value: names.index(value[0]))
    return set(itertools.combinations(ordered, strength))
