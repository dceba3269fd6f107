"""The suites `model` and `end-to-end`: variants share weights, compute what they should, and only then are timed."""

import importlib.util
import sys
import types

import pytest
import torch

from bench import command, end_to_end, model, model_cases, model_check, runner
from bench.cases import STEP
from bench.results import RELATIVE

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
OURS = ["routed, hidden units", "routed, SGTM"]
RIVALS = ["unrouted", "detach, hidden units", "detach, SGTM"]


@pytest.fixture(autouse=True)
def _small(monkeypatch, quick_bench):
    monkeypatch.setitem(model_cases.SHAPES, "cpu", SHAPE)
    monkeypatch.setattr(model_cases, "LIGER_MISSING", "liger_kernel is not installed")


@pytest.mark.slow
def test_every_variant_is_checked_and_timed(tmp_path):
    (plan,) = model.plans(CPU)
    done = runner.run("model", [plan], 2, CPU, tmp_path)
    assert done.failures() == []
    case = done.cases[plan.name]
    assert set(case["variants"]) == {*OURS, *RIVALS, "Liger"}
    assert case["variants"]["Liger"] == {"is_rival": True, "missing": "liger_kernel is not installed"}
    # AdamW keeps two moments, and the step of each of 21 parameters.
    held = 3 * 4 * case["facts"]["parameters"] + 4 * 21
    for name in OURS + RIVALS:
        assert case["variants"][name]["is_rival"] == (name in RIVALS)
        assert 0 < case["variants"][name]["budget_share"] <= 1
        speed = done.figure(plan.name, name, STEP)
        assert done.figure(plan.name, name, STEP, "tokens").p50 == pytest.approx(32e3 / speed.p50)
        assert done.figure(plan.name, name, STEP, "memory").p50 == pytest.approx((held + 10**6) / 1e6)
        assert all(done.figure(plan.name, name, STEP, RELATIVE + rival) for rival in RIVALS)
    hidden, detach = (
        done.figure(plan.name, f"{kind}, hidden units", STEP, "saved") for kind in ("routed", "detach")
    )
    assert hidden.p50 < detach.p50


@pytest.mark.slow
def test_what_is_wrong_is_not_timed(monkeypatch, tmp_path):
    def trainings(whole, shape):
        plain = model_cases.unrouted(whole, shape)
        hidden = model_cases.detach_hidden(model_cases.with_shared_weights(whole), shape)
        sgtm = model_cases.detach_sgtm(model_cases.with_shared_weights(whole), shape)
        return {
            "unrouted": model_cases.Training("unrouted", plain),
            "detach, hidden units": model_cases.Training("hidden units", hidden),
            "detach, SGTM": model_cases.Training("SGTM", sgtm),
            "unmasked": model_cases.Training("hidden units", plain),
            "another forward": model_cases.Training("SGTM", sgtm, same_losses=(sgtm,)),
            "rival": model_cases.Training("unrouted", refuses, is_rival=True),
        }, {}

    def refuses(batch):
        raise RuntimeError("no such device")

    monkeypatch.setattr(model, "trainings", trainings)
    (plan,) = model.plans(CPU)
    done = runner.run("model", [plan], 2, CPU, tmp_path)
    variants = done.cases[plan.name]["variants"]
    timed = [name for name in variants if done.figure(plan.name, name, STEP)]
    assert timed == ["unrouted", "detach, hidden units", "detach, SGTM"]
    assert variants["rival"]["error"] == "RuntimeError: no such device"
    unmasked, another = done.failures()
    assert unmasked.startswith(f"{plan.name}, unmasked: ")
    assert "of what is allowed" in unmasked
    assert another.startswith(f"{plan.name}, another forward: loss: got ")


def test_a_budget_that_says_nothing_lets_nothing_pass():
    whole, batch = model_cases.make_model(SHAPE, CPU), model_cases.make_batch(SHAPE, CPU)
    unrouted = model_cases.Training("hidden units", model_cases.unrouted(whole, SHAPE))
    numbers = model_check.numbers(whole, unrouted.loss, batch)
    want = model_check.expected(whole, SHAPE, "hidden units", unrouted.loss, batch, numbers)
    assert not want.tells
    assert "would pass" in model_check.examine(unrouted, whole, batch, want, numbers.loss)["wrong"]


def test_sgtm_by_hooks_keeps_confined_tokens_out_of_the_rest():
    whole, batch = model_cases.make_model(SHAPE, CPU), model_cases.make_batch(SHAPE, CPU)
    loss = model_cases.detach_sgtm(whole, SHAPE)
    everyone = torch.ones_like(batch.route_ids)
    gradients = model_check.numbers(whole, loss, batch._replace(route_ids=everyone)).gradients
    query, key, units = 2 * 8, 8, 8  # two heads of width 8, the key head they share
    for name, rows in {"self_attn.q_proj": query, "self_attn.k_proj": key, "mlp.up_proj": units}.items():
        gradient = gradients[f"model.layers.0.{name}.weight"]
        assert (gradient[:-rows] == 0).all()
        assert (gradient[-rows:] != 0).any()
    for name, columns in {"self_attn.o_proj": query, "mlp.down_proj": units}.items():
        gradient = gradients[f"model.layers.1.{name}.weight"]
        assert (gradient[:, :-columns] == 0).all()
        assert (gradient[:, -columns:] != 0).any()


def test_variants_share_their_weights():
    whole = model_cases.make_model(SHAPE, CPU)
    other = model_cases.with_shared_weights(whole)
    assert other.model.layers[0] is not whole.model.layers[0]
    assert all(one is two for one, two in zip(other.parameters(), whole.parameters(), strict=True))


def test_confined_tokens_are_one_document_a_row():
    shape = model_cases.SHAPES["cuda"]
    route_ids = model_cases.make_batch(shape, CPU).route_ids
    assert route_ids.float().mean().item() == pytest.approx(0.037, abs=1e-3)
    for row in route_ids:
        assert row.diff().abs().sum() <= 2


def test_liger_patches_for_its_own_forward_alone(monkeypatch):
    whole, batch = model_cases.make_model(SHAPE, CPU), model_cases.make_batch(SHAPE, CPU)
    modeling = sys.modules["transformers.models.llama.modeling_llama"]
    ordinary, calls = modeling.apply_rotary_pos_emb, []

    def rotate(*arguments, **keywords):
        calls.append("liger")
        return ordinary(*arguments, **keywords)

    def apply(model):
        modeling.apply_rotary_pos_emb = rotate

    package = types.SimpleNamespace(apply_liger_kernel_to_llama=apply)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", package)
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    loss = model_cases.liger(model_cases.with_shared_weights(whole))
    assert torch.equal(loss(batch), model_cases.own_loss(whole, batch))
    assert len(calls) == SHAPE.layers
    assert modeling.apply_rotary_pos_emb is ordinary


def test_without_transformers_it_is_named(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert command.main(["run", "model"]) == 2
    assert "suite: model cannot run here: transformers is not installed" in capsys.readouterr().err
    assert end_to_end.why_missing() == "transformers and tokenizers not installed"


def test_a_step_for_the_memory_of_its_own_process():
    before = model_cases.warm_step_on_cpu(SHAPE, "routed, SGTM")
    assert before() is None


@pytest.mark.slow
def test_the_step_of_the_demo(tmp_path, monkeypatch):
    """Every way to train it has the gradients of its meaning: homogeneous steps and masks by hand those of the plan."""
    pytest.importorskip("tokenizers")
    (plan,) = end_to_end.plans(CPU)
    done = runner.run("end-to-end", [plan], 1, CPU, tmp_path)
    variants = done.cases[plan.name]["variants"]
    assert done.failures() == []
    assert all(0 < one["largest_error"] <= end_to_end.TOLERANCE for one in variants.values())
    assert [name for name, one in variants.items() if not one["is_rival"]] == [
        "routed",
        "routed, hidden units",
    ]
    assert all(done.figure(plan.name, name, STEP) for name in variants)
    # The check sees what SGTM confines: the unrouted model would not pass for a routed one.
    whole = end_to_end.make_model()
    (batch,) = end_to_end.batches(1)
    made = end_to_end.trainings(whole)
    exact = end_to_end.exact_gradients(whole, "SGTM", batch)
    wrong = end_to_end._examine(made["unrouted"], whole, batch, exact)
    assert "of the largest entry" in wrong["wrong"]
