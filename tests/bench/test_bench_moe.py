"""The suite `moe` on a small mixture: every variant is checked and timed, and a wrong one is not."""

import pytest
import torch

pytest.importorskip("transformers")

from bench import model_cases, moe, runner, suites
from bench.cases import STEP
from bench.ops import Options

CPU = torch.device("cpu")
SHAPE = model_cases.Shape(
    batch=2, length=64, layers=2, d_model=32, d_ff=64, heads=4, kv_heads=2, vocabulary=80, units=8
)

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _small(monkeypatch, quick_bench):
    monkeypatch.setitem(model_cases.SHAPES, "cpu", SHAPE)


def test_every_variant_is_checked_and_timed(tmp_path):
    (plan,) = suites.suite_plans("moe", Options(CPU))
    done = runner.run("moe", [plan], 2, CPU, tmp_path)
    assert done.failures() == []
    assert set(done.cases[plan.name]["variants"]) == {moe.BASE, moe.UNITS, moe.WHOLE}
    assert all(done.figure(plan.name, name, STEP) for name in (moe.BASE, moe.UNITS, moe.WHOLE))


def test_what_is_wrong_is_not_timed(monkeypatch, tmp_path):
    right = moe.make_losses

    def wrong(model, shape):
        losses = right(model, shape)
        return losses | {moe.WHOLE: losses[moe.UNITS]}

    monkeypatch.setattr(moe, "make_losses", wrong)
    (plan,) = suites.suite_plans("moe", Options(CPU))
    done = runner.run("moe", [plan], 1, CPU, tmp_path)
    (failure,) = done.failures()
    assert "the gradient of confined tokens is not where it should be" in str(failure)
