"""The helpers of tests on a GPU, where there is none: what they forbid, take back, end and allow."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import cases
import device_state
import emulated_vendors
import pytest
import torch

from gradroute.testing import Result

TESTS = Path(__file__).parents[1]


@pytest.fixture
def modes(monkeypatch):
    """The modes that were set, on a GPU that is not there; each time PyTorch warns."""
    found = []

    def set_mode(mode):
        found.append(mode)
        warnings.warn(f"{device_state.PROTOTYPE} and does not yet detect all", UserWarning, stacklevel=2)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    return found


def test_waiting_is_forbidden_and_allowed_again(modes):
    with device_state.without_waiting():
        assert modes == ["error"]
    assert modes == ["error", "default"]


def test_waiting_is_allowed_again_after_an_error(modes):
    def fail():
        with device_state.without_waiting():
            raise ValueError("a failure")

    with pytest.raises(ValueError, match="a failure"):
        fail()
    assert modes == ["error", "default"]


def test_other_warnings_are_errors_while_waiting_is_forbidden(modes):
    def warn():
        with device_state.without_waiting():
            warnings.warn("another", UserWarning, stacklevel=2)

    with pytest.raises(UserWarning, match="another"):
        warn()
    assert modes == ["error", "default"]


@pytest.mark.skipif(not hasattr(torch._C, "_cuda_set_sync_debug_mode"), reason="needs a build with CUDA")
def test_the_warning_is_pytorchs(monkeypatch):
    numbers = {"default": 0, "error": 2}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "set_sync_debug_mode", lambda mode: torch._C._cuda_set_sync_debug_mode(numbers[mode])
    )
    with device_state.without_waiting():
        assert torch._C._cuda_get_sync_debug_mode() == 2
    assert torch._C._cuda_get_sync_debug_mode() == 0


FAILING = """
import device_state, pytest, torch

@pytest.fixture(autouse=True)
def _teardown(request):
    yield
    device_state.end_after_an_error(request.config, request.node.name)

def synchronize():
    raise RuntimeError("an illegal memory access was encountered")

def test_first(monkeypatch):
    torch.cuda.synchronize = synchronize

def test_second():
    torch.cuda.synchronize = lambda: None
"""


def run_failing(tmp_path, *arguments):
    (tmp_path / "test_failing.py").write_text(FAILING)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments, "test_failing.py"]
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)


LOST = "test_first: the GPU is not usable any more in this process: an illegal memory access was encountered"


@pytest.mark.slow
def test_an_error_that_stays_ends_a_worker(tmp_path):
    """Another takes its place, and runs the tests that were left."""
    pytest.importorskip("xdist")
    run = run_failing(tmp_path, "-n", "1")
    assert LOST in run.stderr
    assert "crashed while running 'test_failing.py::test_first'" in run.stdout
    assert "1 failed, 2 passed" in run.stdout  # as reported, test_first has passed before it ends the worker


@pytest.mark.slow
def test_an_error_that_stays_ends_a_run_without_workers(tmp_path):
    run = run_failing(tmp_path)
    assert run.returncode == 1
    assert LOST in run.stdout
    assert "test_second" not in run.stdout


def test_gradients_of_two_variants_nearly_agree():
    expected = torch.tensor([1.0, -4.0, 1e-3])
    limit = cases.CONTRACTED * 2**-23 * 4
    for error, agrees in ((0.9 * limit, True), (1.2 * limit, False), (torch.nan, False)):
        actual = expected + torch.tensor([0.0, 0.0, error])
        results = (Result(expected, {"x": actual}), Result(expected, {"x": expected}), "op")
        if agrees:
            cases.assert_gradients_nearly_agree(*results)
        else:
            with pytest.raises(AssertionError, match="op: dx"):
                cases.assert_gradients_nearly_agree(*results)


def test_products_of_tf32_are_within_their_bound():
    """Each product of two numbers within 2⁻¹⁹ of itself; one product of TF32 alone is not within 2⁻¹¹."""
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 4096, 1, 1, generator=generator)
    exact = a.double() * b.double()
    share = (emulated_vendors.product_of_3xtf32(a, b) - exact).abs() / exact.abs()
    assert share.max() <= 2**-19
    assert share.max() > 2**-22
    big_a, big_b = (emulated_vendors.in_two_parts(t)[0] for t in (a, b))
    assert ((big_a * big_b - exact).abs() / exact.abs()).max() > 2**-11


@pytest.mark.parametrize("sites", ["all", "score_edges", ("query", "value_edges")])
def test_attention_for_backend_cuda_is_what_it_takes(sites, monkeypatch):
    """Without edges; where no vendor's kernel runs fp32, in bf16."""
    monkeypatch.setattr(cases, "refusal_of", lambda call, backend: refusal(call))

    def refusal(call):
        return (
            "no window in fp32"
            if (call.upstream.dtype, call.keywords) == (torch.float32, {"window": 5})
            else None
        )

    call = cases.make("routed_attention", on="cuda", sites=sites)
    assert not set(call.tables) & set(cases.EDGES)
    assert ("query" in call.tables) == (sites != "score_edges")
    assert call.upstream.dtype == torch.float32
    assert cases.make("routed_attention", on="cuda", sites=sites, window=5).upstream.dtype == torch.bfloat16
