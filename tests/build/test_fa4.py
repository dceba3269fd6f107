"""What FlashAttention-4's backward is compiled with; in the environment of `make test-fa4`, which has the library."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import emulated_fa4
import pytest
import torch

from gradroute import Routes
from gradroute.backends.fa4 import refusals
from gradroute.backends.fa4.operands import Operands
from gradroute.backends.fa4.passes import Pass
from gradroute.primitives.attention_pattern import Pattern
from gradroute.tables import Table

ROOT = Path(__file__).parents[2]

# The library's own, when it is imported: it names things of CUTLASS where they were before.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

needs_the_library = pytest.mark.skipif(
    refusals.why_not_installed() is not None, reason=f"{refusals.why_not_installed()}: make test-fa4"
)


def test_the_releases_are_the_same_everywhere():
    pinned = dict(re.findall(r'"?([\w-]+)==([\w.]+)', (ROOT / "tests/fa4.txt").read_text()))
    extra = re.search(r"^fa4 = \[(.*)\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert dict(re.findall(r'"([\w-]+)==([\w.]+)"', extra)) == refusals.VERSIONS
    assert refusals.VERSIONS.items() <= pinned.items()


# The most bytes of stack that a thread has in any call of a kind (all axes of tests/offline_fa4.py combined), as these
# releases compile the kernels: where more are needed, more is spilled.
MOST_STACK = {
    "sm_90": {
        "both, binary": 144,
        "both, many routes": 72,
        "values, binary": 48,
        "both, fractional": 480,
        "scores": 424,
        "values, positive": 832,
    },
    "sm_100": {
        "both, binary": 360,
        "both, many routes": 144,
        "values, binary": 248,
        "both, fractional": 1464,
        "scores": 88,
        "values, positive": 1408,
    },
}


@needs_the_library
@pytest.mark.timeout(900)
@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.parametrize("capability", refusals.CAPABILITIES, ids=str)
def test_every_kind_of_pass_compiles(capability, half):
    architecture = f"sm_{capability[0]}{capability[1]}"
    command = [sys.executable, ROOT / "tests/offline_fa4.py", architecture, str(half), "2"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(reports) > 6
    assert all(0 < report["registers"] <= 255 for report in reports)
    most = MOST_STACK[architecture]
    spilling = [report for report in reports if report["stack"] > most[report["kind"]]]
    assert not spilling


BATCH, LENGTH, ROUTES = 2, 12, 4
EDGES = Table(torch.tensor([[1, 0, 0.5, 1], [0, 1, 0, 2.0], [0, 3, 1, 0], [1, 0, 0, 1]]))
MANY = Table((torch.arange(40)[:, None] + torch.arange(40)) % 3)


def operands_of(one, padding=False, **pattern):
    num_routes = (one.value or one.score).num_routes
    routes = Routes.of(torch.arange(BATCH * LENGTH).view(BATCH, LENGTH) * 7 % num_routes, num_routes)
    key_mask = None
    if padding:
        key_mask = torch.ones(BATCH, LENGTH, dtype=torch.bool)
        key_mask[0, 3] = key_mask[1, :2] = False
    options = {"causal": True, "window": None, "scale": 1.0, "key_mask": key_mask} | pattern
    return Operands.of(one, routes, (BATCH, LENGTH), Pattern(**options))


@needs_the_library
@pytest.mark.parametrize("table", [None, EDGES, MANY], ids=["no edges", "int32", "int64"])
@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("pattern", [{}, {"window": 4}, {"causal": False}], ids=str)
def test_masks(pattern, padding, table):
    """The device's functions for masks say what the emulation's say, at every position."""
    import fa4_on_the_cpu

    one = Pass(table, EDGES if table is None else table)
    operands = operands_of(one, padding, **pattern)
    mask = fa4_on_the_cpu.device.MASKS[operands.first is None, operands.bits is not None]
    zeros = torch.zeros(BATCH, LENGTH, LENGTH)
    actual = fa4_on_the_cpu.evaluated(fa4_on_the_cpu.every_mask, mask, operands, zeros)
    expected = [
        emulated_fa4.mask_of(batch, *POSITIONS, operands).expand(LENGTH, LENGTH) for batch in range(BATCH)
    ]
    assert torch.equal(actual, torch.stack(expected).float())


POSITIONS = torch.arange(LENGTH)[:, None], torch.arange(LENGTH)[None, :]


@needs_the_library
@pytest.mark.parametrize("padding", [False, True])
def test_changes_of_scores_and_of_their_gradients(padding):
    import fa4_on_the_cpu

    operands = operands_of(Pass(EDGES, Table(EDGES.weights**2)), padding)
    given = torch.randn(BATCH, LENGTH, LENGTH)
    device = fa4_on_the_cpu.device
    bias, factor = (
        torch.stack([emulated_fa4.by_routes(table, batch, *POSITIONS, operands) for batch in range(BATCH)])
        for table in (operands.bias, operands.factor)
    )
    biased = fa4_on_the_cpu.evaluated(fa4_on_the_cpu.every_score, device.biased, operands, given)
    assert torch.equal(biased, given + bias)
    given[0, 0, 0] = given[1, 2] = torch.nan
    multiplied = fa4_on_the_cpu.evaluated(
        fa4_on_the_cpu.every_gradient, device.gradient_by_factor, operands, given
    )
    assert (factor[given.isnan()] == 0).any()
    torch.testing.assert_close(
        multiplied, torch.where(factor == 0, 0, given * factor), rtol=0, atol=0, equal_nan=True
    )
    for every, function in (
        (fa4_on_the_cpu.every_score, device.unbiased),
        (fa4_on_the_cpu.every_gradient, device.same_gradient),
    ):
        same = fa4_on_the_cpu.evaluated(every, function, operands, biased)
        assert torch.equal(same, biased)
