"""The benchmarks of ops: rivals compute the same, what is wrong is not timed, ratios are those of the same rounds."""

import dataclasses
import functools
import json
import math

import cases
import pytest
import torch

from bench import __main__ as command
from bench import attention_cases, launch, memory, model, ops, rivals, runner, suites, timing, work
from bench.cases import BACKWARD, FORWARD, FULL, Case, Limit, Plan, Variant, Work
from bench.results import MISSED, NOT_MEASURED, REACHED, RELATIVE, Figure, Run, limit_text
from bench.settings import ACTIVATION_SITES, SITES, TABLES, UPDATE_SITES, Setting, make_routes, samples
from gradroute import Routes, backends, testing
from gradroute.backends import native

pytestmark = [
    pytest.mark.skipif(native.module is None, reason=str(native.load_error)),
    pytest.mark.usefixtures("quick_bench"),
]

CPU = torch.device("cpu")
EAGER = ops.Options(CPU, with_compiled=False)
OPS = tuple(ops.SUITE_OF)


def setting_of(op, **values):
    """Small, and with an odd number of everything."""
    return suites.with_sites(Setting(op, **({"tokens": 37, "d_model": 20, "d_ff": 72} | values)))


# --- what there is


def test_every_op_is_in_a_suite():
    assert {*ops.SUITE_OF, "routed_attention"} == set(backends.OPS) == set(testing.OPS)
    assert set(ACTIVATION_SITES) | set(UPDATE_SITES) == set(ops.SUITE_OF)


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
    assert call.routes.ids.unique().tolist() == list(range(len(weights)))


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
        ({"dtype": "float31"}, "dtype: got 'float31'"),
        ({"share": 1.5}, "share: got 1.5, expected a share"),
        ({"tokens": 0}, "tokens: got 0"),
        ({"order": "random"}, "order: got 'random'"),
        ({"strength": "tokens"}, "strength: got 'tokens'"),
    ],
)
def test_values_that_an_axis_has_not(values, message):
    with pytest.raises(ValueError, match=message):
        ops.plan(setting_of("routed_linear", **values), EAGER)


# --- rivals


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("sites", cases.tiered(SITES))
@pytest.mark.parametrize("tables", cases.tiered(["block", "interval", "fractional", "negative"]))
def test_every_way_of_an_op_is_right(op, sites, tables):
    setting = setting_of(op, sites=sites, tables=tables)
    if not setting.site_names:
        setting = setting._replace(sites="update" if op in UPDATE_SITES else "activation")
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
        (["run", "model", "--density", "0.5"], "density: the suite model has no such axis"),
        (["run", "cpu", "--tokens", "5"], "tokens: the group cpu has cases of its own"),
        (["run", "linear", "--case", "no such"], "case: got 'no such'"),
        (["run", "linear", "--op", "routed_mlp"], "op: got routed_mlp, expected one of routed_linear"),
        (["run", "norm", "--sites", "both"], "sites: got 'both', which routed_rms_norm has not"),
        (["run", "linear", "--device", "meta"], "device: got 'meta', expected cpu or cuda"),
        (["run", "linear", "--device", "cuda:1"], "device: got 'cuda:1', expected cpu or cuda"),
        (["list", "nothing"], "suite: got 'nothing'"),
    ],
)
def test_what_the_command_refuses(arguments, message, tmp_path, capsys):
    out = ["--out", str(tmp_path)] if arguments[0] == "run" else []
    assert command.main([*arguments, *out]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


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
