"""SGTM in mixed batches: the rival's steps have one label and the same tokens, both mask alike, checks can fail."""

import copy
import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import sgtm_mixed
from experiment import main
from sgtm_mixed import CONTROL, FORGET_FRACTION, MIXED, ONE_LABEL
from unlearning import labelled
from unlearning.corpus import FORGET, RETAIN, mixture, pack
from unlearning.homogeneous import OneLabelSteps
from unlearning.labelled import one_label_steps, optimizer_of
from unlearning.model import Shape, build, loss_of, routing_plan
from unlearning.training import ROWS

from gradroute.models import route

SHAPE = Shape(vocabulary=300, d_model=16, layers=2, heads=2, d_ff=24, forget_units=8)
STEPS = 10


def documents(number, first):
    """Each of 5 to 9 tokens: the first is the document's own, the others are random."""
    generator = torch.Generator().manual_seed(first)
    lengths = torch.randint(4, 9, (number,), generator=generator).tolist()
    return [
        [first + i, *torch.randint(100, (n,), generator=generator).tolist()] for i, n in enumerate(lengths)
    ]


TRAIN = [documents(60, 100), documents(40, 200)]


@pytest.fixture(autouse=True)
def _short_rows(monkeypatch):
    monkeypatch.setattr(labelled, "LENGTH", 16)


@pytest.fixture(scope="module")
def run():
    return sgtm_mixed.run(0, quick=True)


def test_steps_have_one_label_each_and_the_same_tokens_in_total():
    mixed = pack(mixture(TRAIN, 0.4, seed=0), STEPS * ROWS, 16)
    steps = one_label_steps(TRAIN, 0.4, 0, STEPS)
    assert steps.input_ids.shape == mixed.input_ids.shape == (STEPS * ROWS, 16)
    of_step = steps.route_ids.view(STEPS, -1)
    assert (of_step == of_step[:, :1]).all()
    assert int(of_step[:, 0].sum()) == 4
    assert of_step[:, 0].tolist() not in ([0] * 6 + [1] * 4, [1] * 4 + [0] * 6)  # in random order
    both = mixed.route_ids.view(STEPS, -1).float().mean(1)
    assert ((both > 0) & (both < 1)).all()
    longest = 9
    assert abs(int((steps.route_ids == FORGET).sum() - (mixed.route_ids == FORGET).sum())) <= longest


def test_steps_bring_the_documents_of_the_mixture():
    mixed = pack(mixture(TRAIN, 0.4, seed=0), STEPS * ROWS, 16)
    steps = one_label_steps(TRAIN, 0.4, 0, STEPS)
    for label in (RETAIN, FORGET):
        of_mixed, of_steps = (
            set(data.input_ids[(data.position_ids == 0) & (data.route_ids == label)].tolist())
            for data in (mixed, steps)
        )
        assert len(of_mixed ^ of_steps) <= 1  # the last one of either


def models():
    torch.manual_seed(0)
    ordinary = build(SHAPE)
    routed = route(copy.deepcopy(ordinary), routing_plan(ordinary, SHAPE))
    return routed, OneLabelSteps(ordinary, SHAPE.forget_units)


@pytest.mark.parametrize("label", [RETAIN, FORGET])
def test_the_published_form_has_the_gradients_of_routes_of_one_label(label):
    routed, rival = models()
    batch = pack(((label, ids) for ids in TRAIN[label]), ROWS, 16)
    sgtm_mixed.check_same_gradients(routed, rival, batch)
    torch.testing.assert_close(loss_of(routed, batch, True).detach(), rival.backward(batch))
    mixed = batch._replace(route_ids=1 - batch.route_ids)
    with pytest.raises(AssertionError):
        sgtm_mixed.check_same_gradients(routed, Swapped(rival), mixed)


class Swapped:
    """Takes every label for the other."""

    def __init__(self, rival):
        self.rival, self.model = rival, rival.model

    def backward(self, batch):
        return self.rival.backward(batch._replace(route_ids=1 - batch.route_ids))


def test_a_batch_of_two_labels_is_refused():
    _, rival = models()
    batch = pack(mixture(TRAIN, 0.4, seed=0), ROWS, 16)
    with pytest.raises(ValueError, match="expected one label a step"):
        rival.backward(batch)


def test_a_forget_step_leaves_retain_parameters_where_they_are():
    routed, _ = models()
    optimizer = optimizer_of(routed, 1e-2)
    for label in (RETAIN, FORGET):
        before = {name: weight.clone() for name, weight in routed.named_parameters()}
        batch = pack(((label, ids) for ids in TRAIN[label]), ROWS, 16)
        optimizer.zero_grad()
        loss_of(routed, batch, True).backward()
        optimizer.step()
    kept = slice(SHAPE.d_ff - SHAPE.forget_units)
    for name, weight in routed.named_parameters():
        moved = weight != before[name]
        if name.endswith(("gate_proj.weight", "up_proj.weight")):
            assert not moved[kept].any()
            assert moved[kept.stop :].any()
        elif name.endswith("down_proj.weight"):
            assert not moved[:, kept].any()
            assert moved[:, kept.stop :].any()
        else:
            assert bool(moved.any()) is not ("self_attn" in name or "lm_head" in name), name


@pytest.mark.slow
def test_a_quick_run_has_every_measure(run):
    settings = sgtm_mixed.QUICK
    assert set(run["models"]) == {MIXED, ONE_LABEL, CONTROL}
    for model in run["models"].values():
        assert [point["step"] for point in model["curve"]] == [5, 10]
    forget = round(FORGET_FRACTION * settings.steps) * ROWS * sgtm_mixed.LENGTH
    assert run["tokens"][ONE_LABEL][FORGET] == forget
    assert sum(run["tokens"][MIXED]) == sum(run["tokens"][ONE_LABEL])
    assert abs(run["tokens"][MIXED][FORGET] - forget) <= sgtm_mixed.LENGTH  # a document
    for name, model in run["models"].items():
        finals = model["finals"]
        assert len(finals) == (1 if name == CONTROL else len(sgtm_mixed.LEARNING_RATES))
        assert model["learning_rate"] == sgtm_mixed.LEARNING_RATES[finals.index(min(finals))]
        assert sgtm_mixed.together(model["curve"][-1]) == min(finals)
    assert {len(times) for times in run["milliseconds"].values()} == {settings.rounds}


def made_up(run, mixed_rise=2.0, mixed_damage=0.0, mixed_curve=(4.5, 4.0), mixed_time=100.0):
    """One label a step: losses 5 and 4.2 after 5 and 10 steps, a rise of 2; 100 ms for a step of either label."""
    run = copy.deepcopy(run)
    curves = {MIXED: mixed_curve, ONE_LABEL: (5.0, 4.2), CONTROL: (4.5, 4.0)}
    for name, rise, damage in (
        (MIXED, mixed_rise, mixed_damage),
        (ONE_LABEL, 2.0, 0.0),
        (CONTROL, 0.0, 0.0),
    ):
        model = run["models"][name]
        model["curve"] = [
            {"step": step, "retain": loss, "forget": loss}
            for step, loss in zip((5, 10), curves[name], strict=True)
        ]
        retain = model["curve"][-1]["retain"]
        model["before"] = {"retain": retain + 1, "forget": 4.0}
        model["after"] = {"retain": retain + damage, "forget": 4.0 + rise}
    run["milliseconds"] = {"mixed": [mixed_time], "retain": [100.0], "forget": [100.0], "unrouted": [100.0]}
    return run


@pytest.mark.parametrize(
    ("changed", "failing"),
    [
        ({}, []),
        ({"mixed_rise": 0.4}, [0, 1]),
        ({"mixed_rise": 1.7}, [1]),
        ({"mixed_damage": 0.2}, [2]),
        ({"mixed_curve": (5.0, 4.2)}, [3]),
        ({"mixed_curve": (5.0, 4.3)}, [3]),
        ({"mixed_time": 130.0}, [4]),
    ],
)
def test_checks_can_fail(run, changed, failing):
    checks = sgtm_mixed.checks([made_up(run, **changed)])
    assert [index for index, check in enumerate(checks) if not check.passed] == failing


def test_found_says_in_how_many_seeds_mixed_batches_are_ahead(run):
    behind = {"mixed_curve": (5.0, 4.3)}
    text = sgtm_mixed.found([made_up(run), made_up(run), made_up(run, **behind)])
    assert "end 0.20 nats lower (lower in 2 of 3 seeds)" in text
    assert "is reached in 80 % of its" in text
    text = sgtm_mixed.found([made_up(run, **behind)])
    assert "end 0.10 nats higher (lower in 0 of 1 seeds)" in text


def test_steps_to_a_target_are_on_lines_between_evaluations(run):
    run = made_up(run)
    assert sgtm_mixed.steps_to(run, MIXED, 4.25) == pytest.approx(7.5)
    assert sgtm_mixed.steps_to(run, MIXED, 4.6) == 5
    assert sgtm_mixed.steps_to(run, MIXED, 3.0) == 10
    assert sgtm_mixed.steps_ratio(run) == pytest.approx(0.8)


@pytest.mark.slow
def test_what_a_quick_run_leaves(run, tmp_path, capsys):
    recorded = dataclasses.replace(sgtm_mixed.EXPERIMENT, run=lambda seed, quick: run)
    arguments = ["--out", str(tmp_path), "--seeds", "2"]
    assert main(recorded, None, [*arguments, "--quick"]) == 0
    assert main(recorded, None, arguments) == 1  # ten steps localise nothing
    results = json.loads((tmp_path / "sgtm_mixed.json").read_text())
    assert [row["training"] for row in results["table"]] == [MIXED, ONE_LABEL, CONTROL]
    assert not results["checks"][0]["passed"]
    assert "| mixed batches |" in (tmp_path / "sgtm_mixed.md").read_text()
    assert (tmp_path / "sgtm_mixed.png").read_bytes().startswith(b"\x89PNG")
    assert "FAILS" in capsys.readouterr().out
