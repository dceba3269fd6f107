"""Threads, a seed and poisoned memory; the interpreter without a GPU; tests marked gpu only with one."""

import importlib.util
import os
import tempfile

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


def pytest_collection_modifyitems(config, items):
    """Tests marked gpu need a GPU, and so does backend cuda: elsewhere neither is a case.

    Slow ones come first: the last of them would leave one worker alone.
    """
    dropped = {item for item in items if not _can_run(item)}
    config.hook.pytest_deselected(items=list(dropped))
    items[:] = [item for item in items if item not in dropped]
    items.sort(key=lambda item: "slow" not in item.keywords)


def _can_run(item):
    on_gpu = "gpu" in item.keywords
    backend = item.callspec.params.get("backend") if hasattr(item, "callspec") else None
    return torch.cuda.is_available() if on_gpu else backend != "cuda"
