"""Which kernels run a call of attention, and the reasons that are given."""

import inspect
import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from gradroute import AttentionSites, BackendError, Routes, attention, backends, use_backend
from gradroute.attention import explain
from gradroute.backends import attention_plan, native
from gradroute.backends.fa4 import refusals

HALF_OFF = [[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]]
EDGES = [[1.0, 0.0], [1.0, 1.0]]
HEADS, QUERY = AttentionSites(heads=HALF_OFF), AttentionSites(query=HALF_OFF)
SCORES, VALUES = AttentionSites(score_edges=EDGES), AttentionSites(value_edges=EDGES)
BOTH = AttentionSites(score_edges=EDGES, value_edges=EDGES)


def inputs(device="cpu", head_dim=16, keys=8, dtype=torch.float32):
    """q, k, v of four heads, two of keys, and routes."""
    q = torch.zeros(2, 4, 8, head_dim, device=device, dtype=dtype)
    k, v = (torch.zeros(2, 2, keys, head_dim, device=device, dtype=dtype) for _ in range(2))
    return q, k, v, Routes.of(torch.zeros(2, 8, dtype=torch.int32, device=device), 2, validate=False)


def refusal(text):
    return pytest.raises(BackendError, match=re.escape(text))


needs_native = pytest.mark.skipif(native.module is None, reason=str(native.load_error))


@needs_native
def test_on_the_cpu_masks_go_around_the_vendors_kernel():
    q, k, v, routes = inputs()
    plan = explain(q, k, v, routes, HEADS)
    assert (plan.backend, plan.vendor, plan.backward) == ("cpu", "cpu_flash", "vendor")
    assert "the CPU's only vendor kernel" in plan.reason
    assert explain(q, k, v, None, None)[:2] == ("cpu", "cpu_flash")


@needs_native
def test_on_the_cpu_a_window_is_computed_in_tiles():
    q, k, v, routes = inputs()
    plan = explain(q, k, v, routes, HEADS, window=3)
    assert plan[:4] == ("cpu", None, "tiles", "cpu_flash: it has no window")
    assert explain(q, k, v, routes, SCORES)[:3] == ("cpu", "cpu_flash", "tiles")


def test_an_explicit_choice_is_taken():
    q, k, v, routes = inputs()
    for sites in (None, HEADS, SCORES):
        for backend in ("reference", "torch"):
            assert explain(q, k, v, routes, sites, backend=backend).backend == backend
            with use_backend(backend):
                assert explain(q, k, v, routes, sites).backend == backend


def test_arguments_are_checked_as_the_call_checks_them():
    q, k, v, routes = inputs()
    with pytest.raises(ValueError, match="window: got 0"):
        explain(q, k, v, routes, None, window=0)
    with pytest.raises(ValueError, match="dropout: got 1"):
        explain(q, k, v, routes, None, dropout=1.0)
    with pytest.raises(
        ValueError, match=re.escape("k: got torch.float64 on cpu, expected q's torch.float32 on cpu")
    ):
        explain(q, k.double(), v, routes, None)
    with pytest.raises(ValueError, match=r"cu_seqlens: got torch.int64 on cpu, expected torch.int32"):
        explain(q[:1], k[:1], v[:1], None, None, cu_seqlens=torch.tensor([0, 8]))
    with pytest.raises(ValueError, match="documents are of both"):
        explain(q[:1, :, :4], k[:1], v[:1], None, None, cu_seqlens=torch.tensor([0, 8], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"key_mask: got torch.int64 on cpu, expected torch.bool"):
        explain(q, k, v, None, None, key_mask=torch.ones(2, 8, dtype=torch.int64))


@pytest.mark.parametrize("backend", ["reference", "triton", "torch", "cpu"])
def test_dropout_is_refused_where_nothing_drops_out(backend):
    q, k, v, routes = inputs()
    able = backends.available_backends("routed_attention", "cpu")
    if backend not in able:
        pytest.skip(f"{backend} does not run here")
    own = "own kernels do not drop out; only vendors' kernels on CUDA do"
    with refusal(f"the requested backend {backend!r} cannot run it: {own}"):
        explain(q, k, v, routes, HEADS, dropout=0.1, backend=backend)
    with refusal("no backend can run it"):
        explain(q, k, v, routes, SCORES, dropout=0.1)


def test_heads_that_are_too_wide_for_a_tile_are_refused_by_triton():
    if "triton" not in backends.available_backends("routed_attention", "cpu"):
        pytest.skip("triton does not run here")
    q, k, v, routes = inputs(head_dim=264)
    with refusal("its tiles have whole rows of at most 256 features, and these have 264"):
        explain(q, k, v, routes, None, backend="triton")
    assert explain(q, k, v, routes, None, backend="torch").backend == "torch"


# On CUDA, where fake tensors stand for real ones.


@pytest.fixture
def cuda(monkeypatch):
    """Inputs on a GPU that is not there, for a native module with CUDA kernels; FlashAttention-4 is not installed."""
    monkeypatch.setattr(native, "why_not", lambda name: None)
    monkeypatch.setattr(refusals, "installed_version", lambda package: None)
    with FakeTensorMode():
        yield lambda **options: inputs("cuda", dtype=torch.bfloat16, **options)


def test_on_cuda_masks_go_around_the_vendors_kernel(cuda):
    q, k, v, routes = cuda(head_dim=64)
    plan = explain(q, k, v, routes, QUERY)
    assert (plan.backend, plan.backward) == ("cuda", "vendor")
    assert plan.vendor in ("cudnn", "flash", "efficient")
    assert explain(q, k, v, None, None).backend == "cuda"


def test_on_cuda_edges_take_own_kernels_in_the_backward_alone(cuda):
    q, k, v, routes = cuda(head_dim=64)
    unrouted = explain(q, k, v, None, None)
    for sites in (SCORES, VALUES):
        plan = explain(q, k, v, routes, sites)
        assert plan[:3] == ("triton", unrouted.vendor, "own")
        assert plan.reason == (
            "edges between routes need own kernels in the backward (FlashAttention-4's is not taken: the package "
            "flash-attn-4 is not installed (gradroute's extra fa4)); the forward is that of the call without routes: "
            + unrouted.reason
        )
    plan = explain(q, k, v, routes, SCORES, backend="triton")
    assert plan[:4] == ("triton", None, "own", "it was asked for")
    assert explain(q, k, v, routes, SCORES, backend="torch")[:3] == ("torch", unrouted.vendor, "tiles")
    with refusal(
        "the requested backend 'cuda' cannot run it: its edges between routes are those of FlashAttention-4's "
        "backward: the package flash-attn-4 is not installed"
    ):
        explain(q, k, v, routes, VALUES, backend="cuda")


@pytest.mark.usefixtures("free")
def test_on_cuda_edges_take_flash_attention_4_where_it_is_installed(cuda, monkeypatch):
    monkeypatch.setattr(refusals, "installed_version", refusals.VERSIONS.get)
    q, k, v, routes = cuda(head_dim=64)
    unrouted = explain(q, k, v, None, None)
    for sites in (SCORES, VALUES, BOTH):
        for backend in (None, "cuda", "torch"):
            plan = explain(q, k, v, routes, sites, backend=backend)
            assert plan[:3] == (backend or "cuda", unrouted.vendor, "fa4")
            assert plan.reason == (
                f"{unrouted.reason}; FlashAttention-4's backward takes the edges between routes"
            )
    assert explain(q, k, v, routes, BOTH, backend="triton")[:3] == ("triton", None, "own")
    assert explain(q, k, v, routes, QUERY).backward == "vendor"


@pytest.mark.usefixtures("free")
def test_on_cuda_edges_take_own_kernels_where_flash_attention_4_cannot(cuda, monkeypatch):
    monkeypatch.setattr(refusals, "installed_version", refusals.VERSIONS.get)
    q, k, v, routes = cuda(head_dim=64)
    unequal = AttentionSites(score_edges=EDGES, value_edges=[[1.0, 1.0], [0.0, 1.0]])
    plan = explain(q, k, v, routes, unequal)
    assert plan[:3] == ("triton", explain(q, k, v, None, None).vendor, "own")
    assert "score_edges and value_edges differ" in plan.reason
    little = AttentionSites(score_edges=EDGES, value_edges=EDGES, heads=HALF_OFF)
    assert "masks leave so little" in explain(q, k, v, routes, little).reason
    mask = torch.ones(2, 8, dtype=torch.bool, device="cuda")
    assert explain(q, k, v, routes, BOTH, window=3, key_mask=mask)[:3] == ("triton", None, "own")
    torch.use_deterministic_algorithms(True)
    plan = explain(q, k, v, routes, BOTH)
    assert plan.backward == "own"
    assert "its backward adds up dQ by atomics, and deterministic algorithms are asked for" in plan.reason


def test_on_cuda_own_kernels_are_taken_where_masks_leave_little(cuda):
    q, k, v, routes = cuda(head_dim=64)
    plan = explain(q, k, v, routes, HEADS)
    assert plan[:3] == ("triton", explain(q, k, v, None, None).vendor, "own")
    assert "masks leave so little of the backward's work" in plan.reason
    annealed = Routes.of(torch.zeros(2, 8, dtype=torch.int32, device="cuda"), 2, strength=0.5, validate=False)
    assert explain(q, k, v, annealed, HEADS).backend == "cuda"


def test_on_cuda_own_kernels_are_taken_where_no_vendors_can(cuda):
    q, k, v, routes = cuda(head_dim=64)
    mask = torch.ones(2, 8, dtype=torch.bool, device="cuda")
    plan = explain(q, k, v, routes, QUERY, window=3, key_mask=mask)
    assert plan[:3] == ("triton", None, "own")
    assert explain(q, k, v, None, None, window=3, key_mask=mask)[:3] == ("triton", None, "own")
    assert plan.reason.startswith("no vendor's kernel can run it: ")
    assert "flash: it takes no key_mask" in plan.reason
    with refusal("it masks around a vendor's kernel, and none can run the call: "):
        explain(q, k, v, routes, None, window=3, key_mask=mask, backend="cuda")


def test_on_cuda_dropout_is_a_vendors(cuda):
    q, k, v, routes = cuda(head_dim=64)
    assert explain(q, k, v, routes, QUERY, dropout=0.1).backend == "cuda"
    with refusal("edges between routes need own kernels, and own kernels do not drop out"):
        explain(q, k, v, routes, SCORES, dropout=0.1, backend="torch")


def test_what_masks_leave():
    routes = inputs()[3]
    for sites, share in (
        ({}, 1.0),
        ({"heads": HALF_OFF}, 0.5),
        ({"heads": HALF_OFF, "forward_heads": HALF_OFF}, 0.25),
        ({"query": [[0.0], [0.0]]}, 4 / 7),
        ({"key": [[0.0], [0.0]]}, 1.0),  # values still learn
        ({"key": [[0.0], [0.0]], "value": [[0.0], [0.0]]}, 3 / 7),
    ):
        left = attention_plan.remaining_work(routes, AttentionSites(**sites).effective)
        assert left == pytest.approx(share)
    assert attention_plan.remaining_work(None, AttentionSites().effective) == 1.0


def test_explain_takes_the_arguments_of_the_call():
    own, call = (inspect.signature(function).parameters for function in (explain, attention.routed_attention))
    assert list(own.values()) == list(call.values())
