"""The suite `attention`: every way is checked against the reference, and what is wrong is not timed."""

import json

import pytest
import torch

from bench import attention, attention_cases, attention_check, runner, suites
from bench.attention_cases import Entry, Way
from bench.cases import FORWARD, FULL, Limit
from bench.ops import Options
from bench.results import MISSED, NOT_MEASURED
from gradroute import backends
from gradroute.backends import native
from gradroute.backends.fa4 import refusals

pytestmark = pytest.mark.skipif(native.module is None, reason=str(native.load_error))

CPU = torch.device("cpu")
SHAPE = attention_cases.Shape(batch=2, heads=4, kv_heads=2, length=48, head_dim=16, run=(4, 12))


@pytest.fixture(autouse=True)
def _small(monkeypatch, quick_bench):
    monkeypatch.setitem(attention_cases.SHAPES, "cpu", SHAPE)


@pytest.fixture
def attention_calls():
    return attention_cases.calls(SHAPE, CPU)


@pytest.mark.slow
def test_every_case_is_timed_beside_its_rivals(tmp_path):
    plans = suites.suite_plans("attention", Options(CPU, with_compiled=False))
    assert [plan.name for plan in plans] == [f"attention, {name}" for name in attention_cases.CASES["cpu"]]
    done = runner.run("attention", plans, 3, CPU, tmp_path)
    assert done.failures() == []
    for name, case in done.cases.items():
        assert done.figure(name, case["base"], FULL, f"speed relative to {case['base']}").p50 == 1
        for variant, found in case["variants"].items():
            if "missing" in found:
                continue
            speed = done.figure(name, variant, FULL)
            flops = 3.5 * 2 * 2 * 4 * 48**2 * 16
            assert done.figure(name, variant, FULL, "dense-equivalent rate").p50 == pytest.approx(
                flops / speed.p50 / 1e9
            )
            assert ("plan" in found) == (variant in ("reference", "torch", "cpu")) == (not found["is_rival"])
            assert done.figure(name, variant, FULL, "saved").p50 > 0
    time, memory_ = done.cases["attention, both edges"]["limits"]
    assert time["got"] > 0
    assert (memory_["got"], memory_["verdict"]) == (1, MISSED)
    assert json.loads((tmp_path / "attention.json").read_text())["cases"] == json.loads(
        json.dumps(done.cases)
    )


def fails(**_):
    raise RuntimeError("no such device")


def test_what_is_wrong_is_not_timed(monkeypatch, tmp_path):
    def entry(calls):
        wrong = Way(calls.edges, attention_cases.sdpa)
        ways = {
            "base": Way(calls.ordinary, attention_cases.sdpa),
            "wrong": wrong._replace(explain=attention_cases.routed(calls.edges, "torch").explain),
            "wrong rival": wrong,
            "absent": Way(calls.edges, fails),
        }
        return Entry(ways, ("base", "wrong rival"), (Limit("wrong", "base", 1e9),))

    monkeypatch.setitem(attention_cases.CASES, "cpu", {"tiny": entry})
    done = runner.run("attention", attention.plans(CPU), 3, CPU, tmp_path)
    (case,) = done.cases.values()
    (failure,) = done.failures()
    assert failure.startswith("attention, tiny, wrong: wrong: dq: maximum error")
    timed = [name for name in case["variants"] if done.figure("attention, tiny", name, FULL)]
    assert timed == ["base"]
    assert case["variants"]["wrong rival"]["wrong"].startswith("wrong rival: dq: RMS error")
    assert case["variants"]["absent"]["error"] == "RuntimeError: no such device"
    assert case["limits"][0]["verdict"] == NOT_MEASURED


@pytest.mark.slow
@pytest.mark.parametrize("name", attention_cases.CASES["cuda"])
def test_cases_for_cuda_are_right_on_the_cpu(name, attention_calls):
    """Less what needs CUDA: cuDNN, Flex's backward, backend cuda, and what is compiled."""
    if "triton" not in backends.available_backends("routed_attention", CPU):
        pytest.skip("triton runs on the GPU of this machine, not on its CPU")
    entry = attention_cases.CASES["cuda"][name](attention_calls)
    assert set(entry.rivals) <= set(entry.ways)
    assert all({limit.variant, limit.rival} <= set(entry.ways) for limit in entry.limits)
    able = [
        way
        for way in entry.ways
        if way != "cuda" and not way.startswith("Flex") and not way.endswith("compiled")
    ]
    found = attention.examine(entry, dict.fromkeys(able))
    assert not any("wrong" in one for one in found.values())
    refused = {way for way, one in found.items() if "error" in one}
    assert all(way.startswith(("cuDNN", "flash")) for way in refused)
    assert entry.ways["triton"].explain().backend == "triton"
    assert len(entry.ways["triton"].steps(FORWARD)) == 1


@pytest.mark.parametrize("name", ["unmasked", "both edges"])
def test_a_rival_whose_package_is_not_there_is_missing_with_the_reason(name, attention_calls, monkeypatch):
    entry = attention_cases.CASES["cuda"][name](attention_calls)
    (rival,) = entry.needs_flash_4
    assert entry.ways[rival].forward.kernel_options == {"BACKEND": "FLASH"}
    for versions, missing in (
        (refusals.VERSIONS, {}),
        ({}, {rival: "the package flash-attn-4 is not installed (gradroute's extra fa4)"}),
    ):
        monkeypatch.setattr(refusals, "installed_version", versions.get)
        monkeypatch.setitem(attention_cases.CASES["cpu"], name, lambda calls: entry)
        case = attention.case(name, SHAPE, CPU)
        assert case.missing.items() >= missing.items()
        assert (rival in case.variants) == (rival in case.rivals) == (not missing)


def test_other_lengths_are_cases_of_their_own():
    plans = suites.suite_plans("attention", Options(CPU), {"tokens": [32, 64]})
    assert [plan.axes["length"] for plan in plans] == [32] * 2 + [64] * 2
    assert len({plan.name for plan in plans}) == 4


def test_the_score_edges_of_flex_attention(attention_calls):
    call = attention_calls.score_edges
    assert attention_cases.Flex(attention_calls.ordinary).score_mod is None
    s = torch.randn(2, 4, 48, 48, requires_grad=True)
    b, h, i, j = (torch.arange(extent) for extent in s.shape)
    indices = b.view(-1, 1, 1, 1), h.view(-1, 1, 1), i.view(-1, 1), j
    z = attention_cases.Flex(call).score_mod(s, *indices)
    assert torch.equal(z, s)
    z.sum().backward()
    ids = call.routes.ids.view(2, 48).long()
    edges = call.sites.score_edges.weights[ids[:, :, None], ids[:, None, :]]
    assert torch.equal(s.grad, edges.unsqueeze(1).expand_as(s))


def test_a_part_of_a_call_is_what_the_whole_has_there(attention_calls):
    exact, plain = attention_check.exact_and_plain(attention_calls.masks)
    whole = attention_calls.masks.in_float64().run("reference")
    torch.testing.assert_close(exact.output, whole.output)
    for name, gradient in whole.gradients.items():
        torch.testing.assert_close(exact.gradients[name], gradient)
        torch.testing.assert_close(plain.gradients[name], gradient.float(), rtol=1e-4, atol=1e-5)


def test_runs_of_routes_are_as_long_as_they_should_be():
    shape = SHAPE._replace(length=4096, run=(64, 512))
    ids = attention_cases.ids_in_runs(shape)
    assert ids.shape == (2, 4096)
    for row in ids:
        _, lengths = row.unique_consecutive(return_counts=True)
        assert lengths[:-1].min() >= 64
        assert len(lengths) > 4
    assert torch.equal(ids, attention_cases.ids_in_runs(shape))


def test_a_step_for_the_memory_of_its_own_process():
    step = attention_cases.warm_step_on_cpu(SHAPE, "both edges", "cpu")
    assert all(gradient.isfinite().all() for gradient in step())


def test_targets_hold_for_the_shape_that_they_were_set_for():
    own, same, longer = (
        attention.plans(CPU, lengths) for lengths in ((), (SHAPE.length,), (SHAPE.length + 8,))
    )
    assert [len(plan.make().limits) for plan in own] == [2, 0]
    assert [len(plan.make().limits) for plan in same] == [2, 0]
    assert [plan.make().limits for plan in longer] == [(), ()]
