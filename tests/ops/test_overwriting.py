"""Nothing that somebody else may keep is written to: a policy of checkpoints, a mode, a caller; versions tell."""

import functools

import cases
import pytest
import test_compile
import test_skipping
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from gradroute import Routes, Table, backends, testing
from gradroute.backends import native
from gradroute.primitives.overwriting import may_overwrite
from gradroute.testing import Result, assert_result_within_budget

#: Triton's kernels, which are interpreted here, are in the second tier of tests, but for one op.
in_tiers = pytest.mark.parametrize(
    ("op", "backend"),
    [
        pytest.param(
            op,
            backend,
            marks=[pytest.mark.slow] if backend == "triton" and op != "routed_glu" else [],
            id=f"{op}-{backend}",
        )
        for op, backend in cases.FUNCTION_BACKENDS
    ],
)


class Kept:
    """What operations returned, as it was then."""

    def __init__(self):
        super().__init__()
        self.kept = []

    def keep(self, func, outputs):
        for output in tree_leaves(outputs):
            if isinstance(output, torch.Tensor) and "empty" not in str(func):
                self.kept.append((str(func), output, output._version, output.detach().clone()))

    def assert_unchanged(self):
        assert self.kept
        for func, output, version, content in self.kept:
            # A view gets the counter of its base when the mode has returned.
            assert output._is_view() or output._version == version, f"an output of {func} was written to"
            same = torch.equal(cases.bytes_of(output), cases.bytes_of(content))
            assert same, f"an output of {func} was written to"


class DispatchKeeper(Kept, TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        with _disable_current_modes():
            self.keep(func, outputs)
        return outputs


class FunctionKeeper(Kept, TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunction():
            if func.__name__ != "__get__":
                self.keep(func, outputs)
        return outputs


def run_watched(call, backend):
    """The results with nobody who looks on, under a mode of dispatch, and under a mode of functions."""
    yield call.run(backend)
    for keeper in (DispatchKeeper(), FunctionKeeper()):
        with keeper:
            result = call.run(backend)
        keeper.assert_unchanged()
        yield result


@in_tiers
def test_a_mode_may_keep_every_output(op, backend, device):
    """Forward and backward write to nothing that a mode has seen, and give the same numbers under it."""
    cases.require(backend, device)
    # torch's own composition of an RMS norm writes to a mean that it has made.
    variant = {"casting_mode": "llama"} if op == "routed_rms_norm" else {}
    for tables, strength in (("blocks", None), ("dense", "token")):
        call = cases.make(op, on=backend, tables=tables, strength=strength, device=device, **variant)
        expected, *others = run_watched(call, backend)
        for result in others:
            cases.assert_same_numbers(result, expected, op)


def in_parts():
    """Calls whose backward gathers the tokens of each route, and adds up what they leave."""
    for in_order in (False, True):
        gated = test_skipping.quarters(1024, in_order)
        yield gated
        mlp = cases.make("routed_mlp", tokens=1024, sizes=testing.Sizes(d_model=8, d_ff=16))
        yield mlp.with_routes(gated.routes).with_sites(gated.sites)
    linear = cases.make("routed_linear", tokens=1024, tables="blocks")
    yield linear.with_routes(Routes.of(torch.arange(1024) % 4, 4))


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_a_mode_may_keep_every_output_of_a_backward_in_parts(backend):
    """A product added to a part of a matrix in place has other bits than one beside it."""
    cases.require(backend, torch.device("cpu"))
    for call in in_parts():
        exact = call.in_float64().run("reference")
        for result in run_watched(call, backend):
            assert_result_within_budget(result, exact, call.run_plain(), call.op)


def saves(*ops):
    """A policy that keeps the outputs of these ops; without any, of all."""

    def policy(context, op, *args, **kwargs):
        kept = not ops or op in ops
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return policy


aten = torch.ops.aten
ACTIVATIONS = (aten.silu.default, aten.gelu.default, aten.relu.default, aten.mul.Tensor)
POLICIES = {
    "products": saves(aten.mm.default, aten.addmm.default),
    "products and activations": saves(aten.mm.default, *ACTIVATIONS),
    "attention": saves(aten._scaled_dot_product_flash_attention_for_cpu.default),
    "everything": saves(),
}


def run_checkpointed(call, backend, policy):
    leaves = call.leaves()
    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    output = checkpoint(call.call, leaves, backend, use_reentrant=False, context_fn=contexts)
    wanted = {name: leaves[name] for name in call.differentiable}
    gradients = torch.autograd.grad(output, list(wanted.values()), call.upstream)
    return Result(output.detach(), dict(zip(wanted, gradients, strict=True)))


@pytest.mark.setup("Checkpointing", "selective, with any policy, every op")
@in_tiers
def test_selective_checkpointing(op, backend, device):
    """Whatever a policy keeps, the numbers are those of the op without a checkpoint."""
    cases.require(backend, device)
    variant = {"casting_mode": "llama"} if op == "routed_rms_norm" else {}  # see above
    call = cases.make(op, on=backend, tables="blocks", device=device, **variant)
    expected = call.run(backend)
    for name, policy in POLICIES.items():
        cases.assert_same_numbers(run_checkpointed(call, backend, policy), expected, f"{op}, {name}")


def test_who_may_write():
    class Labelled(torch.Tensor):
        pass

    plain = torch.ones(2)
    assert may_overwrite(plain)
    assert not may_overwrite(plain.as_subclass(Labelled))
    for keeper in (DispatchKeeper(), FunctionKeeper()):
        with keeper:
            assert not may_overwrite(plain)
    seen = []
    torch.func.vmap(lambda x: seen.append(may_overwrite(plain)) or x)(plain)
    assert seen == [False]


@pytest.mark.parametrize(
    "name", [name for name in test_compile.REGISTERED if torch._C._get_schema(name, "").is_mutable]
)
def test_what_an_op_writes_to_has_a_new_version(name, device):
    """Else a backward that saved the old values would use the new ones without a word."""
    test_compile.require_op(name, device)
    func, calls = test_compile.recorded_calls(device)[name]
    for args, kwargs in calls:
        copies = [arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args]
        versions = [arg._version if isinstance(arg, torch.Tensor) else None for arg in copies]
        func(*copies, **kwargs)
        for argument, arg, version in zip(func._schema.arguments, copies, versions, strict=False):
            if isinstance(arg, torch.Tensor):
                written = argument.alias_info is not None and argument.alias_info.is_write
                assert (arg._version > version) == written, argument.name


def test_a_backward_of_what_a_kernel_overwrote_raises():
    if native.module is None:
        pytest.skip(native.load_error)
    h = torch.randn(4, 8, requires_grad=True) * 1.0
    y = h.square()
    ids, weights = torch.zeros(4, dtype=torch.int32), torch.full((1, 8), 2.0)
    torch.ops.gradroute.native_masked_product_(h.detach(), ids, None, weights, [])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_without_anybody_who_looks_on_no_second_matrix_is_made(backend):
    cases.require(backend, torch.device("cpu"))
    call = cases.make("route_grad", tables="dense")
    primitives = backends.primitives(backend)
    product = primitives.masked_product(call.upstream, call.routes, call.sites)
    assert product is not call.upstream
    assert primitives.masked_product(call.upstream, call.routes, call.sites, overwrite=True) is call.upstream
    assert torch.equal(product, call.upstream)


@pytest.mark.skipif("triton" not in backends._PRIMITIVES, reason="the package triton is not installed")
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_in_place_a_weight_of_one_keeps_every_bit(dtype, transposed, device):
    """In vectors of other weights too; a weight of zero leaves zeros. The last vector ends beyond the last feature."""
    weights = torch.ones(2, 44)
    weights[1, 9], weights[1, 16:24], weights[1, 40:] = 0, torch.arange(8) / 4, 0
    routes = Routes.of(torch.tensor([0, 1, 1], device=device), num_routes=2)
    numbers = torch.tensor([torch.nan, torch.inf, -0.0, 3.0], dtype=dtype, device=device)
    as_integer = torch.int32 if dtype == torch.float32 else torch.int16
    numbers.view(as_integer)[0] |= 5  # a NaN with a payload
    g = numbers.repeat(3, 11)
    g = g.T.contiguous().T if transposed else g
    m = weights.to(device)[routes.ids.long()]
    expected = torch.where(m == 1, g, torch.where(m == 0, torch.zeros_like(g), g * m.to(dtype)))
    product = backends.primitives("triton").masked_product(g, routes, Table(weights), overwrite=True)
    assert product is g
    assert torch.equal(torch.isnan(g), torch.isnan(expected))
    kept = (m == 1) | ~torch.isnan(expected)
    assert torch.equal(g.contiguous().view(as_integer)[kept], expected.contiguous().view(as_integer)[kept])
