"""The suite `optim`: every variant is checked before it is timed, and what moves where it should not is not timed."""

import pytest
import torch

from bench import model_cases, optim, runner, suites
from bench.cases import STEP
from bench.ops import Options

pytest.importorskip("transformers")

CPU = torch.device("cpu")
SHAPE = model_cases.Shape(
    batch=2,
    length=16,
    layers=2,
    d_model=32,
    d_ff=48,
    heads=4,
    kv_heads=2,
    vocabulary=40,
    units=8,
    forget_share=0.25,
)


@pytest.fixture(autouse=True)
def _small(monkeypatch, quick_bench):
    monkeypatch.setitem(model_cases.SHAPES, "cpu", SHAPE)
    monkeypatch.setattr(optim, "PRETRAINED", SHAPE)


@pytest.mark.slow
def test_every_variant_is_checked_and_timed(tmp_path):
    plans = suites.suite_plans("optim", Options(CPU))
    done = runner.run("optim", plans, 2, CPU, tmp_path)
    assert done.failures() == []
    for plan in plans:
        case = done.cases[plan.name]
        assert set(case["variants"]) == {optim.OWN, optim.FUSED, *optim.RIVALS}
        assert case["variants"][optim.OWN]["largest_error"] == 0
        for name in (optim.FUSED, *optim.RIVALS):
            assert case["variants"][name]["largest_error"] < optim.TOLERANCE
        assert all(done.figure(plan.name, name, STEP) for name in case["variants"])
    # The forget part of 2 layers: 2 of 4 heads of 8, 8 of 48 hidden units; and tokens that no row has.
    untouched = [done.cases[plan.name]["facts"]["untouched"] for plan in plans]
    confined = 2 * 32 * (2 * 16 + 2 * 8 + 3 * 8)
    assert len(untouched) == 4
    assert untouched[::2] == [0, 0]
    for retain in untouched[1::2]:
        assert retain >= confined
        assert (retain - confined) % 32 == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_decay": 0.0}, "got other bits than torch's loop"),
        ({"block_dim": None}, "what no gradient touches has moved"),
    ],
)
def test_what_is_wrong_is_not_timed(monkeypatch, tmp_path, options, message):
    def wrong(weights):
        groups = [{"params": [p], **options} for p in weights.parameters()]
        return optim.RoutedAdamW(groups, lr=1e-5, weight_decay=0.1)

    monkeypatch.setitem(optim.OPTIMIZERS, optim.OWN, wrong)
    plan = optim.plans(CPU)[1]
    done = runner.run("optim", [plan], 1, CPU, tmp_path)
    assert any(message in failure for failure in done.failures())
    assert done.figure(plan.name, optim.OWN, STEP) is None
    assert done.figure(plan.name, optim.BASE, STEP)
