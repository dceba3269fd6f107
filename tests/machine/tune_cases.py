"""What the tests of `python -m gradroute tune` share: small workloads, and a clock that is told the times."""

import pytest
import torch

from gradroute.machine.records import TUNING, Record
from gradroute.machine.tune import command, measuring, workloads
from gradroute.testing import Sizes

CPU = torch.device("cpu")
WIDTHS = Sizes(d_model=8, d_ff=16, vocabulary=16, heads=4, kv_heads=2, head_dim=8)
SMALL = (
    workloads.Size("small", 4, (1, 4), WIDTHS, is_launch_bound=True),
    workloads.Size("large", 64, (1, 16), WIDTHS),
)
EFFORT = measuring.Effort(True, least_rounds=4, most_rounds=4, seconds=0.0, sets=2)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A cache of the test's own, and workloads of a few tokens."""
    monkeypatch.setenv("GRADROUTE_CACHE", str(tmp_path))
    monkeypatch.setattr(workloads, "SIZES", {"cpu": SMALL, "cuda": SMALL})
    monkeypatch.setattr(command, "QUICK", EFFORT)
    monkeypatch.setattr(command, "WHOLE", EFFORT._replace(is_quick=False))
    return tmp_path


def clock(monkeypatch, seconds):
    """Has trials last as long as `seconds(trial)` says, without running them."""
    monkeypatch.setattr(measuring.Measuring, "seconds", lambda self, trial: seconds(trial))


def backend_of(trial):
    """The backend of a trial that runs a call."""
    return trial.step.args[0]


def findings():
    """What the file of the CPU says, by question."""
    return Record(TUNING, CPU).read()
