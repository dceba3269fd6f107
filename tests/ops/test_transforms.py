"""First derivatives of torch.func are autograd's, its other transforms are refused; FakeTensorMode reads nothing."""

import dataclasses

import cases
import pytest
import torch
from test_overwriting import in_tiers
from torch._subclasses.fake_tensor import FakeTensorMode

import gradroute
from gradroute import LinearSites, MLPSites, Routes, Table, backends, routed_linear, testing
from gradroute.testing import Result, assert_same_bits


def fake_call(call, mode):
    """The call with tensors of the mode, and routes made in it."""

    def fake(value):
        return mode.from_tensor(value) if isinstance(value, torch.Tensor) else value

    ids, strength, shape = fake(call.routes.ids), fake(call.routes.strength), call.routes.shape
    routes = Routes.of(ids.view(shape), 4, strength if strength is None else strength.view(shape))
    keywords = {name: fake(value) for name, value in call.keywords.items()}
    tensors = {name: fake(tensor) for name, tensor in call.tensors.items()}
    return dataclasses.replace(
        call, routes=routes, keywords=keywords, tensors=tensors, upstream=fake(call.upstream)
    )


@pytest.mark.setup("FakeTensorMode", "every op, forward and backward")
@in_tiers
def test_under_fake_tensors(op, backend, device):
    """Forward and backward give shapes and dtypes, read nothing, and leave nothing behind in tables."""
    cases.require(backend, device)
    for tables, strength, variant in (
        ("dense", "token", {}),
        *(
            ("blocks", None, variant)
            for variant in testing.variants(op)[: 1 if backend == "triton" else None]
        ),
    ):
        call = cases.make(op, on=backend, tables=tables, strength=strength, device=device, **variant)
        with FakeTensorMode() as mode:
            got = fake_call(call, mode).run(backend)
        expected = call.run(backend)
        pairs = zip(got.gradients.values(), expected.gradients.values(), strict=True)
        for one, other in ((got.output, expected.output), *pairs):
            assert one.shape == other.shape
            assert one.dtype == other.dtype
    call.assert_within_budget(backend)


@pytest.mark.setup("FakeTensorMode", "layers and tables made in it")
def test_layers_and_their_tables_made_under_fake_tensors():
    """What a memory estimate does: the model is made there, with its tables, and trains a step."""
    with FakeTensorMode():
        table = [[1.0] * 8, [0.0] * 8]
        mlp = gradroute.layers.RoutedMLP(4, 8, sites=MLPSites(hidden=table))
        linear = gradroute.layers.RoutedLinear(4, 4, sites=LinearSites(output=Table([[1.0], [0.5]])))
        routes = Routes.of([[0, 1, 1]], 2, strength=0.5)
        assert routes.host_counts is None
        linear(mlp(torch.randn(1, 3, 4), routes), routes).sum().backward()
    assert linear.weight.grad.shape == (4, 4)


@pytest.mark.setup("torch.func", "grad and vjp of every op")
@in_tiers
def test_first_derivatives_of_torch_func(op, backend, device):
    """grad and vjp have the bits of autograd, of parameters that require a gradient as well."""
    cases.require(backend, device)
    call = cases.make(op, on=backend, tables="blocks", device=device)
    expected = call.run(backend)
    names = call.differentiable

    def function(*values):
        return call.call({**call.tensors, **dict(zip(names, values, strict=True))}, backend)

    def loss(*values):
        return (function(*values) * call.upstream).sum()

    values = [call.tensors[name] for name in names]
    for given in (values, [torch.nn.Parameter(value) for value in values]):
        output, pull = torch.func.vjp(function, *given)
        for gradients in (
            pull(call.upstream),
            torch.func.grad(loss, argnums=tuple(range(len(names))))(*given),
        ):
            got = Result(output.detach(), dict(zip(names, [g.detach() for g in gradients], strict=True)))
            assert_same_bits(got, expected, op)


@pytest.fixture(params=backends.OPS["routed_linear"])
def backend(request):
    cases.require(request.param, torch.device("cpu"))
    return request.param


@pytest.fixture
def loss(backend):
    """w [5, 4], x [3, 4] → a loss."""
    routes, sites = Routes.of([0, 1, 0], 2), LinearSites(output=[[1.0], [0.5]])

    def function(w, x):
        return routed_linear(x, w, None, routes, sites, backend=backend).square().sum()

    return function


w, x = torch.randn(5, 4), torch.randn(3, 4)
SECOND = (
    r"routed_linear: got a second derivative \(torch\.func\), but a routed gradient has no second derivative"
)
FORWARD = "a routed op .*: got a derivative in forward mode"
BATCHED = r"got a (call inside|tensor batched by) torch\.func\.vmap"


def test_gradients_sample_by_sample(loss):
    """The way that the refusal of vmap names."""
    samples = torch.randn(2, 3, 4)
    for sample in samples:
        leaf = w.clone().requires_grad_()
        (expected,) = torch.autograd.grad(loss(leaf, sample), leaf)
        assert torch.equal(torch.func.grad(loss)(w, sample), expected)


@pytest.mark.setup("torch.func", "second derivatives", refused="a routed gradient has none")
def test_second_derivatives_of_torch_func_are_refused(loss):
    """Where somebody differentiates again, by a transform or by autograd, and nowhere else."""

    def again(w):
        return torch.func.grad(loss)(w, x).square().sum()

    with pytest.raises(RuntimeError, match=SECOND):
        torch.func.grad(again)(w)
    with pytest.raises(RuntimeError, match=SECOND):
        again(w.clone().requires_grad_()).backward()
    leaf = w.clone().requires_grad_()
    gradient, _ = torch.func.vjp(loss, leaf, x)[1](torch.ones(()))
    with pytest.raises(RuntimeError, match=SECOND):
        gradient.sum().backward()


def test_forward_mode_is_refused(loss):
    with pytest.raises(RuntimeError, match=FORWARD):
        torch.func.jvp(loss, (w, x), (w, x))
    with pytest.raises(RuntimeError, match=FORWARD):
        torch.func.hessian(loss)(w, x)


@pytest.mark.setup(
    "torch.func", "vmap over routed ops", refused="a batch is one call: its routes belong to all of it"
)
def test_batches_of_vmap_are_refused(loss):
    with pytest.raises(RuntimeError, match=BATCHED):
        torch.func.vmap(torch.func.grad(loss), (None, 0))(w, torch.randn(2, 3, 4))
    with pytest.raises(RuntimeError, match=BATCHED):
        torch.func.jacrev(loss)(w, x)
    with pytest.raises(RuntimeError, match=BATCHED):
        torch.func.vmap(lambda factor: factor * loss(w, x))(torch.rand(2))
    leaf = w.clone().requires_grad_()
    with pytest.raises(RuntimeError, match=BATCHED):
        torch.autograd.grad(loss(leaf, x), leaf, torch.ones(2), is_grads_batched=True)


def test_routes_of_vmapped_ids_are_refused():
    with pytest.raises(RuntimeError, match=f"ids: {BATCHED}"):
        torch.func.vmap(lambda ids: Routes.of(ids, 2).ids)(torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(RuntimeError, match=f"strength: {BATCHED}"):
        torch.func.vmap(lambda s: Routes.of([0, 1], 2, s).ids)(torch.rand(2))
