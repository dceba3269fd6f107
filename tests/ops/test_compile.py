"""torch.compile, torch.library, autocast and activation checkpointing: as with the ordinary ops."""

import functools
import itertools
from unittest import mock

import cases
import emulated_fa4
import pytest
import test_optim_fused
import torch
from cases import every_function_backend, every_function_backend_in_tiers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import gradroute
from gradroute import (
    AttentionSites,
    MLPSites,
    NormSites,
    Routes,
    Table,
    backends,
    routed_attention,
    routed_layer_norm,
    routed_linear,
    routed_rms_norm,
    testing,
)
from gradroute.backends import fa4, native
from gradroute.primitives import overwriting
from gradroute.primitives.attention_pattern import Pattern
from gradroute.tables import localize
from gradroute.testing import Result, assert_result_within_budget, assert_same_bits

HALF = Table([[1.0], [0.5]])
LOW_PRECISION = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()


def function_of(call, backend):
    """(tensors, routes) → the op's output, as a model calls it."""
    op = getattr(gradroute, call.op)
    sites = {"table" if call.op == "route_grad" else "sites": call.sites}

    def function(tensors, routes):
        return op(**tensors, routes=routes, **sites, **call.keywords, backend=backend)

    return function


def run(function, call, routes=None):
    """Forward and backward of `function(tensors, routes)` on a sample's inputs."""
    leaves = call.leaves()
    output = function(leaves, call.routes if routes is None else routes)
    wanted = {name: leaves[name] for name in call.differentiable}
    gradients = torch.autograd.grad(output, list(wanted.values()), call.upstream)
    return Result(output.detach(), dict(zip(wanted, gradients, strict=True)))


@pytest.mark.setup("torch.compile", "every op on every backend as one graph")
@pytest.mark.parametrize("strength", ["token", None])
@every_function_backend_in_tiers
def test_one_graph_for_all_ids(op, backend, strength, device):
    """Forward and backward captured whole; batches of other ids, and so of other counts, run the same code."""
    cases.require(backend, device)
    call = cases.make(op, on=backend, strength=strength, device=device)
    function = function_of(call, backend)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    batches = [
        call.routes,
        *(cases.make(op, on=backend, strength=strength, seed=seed, device=device).routes for seed in (1, 2)),
    ]
    assert len({routes.host_counts for routes in batches}) == len(batches) or device.type == "cuda"
    with torch._dynamo.config.patch(error_on_recompile=True):
        for routes in batches:
            expected = run(function, call, without_counts(routes))
            cases.assert_same_numbers(run(compiled, call, routes), expected, op)


def without_counts(routes):
    """Routes as compiled code has them: products are not cut by how many tokens a route has."""
    uncounted = routes.alias()
    uncounted.host_counts = None
    return uncounted


@every_function_backend_in_tiers
def test_routes_made_in_the_graph(op, backend, device):
    cases.require(backend, device)
    call = cases.make(op, on=backend, strength="token", device=device)
    function = function_of(call, backend)

    def step(tensors, ids_and_strength):
        ids, strength = ids_and_strength
        return function(tensors, Routes.of(ids, 4, strength=strength, validate=False))

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(2):
            routes = cases.make(op, on=backend, strength="token", seed=seed, device=device).routes
            got = run(compiled, call, (routes.ids, routes.strength))
            cases.assert_same_numbers(got, run(function, call, routes), op)


@pytest.mark.setup("torch.compile", "every op, by Inductor")
@pytest.mark.slow
@every_function_backend
def test_inductor(op, backend, device):
    """The default compiler fuses what surrounds the kernels: the numbers keep the budget."""
    cases.require(backend, device)
    if backend == "triton" and device.type == "cpu" and op != "routed_gated_mlp":
        pytest.skip("on the CPU every kernel is one opaque call: one op shows it")
    call = cases.make(op, on=backend, strength="token", device=device)
    compiled = torch.compile(function_of(call, backend), fullgraph=True)
    result = run(compiled, call)
    assert_result_within_budget(result, call.in_float64().run("reference"), call.run_plain(), op)


def test_validation_in_the_graph_is_an_assertion():
    """Out-of-range ids raise where the graph runs; nothing waits for them while tracing."""

    def step(x, ids):
        return routed_linear(x, weight, None, Routes.of(ids, 2), sites, backend="torch")

    x, weight = torch.randn(3, 4), torch.randn(5, 4)
    sites = gradroute.LinearSites(output=Table([[1.0], [0.5]]))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, torch.tensor([0, 1, 1])), x @ weight.T)
    with pytest.raises(RuntimeError, match="ids: some are out of range, expected 0 <= id < num_routes = 2"):
        compiled(x, torch.tensor([0, 1, 2]))


@pytest.mark.setup(
    "torch.compile",
    "a tensor in the place of a Table",
    refused="tables are checked and classified on the host",
)
def test_a_tensor_for_a_table_in_the_graph_is_refused():
    def step(x, ids):
        return gradroute.route_grad(x, Routes.of(ids, 2, validate=False), torch.ones(2, 4))

    with pytest.raises(
        Exception, match=r"table: got a Tensor inside compiled code, expected a gradroute\.Table"
    ):
        torch.compile(step, fullgraph=True, backend="eager")(torch.randn(3, 4), torch.tensor([0, 1, 1]))


# Checkpointing


@pytest.mark.setup("Checkpointing", "every op, reentrant or not")
@pytest.mark.parametrize("use_reentrant", [False, True])
@every_function_backend
def test_activation_checkpointing(op, backend, use_reentrant, device):
    cases.require(backend, device)
    call = cases.make(op, on=backend, strength="token", device=device)

    def recomputed(tensors, routes):
        def segment(*inputs):
            return call.with_routes(routes).call(dict(zip(tensors, inputs, strict=True)), backend)

        return checkpoint(segment, *tensors.values(), use_reentrant=use_reentrant)

    assert_same_bits(run_backward(recomputed, call), call.run(backend), op)


def run_backward(function, call):
    """As `run`, through `.backward()`: reentrant checkpointing has no other way."""
    leaves = call.leaves()
    output = function(leaves, call.routes)
    output.backward(call.upstream)
    return Result(output.detach(), {name: leaves[name].grad for name in call.differentiable})


@every_function_backend_in_tiers
def test_activation_checkpointing_compiled(op, backend, device):
    cases.require(backend, device)
    call = cases.make(op, on=backend, strength="token", device=device)
    function = function_of(call, backend)

    def recomputed(tensors, routes):
        return checkpoint(function, tensors, routes, use_reentrant=False)

    compiled = torch.compile(recomputed, fullgraph=True, backend="aot_eager")
    cases.assert_same_numbers(run(compiled, call), call.run(backend), op)


# Autocast


@pytest.mark.parametrize("dtype", LOW_PRECISION)
@every_function_backend
def test_autocast_is_that_of_the_ordinary_op(op, backend, dtype, device):
    """Dtypes and bits of the output, dtypes of the gradients, their errors within the budget."""
    cases.require(backend, device)
    sites = tuple(site for site in testing.site_names(op) if not site.startswith("forward"))
    sites = cases.sites_on(
        backend, sites
    )  # in fp32: autocast makes it a dtype that every pattern has a kernel for
    for variant in testing.variants(op):
        call = cases.make(op, strength="token", sites=sites, device=device, **variant)
        ordinary = call.with_routes(None)
        output = ordinary_output(ordinary, backend, device, dtype)
        call = call.with_upstream(call.upstream.to(output.dtype))
        with torch.autocast(device.type, dtype=dtype):
            result = run_forward_in_autocast(lambda tensors, c=call: c.call(tensors, backend), call)
            plain = run_forward_in_autocast(call.call_plain, call)
        assert result.output.dtype == output.dtype
        assert torch.equal(result.output, output)
        exact = call.in_float64().run("reference")
        for name, gradient in result.gradients.items():
            assert gradient.dtype == torch.float32, name
            # The products are of the low precision, so the budget is that of its dtype.
            why = testing.excess(gradient.to(dtype), exact.gradients[name], plain.gradients[name].to(dtype))
            assert why is None, f"{variant} d{name}: {why}"


def ordinary_output(ordinary, backend, device, dtype):
    """Eager PyTorch's; attention has the bits of the backend's own kernel."""
    with torch.autocast(device.type, dtype=dtype), torch.no_grad():
        plain = ordinary.call_plain(ordinary.tensors)
        return (
            ordinary.call(ordinary.tensors, backend).to(plain.dtype) if "attention" in ordinary.op else plain
        )


def run_forward_in_autocast(forward, call):
    """The backward runs outside of autocast, as training loops do."""
    leaves = call.leaves()
    output = forward(leaves)
    wanted = {name: leaves[name] for name in call.differentiable}
    with torch.autocast(output.device.type, enabled=False):
        gradients = torch.autograd.grad(output, list(wanted.values()), call.upstream)
    return Result(output.detach(), dict(zip(wanted, gradients, strict=True)))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "cpu", "triton"])
def test_autocast_compiled(backend, device):
    cases.require(backend, device)
    call = cases.make("routed_gated_mlp", strength="token", device=device)
    function = function_of(call, backend)

    def step(tensors, routes):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return function(tensors, routes)

    call = call.with_upstream(call.upstream.bfloat16())
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    cases.assert_same_numbers(run(compiled, call), run(step, call), "autocast")


# torch.library


class Recorder(TorchDispatchMode):
    """Keeps the arguments of every call of an op that gradroute registered, by the op's name."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "gradroute":
            copies = [arg.detach().clone() if isinstance(arg, torch.Tensor) else arg for arg in args]
            presence = tuple(arg is None for arg in args)
            self.calls.setdefault(func, {})[presence] = (tuple(copies), dict(kwargs or {}))
        return func(*args, **(kwargs or {}))


KERNEL_BACKENDS = ("triton", "cpu", "cuda")
WITH_OPS = (
    *KERNEL_BACKENDS,
    "torch",
)  # torch has those of attention in tiles, which backend cuda has no need of
REGISTERED = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith("gradroute::"))


@functools.cache
def recorded_calls(device):
    """name → calls of the registered ops, one for each pattern of absent arguments, as all samples make them."""
    # A recorder sees what ops return, so nothing is written in place there; here it only takes notes.
    with mock.patch.object(overwriting, "is_watched", return_value=False), Recorder() as recorder:
        for op, row in backends.OPS.items():
            able = backends.available_backends(op, device)
            kinds = (("sparse", None), ("dense", "token"), ("blocks", "scalar"))
            for backend, (tables, strength) in itertools.product(WITH_OPS, kinds):
                if backend not in row or backend not in able:
                    continue
                options = {"tokens": 17, "tables": tables, "strength": strength, "device": device}
                # A window is what no vendor's attention on the CPU has, and documents have an op of their own.
                variant = {"window": 5} if op == "routed_attention" else {}
                variant |= {"documents": 2} if variant and tables == "blocks" else {}
                call = cases.make(op, on=backend, **options, **variant)
                call.run(backend)
                call.run(backend, frozen=call.differentiable[:1])
        for backend in KERNEL_BACKENDS:
            if backend in backends.available_backends(device=device):
                test_optim_fused.take_steps(backends.primitives(backend).adamw_step, device)
                gradients = [torch.ones(3, 7, device=device), torch.zeros(4, device=device)]
                backends.primitives(backend).touched_blocks(gradients, [0, 1])
        run_in_parts()
        run_fused_forwards(device)
        run_fa4()
    return {
        func.name().removesuffix(".default"): (func, list(calls.values()))
        for func, calls in recorder.calls.items()
    }


def run_in_parts():
    """Samples whose backward gathers the tokens of each route, which only the CPU's does; one without their counts."""
    table = localize(2, 16, {0: slice(0, 8), 1: slice(8, 16)})
    for op in ("routed_mlp", "routed_gated_mlp"):
        if "cpu" in backends.available_backends(op, "cpu"):
            call = cases.make(op, tokens=256, sizes=testing.Sizes(d_model=4, d_ff=16))
            call = call.with_routes(Routes.of(torch.arange(256) % 2, 2)).with_sites(MLPSites(hidden=table))
            call.run("cpu")
            call.routes.host_counts = None
            call.run("cpu")


def run_fused_forwards(device):
    """The ops that Functions call for tensors of a GPU alone, whose bits their kernels have."""
    a, ids = torch.randn(17, 8, device=device), torch.zeros(17, dtype=torch.int32, device=device)
    mask = (torch.rand(17, device=device), torch.rand(2, 8, device=device))
    for backend, name in FUSED_FORWARDS.items():
        if backend in backends.available_backends(device=device):
            op = getattr(torch.ops.gradroute, name).default
            op(a, a.clone(), ids, None, None, "silu")
            op(a, None, ids, *mask, "gelu_new")


def run_fa4():
    """The backward that a library runs on GPUs, with that library emulated."""
    tensors = [torch.randn(1, 2, 17, 64) for _ in range(5)]
    routes = Routes.of(torch.arange(17)[None] % 2, 2)
    pattern = Pattern(causal=True, window=None, scale=0.125)
    with pytest.MonkeyPatch.context() as monkeypatch:
        emulated_fa4.use_on_the_cpu(monkeypatch)
        for score, value in ((torch.eye(2), torch.eye(2)), (torch.full((2, 2), 0.5), None)):
            tables = (Table(score), None if value is None else Table(value))
            fa4.attention_backward(*tensors, torch.zeros(1, 2, 17), routes, *tables, pattern)


FUSED_FORWARDS = {"triton": "activation_forward", "cuda": "native_activation_forward"}


def require_op(name, device):
    """Skips a registered op whose kernels cannot run here."""
    if name == f"gradroute::{FUSED_FORWARDS['cuda']}":  # PyTorch's operations do it on the CPU
        cases.require("cuda", device)
    if "native" in name and native.module is None:
        pytest.skip(native.load_error)
    cases.require(device.type if "native" in name else "triton", device)


@pytest.mark.parametrize("name", REGISTERED)
def test_registered_ops_pass_opcheck(name, device, monkeypatch):
    """Schemas (mutation and aliasing), fake kernels, autograd registration, tracing with dynamic shapes."""
    require_op(name, device)
    if name == "gradroute::attention_fa4_backward":
        emulated_fa4.use_on_the_cpu(monkeypatch)
    recorded = recorded_calls(device)
    assert name in recorded, "no sample calls it"
    func, calls = recorded[name]
    for args, kwargs in calls[:3]:
        outcome = torch.library.opcheck(func, args, kwargs)
        assert set(outcome.values()) == {"SUCCESS"}, outcome


@pytest.mark.slow
def test_samples_on_a_gpu_call_every_op(emulated_backend_cuda, monkeypatch):
    """The backends of a GPU, emulated; `run_in_parts` is the CPU's there too."""
    cases.require("triton", torch.device("cpu"))
    monkeypatch.setattr(f"{__name__}.WITH_OPS", ("triton", "cuda", "torch"))
    recorded = recorded_calls.__wrapped__(torch.device("cpu"))
    assert set(REGISTERED) <= set(recorded)


def test_meta_tensors_need_no_kernel():
    """Shapes and dtypes without data, on every backend."""
    call = cases.make("routed_gated_mlp")
    for backend in ("torch", "cpu", "cuda", "triton"):
        if backend in ("cpu", "cuda") and native.why_not(backend) is not None:
            continue
        meta = {name: tensor.to("meta").requires_grad_() for name, tensor in call.tensors.items()}
        output = call.with_routes(call.routes.to("meta")).call(meta, backend)
        assert output.is_meta
        assert output.shape == call.upstream.shape
        gradients = torch.autograd.grad(output, list(meta.values()), call.upstream.to("meta"))
        assert [gradient.shape for gradient in gradients] == [tensor.shape for tensor in meta.values()]


@pytest.mark.parametrize(
    "call",
    [
        lambda x, routes, number: routed_attention(
            *[x.unflatten(-1, (4, -1)).transpose(1, 2)] * 3, routes, AttentionSites(HALF), scale=number
        ),
        lambda x, routes, number: routed_rms_norm(x, x[0, 0], routes, NormSites(HALF), number),
        lambda x, routes, number: routed_rms_norm(x, x[0, 0], routes, NormSites(HALF), 1e-6, number),
        lambda x, routes, number: routed_layer_norm(x, x[0, 0], None, routes, NormSites(HALF), number),
    ],
    ids=["scale", "eps of rms_norm", "offset", "eps of layer_norm"],
)
def test_numbers_that_change(call):
    """From its second value on Dynamo makes a symbol of a number, as between layers of different scales: one graph."""
    x, routes = torch.randn(1, 6, 16), Routes.of([[0, 1, 1, 0, 1, 0]], 2)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for number in (0.25, 0.5, 0.75):
        got, want = (f(x, routes, number) for f in (compiled, call))
        torch.testing.assert_close(got, want)
