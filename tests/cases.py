"""The cases of the tests that iterate the table of ops: every op × backend, and covering samples of the other axes."""

import pytest
import torch

from gradroute import BackendError, attention, backends, testing
from gradroute.backends import native

covering = testing.covering

#: Every op on every backend that implements it.
OP_BACKENDS = [(op, backend) for op, row in backends.OPS.items() for backend in row]

#: The pairs whose op is an autograd.Function of its own: all but the reference's.
FUNCTION_BACKENDS = [(op, backend) for op, backend in OP_BACKENDS if backend != "reference"]

TOKENS = (0, 1, 37, 130, (2, 19))

every_op_backend = pytest.mark.parametrize(
    ("op", "backend"), OP_BACKENDS, ids=["-".join(pair) for pair in OP_BACKENDS]
)
every_function_backend = pytest.mark.parametrize(
    ("op", "backend"), FUNCTION_BACKENDS, ids=["-".join(pair) for pair in FUNCTION_BACKENDS]
)

#: The cases of every_function_backend for a test that takes seconds: one op a backend is in the first tier of tests.
every_function_backend_in_tiers = pytest.mark.parametrize(
    ("op", "backend"),
    [
        pytest.param(
            op, backend, marks=[] if op == "routed_linear" else pytest.mark.slow, id=f"{op}-{backend}"
        )
        for op, backend in FUNCTION_BACKENDS
    ],
)


def parameters(item):
    """The parameters of a collected test, those of fixtures too."""
    return item.callspec.params if hasattr(item, "callspec") else {}


def tiered(values):
    """Values of a parameter whose cases take seconds: all but the first are in the second tier of tests."""
    first, *others = values
    return [first, *(pytest.param(value, marks=pytest.mark.slow) for value in others)]


def dtypes(backend):
    """The dtypes that a backend takes, see design: fp64 on the reference, torch and cpu only."""
    narrow = (torch.float32, torch.bfloat16, torch.float16)
    return (*narrow, torch.float64) if backend in ("reference", "torch", "cpu") else narrow


def require(backend, device):
    """Skips what this machine cannot do: with a GPU Triton's interpreter is off; the native module may be missing.

    A backend for this device runs, or fails with its reason; one for another device is skipped where it cannot run.
    """
    if backend is None:
        return  # the automatic choice takes one that runs
    if backend == "cpu" and native.module is None:
        pytest.skip(native.load_error)
    home = backends._BACKENDS[backend].home
    if home in (None, device.type):
        return
    reason = backends.unavailable_backends(device=device).get(backend)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")


def make(op, on=None, **options):
    """A sample call; attention takes a batch of one sequence where a number of tokens is asked for.

    Args:
        op: its name.
        on: the backend that the call is for. Attention is then one that it takes, see `_attention_on_cuda`.
        **options: those of `testing.sample`.
    """
    if op != "routed_attention":
        return testing.sample(op, **{"tokens": 37} | options)
    tokens = options.pop("tokens", 37)
    options["tokens"] = (1, tokens) if isinstance(tokens, int) else tokens
    return _attention_on_cuda(options) if on == "cuda" else testing.sample(op, **options)


#: The sites of attention that backend cuda has no kernels for.
EDGES = ("score_edges", "value_edges")


def sites_on(backend, sites):
    """Those of the sites that the backend has kernels for."""
    return tuple(site for site in sites if backend != "cuda" or site not in EDGES)


def _attention_on_cuda(options):
    """A sample of what the backend can run, which masks around vendors' kernels.

    It has no edges, and is of bf16 where no vendor's kernel runs it in fp32, which has neither windows nor documents.
    """
    sites = options.pop("sites", "all")
    names = testing.site_names("routed_attention") if sites == "all" else sites
    options["sites"] = sites_on("cuda", (names,) if isinstance(names, str) else names)
    call = testing.sample("routed_attention", **options)
    refusal = refusal_of(call, "cuda")
    if refusal is not None and call.upstream.dtype == torch.float32:
        call = testing.sample("routed_attention", **options | {"dtype": torch.bfloat16})
        refusal = refusal_of(call, "cuda")
    if refusal is not None:
        pytest.skip(refusal)
    return call


def refusal_of(call, backend):
    """Why a backend does not run a call of attention; None where it does."""
    try:
        plan_of(call, backend)
    except BackendError as refusal:
        return str(refusal)
    return None


def plan_of(call, backend):
    """The kernels that run a call of attention on a backend."""
    return attention.explain(
        *call.tensors.values(), call.routes, call.sites, **call.keywords, backend=backend
    )


def bytes_of(tensor):
    """A tensor's memory, flat: PyTorch compares integers of some dtypes on some devices only, and NaN with nothing."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


# Another variant of a kernel may contract other products and sums into one fused multiply-add, which rounds once where
# they round twice. Each changes a gradient by at most half an eps of fp32, before it is rounded to its dtype: then by
# an eps, here and there. Four of the largest value are few beside what a wrong mask changes.
CONTRACTED = 4


def assert_same_numbers(actual, expected, name):
    """The same bits from two variants of a kernel, or on a GPU the same bits forward and gradients that nearly agree.

    Two runs of one variant have the same bits everywhere: they are compared by `testing.assert_same_bits`.
    """
    if not actual.output.is_cuda:
        testing.assert_same_bits(actual, expected, name)
        return
    assert torch.equal(actual.output, expected.output), f"{name}: output"
    assert_gradients_nearly_agree(actual, expected, name)


def assert_gradients_nearly_agree(actual, expected, name):
    """Within CONTRACTED eps of each gradient's largest value."""
    for argument, gradient in actual.gradients.items():
        other = expected.gradients[argument]
        if gradient is None or other is None:
            assert gradient is other, f"{name}: d{argument}"
            continue
        limit = CONTRACTED * torch.finfo(other.dtype).eps * other.abs().max() if other.numel() else 0
        assert torch.all((gradient - other).abs() <= limit), f"{name}: d{argument}"
