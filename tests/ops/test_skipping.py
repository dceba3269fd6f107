"""Products in parts: rectangles of tokens sorted by route, runs of tokens; the numbers, and the work that is left."""

import dataclasses
import pickle

import cases
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from gradroute import (
    LinearSites,
    MLPSites,
    Routes,
    Table,
    backends,
    routed_linear,
    routed_mlp,
    testing,
)
from gradroute.linear import routed_linears
from gradroute.primitives import shared
from gradroute.primitives.arguments import ActivationMasks
from gradroute.skipping import mlp as skipping
from gradroute.skipping import rule, totals
from gradroute.tables import localize
from gradroute.testing import assert_result_within_budget

OPS = ("routed_linear", "routed_mlp", "routed_gated_mlp")
SIZES = testing.Sizes(d_model=6, d_ff=10)
BACKENDS = [name for name in ("torch", "cpu") if name in backends.available_backends(device="cpu")]

SITES = {
    "routed_linear": (LinearSites, ("output", "input", "update_rows", "update_cols")),
    "routed_mlp": (MLPSites, ("pre", "hidden", "forward", "update_in", "update_out", "output")),
    "routed_gated_mlp": (MLPSites, ("pre", "hidden", "forward", "update", "update_in", "update_out")),
}


@pytest.fixture
def small_parts(monkeypatch):
    """Runs of a few tokens, and rectangles wherever they save anything."""
    monkeypatch.setattr(rule, "RUN", 5)
    monkeypatch.setattr(rule, "MIN_TOKENS", {"cpu": 0, "cuda": 0})
    monkeypatch.setattr(rule, "MIN_SAVING", {"cpu": 0.0, "cuda": 0.0})
    monkeypatch.setattr(rule, "MIN_SAVING_BF16", 0.0)


@pytest.fixture
def parts_taken(monkeypatch):
    """The lists of parts that backwards take."""
    taken = []
    original = skipping.split

    def recorded(*args):
        taken.append(original(*args))
        return taken[-1]

    monkeypatch.setattr(skipping, "split", recorded)
    return taken


def blocks(features, num_routes):
    """Tables of few constant runs of features, with zeros."""
    cut = st.integers(0, features)
    row = st.lists(st.sampled_from([0.0, 0.0, 1.0, 1.0, 0.5, -0.75]), min_size=3, max_size=3)

    def table(cuts, rows):
        first, second = sorted(cuts)
        weights = torch.tensor(rows)
        widths = torch.tensor([first, second - first, features - second])
        return Table(weights.repeat_interleave(widths, dim=1))

    return st.builds(table, st.tuples(cut, cut), st.lists(row, min_size=num_routes, max_size=num_routes))


@st.composite
def calls(draw, op, dtype, device="cpu"):
    """A sample with tables of rectangles on some sites, and tokens in any order of routes."""
    num_routes = draw(st.integers(1, 4))
    tokens = draw(st.integers(1, 23))
    call = cases.make(
        op, tokens=tokens, dtype=dtype, sizes=SIZES, seed=draw(st.integers(0, 3)), device=device
    )
    ids = draw(st.lists(st.integers(0, num_routes - 1), min_size=tokens, max_size=tokens))
    if draw(st.booleans()):
        ids = sorted(ids)
    sites_class, names = SITES[op]
    widths = {name: table.features for name, table in call.tables.items()}
    tables = {}
    for name in draw(st.sets(st.sampled_from(names), min_size=1)):
        tables[name] = draw(blocks(_width(call, name, widths), num_routes))
    routes = Routes.of(torch.tensor(ids), num_routes).to(device)  # counted on the host
    return call.with_routes(routes).with_sites(sites_class(**tables))


def _width(call, site, widths):
    """The features of a site, from the shapes of the call's tensors."""
    if call.op == "routed_linear":
        outputs, inputs = call.tensors["weight"].shape
        return inputs if site in ("input", "update_cols") else outputs
    out = call.tensors["w_out" if call.op == "routed_mlp" else "w_down"]
    return out.shape[0] if site == "output" else out.shape[1]


def dtypes_of_backends():
    """(backend, dtype); Triton's interpreter takes seconds, and fp32 shows what it can."""
    for backend in ("torch", "cpu", "triton", "cuda"):
        for dtype in cases.dtypes(backend):
            yield backend, dtype


@pytest.mark.parametrize(("backend", "dtype"), list(dtypes_of_backends()))
@pytest.mark.parametrize("op", OPS)
def test_any_rectangles_keep_the_budget(op, backend, dtype, device, small_parts):
    cases.require(backend, device)
    examples = {"cpu": 25, "cuda": 10}[device.type]
    if backend == "triton" and device.type == "cpu":
        if dtype != torch.float32:
            pytest.skip("in the interpreter kernels take rows and features of larger matrices in fp32 only")
        examples = 5

    @settings(max_examples=examples)
    @given(calls(op, dtype, device))
    def check(call):
        exact, plain = call.in_float64().run("reference"), call.run_plain()
        assert_result_within_budget(call.run(backend), exact, plain, op, terms_of(call))

    check()


def terms_of(call):
    """The largest gradient that a single token gives to a parameter: where they cancel, errors are of their size."""
    terms = dict.fromkeys(call.differentiable, 0.0)
    for token in range(len(call.routes)):
        alone = call.of_tokens(torch.tensor([token], device=call.upstream.device)).in_float64()
        for name, gradient in alone.run("reference").gradients.items():
            if name != "x":
                terms[name] = max(terms[name], float(gradient.abs().max()))
    return terms


@pytest.mark.parametrize(
    ("areas", "overlap"),
    [
        ([], False),
        ([(slice(0, 2),), (slice(2, 4),)], False),
        ([(slice(0, 3),), (slice(2, 4),)], True),
        ([(slice(None),), (slice(2, 4),)], True),
        ([(slice(0, 2), slice(0, 2)), (slice(0, 2), slice(2, 4))], False),
        ([(slice(0, 2), slice(0, 2)), (slice(1, 2), slice(1, 4))], True),
        ([(slice(i, i + 1),) for i in range(totals.MAX_AREAS + 1)], True),
    ],
)
def test_areas_that_overlap(areas, overlap):
    assert totals.overlap(areas) is overlap


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_the_exact_laws_hold_for_rectangles(op, backend, small_parts):
    """Two runs have the same bits; what is masked off is 0 whatever arrives; frozen inputs change no other gradient."""

    @settings(max_examples=15)
    @given(calls(op, torch.float32))
    def check(call):
        result = call.run(backend)
        testing.assert_same_bits(call.run(backend), result, op)
        for name in call.differentiable:
            frozen = call.run(backend, frozen=[name])
            assert frozen.gradients[name] is None
            same = {other: gradient for other, gradient in result.gradients.items() if other != name}
            kept = {other: gradient for other, gradient in frozen.gradients.items() if other != name}
            testing.assert_same_bits(frozen._replace(gradients=kept), result._replace(gradients=same), op)

    check()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("in_order", [True, False])
def test_what_a_rectangle_leaves_out_is_zero_whatever_arrives(backend, in_order):
    call = quarters(tokens=1024, in_order=in_order)
    blocked = call.with_sites(MLPSites(output=[[0.0], [1.0], [1.0], [1.0]], hidden=call.sites.hidden))
    upstream = call.upstream.clone()
    upstream[call.routes.ids == 0] = float("inf")
    result = blocked.with_upstream(upstream).run(backend)
    assert all(gradient.isfinite().all() for gradient in result.gradients.values())
    assert (result.gradients["x"][call.routes.ids == 0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("by_route", [True, False])
def test_parts_of_half_precision_are_summed_before_they_are_rounded(backend, by_route, dtype):
    """Halves of the batch that cancel, each beyond fp16's range by itself."""
    tokens, d_ff = 2048, 8
    call = cases.make(
        "routed_mlp", tokens=tokens, dtype=dtype, activation="relu2", sizes=SIZES._replace(d_ff=d_ff)
    )
    half = torch.arange(tokens) >= tokens // 2
    upstream = torch.where(half[:, None], -100.0, 100.0).expand(-1, 6).to(dtype)
    tensors = call.tensors | {"x": torch.ones_like(call.tensors["x"])}
    table = torch.ones(2, d_ff)
    table[1, : d_ff // 2] = 0.0 if by_route else 0.5
    call = dataclasses.replace(call, tensors=tensors, upstream=upstream)
    call = call.with_routes(Routes.of(torch.arange(tokens) % 2, 2)).with_sites(MLPSites(hidden=table))
    result = call.run(backend)
    assert result.gradients["w_out"].abs().max() == 0
    call.assert_within_budget(backend)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("backend", ["torch", "cpu", "triton", "cuda"])
def test_weight_gradients_of_many_tokens_are_summed_before_they_are_rounded(backend, dtype, device):
    """They are made of runs of tokens, here of two that cancel, each beyond fp16's range by itself."""
    cases.require(backend, device)
    tokens = 2 * shared.MIN_CHUNK
    call = cases.make("routed_linear", tokens=tokens, dtype=dtype, sizes=SIZES, device=device)
    half = torch.arange(tokens, device=device) >= tokens // 2
    upstream = torch.where(half[:, None], -100.0, 100.0).to(dtype).expand_as(call.upstream)
    tensors = call.tensors | {"x": torch.ones_like(call.tensors["x"])}
    call = dataclasses.replace(call, tensors=tensors, upstream=upstream)
    routes = Routes.of(torch.arange(tokens, device=device) % 2, 2)
    call = call.with_routes(routes).with_sites(LinearSites(update_rows=[[1.0], [0.5]]))
    assert call.run(backend).gradients["weight"].abs().max() == 0
    call.assert_within_budget(backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layers_without_width(backend):
    ids = torch.arange(128) % 2
    routes, x = Routes.of(ids, 2), torch.ones(128, 3, requires_grad=True)
    weight = torch.ones(0, 3, requires_grad=True)
    sites = LinearSites(input=[[1.0], [0.0]])
    gradients = torch.autograd.grad(
        routed_linear(x, weight, None, routes, sites, backend=backend).sum(), [x, weight]
    )
    assert (gradients[0] == 0).all()
    assert gradients[1].shape == (0, 3)
    w_in, w_out = torch.ones(0, 3, requires_grad=True), torch.ones(3, 0, requires_grad=True)
    sites = MLPSites(hidden=[[1.0], [0.0]])
    y = routed_mlp(x, w_in, None, w_out, None, routes, sites, backend=backend)
    assert [g.shape for g in torch.autograd.grad(y.sum(), [w_in, w_out])] == [(0, 3), (3, 0)]


class Stop(torch.autograd.Function):
    """Passes no gradient on, not even zeros."""

    @staticmethod
    def forward(ctx, y):
        return y.view_as(y)

    @staticmethod
    def backward(ctx, dy):
        return None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", ["routed_mlp", "routed_gated_mlp"])
def test_a_gradient_that_never_arrives_is_zero(op, backend):
    call = cases.make(op)
    leaves = call.leaves()
    Stop.apply(call.call(leaves, backend)).sum().backward()
    for name in call.differentiable:
        gradient = leaves[name].grad
        assert gradient is not None, name
        assert (gradient == 0).all(), name


def test_groups_are_not_pickled():
    call = quarters(tokens=1024, in_order=True)
    call.run("torch")
    again = pickle.loads(pickle.dumps(call.sites))
    assert call.sites.effective.groups
    assert again.effective.groups == {}
    testing.assert_same_bits(call.with_sites(again).run("torch"), call.run("torch"), "pickled")


def quarters(tokens, in_order, d_model=8, d_ff=16):
    """A gated MLP with four routes, equal shares of the tokens, disjoint quarters of the hidden units."""
    ids = torch.arange(tokens) % 4
    routes = Routes.of(ids.sort()[0] if in_order else ids, 4)
    table = localize(4, d_ff, {route: slice(4 * route, 4 * route + 4) for route in range(4)})
    call = cases.make("routed_gated_mlp", tokens=tokens, sizes=testing.Sizes(d_model=d_model, d_ff=d_ff))
    return call.with_routes(routes).with_sites(MLPSites(hidden=table, update=table))


class MultiplyAdds(TorchDispatchMode):
    """Counts the multiply-adds of matrix products, in place ones too, which torch's FlopCounterMode misses."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            *_, a, b = args
            self.count += a.shape[0] * a.shape[1] * b.shape[1]
        return func(*args, **(kwargs or {}))


def backward_work(call, backend):
    leaves = call.leaves()
    output = call.call(leaves, backend)
    with MultiplyAdds() as counter:
        torch.autograd.grad(output, [leaf for leaf in leaves.values() if leaf is not None], call.upstream)
    return counter.count


@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_disjoint_quarters_cost_a_quarter(backend, in_order):
    call = quarters(tokens=1024, in_order=in_order)
    call.assert_within_budget(backend)
    every_product = backward_work(call.with_sites(MLPSites(hidden=torch.full((4, 1), 0.5))), backend)
    assert backward_work(call, backend) == every_product / 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameter_routing_of_a_linear_layer_skips_what_may_not_update(backend):
    call = cases.make("routed_linear", tokens=512, sizes=testing.Sizes(d_model=8))
    ids = torch.arange(512) % 2
    call = call.with_routes(Routes.of(ids, 2)).with_sites(LinearSites(update_rows=[[1.0], [0.0]]))
    call.assert_within_budget(backend)
    plain = backward_work(call.with_sites(LinearSites(output=[[1.0], [0.5]])), backend)
    assert backward_work(call, backend) == plain * 3 / 4  # half of dW's


def test_tokens_in_order_are_not_gathered(parts_taken):
    quarters(tokens=1024, in_order=True).run("torch")
    (taken,) = parts_taken
    assert len(taken) == 4
    assert all(isinstance(part.tokens, slice) for part in taken)


@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("op", ["routed_mlp", "routed_gated_mlp"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_backward_of_the_same_graph_has_the_same_bits(backend, op, in_order):
    """A backward may write to what it gathered, not to what was saved."""
    call = cases.make(op, tokens=1024, sizes=testing.Sizes(d_model=8, d_ff=16))
    gated = quarters(1024, in_order)
    call = call.with_routes(gated.routes).with_sites(gated.sites)
    leaves = call.leaves()
    inputs = [leaf for leaf in leaves.values() if leaf is not None]
    before = [leaf.detach().clone() for leaf in inputs]
    output = call.call(leaves, backend)
    first, second = (torch.autograd.grad(output, inputs, call.upstream, retain_graph=True) for _ in range(2))
    for one, other in zip((*first, *before), (*second, *inputs), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("output", [None, [[1.0], [0.0]]])
def test_linear_layers_of_one_x_have_the_gradients_of_each(backend, output):
    """Their forward and the gradients of their weights and biases bit for bit; x gets the sum."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 64, 8, generator=generator, requires_grad=True)
    routes = Routes.of(torch.randint(0, 2, (4, 64), generator=generator), 2)
    update = localize(2, 8, {1: slice(0)})
    all_sites = (
        LinearSites(update_rows=update, output=output),
        LinearSites(update_rows=update),
        LinearSites(input=update),
    )
    layers = [
        (torch.randn(8, 8, generator=generator, requires_grad=True), bias, sites)
        for bias, sites in zip((torch.ones(8, requires_grad=True), None, None), all_sites, strict=True)
    ]
    parameters = [p for weight, bias, _ in layers for p in (weight, bias) if p is not None]
    upstream = torch.randn(3, 4, 64, 8, generator=generator)
    together = routed_linears(x, layers, routes, backend=backend)
    single = [routed_linear(x, *layer[:2], routes, layer[2], backend=backend) for layer in layers]
    (dx, *gradients), (dx_of_each, *expected) = (
        torch.autograd.grad(ys, [x, *parameters], list(upstream)) for ys in (together, single)
    )
    for got, want in zip((*together, *gradients), (*single, *expected), strict=True):
        assert torch.equal(got, want)
    torch.testing.assert_close(dx, dx_of_each)
    x.requires_grad_(False)
    (frozen,) = torch.autograd.grad(routed_linears(x, layers, routes, backend=backend)[1].sum(), layers[1][0])
    assert frozen.isfinite().all()


def test_little_to_save_is_taken_as_it_comes(parts_taken):
    tokens = rule.RUN + 900
    call = quarters(tokens, in_order=False)
    ids = torch.zeros(tokens, dtype=torch.long)
    ids[:40] = 1
    sites = MLPSites(hidden=localize(2, 16, {1: slice(8, 16)}))
    call.with_routes(Routes.of(ids, 2)).with_sites(sites).run("torch")
    (taken,) = parts_taken
    assert [part.tokens for part in taken] == [slice(0, rule.RUN), slice(rule.RUN, tokens)]


def test_a_strength_blends_rows_so_nothing_is_skipped(parts_taken):
    call = quarters(tokens=1024, in_order=True)
    routes = Routes.of(call.routes.ids, 4, strength=torch.full((1024,), 0.5))
    call.with_routes(routes).run("torch")
    (taken,) = parts_taken
    assert len(taken[0].spans) == 1
    assert taken[0].spans[0].features == totals.ALL


def test_groups_are_made_once_for_a_width():
    call = quarters(tokens=1024, in_order=True)
    call.run("torch")
    sites = call.sites.effective
    (groups,) = sites.groups.values()
    call.run("torch")
    assert list(sites.groups.values()) == [groups]


def test_tables_that_are_ones_for_a_rectangle_are_dropped():
    (first, *_), *_ = (part.spans for part in skipping.split(*_split_arguments(quarters(1024, True))))
    assert first.masks == ActivationMasks()
    assert (first.features, first.updates) == (slice(0, 4), ((slice(0, 4), slice(0, 4), ()),))


def _split_arguments(call):
    product = skipping.MLPProduct(call.sites.effective, 16)
    return product, call.routes, rule.decide("gated_mlp", product, call.routes, torch.float32)


def test_many_ragged_runs_of_features_are_taken_as_one():
    weights = torch.tensor([[1.0, 0.0] * 8, [1.0] * 16])
    call = quarters(1024, True)
    routes = Routes.of(call.routes.ids.clamp(max=1), 2)
    call = call.with_routes(routes).with_sites(MLPSites(hidden=weights, update=[[1.0], [0.0]]))
    call.assert_within_budget("torch")
    first, *_ = skipping.split(*_split_arguments(call))
    assert first.spans[0].features == slice(0, 15)
