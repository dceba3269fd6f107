"""What `python -m gradroute check` finds: a kernel that is wrong in one way, in the kind of check that is for it."""

import contextlib
import itertools
import re

import broken_kernels
import pytest
import torch

from gradroute import BackendError, attention, backends, testing
from gradroute.backends import composed, native
from gradroute.backends.native import operands
from gradroute.machine.check import buffers, far_rows, judging, on_cuda, trials
from gradroute.machine.check.cases import KINDS, STEP, Case, Selection, cases, dtypes_of, ops_of
from gradroute.machine.check.judging import REFUSED, RIGHT, UNCHECKED, WRONG, judged

CPU = torch.device("cpu")
OPTIONS = {
    "numbers": {"tokens": 37},
    "determinism": {"tokens": 70},
    "bounds": {"tokens": 37},
    "strides": {"tokens": 3, "far": "upstream"},
}


def outcome(kind, dtype="float32", op="route_grad", **options):
    return judged(Case(kind, op, dtype, OPTIONS[kind] | options), "torch", CPU, 0)


@pytest.fixture
def broken(monkeypatch):
    """Puts a wrong kernel in the place of backend torch's masked product."""

    def put(kernel):
        monkeypatch.setattr(composed, "masked_product", kernel)

    return put


@pytest.mark.parametrize("kind", OPTIONS)
def test_a_right_kernel_is_right(kind, broken):
    assert outcome(kind).state == RIGHT
    broken(lambda g, routes, table, overwrite=False: broken_kernels.product(g, routes, table))
    assert outcome(kind).state == RIGHT
    assert outcome(kind, inputs="sliced", gradient="sliced").state == RIGHT


FOUND = {
    "forgets_the_mask": ("numbers", "dx: maximum error"),
    "another_bit_every_time": ("determinism", "run 2: dx: .* elements differ"),
    "reads_a_row_too_far": ("bounds", "between guards of NaN: dx: maximum error nan"),
    "reads_a_row_too_early": ("bounds", "between guards of NaN: dx: maximum error nan"),
    "reads_a_column_too_far": ("bounds", "between guards of NaN: dx: maximum error nan"),
    "writes_a_row_too_far": (
        "bounds",
        r"20 elements outside of an allocation \[37, 20\] torch.float32 .*the first 1 behind",
    ),
    "writes_before_the_first_row": ("bounds", "1 elements outside of an allocation .*the first 1 before it"),
    "takes_a_row_too_many": ("bounds", "20 elements outside of an allocation"),
    "masks_its_input_a_row_too_far": ("bounds", r"20 elements outside of upstream \[37, 20\]"),
    "writes_into_its_input": ("bounds", "1 elements of upstream were written to"),
    "leaves_the_last_row_out": ("bounds", "between guards of NaN: dx: maximum error nan"),
    "counts_in_32_bits": ("strides", "with rows of upstream far apart: dx: maximum error"),
    "fails": ("numbers", "^RuntimeError: no kernel image is available$"),
}


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("name", FOUND)
def test_a_broken_kernel_is_found(name, broken):
    kind, text = FOUND[name]
    broken(getattr(broken_kernels, name))
    found = outcome(kind)
    assert found.state == WRONG
    assert re.search(text, found.text), found.text


@pytest.mark.parametrize("name", ["another_bit_every_time", "counts_in_32_bits"])
def test_what_other_kinds_of_checks_do_not_find(name, broken):
    broken(getattr(broken_kernels, name))
    assert outcome("numbers").state == RIGHT


def test_the_dtype_that_is_wrong_is_found(broken):
    broken(broken_kernels.wrong_in_bfloat16)
    assert [outcome("numbers", dtype).state for dtype in ("float32", "bfloat16", "float16")] == [
        RIGHT,
        WRONG,
        RIGHT,
    ]


def test_what_is_read_between_rows_is_found(broken):
    broken(broken_kernels.reads_a_column_too_far)
    assert outcome("bounds", gradient="sliced").state == WRONG


@pytest.mark.skipif(native.module is None, reason="the native module was not built")
@pytest.mark.parametrize("op", ["route_grad", "routed_rms_norm", "routed_layer_norm", STEP])
def test_a_native_kernel_that_is_told_of_a_row_too_many_is_found(op, monkeypatch):
    """The C++ kernels themselves then read and write the row behind their matrices.

    These write to nothing that has no guards; the others would write behind what torch allocated.
    """
    options = {"shape": (9, 7), "blocks": "rows"} if op == STEP else {"tokens": 37}
    case = Case("bounds", op, "float32", options)
    assert judged(case, "cpu", CPU, 0).state == RIGHT
    view = operands._view

    def a_row_too_many(tensor, device):
        address, rows, *others = view(tensor, device)
        return address, rows + 1 if tensor.dim() == 2 else rows, *others

    monkeypatch.setattr(operands, "_view", a_row_too_many)
    for kind in (torch.Tensor, torch.nn.Parameter):
        monkeypatch.setitem(operands._TAKEN, kind, a_row_too_many)
    found = judged(case, "cpu", CPU, 0)
    assert found.state == WRONG
    assert re.search("maximum error nan|elements outside of", found.text), found.text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("bits", [buffers.NAN, buffers.FINITE])
def test_guards_are_what_they_are_for(dtype, bits):
    guards = buffers.Guards(bits, shift=1)
    held = [guards.hold("x", torch.randn(3, 5, dtype=getattr(torch, dtype))) for _ in range(9)]
    for one, other in itertools.pairwise(held):
        memories = [t.as_strided((t.storage_offset(),), (1,), 0) for t in (one, other)]
        assert all(torch.isnan(m).all() if bits == buffers.NAN else torch.isfinite(m).all() for m in memories)
        assert not (memories[0].view(torch.int16) == memories[1].view(torch.int16)).any()
    guards.check()


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_what_is_held_keeps_values_and_strides(layout):
    tensor = testing.Draw(0, torch.float32, "cpu", (), testing.Sizes()).normal(4, 6, layout=layout)
    held = buffers.Guards(buffers.NAN).hold("x", tensor)
    assert torch.equal(held, tensor)
    assert held.stride() == tensor.stride()
    assert held.data_ptr() != tensor.data_ptr()


def test_empty_tensors_and_integers_are_held():
    guards = buffers.Guards(buffers.NAN)
    for tensor in (torch.empty(0, 5), torch.arange(7), torch.ones(3, dtype=torch.bool).expand(2, 3)):
        assert torch.equal(guards.hold("x", tensor), tensor)
    guards.check()
    guards.held[1].memory[0] = 1
    with pytest.raises(AssertionError, match=r"1 elements outside of x .*the first 4096 before it"):
        guards.check()


def test_allocations_are_surrounded_and_torch_is_put_back():
    before = [getattr(owner, name) for owner, name in buffers.ALLOCATING]
    guards = buffers.Guards(buffers.NAN)
    made = []

    def allocate():
        with guards.allocating():
            made.append(torch.empty(3, 2))
            made.append(torch.zeros(2, dtype=torch.int32))
            made.append(torch.ones(2).new_empty((4, 1), dtype=torch.float16))
            made.append(torch.empty_like(torch.ones(2, 3).T))
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        allocate()
    assert [getattr(owner, name) for owner, name in buffers.ALLOCATING] == before
    assert len(guards.held) == 4
    assert made[0].isnan().all()
    assert made[1].eq(0).all()
    assert (made[2].shape, made[2].dtype) == ((4, 1), torch.float16)
    assert made[3].stride() == (1, 3)


def test_far_rows_are_far_and_the_same():
    tensor = torch.randn(2, 4, 3, 5)
    far = far_rows.far_apart(tensor)
    assert torch.equal(far, tensor)
    assert 2 * far.stride(2) > 2**31
    assert far.stride(3) == 1


def test_without_memory_for_far_rows_it_is_not_checked(monkeypatch):
    def refuses(*_, **__):
        raise OSError("Cannot allocate memory")

    monkeypatch.setattr(far_rows.mmap, "mmap", refuses)
    found = outcome("strides")
    assert found.state == UNCHECKED
    assert "8 GiB of virtual memory: Cannot allocate memory" in found.text


def test_running_out_of_memory_is_no_error_of_a_kernel(broken):
    def no_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried")

    broken(no_memory)
    assert outcome("numbers") == (UNCHECKED, "out of memory: CUDA out of memory.")


def copied(result, fresh):
    result.output.copy_(fresh.output)
    for name, gradient in result.gradients.items():
        gradient.copy_(fresh.gradients[name])


def replaying(step, device):
    """A graph that does what it should."""
    result = step()
    return result, lambda: copied(result, step())


def replaying_the_first(step, device):
    """A graph that has its results, and never computes any again."""
    return step(), lambda: None


def replaying_once(step, device):
    """A graph that adds to what the replay before left."""
    result = step()

    def replay():
        gradient = next(iter(result.gradients.values()))
        earlier = gradient.clone()
        copied(result, step())
        gradient.add_(earlier, alpha=1e-3)

    return result, replay


@pytest.mark.parametrize("op", [*backends.OPS, STEP])
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_graphs_are_compared_with_ordinary_runs(op, backend):
    if backends.unavailable_backends(device=CPU).get(backend):
        pytest.skip("the native module was not built")
    options = {"shape": (9, 7), "blocks": "rows"} if op == STEP else {"tokens": 19, "strength": "token"}
    case = Case("graphs", op, "float32", options)
    calls = [trials.made(case, backend, CPU, seed) for seed in range(3)]
    on_cuda.check_graph(calls, CPU, replaying)
    with pytest.raises(AssertionError, match="replay with inputs"):
        on_cuda.check_graph(calls, CPU, replaying_the_first)
    with pytest.raises(AssertionError, match="replay with inputs"):
        on_cuda.check_graph(calls, CPU, replaying_once)


@pytest.mark.parametrize(
    ("backend", "op", "is_demanded"),
    [
        ("torch", "route_grad", True),
        ("cpu", "route_grad", False),
        ("cpu", "routed_attention", True),
        ("triton", "route_grad", False),
    ],
)
def test_determinism_is_demanded_of_torch_alone(backend, op, is_demanded, monkeypatch):
    demanded = []

    class Call:
        def prepared(self, place):
            demanded.append(torch.are_deterministic_algorithms_enabled())
            return lambda: testing.Result(torch.zeros(1), {})

    monkeypatch.setattr(judging, "made", lambda *_: Call())
    torch.use_deterministic_algorithms(False)
    try:
        assert judged(Case("determinism", op, "float32", {}), backend, CPU, 0).state == RIGHT
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(True)
    assert demanded == [is_demanded] * 3


@pytest.mark.parametrize(("backend", "state"), [("torch", UNCHECKED), ("triton", WRONG)])
def test_own_kernels_alone_must_be_captured(backend, state, monkeypatch):
    def refuses(step, device):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")

    monkeypatch.setattr(on_cuda, "captured", refuses)
    found = judged(Case("graphs", "route_grad", "float32", {"tokens": 5}), backend, CPU, 0)
    assert found.state == state
    assert "operation not permitted when stream is capturing" in found.text


def test_another_stream_is_compared_with_an_ordinary_run(broken):
    """A kernel on the busy stream has not run yet when the other stream reads its result."""
    is_beside = False

    def product_on_the_busy_stream(g, routes, table, *, overwrite=False):
        return g.new_empty(g.shape) if is_beside else broken_kernels.product(g, routes, table)

    @contextlib.contextmanager
    def beside(device):
        nonlocal is_beside
        is_beside = True
        yield
        is_beside = False

    call = trials.made(Case("streams", "route_grad", "float32", {"tokens": 9}), "torch", CPU, 0)
    on_cuda.check_stream(call, CPU, beside)
    broken(product_on_the_busy_stream)
    with pytest.raises(AssertionError, match="another stream: dx: 180 of 180 elements differ"):
        on_cuda.check_stream(call, CPU, beside)


@pytest.mark.parametrize("refused", [("score_edges", "value_edges"), ("heads",)])
def test_attention_is_asked_only_for_what_the_backend_takes(refused, monkeypatch):
    explain = attention.explain

    def refusing(*args, sites, **keywords):
        if any(getattr(sites, site) is not None for site in refused):
            raise BackendError("there is no kernel for it yet")
        return explain(*args, sites=sites, **keywords)

    monkeypatch.setattr(attention, "explain", refusing)
    case = Case("numbers", "routed_attention", "float32", {"tokens": 9, "sites": "all"})
    found = judged(case, "torch", CPU, 0)
    if refused == ("heads",):
        assert found == (REFUSED, "there is no kernel for it yet")
        return
    assert found.state == RIGHT
    sites = trials.made(case, "torch", CPU, 0).call.sites
    assert sites.score_edges is None
    assert sites.heads is not None


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_cases_cover_every_axis(backend, quick):
    found = cases(backend, CPU, Selection(quick=quick))
    assert found == cases(backend, CPU, Selection(quick=quick))
    assert {case.op for case in found} == {*backends.OPS, *(() if backend == "reference" else (STEP,))}
    for op in backends.OPS:
        of_op = [case for case in found if case.op == op]
        assert {case.kind for case in of_op} == {"numbers", "determinism", "bounds", "strides"}
        numbers = [case for case in of_op if case.kind == "numbers"]
        assert {case.dtype for case in numbers} == {"float32", "bfloat16", "float16", "float64"}
        for axis, values in {
            "tables": testing.TABLE_KINDS,
            "strength": testing.STRENGTHS,
            "gradient": testing.LAYOUTS,
            "sites": ("all", *testing.site_names(op)),
            "variant": testing.variants(op),
        }.items():
            seen = [case.options.get(axis) for case in numbers]
            assert [value for value in values if value not in seen] == []
        assert {0, 1} <= {case.options.get("tokens") for case in numbers}


def test_a_selection_is_a_part_of_the_whole():
    whole = cases("torch", CPU, Selection(quick=True))
    part = cases(
        "torch", CPU, Selection(quick=True, ops=("route_grad",), dtypes=("float16",), kinds=("bounds",))
    )
    assert part
    assert [case for case in whole if case in part] == part
    assert {(case.op, case.dtype, case.kind) for case in part} == {("route_grad", "float16", "bounds")}
    assert not Selection(kinds=("bounds",)).is_complete
    assert Selection(quick=True, seed=3).is_complete


def test_other_seeds_are_other_cases():
    assert cases("torch", CPU, Selection(seed=1)) != cases("torch", CPU, Selection(seed=2))


def test_dtypes_and_ops_are_those_of_the_backend():
    assert dtypes_of("torch", CPU) == ("float32", "bfloat16", "float16", "float64")
    assert STEP not in ops_of("reference")
    assert set(KINDS) == {"numbers", "determinism", "bounds", "strides", "graphs", "streams"}


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("blocks", ["rows", "columns", "one"])
def test_a_wrong_step_is_found(blocks, amsgrad, monkeypatch):
    case = Case("numbers", STEP, "float32", {"shape": (9, 30), "blocks": blocks, "amsgrad": amsgrad})
    assert judged(case, "torch", CPU, 0).state == RIGHT
    step = composed.adamw_step

    def another_epsilon(*, options, **given):
        step(**given, options=options._replace(eps=2e-3))

    monkeypatch.setattr(composed, "adamw_step", another_epsilon)
    found = judged(case, "torch", CPU, 0)
    assert found.state == WRONG
    assert found.text.startswith("adamw_step: output: maximum error")
