"""The benchmarks: rivals compute the same, what is wrong is not timed, ratios are those of the same rounds."""

import functools
import json
import sys

import pytest
import torch

from bench import __main__ as command
from bench import attention, attention_cases, attention_check, cpu, memory, timing
from bench import report as readme
from gradroute import MLPSites, Routes, backends, native
from gradroute.tables import localize

pytestmark = pytest.mark.skipif(native.module is None, reason=str(native.load_error))

CPU = torch.device("cpu")
SHAPE = attention_cases.Shape(batch=2, heads=4, kv_heads=2, length=48, head_dim=16, run=(4, 12))


@pytest.fixture
def case():
    """A small case with a limit that cannot be missed and one that cannot be reached."""
    ids = torch.arange(64) % 2
    table = localize(2, 16, {1: slice(12, 16)})
    sample = cpu.gated_mlp(64, 8, 16, Routes.of(ids, 2), MLPSites(hidden=table))
    return cpu.Case("tiny", sample, table, (("unmasked", 1e9), ("detach", 0.0)))


def test_rivals_and_backends_have_the_same_gradients(case):
    steps = cpu.variants(case, ())
    assert list(steps) == ["unmasked", "detach", "hook", "torch", "cpu"]
    expected = steps["detach"]()
    for name in ("hook", "torch", "cpu"):
        for got, want in zip(steps[name](), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(steps["unmasked"]()[0], expected[0])


def test_the_report_has_every_ratio_and_verdict(case, monkeypatch):
    monkeypatch.setattr(cpu, "CASES", (lambda: case,))
    report = cpu.run(rounds=3)
    measured = report["cases"]["tiny"]["variants"]
    assert measured["unmasked"]["ratios"]["unmasked"] == 1
    assert all(0 < one["milliseconds"]["p20"] <= one["milliseconds"]["p80"] for one in measured.values())
    text = "\n".join(cpu.lines(report))
    assert "cpu must be at most 1000000000.0 × unmasked" in text
    assert text.count("reached") == 1
    assert text.count("MISSED") == 1


def test_a_wrong_kernel_is_not_timed(case, monkeypatch):
    monkeypatch.setattr(native, "masked_product_", lambda g, routes, table: None)
    monkeypatch.setattr(
        native, "glu_backward", lambda dz, gate, *rest, **keywords: (gate, gate, gate, None, None)
    )
    monkeypatch.setattr(cpu, "CASES", (lambda: case,))
    with pytest.raises(AssertionError, match="tiny on cpu: d"):
        cpu.run(rounds=3)


def test_a_ratio_is_the_median_over_paired_rounds():
    assert timing.ratio([2.0, 30.0, 4.0], [1.0, 10.0, 1.0]) == 3.0


@pytest.fixture
def attention_calls():
    return attention_cases.calls(SHAPE, CPU)


def test_every_case_of_attention_is_timed_beside_its_rivals(monkeypatch):
    monkeypatch.setattr(memory, "on_cpu", lambda make: 10**6)
    report = attention.run(rounds=3, device=CPU, shape=SHAPE)
    assert report["failures"] == []
    assert list(report["cases"]) == [f"{name}, forward and backward" for name in attention_cases.CASES["cpu"]]
    for case in report["cases"].values():
        assert case["variants"][case["base"]]["ratios"][case["base"]] == 1
        for name, measured in case["variants"].items():
            assert measured["milliseconds"]["p50"] > 0
            flops = 3.5 * 2 * 2 * 4 * 48**2 * 16
            rate = flops / (measured["milliseconds"]["p50"] / 1e3)
            assert measured["tflops_per_second"] * 1e12 == pytest.approx(rate)
            assert ("plan" in measured) == (name in ("reference", "torch", "cpu"))
    time, memory_ = report["cases"]["both edges, forward and backward"]["limits"]
    assert time["got"] > 0
    assert (memory_["got"], memory_["verdict"]) == (1, "MISSED")
    text = "\n".join(attention.lines(report))
    assert "cpu must be at most 0.125 × reference in memory: 1.000, MISSED" in text
    assert json.loads(json.dumps(report))["cases"] == report["cases"]


def fails(**_):
    raise RuntimeError("no such device")


def test_wrong_attention_is_not_timed(monkeypatch):
    def case(calls):
        unmasked, wrong = attention_cases.sdpa, attention_cases.Variant(calls.edges, attention_cases.sdpa)
        variants = {
            "base": attention_cases.Variant(calls.ordinary, unmasked),
            "wrong": wrong,
            "wrong rival": wrong._replace(may_be_wrong=True),
            "absent": attention_cases.Variant(calls.edges, fails),
        }
        limits = (attention_cases.Limit("wrong", "base", "time", 1e9),)
        return attention_cases.Case(variants, ("base", "wrong rival"), limits)

    monkeypatch.setattr(memory, "on_cpu", lambda make: None)
    monkeypatch.setitem(attention_cases.CASES, "cpu", {"tiny": case})
    report = attention.run(rounds=3, device=CPU, shape=SHAPE)
    (measured,) = report["cases"].values()
    (failure,) = report["failures"]
    assert failure.startswith("tiny, wrong: dq: maximum error")
    variants = measured["variants"]
    assert [name for name, one in variants.items() if "milliseconds" in one] == ["base"]
    assert "wrong" in variants["wrong rival"]
    assert variants["absent"] == {"error": "RuntimeError: no such device"}
    assert variants["base"]["ratios"] == {"base": 1}
    assert measured["limits"][0]["verdict"] == "not measured"
    text = "\n".join(attention.lines(report))
    assert "error: RuntimeError: no such device" in text
    assert "wrong must be at most 1000000000.000 × base in time: not measured" in text


@pytest.mark.parametrize("name", attention_cases.CASES["cuda"])
def test_cases_for_cuda_are_right_on_the_cpu(name, attention_calls):
    """Less what needs CUDA: cuDNN, Flex's backward, backend cuda."""
    if "triton" not in backends.available_backends("routed_attention", CPU):
        pytest.skip("triton runs on the GPU of this machine, not on its CPU")
    case = attention_cases.CASES["cuda"][name](attention_calls)
    assert set(case.rivals) <= set(case.variants)
    assert all({limit.variant, limit.rival} <= set(case.variants) for limit in case.limits)
    able = {
        variant: one
        for variant, one in case.variants.items()
        if variant != "cuda" and not variant.startswith("Flex")
    }
    found = attention.examined(name, case._replace(variants=able))
    assert not any("wrong" in one for one in found.values())
    refused = [variant for variant, one in found.items() if "error" in one]
    assert all(variant.startswith("cuDNN") for variant in refused)
    assert found["triton"]["plan"]["backend"] == "triton"


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


@pytest.mark.skipif(not memory.CLEAR_REFS.exists(), reason="only Linux says how much memory was resident")
def test_the_memory_of_a_step_is_measured():
    size = 1 << 26
    make = functools.partial(functools.partial, torch.ones, size // 4)
    assert size <= memory.on_cpu(make) < size + (8 << 20)


def test_a_failed_check_fails_the_command(monkeypatch, tmp_path, capsys):
    class Suite:
        @staticmethod
        def run(rounds, rivals):
            return {"rounds": rounds, "failures": ["triton is wrong"]}

        @staticmethod
        def lines(report):
            return ["a report"]

    monkeypatch.setitem(command.SUITES, "attention", Suite)
    monkeypatch.setattr(sys, "argv", ["bench", "attention", "--rounds", "5", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="triton is wrong"):
        command.main()
    assert "a report" in capsys.readouterr().out
    assert json.loads((tmp_path / "attention.json").read_text())["rounds"] == 5


def test_the_table_of_attention(tmp_path):
    def measured(p50, relative, size):
        milliseconds = {"p50": p50, "p20": p50, "p80": p50}
        rate = {"tflops_per_second": 1234 / p50}
        return {"milliseconds": milliseconds, "ratios": {"cuDNN": relative}, "extra_bytes": size} | rate

    variants = {
        "cuDNN": measured(4.0, 1.0, 2 * 10**8),
        "triton": measured(6.0, 1.5, None),
        "Flex": {"wrong": "dq"},
        "flash": {"error": "RuntimeError"},
    }
    run = {
        "environment": {"threads": 2, "instruction_set": "avx512", "gpu": "NVIDIA H200"},
        "shape": SHAPE._asdict(),
        "dtype": "bfloat16",
        "cases": {"unmasked, forward": {"base": "cuDNN", "limits": [], "variants": variants}},
    }
    folder = tmp_path / "h200"
    folder.mkdir()
    (folder / "attention.json").write_text(json.dumps(run), encoding="utf-8")
    assert readme.table(tmp_path).splitlines() == [
        "`python -m bench attention` on h200 (NVIDIA H200), bfloat16, causal, B = 2, H = 4, G = 2, S = 48, D = 16, "
        "medians; memory beyond the inputs:",
        "",
        "| | | time | relative | TFLOP/s | memory |",
        "|---|---|---|---|---|---|",
        "| unmasked, forward | cuDNN | 4.00 ms | 1.00 | 308 | 200 MB |",
        "| unmasked, forward | triton | 6.00 ms | 1.50 | 206 | – |",
        "| unmasked, forward | Flex | wrong | – | – | – |",
        "| unmasked, forward | flash | does not run | – | – | – |",
    ]
