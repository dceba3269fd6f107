"""Threads, a seed and poisoned memory; the interpreter without a GPU; tests marked gpu only with one."""

import fcntl
import gc
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers of pytest-xdist already fill the cores
# What was checked and measured on this machine concerns no test; those that keep findings do it in folders of theirs.
os.environ["GRADROUTE_CACHE"] = os.path.join(tempfile.gettempdir(), f"gradroute-tests-{os.getpid()}")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS needs it for deterministic algorithms

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, so before gradroute is
    if importlib.util.find_spec("triton") is not None:
        import interpreter

        interpreter.patch_the_language_once_a_launch()
        interpreter.read_numbers_with_any_numpy()

import cases
import device_state
import emulated_cuda
import emulated_vendors

import gradroute

# A busy machine is slow now and then: how long an example takes says nothing about it. Examples are the same in every
# run, so that a change is what turns a test red; `--hypothesis-profile explore` draws others.
hypothesis.settings.register_profile("explore", deadline=None)
hypothesis.settings.register_profile("gradroute", deadline=None, derandomize=True)
hypothesis.settings.load_profile("gradroute")


@pytest.fixture(autouse=True, scope="session")
def _process():
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    # Uninitialised memory is then NaN (the largest value for integers): test_uninitialised_memory_is_poisoned.
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture(autouse=True)
def _automatic_backend_and_seed():
    torch.manual_seed(0)
    gradroute.backends.choose_anew()  # the test before may have changed which backends there are
    with gradroute.use_backend(None):
        yield


@pytest.fixture(autouse=True)
def _gpu_as_it_was(request):
    yield
    if "gpu" in request.keywords and torch.cuda.is_available():
        device_state.allow_waiting()
        device_state.end_after_an_error(request.config, request.node.nodeid)


@pytest.fixture
def whole_gpu():
    """The GPU's memory less what this process still uses: what earlier tests have left in torch's cache is free."""
    _empty_cache()
    torch.cuda.reset_peak_memory_stats()
    yield
    _empty_cache()


def _empty_cache():
    gc.collect()
    torch.cuda.empty_cache()


@pytest.fixture(scope="session")
def emulated_cuda_folder(request, tmp_path_factory):
    """The folder of the emulated module; the first process that comes here builds it where a source has changed."""
    cache = getattr(request.config, "cache", None)  # -p no:cacheprovider
    cached = tmp_path_factory.mktemp("emulated_cuda") if cache is None else cache.mkdir("emulated_cuda")
    folder = cached / emulated_cuda.identity()
    with (cached / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not emulated_cuda.module_in(folder).exists():
            for old in filter(Path.is_dir, cached.iterdir()):
                shutil.rmtree(old)
            folder.mkdir()
            emulated_cuda.build(folder)
    return folder


@pytest.fixture(scope="session")
def emulated_cuda_module(emulated_cuda_folder):
    return emulated_cuda.load(emulated_cuda_folder)


@pytest.fixture
def emulated_backend_cuda(request, monkeypatch):
    """Backend cuda runs on tensors of the CPU: its own kernels and the vendors' are emulated."""
    missing = emulated_cuda.missing_tools()
    if missing:
        pytest.skip(f"no {', '.join(missing)} to compile the emulation of CUDA with")
    emulated_cuda.use_as_backend_cuda(request.getfixturevalue("emulated_cuda_module"), monkeypatch)
    emulated_vendors.use_on_the_cpu(monkeypatch)


@pytest.fixture(autouse=True)
def _backend_cuda_on_the_cpu(request):
    parameters = cases.parameters(request.node)
    if (parameters.get("backend"), parameters.get("device")) == ("cuda", "cpu"):
        request.getfixturevalue("emulated_backend_cuda")


@pytest.fixture
def free():
    """Without deterministic algorithms, which exclude some kernels."""
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(True)


@pytest.fixture
def quick_bench(monkeypatch):
    """Benchmarks without the ceilings of this machine, and without processes of their own: everything takes 1 MB."""
    from bench import machine, memory

    monkeypatch.setattr(machine, "COPY_BYTES", {"cpu": 1 << 10})
    monkeypatch.setattr(machine, "PROBE", (8, 8, 8))
    monkeypatch.setattr(machine, "GEMM_SHAPES", {"cpu": ((8, 8, 8),)})
    monkeypatch.setattr(memory, "on_cpu", lambda make: 10**6)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """The device of a test that also proves something on a GPU: `pytest -m gpu` runs those cases."""
    return torch.device(request.param)


COMPILING = ("test_offline", "test_machine_code")


def pytest_collection_modifyitems(config, items):
    """Leaves out what is no case, here or anywhere.

    Slow ones come first, and those that compile all kernels before them: the last of them would leave one worker alone.
    """
    dropped = {item for item in items if not _is_case(item)}
    config.hook.pytest_deselected(items=list(dropped))
    items[:] = [item for item in items if item not in dropped]
    items.sort(key=lambda item: ("slow" not in item.keywords, item.path.stem not in COMPILING))


def _is_case(item):
    """Tests marked gpu need a GPU, and backend cpu takes no tensors of one; elsewhere backend cuda is emulated.

    It is where a test says by the parameter device that it also runs on a GPU.
    """
    parameters = cases.parameters(item)
    backend = parameters.get("backend")
    if "gpu" in item.keywords:
        return torch.cuda.is_available() and backend != "cpu"
    return backend != "cuda" or parameters.get("device") == "cpu"
