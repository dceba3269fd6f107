"""A run of the benchmark: what is wrong is not timed, ratios are those of the same rounds, and nothing is lost."""

import contextlib
import dataclasses
import functools
import json
import math

import pytest
import torch
from bench_cases import CPU, EAGER, plan_of, setting_of, wrong_glu_backward

from bench import (
    busy,
    launch,
    memory,
    ops,
    runner,
    suites,
    timing,
)
from bench.cases import FORWARD, FULL, Case, Limit, Plan, Variant
from bench.results import MISSED, NOT_MEASURED, REACHED, RELATIVE, Figure, Run, limit_text
from gradroute import backends
from gradroute.backends import native

pytestmark = [
    pytest.mark.skipif(native.module is None, reason=str(native.load_error)),
    pytest.mark.usefixtures("quick_bench"),
]


def test_a_run_has_every_figure(tmp_path, capsys):
    limits = (
        Limit("cpu", "unmasked", 1e9),
        Limit("cpu", "detach", 0.0),
        Limit("cpu", "detach", 1.0, "memory"),
        Limit("cpu", "detach", 1.0, "saved"),
        Limit("cpu", "no such", 1.0),
        Limit("detach", "hook", 1e9, added="unmasked"),
    )
    done = runner.run("linear", [plan_of(limits=limits)], 3, CPU, tmp_path, command="the command")
    loaded = Run.load(tmp_path / "linear.csv")
    assert loaded.rows == done.rows
    assert loaded.description == json.loads(json.dumps(done.description))
    case = loaded.cases["tiny"]
    assert [limit["verdict"] for limit in case["limits"]][:5] == [
        REACHED,
        MISSED,
        REACHED,
        REACHED,
        NOT_MEASURED,
    ]
    assert case["limits"][5]["got"] is not None
    assert case["limits"][2]["got"] == 1
    assert case["limits"][3]["got"] < 1
    own = [name for name, one in case["variants"].items() if not one["is_rival"]]
    assert own == list(backends.available_backends("routed_linear", CPU))[:-1]
    names = ["unmasked", "detach", "hook", "homogeneous steps", *own]
    assert list(case["variants"]) == names
    for name in names:
        speed = loaded.figure("tiny", name, FULL)
        assert 0 < speed.p20 <= speed.p50 <= speed.p80
        assert loaded.figure("tiny", name, FULL, RELATIVE + "unmasked").p50 > 0
        rate = loaded.figure("tiny", name, FULL, "dense-equivalent rate").p50
        assert rate == pytest.approx(6 * 37 * 20 * 72 / speed.p50 / 1e9)
        assert loaded.figure("tiny", name, FULL, "useful rate").p50 < rate
    assert loaded.figure("tiny", "unmasked", FULL, RELATIVE + "unmasked") == Figure(1, 1, 1)
    assert loaded.figure("tiny", "homogeneous steps", FORWARD) is None
    assert {"copy", "gemm"} == set(loaded.description["ceilings"])
    assert loaded.description["command"] == "the command"
    assert {"torch", "commit", "clean", "threads"} <= set(loaded.description["environment"])
    config = loaded.rows[0].config
    assert (config["suite"], config["case"], config["tokens"], config["share"]) == ("linear", "tiny", 37, 0.5)
    assert loaded.missed() == [
        f"tiny: cpu at most 0 x detach in speed, full: {case['limits'][1]['got']:.3f}, MISSED"
    ]


def test_what_is_wrong_is_not_timed(tmp_path, monkeypatch):
    monkeypatch.setattr(native, "glu_backward", wrong_glu_backward)
    plan = ops.plan(setting_of("routed_glu", tables="interval"), EAGER, (FULL,), name="tiny")
    done = runner.run("primitive", [plan], 3, CPU, tmp_path)
    assert done.figure("tiny", "cpu", FULL) is None
    assert done.figure("tiny", "torch", FULL) is not None
    (failure,) = done.failures()
    assert failure.startswith("tiny, cpu: cpu: dgate: maximum error")


@pytest.mark.slow
def test_a_run_goes_on_where_it_was(tmp_path, monkeypatch):
    first, second = plan_of("first"), plan_of("second")
    runner.run("linear", [first], 2, CPU, tmp_path)
    rows = Run.load(tmp_path / "linear.json").rows
    broken = dataclasses.replace(first, make=lambda: pytest.fail("timed again"))
    done = runner.run("linear", [broken, second], 2, CPU, tmp_path, resume=True)
    assert list(done.cases) == ["first", "second"]
    assert done.rows[: len(rows)] == rows
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    with pytest.raises(ValueError, match=r"resume: .*json was measured with .*, and this is {'threads': 77}"):
        runner.run("linear", [first, second], 2, CPU, tmp_path, resume=True)


@pytest.mark.slow
def test_an_interrupt_keeps_what_is_done(tmp_path):
    def interrupted():
        raise KeyboardInterrupt

    plans = [plan_of("first"), dataclasses.replace(plan_of("second"), make=interrupted), plan_of("third")]
    done = runner.run("linear", plans, 2, CPU, tmp_path)
    assert done.description["interrupted"]
    assert list(Run.load(tmp_path / "linear.json").cases) == ["first"]


@pytest.mark.slow
def test_a_case_that_fails_costs_no_other(tmp_path, capsys):
    def refused():
        raise RuntimeError("CUDA out of memory")

    plans = [dataclasses.replace(plan_of("first"), make=refused), plan_of("second")]
    done = runner.run("linear", plans, 2, CPU, tmp_path)
    assert done.failures() == ["first: RuntimeError: CUDA out of memory"]
    assert done.figure("second", "cpu", FULL) is not None
    assert "RuntimeError: CUDA out of memory" in capsys.readouterr().err
    again = runner.run("linear", [plan_of("first"), plan_of("second")], 2, CPU, tmp_path, resume=True)
    assert again.failures() == []
    assert again.figure("first", "cpu", FULL) is not None
    with pytest.raises(ValueError, match=r"resume: .* has 2 rounds, and these are 3"):
        runner.run("linear", [plan_of("first")], 3, CPU, tmp_path, resume=True)


@pytest.mark.slow
def test_a_variant_that_fails_while_it_is_measured_is_told(tmp_path):
    def refused():
        raise MemoryError("too large")

    def case():
        steps = {
            "fine": Variant(lambda mode: [lambda: None], is_rival=True),
            "large": Variant(lambda mode: [lambda: None], saved_bytes=refused),
            "broken": Variant(lambda mode: refused()),
        }
        return Case(steps, ("fine",), lambda variants: {name: {} for name in variants}, "not at all")

    done = runner.run("x", [Plan("x", "case", "x", {"tokens": 1}, case)], 2, CPU, tmp_path)
    assert done.failures() == ["case, large: MemoryError: too large", "case, broken: MemoryError: too large"]
    assert done.figure("case", "large", FULL) is None


@pytest.mark.slow
def test_a_case_is_timed_beside_a_busy_process(tmp_path, monkeypatch):
    workers, begin = [], busy.process

    @contextlib.contextmanager
    def kept():
        with begin() as worker:
            workers.append(worker)
            yield worker

    def seconds(step):
        (worker,) = workers
        assert worker.poll() is None
        return 1.0

    def case():
        steps = {"alone": Variant(lambda mode: [lambda: None]), "cpu": Variant(lambda mode: [lambda: None])}
        return Case(steps, ("alone",), lambda variants: {name: {} for name in variants}, "not at all")

    monkeypatch.setattr(busy, "process", kept)
    monkeypatch.setattr(timing, "clock_of", lambda device: seconds)
    plan = suites.beside_busy_process(Plan("x", "case", "x", {"tokens": 1}, case))
    done = runner.run("x", [plan], 2, CPU, tmp_path)
    assert done.failures() == []
    assert done.figure("case", "cpu", FULL).p50 == 1e3
    assert [worker.poll() is None for worker in workers] == [False]


def test_a_busy_process_that_ends_by_itself_is_told(monkeypatch):
    monkeypatch.setattr(busy, "WORK", "raise SystemExit(3)")
    with pytest.raises(RuntimeError, match="ended by itself, with exit status 3"), busy.process() as worker:
        worker.wait()


def test_a_ratio_is_the_median_over_paired_rounds():
    assert timing.ratio([2.0, 30.0, 4.0], [1.0, 10.0, 1.0]).p50 == 3.0


def test_rounds_take_inputs_in_turn_and_reverse_their_order():
    calls = []
    variants = {
        name: [functools.partial(calls.append, f"{name}{turn}") for turn in range(2)] for name in "ab"
    }
    times = timing.interleaved(variants, 2, "", lambda step: step() or 1.0)
    assert calls == ["a0", "b0", "b0", "a0", "a1", "b1", "b1", "a1"]
    assert times == {"a": [1e3, 1e3], "b": [1e3, 1e3]}


@pytest.mark.slow
def test_a_launch_is_timed_by_the_call(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, "CALLS", 3)
    plans = suites.suite_plans("launch", EAGER)
    assert [plan.kernel for plan in plans] == list(backends.OPS)
    done = runner.run("launch", plans[:2], 2, CPU, tmp_path)
    assert done.failures() == []
    for name, case in done.cases.items():
        (limit,) = case["limits"]
        own, plain = (done.figure(name, variant, FORWARD).p50 for variant in ("routed", "unrouted"))
        assert 0 < plain < 1
        assert limit["got"] == pytest.approx(1e3 * (own - plain), rel=0.5)
    times = {"own": [0.025, 0.030], "rival": [0.010, 0.010]}
    limit = runner.verdict(Limit("own", "rival", 20.0, "added"), times, {})
    assert (limit["got"], limit["verdict"]) == (pytest.approx(17.5), REACHED)
    assert limit_text(limit) == "own at most 20 µs more than rival, full: 17.500, reached"


def test_added_time_is_beyond_the_floor():
    limit = Limit("own", "rival", 0.5, added="floor")
    times = {"own": [3.0, 3.0], "rival": [6.0, 6.0], "floor": [1.0, 1.0]}
    assert runner.verdict(limit, times, {})["got"] == pytest.approx(0.4)


@pytest.mark.slow
@pytest.mark.skipif(not memory.CLEAR_REFS.exists(), reason="only Linux says how much memory was resident")
def test_the_memory_of_a_step_is_measured(monkeypatch):
    monkeypatch.undo()
    size = 1 << 26
    make = functools.partial(functools.partial, torch.ones, size // 4)
    assert size <= memory.on_cpu(make) < size + (8 << 20)


def test_a_step_for_the_memory_of_its_own_process():
    step = ops.warm_step_on_cpu(setting_of("routed_linear"), "cpu", FULL)
    assert all(math.isfinite(gradient.sum()) for gradient in step())


def test_bytes_saved_for_backward():
    weight = torch.ones(4, 4, requires_grad=True)
    x = torch.ones(2, 4, requires_grad=True)
    assert memory.saved(lambda: torch.nn.functional.linear(x.exp(), weight), [weight]) == x.nbytes
