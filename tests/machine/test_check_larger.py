"""What `python -m gradroute check` finds in larger sizes and in calls of other forms: mutants that are wrong there."""

import functools
import sys

import broken_kernels
import pytest
import torch
from cases import tiered

import gradroute
from gradroute import backends, testing
from gradroute.backends import composed
from gradroute.machine.check import larger, trials
from gradroute.machine.check.cases import Case, Selection, cases
from gradroute.machine.check.judging import RIGHT, WRONG, judged
from gradroute.primitives import products
from gradroute.skipping import rule

CPU = torch.device("cpu")


def judged_cases(op, kind, wanted, backend="torch", dtypes=()):
    """The outcomes of those cases of a backend's whole check, in all dtypes or some, that are wanted."""
    chosen = Selection(ops=(op,), kinds=(kind,), dtypes=dtypes)
    found = [case for case in cases(backend, CPU, chosen) if wanted(case.options)]
    assert found
    return [judged(case, backend, CPU, 0).state for case in found]


def has(*names):
    return lambda options: all(name in options for name in names)


def long_sequence(options):
    return options["tokens"] == larger.LONG_SEQUENCE


def sized(options):
    return options.get("sizes") is not None


#: Mutant → its op, where it is wrong, given the call's arguments, and the cases that are for it.
WRONG_WHERE = {
    "sequences of more than a tile": ("routed_attention", lambda q, **_: q.shape[2] > 1024, long_sequence),
    "windows of long sequences": (
        "routed_attention",
        lambda q, window=None, **_: window is not None and q.shape[2] > 1024,
        long_sequence,
    ),
    "documents of long sequences": (
        "routed_attention",
        lambda q, cu_seqlens=None, **_: cu_seqlens is not None and q.shape[2] > 1024,
        long_sequence,
    ),
    "heads of 64": ("routed_attention", lambda q, **_: q.shape[3] == 64, sized),
    "heads of 80": ("routed_attention", lambda q, **_: q.shape[3] == 80, sized),
    "heads of 128": ("routed_attention", lambda q, **_: q.shape[3] == 128, sized),
    "a frozen weight": ("routed_linear", lambda w, **_: not w.requires_grad, has("frozen")),
    "all but the bias frozen": (
        "routed_linear",
        lambda x, w, b, **_: b is not None and not x.requires_grad and not w.requires_grad,
        has("frozen"),
    ),
    "two routes": ("routed_linear", lambda routes, **_: routes.num_routes == 2, has("num_routes")),
    "33 routes": ("routed_linear", lambda routes, **_: routes.num_routes == 33, has("num_routes")),
    "more than 64 routes": ("routed_linear", lambda routes, **_: routes.num_routes > 64, has("num_routes")),
    "many tokens": (
        "routed_mlp",
        lambda x, **_: x.shape[0] > 4096,
        lambda options: options["tokens"] == larger.MANY,
    ),
    "no routes": ("routed_mlp", lambda routes, **_: routes is None, has("ordinary")),
    "an fp64 strength": (
        "routed_linear",
        lambda routes, **_: (
            routes is not None and routes.strength is not None and routes.strength.dtype == torch.float64
        ),
        has("exact_strength"),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WRONG_WHERE)
def test_a_call_that_is_wrong_in_one_place_is_found(name, monkeypatch):
    op, is_wrong, wanted = WRONG_WHERE[name]
    right = getattr(gradroute, op)

    def mutant(**given):
        output = right(**given)
        return output * 1.1 if given["backend"] == "torch" and is_wrong(**given) else output

    monkeypatch.setattr(gradroute, op, mutant)
    assert WRONG in judged_cases(op, "numbers", wanted)


def test_wide_segments_that_keep_what_is_masked_are_found(monkeypatch):
    def product(g, routes, table, *, overwrite=False):
        out = broken_kernels.product(g, routes, table)
        out[:, 256:] = g[:, 256:]
        return out

    monkeypatch.setattr(composed, "masked_product", product)
    assert WRONG in judged_cases(
        "route_grad", "numbers", lambda options: options.get("sizes") == larger.SEGMENTED
    )


def test_another_bit_in_many_tokens_alone_is_found(monkeypatch):
    def product(g, routes, table, *, overwrite=False):
        kernel = broken_kernels.another_bit_every_time if len(g) > 4096 else broken_kernels.product
        return kernel(g, routes, table)

    monkeypatch.setattr(composed, "masked_product", product)
    assert set(judged_cases("route_grad", "determinism", has("runs"))) == {WRONG}
    assert set(judged_cases("route_grad", "determinism", lambda options: "runs" not in options)) == {RIGHT}


def test_a_second_backward_is_another_call(monkeypatch):
    case = Case("numbers", "route_grad", "float32", {"tokens": 5, "twice": True})
    assert judged(case, "torch", CPU, 0).state == RIGHT
    calls = []

    def product(g, routes, table, *, overwrite=False):
        calls.append(g)
        return broken_kernels.product(g, routes, table) * (1 if len(calls) == 1 else 1.1)

    monkeypatch.setattr(composed, "masked_product", product)
    assert judged(case, "torch", CPU, 0).state == WRONG


@pytest.mark.parametrize("op", larger.WITH_RECTANGLES)
def test_rectangles_are_made_in_the_cases_that_are_for_them(op, monkeypatch):
    forms = []
    decide = rule.decide

    def remembered(*given):
        forms.append(decide(*given).form)
        return decide(*given)

    for name, module in list(sys.modules.items()):
        if name.startswith("gradroute.") and getattr(module, "decide", None) is decide:
            monkeypatch.setattr(module, "decide", remembered)
    for used in (3, 4):
        options = {"tokens": 1501, "tables": "blocks", "on_host": True, "used": used, "sites": "all"}
        trials.made(Case("numbers", op, "float32", options), "cpu", CPU, 0).call.run("torch")
    assert rule.RECTANGLES in forms


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["cpu", "torch"])
@pytest.mark.parametrize("op", larger.WITH_RECTANGLES)
def test_a_rectangle_that_is_left_out_is_found(op, backend, monkeypatch):
    """In a whole check alone: a quick one has no case in which the CPU makes rectangles."""
    if backend in backends.unavailable_backends(op, CPU):
        pytest.skip(f"{backend} does not run here")
    decide = rule._decide_by_counts

    def forgetful(groups, routes, found):
        groups.groups[0].spans = ()
        return decide(groups, routes, found)

    assert set(judged_cases(op, "numbers", has("on_host"), backend, ("float32",))) == {RIGHT}
    monkeypatch.setattr(rule, "_decide_by_counts", forgetful)
    assert WRONG in judged_cases(op, "numbers", has("on_host"), backend, ("float32",))


@pytest.mark.parametrize("op", tiered(["routed_linear", "routed_mlp"]))
def test_a_sum_over_tokens_in_bf16_is_found(op, monkeypatch):
    """As of a product that rounds its accumulator after each step of 16 tokens: few tokens do not show it."""
    product = products.product

    def rounding(a, b):
        if a.dtype != torch.bfloat16:
            return product(a, b)
        steps = zip(a.split(16, 1), b.split(16), strict=True)
        return functools.reduce(torch.add, (product(*step) for step in steps))

    wanted = Selection(quick=True, ops=(op,), dtypes=("bfloat16",), kinds=("numbers",))
    found = [case for case in cases("torch", CPU, wanted) if case.options["tokens"] == larger.MANY]
    assert {judged(case, "torch", CPU, 0).state for case in found} == {RIGHT}
    for module in list(sys.modules.values()):
        if module.__name__.startswith("gradroute.") and getattr(module, "product", None) is product:
            monkeypatch.setattr(module, "product", rounding)
    assert WRONG in [judged(case, "torch", CPU, 0).state for case in found]


def test_every_input_is_frozen_alone_and_all_but_each():
    names = testing.sample("routed_linear").differentiable
    seen = {
        case.options["frozen"]
        for case in cases("torch", CPU, Selection(quick=True, ops=("routed_linear",)))
        if "frozen" in case.options
    }
    assert {(name,) for name in names} <= seen
    assert {tuple(other for other in names if other != name) for name in names} <= seen
