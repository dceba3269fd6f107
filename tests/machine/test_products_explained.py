"""Linear layers and MLPs say how their backward makes its products, by the very rule that makes them."""

import inspect

import pytest
import torch

from gradroute import LinearSites, MLPSites, Routes, gated_mlp, linear, mlp, testing, use_backend
from gradroute.machine import answers
from gradroute.machine.answers import MEASURED, SHIPPED
from gradroute.skipping import mlp as skipping
from gradroute.skipping import rule
from gradroute.tables import localize

CPU = torch.device("cpu")
D_MODEL, D_FF = 4, 16
MODULES = {"routed_linear": linear, "routed_mlp": mlp, "routed_gated_mlp": gated_mlp}
PRODUCTS = {module: name for name, module in rule.PRODUCTS.items()}
every_op = pytest.mark.parametrize("op", MODULES)


def call_of(op, tokens=512, *, sites=None, **options):
    """A call of two routes, the second of which has a quarter of the features."""
    call = testing.sample(op, tokens=tokens, sizes=testing.Sizes(d_model=D_MODEL, d_ff=D_FF), sites=())
    return call.with_routes(routes_of(tokens, **options)).with_sites(sites or sites_of(op, 2))


def sites_of(op, num_routes):
    table = localize(num_routes, D_FF, {1: slice(0, 4)})
    return LinearSites(output=table) if op == "routed_linear" else MLPSites(hidden=table, update=table)


def routes_of(tokens, num_routes=2, strength=None):
    return Routes.of(torch.arange(tokens) % 2, num_routes, strength=strength)


def explained(call, **options):
    return MODULES[call.op].explain(
        **call.tensors, routes=call.routes, sites=call.sites, **call.keywords, **options
    )


def forms(call, **options):
    return {product.form for product in explained(call, **options).products.values()}


@every_op
def test_it_takes_the_arguments_of_the_call(op):
    own = inspect.signature(MODULES[op].explain).parameters
    assert list(own.values()) == list(inspect.signature(getattr(MODULES[op], op)).parameters.values())


@every_op
def test_rectangles_are_explained_with_what_is_left(op):
    for product in explained(call_of(op)).products.values():
        assert (product.form, product.evidence) == ("rectangles", SHIPPED)
        assert product.work == pytest.approx(5 / 8)
        assert product.run == rule.RUN
        assert product.reason == "masks leave 62.5% of the work, with 256 tokens a rectangle on average"


@pytest.mark.parametrize("op", ["routed_mlp", "routed_gated_mlp"])
@pytest.mark.parametrize("tokens", [512, 64, 0])
def test_what_is_explained_is_what_the_backward_does(op, tokens, monkeypatch):
    taken, original = [], skipping.rectangles

    def recorded(*args):
        taken.append(original(*args))
        return taken[-1]

    monkeypatch.setattr(skipping, "rectangles", recorded)
    call = call_of(op, tokens)
    call.run("torch")
    (parts,) = taken
    assert bool(parts) == (forms(call) == {"rectangles"}) == (tokens == 512)


REASONS = {
    "too few tokens": (
        {"tokens": 100},
        "rectangles would have 50 tokens on average, and they pay from 64 on",
    ),
    "no tokens": ({"tokens": 0}, "there are no tokens"),
    "a strength": ({"strength": 0.5}, "a strength blends the rows of the tables"),
    "many routes": ({"num_routes": 65}, "there are more than 64 routes"),
}


@every_op
@pytest.mark.parametrize("case", REASONS)
def test_products_that_are_made_whole_say_why(op, case):
    options, reason = REASONS[case]
    call = call_of(op, **options)
    if case == "many routes":
        call = call.with_sites(sites_of(op, 65))
    for product in explained(call).products.values():
        assert (product.form, product.work) == ("whole", 1.0)
        assert reason in product.reason


@every_op
def test_little_to_save_is_said_in_figures(op):
    whole = [[0.5], [1.0]]
    sites = LinearSites(output=whole) if op == "routed_linear" else MLPSites(hidden=whole)
    for product in explained(call_of(op, sites=sites)).products.values():
        assert product.reason == "masks leave 100.0% of the work, and rectangles pay from 95.0% down"
        # An MLP takes whole products in runs too; a linear layer's are one call.
        assert product.run == (None if op == "routed_linear" else rule.RUN)


@every_op
def test_a_rule_by_which_rectangles_never_pay_is_said_in_words(op):
    never = {f"rectangles/{name}/float32": {"min_saving": 2.0, "min_tokens": 1} for name in rule.PRODUCTS}
    with answers.trying(torch.device("cpu"), never):
        for product in explained(call_of(op)).products.values():
            assert "of the work, and rectangles never pay" in product.reason


@every_op
@pytest.mark.parametrize("is_compiled", [False, True])
def test_products_are_grouped_where_the_host_knows_no_counts(op, is_compiled, monkeypatch):
    call = call_of(op)
    if is_compiled:
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    else:
        monkeypatch.setattr(call.routes, "host_counts", None)
    for product in explained(call, backend="torch").products.values():
        assert (product.form, product.run, product.evidence) == ("grouped", None, SHIPPED)
        assert product.work == pytest.approx(
            3 / 4
        )  # half of two tiles of 8, of which four features are masked
        assert product.reason == (
            "masks leave 75.0% of the work where routes have as many tokens; how many, the device alone knows"
        )


UNGROUPED = {
    "a strength": ({"strength": 0.5}, "a strength blends the rows of the tables"),
    "many routes": ({"num_routes": 65}, "there are more than 64 routes"),
}


@every_op
@pytest.mark.parametrize("case", UNGROUPED)
def test_products_without_counts_that_are_made_whole_say_why(op, case, monkeypatch):
    options, reason = UNGROUPED[case]
    call = call_of(op, **options, **({"sites": sites_of(op, 65)} if case == "many routes" else {}))
    monkeypatch.setattr(call.routes, "host_counts", None)
    for product in explained(call).products.values():
        assert (product.form, product.work) == ("whole", 1.0)
        assert reason in product.reason


@every_op
def test_measured_rules_for_grouped_products_are_followed(op, monkeypatch):
    call, question = call_of(op), f"grouped/{PRODUCTS[op]}/float32"
    monkeypatch.setattr(call.routes, "host_counts", None)
    for threshold, reason in (
        (
            0.3,
            "masks leave 75.0% of the work where routes have as many tokens, and grouping pays from 70.0% down",
        ),
        (2.0, "masks leave 75.0% of the work, and grouping never pays"),
    ):
        with answers.trying(CPU, {question: threshold}):
            for product in explained(call).products.values():
                assert (product.form, product.evidence, product.reason) == ("whole", MEASURED, reason)


REFUSALS = {
    (9, 0): {torch.bfloat16: None, torch.float16: rule.NOT_BF16},
    (10, 3): {torch.bfloat16: None, torch.float32: rule.NOT_BF16},
    (8, 0): {torch.bfloat16: rule.NOT_HOPPER},
    (12, 0): {torch.bfloat16: rule.NOT_HOPPER},
}


@pytest.mark.parametrize("capability", REFUSALS)
def test_devices_for_which_torch_would_wait_are_refused(capability, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    for dtype, refusal in REFUSALS[capability].items():
        assert rule.why_not_grouped(torch.device("cuda", 0), dtype) == refusal


class OnCuda:
    """Routes of a CUDA device that is not there, which the host has not counted."""

    device = torch.device("cuda", 0)
    strength = host_counts = None
    num_routes = 2


def test_refusals_of_cuda_devices_are_explained(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    sites = call_of("routed_gated_mlp").sites.effective
    with answers.trying(OnCuda.device, {}):
        decisions = [
            rule.decide("gated_mlp", skipping.MLPProduct(sites, *widths), OnCuda, dtype)
            for widths, dtype in (
                ((16, 8), torch.bfloat16),
                ((16, 12), torch.bfloat16),
                ((16, 8), torch.float16),
            )
        ]
    assert [decision.form for decision in decisions] == ["grouped", "whole", "whole"]
    assert rule.NOT_ALIGNED in decisions[1].reason
    assert rule.NOT_BF16 in decisions[2].reason


@every_op
def test_without_routes_or_on_the_reference_nothing_is_left_out(op):
    plan = explained(call_of(op).with_routes(None))
    assert (plan.backend, plan.reason) == ("torch", "nothing is masked, so that it is PyTorch's own op")
    assert {product.form for product in plan.products.values()} == {"whole"}
    with use_backend("reference"):
        plan = explained(call_of(op))
    assert (plan.backend, plan.reason) == ("reference", "it was asked for")
    assert {product.form for product in plan.products.values()} == {"whole"}


def test_a_linear_layer_explains_each_of_its_products():
    sites = LinearSites(update_rows=localize(2, D_FF, {1: slice(0)}))
    products = explained(call_of("routed_linear", sites=sites)).products
    assert (products["dx"].form, products["dW"].form) == ("whole", "rectangles")
    assert products["dW"].work == 0.5


@every_op
def test_a_measured_rule_changes_the_form_and_is_said_to_be(op):
    call, product = call_of(op), PRODUCTS[op]
    rectangles = f"rectangles/{product}/float32"
    assert forms(call) == {"rectangles"}
    for changed in ({"min_saving": 0.5, "min_tokens": 1}, {"min_saving": 0.0, "min_tokens": 257}):
        with answers.trying(CPU, {rectangles: changed}):
            assert forms(call) == {"whole"}
            for each in explained(call).products.values():
                assert (each.evidence, each.run_evidence) == (MEASURED, None if each.run is None else SHIPPED)
            blended = explained(call_of(op, strength=0.5)).products.values()
            assert {each.evidence for each in blended} == {SHIPPED}
    with answers.trying(CPU, {rectangles: {"min_saving": 0.0, "min_tokens": 25}}):
        assert forms(call_of(op, tokens=50)) == {"rectangles"}


@every_op
def test_a_measured_run_changes_how_many_tokens_are_taken_at_once(op, monkeypatch):
    call, lengths = call_of(op), []
    original = Routes._at

    def recorded(routes, tokens):
        found = original(routes, tokens)
        lengths.append(len(found))
        return found

    monkeypatch.setattr(Routes, "_at", recorded)
    with answers.trying(CPU, {f"run/{PRODUCTS[op]}/float32": 100}):
        for product in explained(call).products.values():
            assert (product.run, product.run_evidence, product.evidence) == (100, MEASURED, SHIPPED)
        call.assert_within_budget("torch")
    assert lengths == [100, 100, 56, 100, 100, 56]


@every_op
def test_an_answer_for_another_product_or_dtype_changes_nothing(op):
    others = {f"rectangles/{name}/float32": {"min_saving": 2.0, "min_tokens": 1} for name in rule.PRODUCTS}
    del others[f"rectangles/{PRODUCTS[op]}/float32"]
    others[f"rectangles/{PRODUCTS[op]}/bfloat16"] = {"min_saving": 2.0, "min_tokens": 1}
    with answers.trying(CPU, others):
        assert forms(call_of(op)) == {"rectangles"}
        assert {each.evidence for each in explained(call_of(op)).products.values()} == {SHIPPED}


def test_rules_of_cuda_devices_are_for_them():
    cuda = torch.device("cuda", 0)
    with answers.trying(cuda, {}):
        assert rule.rule_of("mlp", cuda, torch.bfloat16) == (0.1, 2048, None, SHIPPED, None)
    with answers.trying(cuda, {"rectangles/mlp/bfloat16": {"min_saving": 0.2, "min_tokens": 512}}):
        assert rule.rule_of("mlp", cuda, torch.bfloat16) == (0.2, 512, None, MEASURED, None)


def test_devices_without_rules_make_products_whole():
    routes = Routes.of(torch.arange(4, device="meta") % 2, 2, validate=False)
    decision = rule.decide("mlp", None, routes, torch.float32)
    assert (decision.form, decision.reason) == ("whole", rule.ELSEWHERE)
