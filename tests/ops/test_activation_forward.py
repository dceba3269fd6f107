"""The fused forward of the activations: eager PyTorch's bits on a GPU, and elsewhere all that is not the device's.

Triton's interpreter and the emulation of CUDA have the CPU's exponential, error function and tangent, so that act(a)
has nobody's bits there. What the kernels make of it is exact everywhere: the products and how each of them is rounded.
"""

import importlib
import itertools

import cases
import emulated_cuda
import numpy as np
import pytest
import torch

from gradroute import ActivationSites, MLPSites, Routes, backends, routed_gated_mlp, routed_glu, routed_mlp
from gradroute.activations import ACTIVATIONS
from gradroute.backends import composed, native
from gradroute.backends import triton as kernels
from gradroute.kernels import activation_forward as in_triton
from gradroute.primitives import fused_forward
from gradroute.primitives.fused_forward import ForwardArguments, equal_bits, every_value, is_worthwhile
from gradroute.tables import Table

on_cuda = importlib.import_module(
    "gradroute.backends.native.activation_forward"
)  # the package has the function

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EXACT = ("relu", "relu2")  # except for the sign of relu(-0), which PyTorch's kernels for the CPU keep
OPS = {"triton": in_triton.activation_forward_op, "cuda": on_cuda.activation_forward_op}


@pytest.fixture(params=OPS)
def op(request, monkeypatch):
    """The op of a backend with kernels for GPUs, on the CPU: interpreted, or emulated.

    NumPy, which interprets, would warn of the infinities and NaN among the values.
    """
    if request.param == "triton":
        cases.require("triton", CPU)
    else:
        if missing := emulated_cuda.missing_tools():
            pytest.skip(f"no {', '.join(missing)} to compile the emulation of CUDA with")
        emulated_cuda.use(request.getfixturevalue("emulated_cuda_module"), monkeypatch)
    with np.errstate(all="ignore"):
        yield OPS[request.param]


def values(dtype, step=1):
    """Every `step`-th of all values of a dtype of 16 bits, or of a sample of fp32: `[T, 251]`."""
    found = every_value(dtype, CPU).flatten()[::step]
    return found[: found.numel() // 251 * 251].view(-1, 251)


def unmasked(a, activation):
    return ForwardArguments(torch.zeros(len(a), dtype=torch.int32), None, None, activation)


def readable(x, op):
    """x without what Triton's interpreter misreads: subnormal numbers in bf16."""
    if op is not OPS["triton"] or x.dtype != torch.bfloat16:
        return x
    return x.masked_fill(x.abs() < torch.finfo(x.dtype).smallest_normal, 0)


def is_close(value, a, activation):
    """Within two units in the last place of a: the exponentials differ, and of several roundings one may turn."""
    exact = ACTIVATIONS[activation].value(a)
    finite = exact.isfinite() & (a.abs() < 1e4)  # beyond, powers of a overflow sooner or later
    error = (value.double() - exact.double()).abs()
    smallest = torch.finfo(a.dtype).smallest_normal
    return bool((error <= 2 * torch.finfo(a.dtype).eps * a.double().abs() + smallest)[finite].all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values(op, activation, dtype):
    a = readable(values(dtype, 61 if dtype.itemsize == 2 else 4001), op)
    value = op(a, None, *unmasked(a, activation))
    assert is_close(value, a, activation)
    if activation in EXACT:
        expected = readable(ACTIVATIONS[activation].value(a), op)
        torch.testing.assert_close(readable(value, op), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_products_are_rounded_one_by_one(op, activation, dtype):
    """With the kernel's own act(a), its product with up and the mask have the bits of PyTorch's operations."""
    a = readable(values(dtype, 67 if dtype.itemsize == 2 else 4003), op)
    up, ids = a.flip(0), torch.arange(len(a), dtype=torch.int32) % 3
    routes = Routes.of(ids, 3)
    table = Table(torch.tensor([[1.0], [0.0], [-0.75]]) * torch.linspace(0.5, 1, 251))
    value = op(a, None, *unmasked(a, activation))
    z = op(a, up, *unmasked(a, activation))
    assert equal_bits(readable(z, op), readable(value * up, op))
    masked = op(a, up, ids, None, table.on(CPU), activation)
    expected = composed.masked_product(value * up, routes, table)
    assert equal_bits(readable(masked, op), readable(expected, op))


@pytest.mark.parametrize("per_token", [True, False])
def test_strength(op, per_token):
    """Interpolated weights may differ in their last place: PyTorch's lerp has fused multiply-adds on the CPU."""
    a, up, ids = torch.randn(9, 16), torch.randn(9, 16), torch.arange(9, dtype=torch.int32) % 3
    strength = torch.linspace(0, 1, 9) if per_token else torch.tensor(0.3)
    table = Table(torch.randn(3, 16))
    masked = op(a, up, ids, strength, table.on(CPU), "relu")
    expected = composed.masked_product(a.relu() * up, Routes.of(ids, 3, strength=strength), table)
    torch.testing.assert_close(masked, expected)


@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 520), (130, 37)])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
def test_sizes_and_strides(op, shape, layout):
    tokens, features = shape
    made = {
        "contiguous": lambda: torch.randn(shape),
        "transposed": lambda: torch.randn(features, tokens).T,
        "sliced": lambda: torch.randn(tokens, features + 3)[:, 3:],
    }[layout]
    a, up = made().bfloat16(), made().bfloat16()
    expected = ACTIVATIONS["relu"].value(a) * up
    assert equal_bits(op(a, up, *unmasked(a, "relu")), expected.contiguous())


@pytest.mark.parametrize("with_up", [True, False])
def test_the_op_passes_opcheck(op, with_up):
    a = torch.randn(5, 8)
    weights, ids = torch.rand(2, 8), torch.zeros(5, dtype=torch.int32)
    for strength, weight in ((None, None), (torch.rand(5), weights), (torch.tensor(0.5), weights)):
        arguments = (a, a.clone() if with_up else None, ids, strength, weight, "silu")
        outcome = torch.library.opcheck(registered(op), arguments)
        assert set(outcome.values()) == {"SUCCESS"}, outcome


def registered(op):
    """The op as torch.library has it."""
    name = "activation_forward" if op is OPS["triton"] else "native_activation_forward"
    return getattr(torch.ops.gradroute, name).default


def run_forward(dtype):
    a = torch.randn(3, 8, dtype=dtype)
    return on_cuda.activation_forward_op(a, a, *unmasked(a, "silu"))


def test_where_a_kernel_is_worthwhile():
    meta, table = torch.empty(2, 3, device="meta"), Table(torch.ones(1, 3))
    assert not is_worthwhile(torch.empty(2, 3), torch.empty(2, 3), table, "silu")
    for activation in ACTIVATIONS:
        assert is_worthwhile(meta, meta, None, activation)
        assert is_worthwhile(meta, None, table, activation)
        several = activation in ("gelu_new", "gelu_fast", "relu2")
        assert is_worthwhile(meta, None, None, activation) == several


@pytest.fixture
def pretended(monkeypatch):
    """Kernels are asked for on the CPU, too, as if its tensors were on a GPU; nothing is known of their bits yet."""
    for module in (on_cuda, in_triton):
        monkeypatch.setattr(module, "is_worthwhile", lambda *_: True)
    monkeypatch.setattr(fused_forward, "_verdicts", {})


def wrong(a, up, *rest):
    return torch.full_like(a, 7)


def eager(a, up, *rest):
    value = ACTIVATIONS[ForwardArguments(*rest).activation].value(a)
    return value if up is None else value * up


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_kernel_with_other_bits_is_not_used(pretended, monkeypatch, dtype):
    """It is said once, and the forward stays PyTorch's."""
    monkeypatch.setattr(on_cuda, "activation_forward_op", wrong)
    a, up = torch.randn(2, 4, 8).to(dtype).unbind()
    routes = Routes.of(torch.zeros(4, dtype=torch.int64), 1)
    with pytest.warns(
        RuntimeWarning, match="the fused forward of silu in .* of backend 'cuda' has other bits"
    ):
        first = native.activation_forward(a, up, routes, None, "silu")
    second = native.activation_forward(a, up, routes, None, "silu")  # a second warning would be an error
    assert torch.equal(first, torch.nn.functional.silu(a) * up)
    assert torch.equal(second, first)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_kernel_that_shows_its_bits_is_used(pretended, monkeypatch, dtype):
    calls = []

    def counted(a, up, *rest):
        calls.append(a.shape)
        return eager(a, up, *rest)

    monkeypatch.setattr(in_triton, "activation_forward_op", counted)
    a, up = torch.randn(2, 2, 3, 8).to(dtype).unbind()
    routes = Routes.of(torch.zeros(2, 3, dtype=torch.int64), 1)
    for _ in range(2):
        z = kernels.activation_forward(a, up, routes, None, "gelu_new")
    assert torch.equal(z, ACTIVATIONS["gelu_new"].value(a) * up)
    assert calls[-2:] == [(6, 8)] * 2  # each call
    assert len(calls) == 4  # and before the first one twice, to compare


@pytest.mark.slow
@pytest.mark.parametrize("agrees", [True, False])
def test_the_comparison_is_a_constant_of_compiled_code(pretended, monkeypatch, agrees):
    """One graph: it has the kernel where the bits are equal, and PyTorch's operations where they are not."""
    cases.require("triton", CPU)
    asked = []

    def answer(*arguments):
        asked.append(arguments[2:])
        return agrees

    monkeypatch.setattr(in_triton, "has_eager_bits", answer)
    a, up = torch.randn(2, 4, 8).unbind()
    routes = Routes.of(torch.zeros(4, dtype=torch.int64), 1)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph.code)
        return graph

    compiled = torch.compile(
        lambda a, up: kernels.activation_forward(a, up, routes, None, "relu"), fullgraph=True, backend=backend
    )
    assert torch.equal(compiled(a, up), a.relu() * up)
    assert ("torch.ops.gradroute.activation_forward" in graphs[0]) == agrees
    assert set(asked) == {("relu", torch.float32, CPU)}


def test_nothing_is_compared_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(fused_forward, "_verdicts", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    device = torch.device("cuda", 0)
    assert not fused_forward.has_eager_bits("cuda", wrong, "silu", torch.bfloat16, device)
    assert not fused_forward._verdicts


def test_bits_are_compared_outside_of_modes_and_autocast(monkeypatch):
    """A kernel is asked inside of whatever is active: it is compared outside."""
    monkeypatch.setattr(fused_forward, "_verdicts", {})
    seen = []

    def watched(a, up, *rest):
        seen.append((torch.is_autocast_enabled("cpu"), torch.is_grad_enabled(), type(a)))
        return eager(a, up, *rest)

    with torch.autocast("cpu", dtype=torch.bfloat16), torch._subclasses.FakeTensorMode():
        assert fused_forward.has_eager_bits("cuda", watched, "gelu_new", torch.float16, CPU)
    assert seen == [(False, False, torch.Tensor)] * 2


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("backend", "activation"), list(itertools.product(OPS, ACTIVATIONS)))
def test_bits_of_eager_pytorch_on_a_gpu(backend, activation, dtype):
    """All values of 16 bits, and of fp32 all that end in one of 16 ways."""
    cases.require(backend, torch.device("cuda"))
    device = torch.device("cuda", torch.cuda.current_device())
    for start in range(-(2**31), 2**31, 2**26) if dtype == torch.float32 else (None,):
        if start is None:
            a = every_value(dtype, device)
        else:
            patterns = torch.arange(start, start + 2**26, 16, device=device) + 5
            a = patterns.to(torch.int32).view(dtype).view(-1, 256)
        up = a.roll(1, 0)
        arguments = ForwardArguments(
            torch.zeros(len(a), dtype=torch.int32, device=device), None, None, activation
        )
        value = ACTIVATIONS[activation].value(a)
        assert equal_bits(OPS[backend](a, None, *arguments), value)
        assert equal_bits(OPS[backend](a, up, *arguments), value * up)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_ops_on_a_gpu_use_the_kernels(backend, monkeypatch):
    """Every op with a forward through the activation asks the fused kernel, and without a warning."""
    cases.require(backend, torch.device("cuda"))
    module = in_triton if backend == "triton" else on_cuda
    real, calls = module.activation_forward_op, []

    def counted(*arguments):
        calls.append(arguments[0].shape)
        return real(*arguments)

    monkeypatch.setattr(module, "activation_forward_op", counted)
    x, weights = torch.randn(6, 8, device="cuda"), torch.randn(3, 8, 8, device="cuda")
    routes = Routes.of(torch.zeros(6, dtype=torch.int64, device="cuda"), 2)
    table = torch.rand(2, 8)
    with backends.use_backend(backend):
        routed_gated_mlp(x, *weights, routes, MLPSites(pre=table))
        routed_mlp(x, weights[0], None, weights[1], None, routes, MLPSites(forward=table))
        routed_glu(x, x, routes, ActivationSites(hidden=table))
    assert calls.count((6, 8)) == 3
