"""The choice of a backend: explicit and never falling back, automatic, and the reasons in every refusal."""

import re
import subprocess
import sys

import cases
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import gradroute
from gradroute import (
    BackendError,
    LinearSites,
    Routes,
    available_backends,
    backends,
    reference,
    routed_linear,
    unavailable_backends,
    use_backend,
)
from gradroute.backends import choose, native

X = torch.zeros(2, 3)


def expect(error, message):
    return pytest.raises(error, match=re.escape(message))


@pytest.fixture
def without_interpreter(monkeypatch):
    """Triton as on a machine without a GPU and without TRITON_INTERPRET."""
    monkeypatch.setattr(backends.triton, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


# The explicit choice


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu", "triton"])
def test_an_explicit_choice_is_taken(backend):
    cases.require(backend, X.device)
    assert choose("routed_linear", backend, X) == backend
    with use_backend(backend):
        assert choose("routed_linear", None, X) == backend


def test_the_argument_goes_before_the_process():
    with use_backend("torch"):
        assert choose("routed_linear", "reference", X) == "reference"


@pytest.mark.parametrize(
    ("op", "backend"), cases.OP_BACKENDS, ids=["-".join(pair) for pair in cases.OP_BACKENDS]
)
def test_every_backend_of_the_table_runs_its_op(op, backend, monkeypatch):
    """The reference is asked when it is chosen, and only then."""
    cases.require(backend, X.device)
    asked = []
    meaning = getattr(reference, op)
    monkeypatch.setattr(reference, op, lambda *args, **kwargs: asked.append(op) or meaning(*args, **kwargs))
    output = cases.make(op, tokens=3).run(backend).output
    assert output.isfinite().all()
    assert asked == ([op] if backend == "reference" else [])


@pytest.mark.parametrize("backend", ["cpu", "triton", "cuda"])
def test_a_backend_that_does_not_implement_the_op(backend, monkeypatch):
    monkeypatch.setitem(backends.OPS, "route_grad", ("torch", "reference"))
    with expect(
        BackendError,
        f"route_grad: the requested backend {backend!r} cannot run it: there are no {backend} kernels for route_grad "
        "yet",
    ):
        cases.make("route_grad", tokens=4).run(backend)
    assert unavailable_backends("route_grad")[backend] == f"there are no {backend} kernels for route_grad yet"


def test_a_backend_that_cannot_run_the_very_call():
    refused = {"cpu": "its fingers are too short"}
    with expect(
        BackendError, "route_grad: the requested backend 'cpu' cannot run it: its fingers are too short"
    ):
        choose("route_grad", "cpu", X, refused)
    assert choose("route_grad", None, X, {}, ("cpu", "torch")) == "cpu"
    with pytest.warns(RuntimeWarning, match="'reference': cpu: its fingers are too short"):
        assert choose("route_grad", None, X, refused, ("cpu", "reference")) == "reference"


def test_tensors_on_another_device_are_refused(monkeypatch):
    monkeypatch.setattr(native, "why_not", lambda name: None)
    with expect(BackendError, "its kernels take tensors on cuda; these are on cpu"):
        choose("route_grad", "cuda", X)


def test_a_module_without_cuda_is_named(monkeypatch):
    monkeypatch.setattr(native.loading, "module", object())
    with expect(BackendError, "the native module was built without CUDA"):
        choose("route_grad", "cuda", X)


def test_without_the_native_module_the_automatic_choice_warns(monkeypatch):
    monkeypatch.setattr(native.loading, "module", None)
    monkeypatch.setattr(native.loading, "load_error", "the native module was not built")
    with pytest.warns(
        RuntimeWarning, match="on the slower backend 'torch': .*cpu: the native module was not built"
    ):
        assert choose("route_grad", None, X) == "torch"


def test_what_is_no_tensor_is_not_explained():
    with expect(TypeError, "x: got a NoneType, expected a tensor"):
        backends.explain("routed_mlp", None)


def test_compiled_code_warns_of_a_slower_backend_while_it_is_traced(monkeypatch):
    monkeypatch.setattr(native.loading, "module", None)
    monkeypatch.setattr(native.loading, "load_error", "the native module was not built")
    backends.choose_anew()
    weight, routes = torch.randn(3, 4), Routes.of([0, 1], 2)
    sites = LinearSites(output=[[1.0, 0.0, 1.0], [1.0, 1.0, 1.0]])

    def step(x):
        return routed_linear(x, weight, None, routes, sites)

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    x = torch.randn(2, 4, requires_grad=True)
    with pytest.warns(RuntimeWarning, match="routed_linear runs on the slower backend 'torch': ") as caught:
        output = compiled(x)
    assert sum("slower backend" in str(warning.message) for warning in caught) == 1
    torch.testing.assert_close(output, x @ weight.T)
    (gradient,) = torch.autograd.grad(output.sum(), x)
    torch.testing.assert_close(gradient, torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 1.0]]) @ weight)


@pytest.mark.parametrize("op", [op for op, row in backends.OPS.items() if "triton" in row])
def test_fp64_is_refused_by_triton(op):
    call = cases.make(op, dtype=torch.float64)
    with expect(
        BackendError,
        f"{op}: the requested backend 'triton' cannot run it: float64 runs on the backends reference, torch and cpu",
    ):
        call.run("triton")


def test_a_dtype_that_no_backend_has():
    with expect(
        BackendError, "cannot run it: dtype torch.float8_e4m3fn is not supported, only float32, bfloat16"
    ):
        choose("route_grad", "torch", X.to(torch.float8_e4m3fn))


def test_triton_without_a_gpu_is_refused(without_interpreter):
    with expect(
        BackendError,
        "route_grad: the requested backend 'triton' cannot run it: Triton runs on CUDA devices (elsewhere only under "
        "TRITON_INTERPRET=1); the tensors are on cpu",
    ):
        cases.make("route_grad").run("triton")


def test_triton_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr(backends, "_triton_is_installed", False)
    with expect(BackendError, "cannot run it: the package triton is not installed"):
        choose("route_grad", "triton", X)
    assert "triton" not in available_backends("route_grad")


@pytest.mark.parametrize("backend", ["pytorch", "Triton"])
def test_a_backend_that_does_not_exist(backend):
    message = f"backend: got {backend!r}, expected one of reference, torch, cpu, triton, cuda"
    with expect(ValueError, message):
        choose("route_grad", backend, X)
    with expect(ValueError, message):
        use_backend(backend)
    assert choose("route_grad", None, X) == "cpu"


# The choice for the process


def test_use_backend_as_a_call():
    use_backend("reference")
    assert choose("route_grad", None, X) == "reference"
    use_backend(None)
    assert choose("route_grad", None, X) == "cpu"


def test_use_backend_restores_on_leaving():
    with use_backend("reference"):
        with use_backend("torch"):
            assert choose("route_grad", None, X) == "torch"
        assert choose("route_grad", None, X) == "reference"
        with pytest.raises(KeyError), use_backend("torch"):
            raise KeyError
        assert choose("route_grad", None, X) == "reference"
    assert choose("route_grad", None, X) == "cpu"


CHOOSE = """
import torch, gradroute
from gradroute.backends import choose
print(choose("route_grad", None, torch.zeros(2)))
"""


@pytest.mark.parametrize(("value", "chosen"), [("reference", "reference"), ("torch", "torch"), ("", "cpu")])
def test_the_environment_chooses(value, chosen, monkeypatch):
    monkeypatch.setenv("GRADROUTE_BACKEND", value)
    run = subprocess.run([sys.executable, "-c", CHOOSE], capture_output=True, text=True, check=True)
    assert run.stdout.split() == [chosen]


def test_the_environment_names_a_backend_that_does_not_exist(monkeypatch):
    monkeypatch.setenv("GRADROUTE_BACKEND", "fastest")
    run = subprocess.run([sys.executable, "-c", CHOOSE], capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert (
        "GRADROUTE_BACKEND: got 'fastest', expected one of reference, torch, cpu, triton, cuda" in run.stderr
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_has_no_backends():
    assert available_backends("routed_linear", "cuda") == ()
    assert unavailable_backends(device="cuda")["torch"] == "no CUDA device is visible"


def test_an_empty_name_is_no_choice():
    with pytest.raises(ValueError, match="backend: got '', expected one of reference"):
        choose("route_grad", "", X)


def test_a_weight_without_memory_is_refused():
    x, weight = torch.randn(3, 4), torch.randn(5, 4, device="meta")
    routes, sites = (
        gradroute.Routes.of(torch.zeros(3, dtype=torch.int64), 1),
        gradroute.LinearSites(output=[[0.5]]),
    )
    with pytest.raises(
        ValueError, match="x: got a tensor on cpu for a weight on meta, expected both on one device"
    ):
        gradroute.routed_linear(x, weight, None, routes, sites)


# The automatic choice


@pytest.mark.parametrize("op", [op for op, row in backends.OPS.items() if "cpu" in row])
def test_on_the_cpu_it_is_cpu_and_says_nothing(op):
    assert choose(op, None, X) == "cpu"


def test_the_reference_is_chosen_with_a_warning(monkeypatch):
    monkeypatch.setitem(backends.OPS, "route_grad", ("reference",))
    with pytest.warns(RuntimeWarning, match="route_grad runs on the slower backend 'reference'"):
        assert choose("route_grad", None, X) == "reference"


@pytest.fixture
def x_on_a_gpu(device):
    """X on the GPU; where there is none, a tensor without data that is on one."""
    if device.type == "cuda":
        yield X.to(device)
    else:
        with FakeTensorMode():
            yield torch.empty(X.shape, device="cuda")


@pytest.mark.parametrize("op", [op for op, row in backends.OPS.items() if "triton" in row])
def test_on_the_gpu_it_is_triton_and_says_nothing(op, x_on_a_gpu):
    assert choose(op, None, x_on_a_gpu) == "triton"


def test_on_the_gpu_another_choice_gives_its_reasons(x_on_a_gpu):
    with pytest.warns(
        RuntimeWarning, match="on the slower backend 'torch': triton: float64 runs on the backends"
    ):
        assert choose("routed_linear", None, x_on_a_gpu.double()) == "torch"


def test_no_backend_at_all_lists_every_reason(monkeypatch):
    monkeypatch.setattr(backends, "_triton_is_installed", False)
    monkeypatch.setitem(backends.OPS, "route_grad", ("triton", "cuda"))
    x = torch.zeros(2).to(torch.float8_e4m3fn)
    with expect(
        BackendError, "route_grad: no backend can run it: triton: Triton is chosen by itself"
    ) as caught:
        choose("route_grad", None, x)
    assert "; cuda: dtype torch.float8_e4m3fn is not supported" in str(caught.value)


# The lists of backends that can run here, and of those that cannot


def test_available_backends():
    cases.require("triton", X.device)
    assert available_backends("route_grad", "cpu") == ("triton", "cpu", "torch", "reference")
    assert available_backends() == ("triton", "cpu", "torch", "reference")


def test_unavailable_backends_give_reasons(without_interpreter, monkeypatch):
    monkeypatch.setattr(native, "why_not", lambda name: None)
    assert unavailable_backends("route_grad") == {
        "triton": "no CUDA device is visible, and TRITON_INTERPRET=1 is not set",
        "cuda": "no CUDA device is visible",
    }
    assert available_backends("route_grad") == ("cpu", "torch", "reference")
    assert unavailable_backends(device="cpu")["cuda"] == "its kernels take tensors on cuda; these are on cpu"


def test_available_backends_of_an_unknown_op():
    with expect(ValueError, "op: got 'routed_conv', expected one of 'route_grad', 'routed_linear'"):
        available_backends("routed_conv")


def test_importing_gradroute_does_not_need_triton(tmp_path):
    """On macOS, or without triton installed."""
    code = (
        "import sys, importlib.util\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'triton' else find(name, *rest)\n"
        "import gradroute\n"
        "assert not any(name.split('.')[0] == 'triton' for name in sys.modules), 'triton was imported'\n"
        "print(gradroute.available_backends('routed_linear'), gradroute.unavailable_backends('routed_linear'))\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert run.stdout.startswith("('cpu', 'torch', 'reference')")
    assert "'triton': 'the package triton is not installed'" in run.stdout


@pytest.mark.skipif(bool(torch.version.cuda or torch.version.hip), reason="its kernels can run here")
def test_triton_is_not_imported_where_its_kernels_cannot_run(monkeypatch):
    """Until somebody asks for them: it takes longer than all the rest of the package."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    code = (
        "import sys, gradroute\n"
        "print(gradroute.available_backends(), 'triton' in sys.modules)\n"
        "print(gradroute.backends.primitives('triton').glu_backward.__name__, 'triton' in sys.modules)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == ["('cpu', 'torch', 'reference') False", "glu_backward True"]


def test_public_names_are_importable():
    assert sorted(gradroute.__all__) == sorted(set(gradroute.__all__))
    for name in gradroute.__all__:
        assert getattr(gradroute, name) is not None
