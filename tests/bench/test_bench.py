"""The benchmarks of ops: rivals compute the same, what is wrong is not timed, ratios are those of the same rounds."""

import dataclasses
import functools
import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import cases
import pytest
import torch

from bench import (
    attention_cases,
    command,
    launch,
    machine,
    memory,
    model,
    op_table,
    ops,
    progress,
    rivals,
    runner,
    suites,
    timing,
    work,
)
from bench.cases import BACKWARD, FORWARD, FULL, Case, Limit, Plan, Variant, Work
from bench.results import MISSED, NOT_MEASURED, REACHED, RELATIVE, Figure, Run, limit_text
from bench.settings import DTYPES, SITES, TABLES, Setting, make_routes, samples
from gradroute import Routes, backends, testing
from gradroute.backends import native

pytestmark = [
    pytest.mark.skipif(native.module is None, reason=str(native.load_error)),
    pytest.mark.usefixtures("quick_bench"),
]

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
EAGER = ops.Options(CPU, with_compiled=False)
OPS = tuple(op_table.OPS)


def setting_of(op, **values):
    """Small, and with an odd number of everything."""
    return suites.with_sites(Setting(op, **({"tokens": 37, "d_model": 20, "d_ff": 72} | values)))


# --- what there is


def test_every_op_is_in_a_suite():
    assert {*op_table.OPS, "routed_attention"} == set(backends.OPS) == set(testing.OPS)
    assert all(op.activation or op.update for op in op_table.OPS.values())


@pytest.mark.parametrize("suite", suites.SUITES)
def test_every_suite_has_cases_with_names_of_their_own(suite):
    for device in ("cpu", "cuda"):
        plans = suites.suite_plans(suite, ops.Options(torch.device(device)))
        names = [plan.name for plan in plans]
        assert names
        assert len(set(names)) == len(names)
        assert all(plan.suite == suite and plan.x in plan.axes for plan in plans)


def test_groups_have_the_limits_of_their_device(capsys):
    names = {plan.name for plan in suites.available("cpu", EAGER)}
    assert {plan.name for plan in suites.cpu_limits(EAGER)} < names
    assert "training step of the demo" in names
    cuda = ops.Options(torch.device("cuda"))
    assert {plan.name for plan in suites.cuda_limits(cuda)} < {
        plan.name for plan in suites.available("h200", cuda)
    }
    with pytest.raises(ValueError, match="'h200', which is for cuda, on cpu"):
        suites.available("h200", EAGER)


@pytest.mark.slow
def test_every_limit_of_an_h200_is_measured(monkeypatch, tmp_path):
    """On the CPU, in Triton's interpreter, with small sizes: names, passes and quantities fit."""
    small = {"tokens": 160, "d_model": 16, "d_ff": 144, "dtype": "float32"}
    monkeypatch.setitem(suites.BASE_POINTS, "cuda", small)
    plans = suites.cuda_limits(EAGER)
    done = runner.run("h200", plans, 1, CPU, tmp_path)
    assert done.failures() == []
    limits = [limit for case in done.cases.values() for limit in case["limits"]]
    assert len(limits) == 11
    unmeasured = [limit["rival"] for limit in limits if limit["verdict"] == NOT_MEASURED]
    assert unmeasured == ["unmasked, compiled"]
    assert {limit["variant"] for limit in limits} == {backends.available_backends("route_grad", CPU)[0]}


# --- settings


@pytest.mark.parametrize("tables", TABLES)
def test_tables_are_what_they_say(tables):
    call = samples(setting_of("routed_activation", tables=tables, tokens=500), CPU, 1)[0]
    weights = call.sites.hidden.weights
    if tables == "block":
        assert weights[1, :-64].eq(0).all()
        assert weights[1, -64:].eq(1).all()
        assert weights[0].eq(1).all()
    if tables == "interval":
        assert weights.eq(1).sum(1).tolist() == [18] * 4  # a quarter of 72
        assert weights.sum(0).eq(1).all()
    if tables == "refuse":
        assert weights.tolist() == [[1.0], [0.0]]
    assert call.routes.ids.unique().tolist() == list(range(len(weights) - (tables == "unused")))


def test_orders_and_shares():
    mixed, ordered, runs = (
        make_routes(setting_of("route_grad", tokens=5000, order=order, share=0.25))
        for order in ("mixed", "sorted", "runs")
    )
    assert mixed.ids.float().mean() == pytest.approx(0.25, abs=0.03)
    assert torch.equal(mixed.ids.sort()[0], ordered.ids)
    _, lengths = runs.ids.unique_consecutive(return_counts=True)
    assert lengths[:-1].min() >= 64


def test_sets_of_inputs_differ_and_routes_do_not():
    one, two = samples(setting_of("routed_linear"), CPU, 2)
    assert not torch.equal(one.tensors["x"], two.tensors["x"])
    assert not torch.equal(one.upstream, two.upstream)
    assert one.routes is two.routes


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tables": "blok"}, "tables: got 'blok', expected one of block"),
        ({"dtype": "float31"}, "dtype: got 'float31', expected one of float32, bfloat16, float16, float64"),
        ({"dtype": "int8"}, "dtype: got 'int8', expected one of float32, bfloat16, float16, float64"),
        ({"dtype": "complex64"}, "dtype: got 'complex64'"),
        ({"sites": "hidden"}, "sites: got 'hidden', expected one of activation, update, both, all"),
        ({"density": math.nan}, "density: got nan, expected a share"),
        ({"op": "routed_attention"}, "op: got 'routed_attention', which is in the suite attention"),
        ({"op": "route"}, "op: got 'route', expected one of route_grad"),
        ({"share": 1.5}, "share: got 1.5, expected a share"),
        ({"tokens": 0}, "tokens: got 0"),
        ({"order": "random"}, "order: got 'random'"),
        ({"strength": "tokens"}, "strength: got 'tokens'"),
    ],
)
def test_values_that_an_axis_has_not(values, message):
    with pytest.raises(ValueError, match=message):
        ops.plan(setting_of("routed_linear")._replace(**values), EAGER)


# --- rivals


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("sites", cases.tiered(SITES))
@pytest.mark.parametrize("tables", cases.tiered(["block", "interval", "fractional", "negative"]))
def test_every_way_of_an_op_is_right(op, sites, tables):
    setting = setting_of(op, sites=sites, tables=tables)
    if not setting.site_names:
        setting = setting._replace(sites="update" if op_table.OPS[op].update else "activation")
    made = ops.ways(samples(setting, CPU, 2), with_compiled=False)
    assert {"unmasked", "detach", "hook", "torch", "cpu"} <= set(made)
    variants = {name: Variant(way.steps) for name, way in made.items()}
    assert ops.examine(made, variants) == {name: {} for name in made}
    for way in made.values():
        for mode in (FORWARD, BACKWARD, FULL):
            for step in way.steps(mode):
                step()


def test_rivals_in_half_precision():
    setting = setting_of("routed_gated_mlp", dtype="bfloat16", sites="both", tables="block")
    made = ops.ways(samples(setting, CPU, 1), with_compiled=False)
    assert {"detach, fp32 mask", "homogeneous steps"} <= set(made)
    assert ops.examine(made, {name: Variant(way.steps) for name, way in made.items()}) == {
        name: {} for name in made
    }


@pytest.mark.slow
def test_compiled_rivals_are_right():
    calls = samples(setting_of("routed_gated_mlp", sites="both"), CPU, 1)
    made = {name: way for name, way in ops.ways(calls).items() if "compiled" in name}
    assert set(made) == {"unmasked, compiled", "detach, compiled"}
    assert ops.examine(made, {name: Variant(way.steps) for name, way in made.items()}) == {
        name: {} for name in made
    }
    for way in made.values():
        (step,) = way.steps(BACKWARD)
        assert all(map(torch.equal, step(), step()))


def test_a_rival_that_computes_something_else_is_found():
    calls = samples(setting_of("routed_gated_mlp", tables="interval"), CPU, 1)
    wrong = ops.Way(calls, rivals.unmasked(calls[0]))
    found = ops.examine({"unmasked": wrong}, {"unmasked": Variant(wrong.steps)})
    assert found["unmasked"]["wrong"].startswith("unmasked: dx: RMS error")


def test_a_budget_that_says_nothing_lets_nothing_pass():
    """Neither a wrong formula of plain PyTorch nor masks that change nothing make a check that cannot fail."""
    call = samples(setting_of("routed_activation", tables="interval"), CPU, 1)[0]
    exact, plain = call.in_float64().run("reference"), call.run_plain()
    assert ops.why_useless(call, exact, plain) is None
    wrong = plain._replace(output=plain.output + 1e-3)
    assert ops.why_useless(call, exact, wrong).startswith("output: plain PyTorch is off")
    ids = torch.zeros_like(call.routes.ids)
    unmasked = samples(setting_of("routed_activation", tables="block"), CPU, 1)[0].with_routes(
        Routes.of(ids, 2)
    )
    exact, plain = unmasked.in_float64().run("reference"), unmasked.run_plain()
    assert "would pass" in ops.why_useless(unmasked, exact, plain)
    way = ops.Way([unmasked], rivals.unmasked(unmasked))
    assert "would pass" in ops.examine({"x": way}, {"x": Variant(way.steps)})["x"]["wrong"]


def test_a_rival_that_does_not_run_is_told():
    def fails(**tensors):
        raise RuntimeError("no such device\nand more")

    calls = samples(setting_of("routed_linear"), CPU, 1)
    found = ops.examine({"rival": ops.Way(calls, fails)}, {"rival": Variant(list)})
    assert found == {"rival": {"error": "RuntimeError: no such device"}}


def test_homogeneous_steps_have_a_label_each():
    calls = samples(setting_of("routed_linear", sites="update", tables="refuse", share=0.5), CPU, 1)
    made = ops.ways(calls, with_compiled=False)["homogeneous steps"]
    assert made.steps(FORWARD) == made.steps(BACKWARD) == []
    (step,) = made.steps(FULL)
    outputs, of_tokens, of_parameters = step()
    counts = calls[0].routes.ids.bincount().tolist()
    assert [len(output) for output in outputs] == [len(one["x"]) for one in of_tokens] == counts
    assert made.saved_bytes() == max(counts) * calls[0].tensors["x"].shape[1] * 4  # x of the larger step
    allowed = calls[0].routes.ids == 0
    expected = calls[0].upstream[allowed].T @ calls[0].tensors["x"][allowed]
    torch.testing.assert_close(of_parameters["weight"], expected)


def test_liger_is_named_where_it_is_missing(monkeypatch):
    call = samples(setting_of("routed_rms_norm"), CPU, 1)[0]
    monkeypatch.setattr(rivals, "LIGER_MISSING", "liger_kernel is not installed")
    assert ops.missing(call) == {"Liger, unmasked": "liger_kernel is not installed"}
    monkeypatch.setattr(rivals, "LIGER_MISSING", None)
    assert ops.missing(call) == {"Liger, unmasked": "Liger-Kernel needs a GPU"}
    assert ops.missing(samples(setting_of("route_grad"), CPU, 1)[0]) == {}


# --- work


def test_useful_work_is_what_masks_leave():
    quarters = setting_of("routed_gated_mlp", tokens=400, tables="interval", density=0.25, sites="both")
    found = work.work_of(samples(quarters, CPU, 1)[0])
    product = 2.0 * 400 * 20 * 72
    assert found[FORWARD] == Work(3 * product, 3 * product)
    assert found[BACKWARD] == Work(6 * product, pytest.approx(6 * product / 4))
    assert found[FULL] == Work(9 * product, pytest.approx(3 * product + 6 * product / 4))
    # Masks of activations leave the gradient of the output weight whole.
    hidden = work.work_of(samples(quarters._replace(sites="activation"), CPU, 1)[0])
    assert hidden[BACKWARD].useful_flops == pytest.approx(product * (1 + 5 / 4))


def test_a_strength_brings_route_0_in():
    setting = setting_of("routed_linear", tables="refuse", sites="update", share=0.5)
    plain, strong = (
        work.work_of(samples(setting._replace(strength=s), CPU, 1)[0])[FULL] for s in (None, "token")
    )
    assert strong.useful_flops == strong.dense_flops > plain.useful_flops


def test_bytes_that_must_be_moved():
    call = samples(setting_of("route_grad", tables="interval", density=0.5, tokens=100), CPU, 1)[0]
    size = 4 * 100 * 20
    assert work.work_of(call)[BACKWARD].moved_bytes == pytest.approx(1.5 * size)
    assert work.work_of(call)[FORWARD].moved_bytes == 0
    glu = samples(setting_of("routed_glu", tokens=100), CPU, 1)[0]
    assert work.work_of(glu)[FULL].moved_bytes == 8 * 4 * 100 * 72


# --- the run


def wrong_glu_backward(dz, gate, *rest, **keywords):
    return (*[gate.detach()] * 3, None, None)


def plan_of(name="tiny", limits=(), **values):
    setting = setting_of("routed_linear", sites="update", tables="refuse", share=0.5, **values)
    make = functools.partial(ops.case, setting, EAGER, (FORWARD, FULL), limits, True)
    return Plan("linear", name, "routed_linear", setting.axes, make)


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


# --- the command


@pytest.mark.slow
def test_the_command_runs_a_product_of_axes(tmp_path, capsys):
    arguments = [
        "run",
        "norm",
        "--op",
        "routed_rms_norm",
        "--tokens",
        "8",
        "9",
        "--d-model",
        "4",
        "--no-compiled",
    ]
    assert command.main([*arguments, "--rounds", "2", "--out", str(tmp_path)]) == 0
    run = Run.load(tmp_path / "norm.json")
    assert [case["axes"]["tokens"] for case in run.cases.values()] == [8, 9]
    said = capsys.readouterr().out
    assert "Liger, unmasked" in said
    assert "missing: " in said


def test_a_wrong_kernel_fails_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(native, "glu_backward", wrong_glu_backward)
    arguments = ["run", "primitive", "--op", "routed_glu", "--tokens", "8", "--d-ff", "8", "--no-compiled"]
    assert command.main([*arguments, "--rounds", "2", "--out", str(tmp_path)]) == 1
    assert "cpu: dgate: maximum error" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "nothing"], "suite: got 'nothing', expected one of primitive"),
        (
            ["run", "model", "--density", "0.5"],
            "density: got an axis that the suite model lacks, expected none",
        ),
        (
            ["run", "attention", "--dtype", "int8"],
            "dtype: got an axis that the suite attention lacks, expected tokens",
        ),
        (
            ["run", "attention", "--tokens", "64", "1"],
            "tokens: got 1, expected at least 2 for the suite attention",
        ),
        (["run", "labels", "--tokens", "9"], "tokens: got 9, expected at least 100 for the suite labels"),
        (["run", "gated_mlp", "--dtype", "int8"], "dtype: got 'int8', expected one of float32, bfloat16"),
        (["run", "mlp", "--tables", "quarters"], "tables: got 'quarters', expected one of block, refuse"),
        (["run", "mlp", "--strength", "half"], "strength: got 'half', expected one of none, token, scalar"),
        (["run", "mlp", "--order", "random"], "order: got 'random', expected one of mixed, sorted, runs"),
        (["run", "mlp", "--share", "2"], "share: got 2.0, expected a share from 0 to 1"),
        (
            ["run", "mlp", "--share", "0.5", "--tables", "dense"],
            "share: got [0.5] with tables dense, which ignore it",
        ),
        (
            ["run", "mlp", "--share", "0.5", "--density", "1"],
            "density: got [1.0] with tables block, which ignore it",
        ),
        (["run", "cpu", "--tokens", "5"], "tokens: the group cpu has cases of its own"),
        (["run", "linear", "--case", "no such"], "case: got 'no such'"),
        (["run", "linear", "--op", "routed_mlp"], "op: got routed_mlp, expected one of routed_linear"),
        (["run", "norm", "--sites", "both"], "sites: got 'both', expected update or all for routed_rms_norm"),
        (["run", "linear", "--device", "meta"], "device: got 'meta', expected cpu or cuda"),
        (["run", "linear", "--device", "cuda:1"], "device: got 'cuda:1', expected cpu or cuda"),
        (["run", "linear", "--device", "gpu"], "device: got 'gpu', expected cpu or cuda"),
        (["list", "nothing"], "suite: got 'nothing'"),
        (["plot", "nowhere"], "nowhere: got no runs, expected NAME.csv with NAME.json"),
    ],
)
def test_what_the_command_refuses(arguments, message, tmp_path, capsys):
    out = ["--out", str(tmp_path)] if arguments[0] == "run" else []
    assert command.main([*arguments, *out]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "0"], "--tokens: got '0', expected a whole number of at least 1"),
        (["--d-ff", "1e3"], "--d-ff: got '1e3', expected a whole number of at least 1"),
        (["--rounds", "none"], "--rounds: got 'none', expected a whole number of at least 1"),
        (["--density", "half"], "--density: invalid float value: 'half'"),
        (["--resume", "--overwrite"], "not allowed with argument --resume"),
    ],
)
def test_numbers_that_the_command_refuses(arguments, message, capsys):
    with pytest.raises(SystemExit) as refused:
        command.main(["run", "mlp", *arguments])
    assert refused.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("threshold", ["-0.1", "nan", "much"])
def test_a_threshold_that_compares_nothing_is_refused(threshold, tmp_path, capsys):
    with pytest.raises(SystemExit):
        command.main(["compare", str(tmp_path), str(tmp_path), f"--threshold={threshold}"])
    assert f"--threshold: got '{threshold}', expected a number of at least 0" in capsys.readouterr().err


def test_a_file_is_no_folder_for_results(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert command.main([*TINY, "--out", str(tmp_path / "file")]) == 2
    assert "which is a file, expected a folder" in capsys.readouterr().err


TINY = [
    "run",
    "norm",
    "--op",
    "routed_rms_norm",
    "--tokens",
    "8",
    "--d-model",
    "4",
    "--no-compiled",
    "--rounds",
    "2",
]


def test_what_was_measured_is_not_overwritten_unasked(tmp_path, capsys):
    arguments = [*TINY, "--out", str(tmp_path)]
    assert command.main(arguments) == 0
    assert (
        "No targets: they are set for the cases that `python -m bench list norm` names"
        in capsys.readouterr().out
    )
    before = (tmp_path / "norm.csv").read_text()
    assert command.main(arguments) == 2
    said = capsys.readouterr().err
    assert "norm.json has 1 case already: --resume goes on with them, --overwrite replaces them" in said
    assert command.main([*arguments, "--resume"]) == 0
    assert "norm.json has all of 1 case: nothing is left to time" in capsys.readouterr().err
    assert (tmp_path / "norm.csv").read_text() == before
    more = [*arguments, "--resume", "--tokens", "8", "9"]
    assert command.main(more) == 0
    assert "norm.json has 1 of 2 cases: 1 to go" in capsys.readouterr().err
    assert len(Run.load(tmp_path / "norm.json").cases) == 2
    assert command.main([*arguments, "--overwrite"]) == 0
    assert len(Run.load(tmp_path / "norm.json").cases) == 1


def test_an_interrupted_command_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    measured = runner.measure

    def measure(plan, *rest):
        if plan.axes["tokens"] == 9:
            raise KeyboardInterrupt
        return measured(plan, *rest)

    monkeypatch.setattr(runner, "measure", measure)
    assert command.main([*TINY, "--out", str(tmp_path), "--tokens", "8", "9"]) == 130
    assert "interrupted: 1 of 2 cases are kept; the same command with --resume" in capsys.readouterr().err
    assert list(Run.load(tmp_path / "norm.json").cases)
    monkeypatch.setattr(runner, "measure", measured)
    assert command.main([*TINY, "--out", str(tmp_path), "--tokens", "8", "9", "--resume"]) == 0
    assert len(Run.load(tmp_path / "norm.json").cases) == 2


def test_an_interrupt_before_the_first_case_leaves_nothing(tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(machine, "ceilings", interrupted)
    assert command.main([*TINY, "--out", str(tmp_path)]) == 130
    assert "interrupted before the first case was done" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_help_explains_every_value_once(capsys):
    with pytest.raises(SystemExit):
        command.main(["run", "--help"])
    said = capsys.readouterr().out
    for value in (*TABLES, *SITES):
        assert sum(line.startswith(f"  {value} ") for line in said.splitlines()) == 1
    assert all(dtype in said for dtype in DTYPES)


def test_a_run_without_a_sweep_has_no_plots(tmp_path, capsys):
    assert command.main([*TINY, "--out", str(tmp_path)]) == 0
    assert command.main(["plot", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "norm.csv: nothing to plot: a curve needs two cases that differ in density or tokens alone" in said


def test_passes_and_rates_are_explained(tmp_path, capsys):
    runner.run("linear", [plan_of()], 2, CPU, tmp_path)
    said = capsys.readouterr().out
    assert "  full: forward and backward\n" in said
    assert " useful TFLOP/s" in said


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_names_cases_whole(monkeypatch):
    name = "a very long name of a case, " * 8
    for stream, wanted in ((io.StringIO(), f"[1/2] {name}\n  making\n"), (Terminal(), None)):
        monkeypatch.setattr("sys.stderr", stream)
        progress.case(name, 1, 2)
        progress.stage("making")
        progress.step("checking " + name)
        if wanted is None:
            assert f"[1/2] {name}\n" in stream.getvalue()
            assert "\r\033[K  making\r\033[K  checking a very" in stream.getvalue()
            assert len(stream.getvalue().rpartition("\033[K")[2]) < 80
        else:
            assert stream.getvalue() == wanted


@pytest.mark.parametrize(
    ("command", "first"),
    [
        (["-m", "bench", "list"], "python -m bench: loading PyTorch and gradroute"),
        (["examples/demo.py", "--out", "{folder}"], "demo: loading PyTorch, transformers and gradroute"),
    ],
)
def test_a_command_is_there_before_its_imports(command, first, tmp_path):
    """And an interrupt while it imports ends it without a traceback, whatever an import does with it."""
    (tmp_path / "torch.py").write_text(
        "import os, signal\n"
        "try:\n    os.kill(os.getpid(), signal.SIGINT); input()\nexcept BaseException:\n    pass\n"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [part.format(folder=tmp_path) for part in command]
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 130
    said = (done.stdout + done.stderr).splitlines()
    assert said[0] == first
    assert said[-1].partition(";")[0].endswith(": interrupted")
    assert len(said) <= 3


def test_ceilings_of_slow_dtypes_take_no_minutes(monkeypatch):
    shapes = []

    def rate(device, dtype, shape):
        shapes.append(shape)
        return 1e-3  # a thousandth of what fp32 has

    monkeypatch.setattr(machine, "_product_rate", rate)
    monkeypatch.setattr(machine, "GEMM_SHAPES", {"cpu": ((2048, 2048, 2048), (64, 64, 64))})
    assert machine.gemm_rate(CPU, torch.float16) == 1e-3
    assert shapes == [machine.PROBE, (512, 512, 512), (64, 64, 64)]
    seconds = 2 * 512**3 / 1e-3 / 1e12
    assert seconds < machine.MOST_SECONDS < 8 * seconds


def test_ceilings_are_the_highest_rates(monkeypatch):
    monkeypatch.setattr(machine, "gemm_rate", lambda *_: 2.0)
    monkeypatch.setattr(machine, "copy_rate", lambda *_: 3.0)
    found = machine.ceilings(CPU, ["float32"])
    assert found == {"copy": 3.0, "gemm": {"float32": 2.0}}
    other = {"copy": 1.0, "gemm": {"float32": 5.0, "bfloat16": 1.0}}
    assert machine.higher(found, other) == {"copy": 3.0, "gemm": {"float32": 5.0, "bfloat16": 1.0}}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_group_for_cuda_needs_one(capsys):
    assert command.main(["run", "h200"]) == 2
    assert "torch sees no CUDA device here" in capsys.readouterr().err


@pytest.mark.gpu
def test_suites_run_on_a_gpu(monkeypatch, tmp_path):
    """Clocks, memory, rivals and limits of the suite h200 less its model, in small."""
    monkeypatch.undo()
    small = {"tokens": 160, "d_model": 64, "d_ff": 192, "dtype": "float32"}
    monkeypatch.setitem(suites.BASE_POINTS, "cuda", small)
    shape = attention_cases.SHAPES["cuda"]._replace(batch=1, length=256)
    monkeypatch.setitem(attention_cases.SHAPES, "cuda", shape)
    options = ops.Options(torch.device("cuda"))
    plans = suites.limit_plans(options) + suites.suite_plans("launch", options)
    plans += suites.suite_plans("attention", options) + suites.suite_plans("norm", options)[:2]
    done = runner.run("small", plans, 2, options.device, tmp_path)
    assert done.failures() == []
    assert all(done.modes(name) for name in done.cases)
    assert done.figure("route_grad, 3.7% of tokens", "triton", FORWARD, "memory").p50 == 0


@pytest.mark.slow
def test_a_group_names_what_this_machine_lacks(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(model, "why_missing", lambda: "transformers is not installed")
    cases = lambda options: [plan_of(), *suites.suite_plans("model", options)]  # noqa: E731
    monkeypatch.setitem(suites.GROUPS, "cpu", ("cpu", cases))
    assert command.main(["run", "cpu", "--rounds", "2", "--out", str(tmp_path)]) == 0
    missing = Run.load(tmp_path / "cpu.json").description["missing"]
    assert missing == {"model": "transformers is not installed"}
    assert "model is missing: transformers is not installed" in capsys.readouterr().out


def test_the_command_lists_suites_and_cases(capsys):
    assert command.main(["list"]) == 0
    assert capsys.readouterr().out.split()[: len(suites.SUITES)] == list(suites.SUITES)
    assert command.main(["list", "cpu"]) == 0
    assert "linear       linear, one token in 16 may not update\n" in capsys.readouterr().out
