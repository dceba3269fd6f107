"""The questions that `python -m gradroute tune` asks, with a clock that is told the times."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from tune_cases import CPU, EFFORT, SMALL, clock, small

from gradroute import backends, gated_mlp, linear, mlp, testing
from gradroute.backends import attention_plan, native
from gradroute.machine import answers
from gradroute.machine.tune import measuring, of_attention, of_kernels, of_products, workloads
from gradroute.machine.tune.measuring import Measuring
from gradroute.machine.tune.questions import questions
from gradroute.machine.tune.workloads import call_of
from gradroute.skipping import rule, tiling

__all__ = ["small"]
pytestmark = pytest.mark.usefixtures("small")
WHOLE = EFFORT._replace(is_quick=False)


def asked(name, device=CPU):
    """The question of this name."""
    (question,) = questions(device, WHOLE, [name])
    return question


def tokens_of(trial):
    """How many tokens a rectangle has that a trial times: one a route."""
    return len(trial.step.call.routes) // of_products.ROUTES


def saved_by(trial):
    """The share of the features that a trial's table leaves out."""
    (table, *_) = trial.step.call.tables.values()
    return 1 - table.density


def is_rectangles(trial):
    return trial.answers[next(iter(trial.answers))] == of_products.ALWAYS


@pytest.mark.parametrize("product", rule.PRODUCTS)
def test_rectangles_pay_from_where_they_are_faster_on(product, monkeypatch):
    """Here from a fifth of the work, and from 32 tokens a rectangle on."""

    def seconds(trial):
        tokens, saved = tokens_of(trial), saved_by(trial)
        pays = tokens >= 32 if saved == 0.75 else saved > 0.15
        return 1.0 if is_rectangles(trial) == pays else 2.0

    clock(monkeypatch, seconds)
    question = asked(f"rectangles/{product}/float32")
    outcome = question.measure(Measuring(CPU, WHOLE))
    assert outcome.answer == {"min_saving": 0.2, "min_tokens": 32}
    assert outcome.measured["20% saved: rectangles"]["ratio"] == 1.0
    assert outcome.measured["20% saved: whole"]["ratio"] == 2.0
    assert outcome.measured["8 tokens a rectangle: rectangles"]["ratio"] == 2.0
    assert outcome.left_out == {}


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (lambda trial: 1.0, {"min_saving": 0.05, "min_tokens": 64}),
        (lambda trial: 1.0 if is_rectangles(trial) else 2.0, {"min_saving": 0.02, "min_tokens": 8}),
        (lambda trial: 2.0 if is_rectangles(trial) else 1.0, {"min_saving": 2.0, "min_tokens": 1 << 30}),
    ],
)
def test_rectangles_stay_as_shipped_or_are_made_always_or_never(seconds, expected, monkeypatch):
    clock(monkeypatch, seconds)
    assert asked("rectangles/mlp/float32").measure(Measuring(CPU, WHOLE)).answer == expected


def test_rectangles_that_are_wrong_are_never_made(monkeypatch):
    """However fast they are: the rule then has a threshold that nothing reaches."""
    original = rule._decide_by_counts

    def forgetful(groups, routes, found):
        groups.groups[0].spans = ()
        return original(groups, routes, found)

    monkeypatch.setattr(rule, "_decide_by_counts", forgetful)
    clock(monkeypatch, lambda trial: 1e-9 if is_rectangles(trial) else 1.0)
    outcome = asked("rectangles/mlp/float32").measure(Measuring(CPU, WHOLE))
    assert outcome.answer == {"min_saving": of_products.NEVER_SAVED, "min_tokens": of_products.NEVER_TOKENS}
    assert "error" in outcome.left_out["5% saved: rectangles"]


@pytest.mark.parametrize("saving", of_products.SAVINGS)
def test_tables_leave_out_the_share_that_is_asked_for_in_a_block_of_each_route(saving):
    table = of_products.without_part(1000, saving)
    assert 1 - table.density == pytest.approx(saving, abs=1e-3)
    assert len({tuple(row) for row in table.weights.tolist()}) == of_products.ROUTES


@pytest.mark.parametrize("product", rule.PRODUCTS)
def test_trials_make_the_forms_that_they_are_said_to_make(product):
    """The counts of parts that a trial's backward takes, at the smallest saving and the fewest tokens."""
    question = asked(f"rectangles/{product}/float32")
    for tokens, table in (
        (32, of_products.quarters(16)),
        (64, of_products.without_part(16, 0.02)),
    ):
        trials = question.trials(
            Measuring(CPU, WHOLE), tokens, table, {"r": of_products.ALWAYS, "w": of_products.NEVER}
        )
        for name, form in (("r", "rectangles"), ("w", "whole")):
            for trial in trials[name]:
                with answers.trying(CPU, trial.answers):
                    assert forms_of(trial.step.call) == {form}


@pytest.mark.parametrize("product", rule.PRODUCTS)
def test_grouped_products_pay_from_where_they_are_faster_on(product, monkeypatch):
    """Here from half of the work on, and every trial makes the form that it is said to make."""

    def seconds(trial):
        is_grouped = trial.answers[next(iter(trial.answers))] == 0.0
        with answers.trying(CPU, trial.answers):
            assert forms_of(trial.step.call) == {"grouped" if is_grouped else "whole"}
        return 1.0 if is_grouped == (saved_by(trial) > 0.4) else 2.0

    monkeypatch.setattr(tiling, "ALIGNMENT", 1)
    clock(monkeypatch, seconds)
    question = of_products.Grouped(product, CPU, torch.float32)
    outcome = question.measure(Measuring(CPU, WHOLE))
    assert outcome.answer == 0.5
    assert outcome.measured["50% saved: whole"]["ratio"] == 2.0
    answers.parsed(question.name, outcome.answer)


def forms_of(call):
    module = {"routed_linear": linear, "routed_mlp": mlp, "routed_gated_mlp": gated_mlp}[call.op]
    plan = module.explain(**call.tensors, routes=call.routes, sites=call.sites, **call.keywords)
    return {product.form for product in plan.products.values()}


@pytest.mark.parametrize("product", rule.PRODUCTS)
def test_the_fastest_run_is_taken(product, monkeypatch):
    monkeypatch.setattr(of_products, "RUNS", (16, 32, 128))
    question = asked(f"run/{product}/float32")
    clock(monkeypatch, lambda trial: {rule.RUN: 1.0, 32: 0.8, 16: 0.99}[trial.answers[question.name]])
    outcome = question.measure(Measuring(CPU, WHOLE))
    assert outcome.answer == 32
    assert set(outcome.measured) == {f"{rule.RUN} tokens", "16 tokens", "32 tokens"}


def test_the_fastest_tiles_are_taken(monkeypatch):
    question = asked("tiles/float32")
    clock(monkeypatch, lambda trial: 0.5 if trial.answers[question.name]["rows"] == 128 else 1.0)
    assert question.measure(Measuring(CPU, WHOLE)).answer == {"rows": 128, "keys": 256}
    clock(monkeypatch, lambda trial: 1.0)
    outcome = question.measure(Measuring(CPU, WHOLE))
    assert outcome.answer == question.shipped
    assert next(iter(outcome.measured)) == "384 × 512"


@pytest.fixture
def with_triton(monkeypatch):
    """Triton's interpreter as a backend that the automatic choice has on the CPU."""
    if "triton" not in backends.available_backends(device="cpu"):
        pytest.skip("triton does not run here")
    monkeypatch.setattr(backends, "candidates", lambda op, x: ("triton", "torch"))


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (0.5, attention_plan.SKIP_BELOW),  # as shipped
        (0.25, 0.5),  # the next larger share, at which they were slower
        (1.0, 1.0),
        (-1.0, of_attention.NEVER),
    ],
)
def test_own_attention_is_taken_below_the_share_where_it_is_faster(limit, expected, with_triton, monkeypatch):
    def seconds(trial):
        (table,) = trial.step.func.__self__.tables.values()
        is_own = trial.step.args[0] is None
        assert trial.answers == ({"skip_below/float32": of_attention.ALWAYS} if is_own else {})
        return 1.0 if is_own == (table.density <= limit) else 2.0

    clock(monkeypatch, seconds)
    monkeypatch.setattr(measuring.Judged, "check", lambda *_, **__: None)
    assert asked("skip_below/float32").measure(Measuring(CPU, WHOLE)).answer == expected


def test_masks_leave_the_share_of_attention_that_is_asked_for():
    for share in of_attention.SHARES:
        call = of_attention.with_share(
            share, SMALL[1]._replace(widths=testing.Sizes(heads=16)), torch.float32, CPU, 0
        )
        left = attention_plan.remaining_work(call.routes, call.sites.effective)
        assert left == pytest.approx(share, abs=1 / 32)


def test_vendors_are_ranked_and_one_that_does_not_run_the_call_is_left_out(monkeypatch):
    """The kernels of a GPU do not run here: what they do is told, as are their times."""
    names = ("flash", "cudnn", "efficient")
    question = of_attention.Vendors(torch.float32, "torch", names)
    plan = attention_plan.Plan("torch", "flash", "vendor", "efficient: it has no such mask")

    def planned(call, backend):
        (first,) = answers.vendors(CPU, torch.float32)
        return plan._replace(vendor=first if first != "efficient" else "flash")

    monkeypatch.setattr(of_attention, "_plan", planned)
    clock(monkeypatch, lambda trial: {"flash": 1.0, "cudnn": 0.5}[trial.answers[question.name][0]])
    outcome = question.measure(Measuring(CPU, WHOLE))
    assert outcome.answer == ["cudnn", "flash"]
    assert outcome.left_out == {
        "efficient": "AssertionError: it does not run the call: efficient: it has no such mask"
    }


def test_questions_of_a_gpu_are_about_what_it_can_run(monkeypatch):
    """On a GPU that is not there, with a native module that has CUDA kernels."""
    monkeypatch.setattr(native, "why_not", lambda name: None)
    monkeypatch.setattr(of_kernels, "questions", lambda *_: iter(()))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    cuda = torch.device("cuda", 0)
    with FakeTensorMode():
        found = questions(cuda, WHOLE)
    kinds = [question.name.split("/")[0] for question in found]
    assert set(kinds) == {"backends", "vendors", "skip_below", "rectangles", "grouped"}
    grouped = [question.name for question in found if question.name.startswith("grouped/")]
    assert grouped == [f"grouped/{product}/bfloat16" for product in rule.PRODUCTS]
    dtypes = list(dict.fromkeys(question.name.split("/")[-1] for question in found))
    assert dtypes == ["bfloat16", "float16", "float32"]
    for question in found:
        answers.parsed(question.name, question.shipped)
    (vendors,) = [question for question in found if question.name == "vendors/bfloat16"]
    assert sorted(vendors.shipped) == ["cudnn", "efficient", "flash"]


@pytest.mark.slow
def test_the_fastest_launch_that_is_right_is_taken(with_triton, monkeypatch):
    launch = pytest.importorskip("gradroute.kernels.launch")
    shipped = launch.shipped_config("masked_product_kernel", CPU)
    other, wrong = shipped | {"BLOCK_T": 4}, shipped | {"BLOCK_T": 2}
    monkeypatch.setattr(of_kernels, "short_list", lambda entry, device: [shipped, other, wrong])
    question = asked("launch/masked_product_kernel")
    assert question.op == "route_grad"
    check = measuring.Judged.check

    def fails(judged, *args, **kw):
        if answers.launch("masked_product_kernel", CPU) == wrong:
            raise RuntimeError("out of resources")
        check(judged, *args, **kw)

    monkeypatch.setattr(measuring.Judged, "check", fails)
    times = {shipped["BLOCK_T"]: 1.0, 4: 0.5, 2: 1e-9}
    clock(monkeypatch, lambda trial: times[trial.answers[question.name]["BLOCK_T"]])
    outcome = question.measure(Measuring(CPU, WHOLE))
    assert outcome.answer == other
    assert list(outcome.left_out.values()) == ["RuntimeError: out of resources"]


def test_the_launches_of_every_op_are_found_by_running_it(with_triton):
    for op, entries in {
        "route_grad": ["masked_product_kernel"],
        "routed_linear": ["masked_product_kernel"],
        "routed_glu": ["glu_bwd_kernel"],
    }.items():
        call = call_of(op, SMALL[0], torch.float32, CPU, 0)
        assert of_kernels.asked_by(call, CPU) == entries


@pytest.mark.slow
def test_calls_of_several_kinds_ask_for_more_kernels(with_triton):
    """What an op masks decides which of its kernels are launched."""
    found = {}
    for op in ("routed_linear", "routed_attention"):
        found[op] = [
            set(of_kernels.asked_by(call_of(op, SMALL[0], torch.float32, CPU, 0, **options), CPU))
            for options in workloads.kinds_of_calls(op)
        ]
    assert found["routed_linear"][1] > found["routed_linear"][0]
    assert set.union(*found["routed_attention"]) > found["routed_attention"][0]


def test_a_kernel_without_a_short_list_is_not_asked_about(with_triton, monkeypatch):
    launch = pytest.importorskip("gradroute.kernels.launch")
    monkeypatch.setattr(
        of_kernels, "short_list", lambda entry, device: [launch.shipped_config(entry, device)]
    )
    monkeypatch.setattr(of_kernels.backends, "OPS", {"route_grad": backends.OPS["route_grad"]})
    assert list(of_kernels.questions(CPU, torch.float32, WHOLE)) == []


def test_results_are_judged_by_the_budget_and_by_their_bits(monkeypatch):
    judged = measuring.Judged(call_of("routed_linear", SMALL[1], torch.float32, CPU, 0))
    judged.check("torch")
    results = iter(
        [judged.call.run("torch"), judged.call.with_upstream(judged.call.upstream * 2).run("torch")]
    )
    monkeypatch.setattr(testing.Sample, "run", lambda *_: next(results))
    with pytest.raises(AssertionError, match="run again: dx"):
        judged.check("torch")
