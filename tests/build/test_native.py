"""The native module: every instruction set, what it refuses, its arithmetic, its independence of threads."""

import math
import sys
import threading
import time
import types
import warnings

import cases
import pytest
import torch

from gradroute import MLPSites, Routes, Table, backends, testing
from gradroute.activations import ACTIVATIONS
from gradroute.backends import native
from gradroute.backends.native import loading, operands
from gradroute.backends.native.operands import (
    BiasOperands,
    DeltaOperands,
    EmbeddingOperands,
    HeadMasks,
    HeadOperands,
    Mask,
    Positions,
    Routing,
    Weights,
)

pytestmark = pytest.mark.skipif(native.module is None, reason=str(native.load_error))

INSTRUCTION_SETS = native.module.INSTRUCTION_SETS if native.module else ()
CPU_OPS = [op for op, row in backends.OPS.items() if "cpu" in row]


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request, monkeypatch):
    """Each that this machine runs, in use."""
    monkeypatch.setattr(loading, "instruction_set", request.param)
    return request.param


@pytest.fixture
def threads():
    """Sets the number of threads, and puts it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def of_routes(ids, num_routes=2, strength=None):
    return Routes.of(torch.as_tensor(ids), num_routes, strength=strength)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("op", CPU_OPS)
def test_every_instruction_set_keeps_the_budget(op, dtype, instruction_set):
    sizes = testing.Sizes(d_model=300, d_ff=270)  # more than a block of features, no multiple of a vector
    for variant in testing.variants(op):
        cases.make(op, dtype=dtype, tokens=70, sizes=sizes, strength="token", **variant).assert_within_budget(
            "cpu"
        )


@pytest.mark.parametrize("op", CPU_OPS)
def test_results_do_not_depend_on_the_number_of_threads(op, instruction_set, threads):
    """Sums over tokens are made in runs; large enough for the runs to be shared among threads."""
    sizes = testing.Sizes(d_model=96, d_ff=128)
    call = cases.make(op, tokens=700, sizes=sizes, tables="blocks")
    results = []
    for number in (1, 2, 3):
        threads(number)
        results.append(call.run("cpu"))
    for result in results[1:]:
        if op in (
            "routed_linear",
            "routed_mlp",
            "routed_gated_mlp",
            "routed_attention",
        ):  # products are torch's
            exact = call.in_float64().run("reference")
            testing.assert_result_within_budget(result, exact, call.run_plain(), op)
        else:  # the forward is torch's, whose vectorised loops end elsewhere
            testing.assert_same_bits(result._replace(output=results[0].output), results[0], op)


def product(g, weights, ids):
    """m ⊙ g by the kernel, for weights `[R, 1]`."""
    return native.masked_product(g, of_routes(ids, len(weights)), Table(weights))


def test_every_half_is_read_and_rounded_as_torch_does(instruction_set):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        g = bits.view(dtype).reshape(-1, 64)
        for m in (1.0, 0.3, 3.0, 1e-3, 700.0):
            weights = torch.tensor([[1.0], [m]])
            expected = (g.float() * weights[1]).to(dtype)
            got = native.masked_product(
                g, of_routes([1] * len(g)), Table(torch.cat([weights] * 2, 1).repeat(1, 32))
            )
            same = torch.equal(got.view(torch.int16), expected.view(torch.int16))
            assert same or torch.equal(got.nan_to_num(7.0), expected.nan_to_num(7.0))


def test_ties_round_to_even(instruction_set):
    for dtype in (torch.float16, torch.bfloat16):
        step = torch.finfo(dtype).eps
        x = torch.tensor([1.0, 1.0 + step, 1.0 + 2 * step, 1.0 + 3 * step], dtype=dtype)
        for m in (1 + step / 2, 1 - step / 4, 0.5 + step / 8):
            expected = (x.float() * torch.tensor(m)).to(dtype)
            assert torch.equal(product(x[None], [[1.0], [m]], [1])[0], expected)


def test_smallest_halves_are_rounded_not_flushed(instruction_set):
    x = torch.tensor([2.0**-24, 3 * 2.0**-24, 2.0**-14, -(2.0**-24)], dtype=torch.float16)
    for m in (0.5, 0.75, 1.5, 0.25):
        assert torch.equal(product(x[None], [[1.0], [m]], [1])[0], (x.float() * m).half())


DERIVATIVES = {
    "silu": lambda a: torch.sigmoid(a) * (1 + a * (1 - torch.sigmoid(a))),
    "gelu": lambda a: (
        0.5 * torch.erfc(-a / math.sqrt(2)) + a * torch.exp(-a * a / 2) / math.sqrt(2 * math.pi)
    ),
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_over_the_whole_line(activation, instruction_set):
    """Value and derivative within 4 eps of the larger of 1 and the value; saturated without overflow or NaN."""
    a = torch.cat(
        [torch.linspace(-30, 30, 40001), torch.tensor([-1e4, -104.0, -88.0, 0.0, 88.0, 104.0, 1e4])]
    )[None]
    exact = a.double().requires_grad_()
    value = testing.PLAIN_ACTIVATIONS[activation](exact)
    (derivative,) = torch.autograd.grad(value.sum(), exact)
    da, z, _ = native.activation_backward(
        torch.ones_like(a),
        a,
        of_routes([0]),
        MLPSites().masks,
        activation,
        want_z=True,
        want_bias=False,
    )
    for got, expected in ((z, value.detach()), (da, derivative)):
        error = (got.double() - expected).abs() / expected.abs().clamp(min=1)
        assert error.max() <= 4 * torch.finfo(torch.float32).eps, a[0, error.argmax()]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_nan_activation_is_not_hidden(activation, instruction_set):
    a = torch.tensor([[float("nan"), 1.0]])
    da, z, _ = native.activation_backward(
        torch.ones_like(a), a, of_routes([0]), MLPSites().masks, activation, want_z=True, want_bias=False
    )
    assert z[0, 0].isnan()
    assert torch.isfinite(da[0, 1])
    assert torch.isfinite(z[0, 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_in_place_touches_only_what_a_table_changes(dtype, instruction_set):
    """Where m is 1 nothing is written: another thread's value, put there meanwhile, would stay."""
    table = Table(torch.tensor([[1.0] * 6, [1.0, 1.0, 0.0, 0.0, 0.5, 0.5]]))
    g = torch.arange(12, dtype=dtype).reshape(2, 6) + 1
    expected = g.clone()
    expected[1, 2:4] = 0
    expected[1, 4:] *= 0.5
    assert native.masked_product(g, of_routes([0, 1]), table, overwrite=True) is g
    assert torch.equal(g, expected)


def masked_heads(x, out, routes, table):
    weights = table.weights
    native.launch("masked_heads", HeadOperands(x, out, Mask.of(routes.ids, None, weights)))


def check_masks_by_token_and_head(dtype, in_place, shape):
    """masked_heads of x `[batch, heads, sequence, features]` gives the bits of its formula."""
    torch.manual_seed(0)
    batch, heads, sequence, features = shape
    x = torch.randn(batch, sequence, heads, features).to(dtype).transpose(1, 2)
    ids = torch.randint(0, 3, (batch, sequence))
    table = Table(torch.tensor([[1.0, 0.0, 0.5], [1.0] * 3, [0.0, -0.75, 1.0]]))
    mask = table.weights[ids].transpose(1, 2)[..., None].to(dtype)
    expected = mask * x
    out = x if in_place else torch.empty_like(x)
    masked_heads(x, out, of_routes(ids, 3), table)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("in_place", [True, False])
def test_masks_by_token_and_head(dtype, in_place, instruction_set):
    check_masks_by_token_and_head(dtype, in_place, (2, 3, 5, 7))


def check_delta_of_attention(dtype, shape):
    """delta = rowsum(do ⊙ o) with do = m_forward_heads ⊙ m_heads ⊙ dz, of dz `[batch, heads, sequence, features]`."""
    torch.manual_seed(0)
    batch, heads, sequence, _ = shape
    wide = torch.promote_types(dtype, torch.float32)
    dz, o = (torch.randn(shape, dtype=wide).to(dtype) for _ in range(2))
    ids = torch.randint(0, 2, (batch, sequence))
    first, second = (
        Table(w) for w in ([[1.0, 0.5, 1.0], [0.0, 1.0, -1.0]], [[1.0, 1.0, 1.0], [1.0, 0.5, 0.0]])
    )
    masks = [table.weights[ids].transpose(1, 2)[..., None].to(wide) for table in (first, second)]
    expected = masks[0] * masks[1] * dz
    routes, d_o, delta = (
        of_routes(ids),
        torch.empty_like(dz),
        torch.empty(batch * heads, sequence, dtype=wide),
    )
    masks = HeadMasks(Routing(routes.ids, None), Weights(first.weights), Weights(second.weights))
    native.launch("attention_delta", DeltaOperands(dz, o, d_o, delta, masks))
    torch.testing.assert_close(d_o, expected.to(dtype), rtol=1e-6, atol=0)
    torch.testing.assert_close(delta, (expected * o).sum(-1).flatten(0, 1), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_delta_of_attention(dtype, instruction_set):
    check_delta_of_attention(dtype, (2, 3, 5, 300))


def bias_grad(g, sums=None):
    """The kernel, launched as the primitives do it."""
    sums = torch.zeros(1, 3) if sums is None else sums
    native.launch("bias_grad", BiasOperands(g, sums, Mask.of(torch.zeros(2).int(), None, None)))


class Wrapped(torch.Tensor):
    """A subclass that wraps others: its memory is somewhere else."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError


class Marked(torch.nn.Parameter):
    """A subclass in name only, as libraries make of Parameter."""


def test_a_tensor_subclass_is_refused():
    g = torch.ones(2, 3).as_subclass(Wrapped)
    with pytest.raises(TypeError, match="got a Wrapped, expected a torch"):
        bias_grad(g)


def test_a_subclass_in_name_only_is_taken():
    call = cases.make("routed_rms_norm")
    tensors = call.leaves()
    tensors["weight"] = Marked(tensors["weight"].detach())
    (gradient,) = torch.autograd.grad(call.call(tensors, "cpu"), tensors["weight"], call.upstream)
    assert torch.equal(gradient, call.run("cpu").gradients["weight"])


@pytest.mark.parametrize("number", range(3))
def test_ids_weights_and_positions_elsewhere_are_refused(number):
    given = [torch.zeros(2).int(), torch.ones(1, 1), torch.zeros(2).long()]
    given[number] = given[number].to("meta")
    ids, weights, positions = given
    operands = EmbeddingOperands(
        torch.ones(2, 3),
        torch.zeros(2, 3),
        Positions(positions),
        Positions(torch.zeros(2).long()),
        -1,
        Mask.of(ids, None, weights),
    )
    with pytest.raises(ValueError, match="got a tensor on meta, expected cpu as the first one"):
        native.launch("embedding_backward", operands)


def test_a_dtype_that_no_kernel_takes_is_refused():
    with pytest.raises(
        ValueError, match=r"got a torch\.int32 tensor, expected torch\.float32, torch\.bfloat16"
    ):
        bias_grad(torch.ones(2, 3).int())


@pytest.mark.parametrize(
    ("architecture", "runs", "not_on"),
    [
        ("80-real", (8, 6), (9, 0)),
        ("90a-real", (9, 0), (10, 0)),
        ("100", (12, 0), (9, 0)),
        ("90", (10, 3), (8, 9)),
    ],
)
def test_devices_that_an_architecture_serves(architecture, runs, not_on):
    assert loading.runs_on(architecture, runs)
    assert not loading.runs_on(architecture, not_on)


def test_a_dtensor_is_refused(tmp_path):
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.distributed's own
        init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            g = distribute_tensor(torch.ones(2, 3), init_device_mesh("cpu", (1,)))
            with pytest.raises(TypeError, match="got a DTensor"):
                bias_grad(g)
        finally:
            destroy_process_group()


def test_tensors_without_memory_are_not_launched():
    meta = torch.ones(2, 3, device="meta")
    with pytest.raises(ValueError, match="got a tensor on meta, expected cpu"):
        bias_grad(torch.ones(2, 3), sums=meta)
    bias_grad(meta)  # tracing: nothing happens


def test_a_tensor_whose_memory_is_gone_is_refused():
    g = torch.ones(2, 3)
    gone = torch.ones(2, 3)
    gone.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"got a tensor \[2, 3\] without memory"):
        bias_grad(g, sums=gone)


def test_a_misaligned_view_is_refused():
    g = torch.frombuffer(bytearray(4 * 6 + 1), dtype=torch.float32, offset=1, count=6).reshape(2, 3)
    with pytest.raises(ValueError, match="an address that is not a multiple of 4; clone it"):
        bias_grad(g)


def test_an_unknown_instruction_set_is_refused(monkeypatch):
    monkeypatch.setenv("GRADROUTE_CPU_CAPABILITY", "mmx")
    with pytest.raises(ValueError, match="GRADROUTE_CPU_CAPABILITY: got 'mmx', expected one of "):
        loading._instruction_set()
    monkeypatch.setenv("GRADROUTE_CPU_CAPABILITY", "baseline")
    assert loading._instruction_set() == "baseline"


@pytest.mark.parametrize("struct", operands.STRUCTS)
def test_operands_are_those_of_the_module(struct):
    """The same fields in the same order in csrc/kernels.inc and in operands.py."""
    assert native.module.STRUCTS[struct.__name__] == struct._fields


def test_every_struct_of_the_module_has_a_twin():
    by_hand = {"Matrix", "Heads", "Routing", "Table", "Stream"}  # the tuples that `taken` makes of tensors
    assert set(native.module.STRUCTS) - by_hand == {struct.__name__ for struct in operands.STRUCTS}
    assert set(native.module.KERNELS.values()) <= {struct.__name__ for struct in operands.STRUCTS}


def test_tensors_are_taken_as_the_module_reads_them():
    taken = {
        "Matrix": operands.taken(torch.ones(2, 3), torch.device("cpu")),
        "Heads": operands.taken(torch.ones(2, 3, 4, 5), torch.device("cpu")),
        "Routing": Routing(torch.zeros(2).int(), torch.ones(2)).taken(torch.device("cpu")),
        "Table": Weights(torch.ones(2, 3)).taken(torch.device("cpu")),
    }
    assert {name: len(fields) for name, fields in taken.items()} == {
        name: len(native.module.STRUCTS[name]) for name in taken
    }
    with pytest.raises(TypeError, match="expected a tuple of 3 fields"):
        native.module.cpu_baseline.bias_grad((), (0, 0))


BUILT_EARLIER = types.SimpleNamespace(__file__="/somewhere/_native.so", STRUCTS={"Mask": ("routing",)})


def test_a_module_of_other_sources_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradroute._native", BUILT_EARLIER)
    module, why = loading._load()
    assert module is None
    assert "/somewhere/_native.so was built from other sources than this package: build it again" in why


def test_the_checkout_names_the_copy_that_has_the_module(tmp_path, monkeypatch):
    """A plain `pip install .` builds no module for the checkout, whose package Python finds first at its root."""
    monkeypatch.setattr(loading, "_PACKAGE", tmp_path / "checkout" / "gradroute")
    installed = tmp_path / "site-packages" / "gradroute"
    installed.mkdir(parents=True)
    (installed / "_native.cpython.so").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path / "checkout"), str(tmp_path / "site-packages")])
    why = loading._why_missing()
    assert f"not built for the copy of gradroute in {tmp_path}/checkout/gradroute" in why
    assert f"the copy installed in {installed} has it: run from outside of the checkout" in why
    monkeypatch.setattr(sys, "path", [str(tmp_path / "checkout")])
    assert loading._why_missing() == "the native module was not built (docs/install.md says what it needs)"


def test_the_best_instruction_set_comes_first():
    order = ("avx512", "avx2", "baseline")
    assert tuple(name for name in order if name in INSTRUCTION_SETS) == INSTRUCTION_SETS


def test_without_the_module_the_backends_say_why(monkeypatch):
    monkeypatch.setattr(loading, "module", None)
    monkeypatch.setattr(loading, "load_error", "the native module was not built")
    for backend in ("cpu", "cuda"):
        assert backends.unavailable_backends("route_grad", "cpu")[backend].startswith(
            "the native module was not built"
        )
    with pytest.raises(backends.BackendError, match="the native module was not built"):
        cases.make("route_grad").run("cpu")
    with pytest.warns(RuntimeWarning, match="runs on the slower backend 'torch'"):
        result = cases.make("route_grad").run()
    testing.assert_same_bits(result, cases.make("route_grad").run("reference"), "torch")


def test_the_gil_is_released_while_a_kernel_runs(monkeypatch):
    """One kernel in another thread; this thread never waits for as long as it takes."""
    monkeypatch.setattr(loading, "instruction_set", "baseline")
    a = torch.ones(4096, 4096)
    masks, routes, took = MLPSites().masks, of_routes([0] * 4096), []

    def work():
        start = time.perf_counter()
        native.activation_backward(a, a, routes, masks, "gelu", want_z=False, want_bias=False)
        took.append(time.perf_counter() - start)

    thread, longest, last = threading.Thread(target=work), 0.0, time.perf_counter()
    thread.start()
    while thread.is_alive():
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    assert longest < took[0] / 2
