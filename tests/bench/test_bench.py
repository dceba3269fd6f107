"""The benchmarks of ops: suites and settings are what they say, rivals compute the same, and work is counted."""

import math

import cases
import pytest
import torch
from bench_cases import CPU, EAGER, OPS, setting_of

from bench import (
    op_table,
    ops,
    rivals,
    runner,
    suites,
    work,
)
from bench.cases import BACKWARD, FORWARD, FULL, Variant, Work
from bench.results import NOT_MEASURED
from bench.settings import SITES, TABLES, make_routes, samples
from gradroute import Routes, backends, testing
from gradroute.backends import native

pytestmark = [
    pytest.mark.skipif(native.module is None, reason=str(native.load_error)),
    pytest.mark.usefixtures("quick_bench"),
]


def test_every_op_is_in_a_suite():
    assert {*op_table.OPS, "routed_attention"} == set(backends.OPS) == set(testing.OPS)
    assert all(op.activation or op.update for op in op_table.OPS.values())


# These change no byte that an op reads or writes, and the axis of activation sites has `hidden` in their place.
SITES_WITHOUT_COST = {name: {"pre", "forward"} for name in ("routed_activation", "routed_glu")}


@pytest.mark.parametrize("name", op_table.OPS)
def test_every_site_of_an_op_is_known(name):
    """A site that the table does not name would be counted as one that leaves all the work."""
    op = op_table.OPS[name]
    of_products = {site for groups in op.backward for group in groups for site in group}
    of_parameters = {site for sites in op.updates.values() for site in sites if site}
    known = {*op.activation, *op.update, *of_products, *of_parameters}
    assert known | SITES_WITHOUT_COST.get(name, set()) == set(testing.site_names(name))


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
