"""PyTorch's attention kernels for CUDA: on tensors without data, on emulated ops, or on a GPU."""

import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from emulated_vendors import EmulatedOps
from torch.nn.attention import SDPBackend, sdpa_kernel
from vendor_cases import (
    HEADS,
    LAYOUTS,
    assert_within_budget,
    empty,
    inputs,
    pattern,
    run,
    same_bits,
)

from gradroute.backends.vendor import VENDORS, choose


def fake_cases():
    """Kernel, inputs' options, pattern's fields."""
    shapes = [{"kv_heads": kv_heads, "head_dim": 64} for kv_heads in (8, 2, 1)]
    shapes += [{"head_dim": head_dim} for head_dim in (80, 128, 13)]
    shapes += [{"queries": 37}, {"queries": 20, "keys": 37, "causal": False}, {"dtype": torch.float16}]
    longer = [{"head_dim": 256}, {"queries": 1, "keys": 37}, {"dropout": 0.25}]
    for name in ("cudnn", "flash", "efficient"):
        yield from ((name, case) for case in shapes + (longer if name != "cudnn" else []))
    documents = {"batch": 1, "documents": True}
    flash = ({"queries": 20, "keys": 37}, {"window": 5}, {"window": 5, "causal": False}, documents)
    yield from (("flash", case) for case in (*flash, documents | {"window": 9, "head_dim": 20}))
    efficient = ({"dtype": torch.float32}, {"dtype": torch.float32, "head_dim": 6}, {"padding": True})
    yield from (("efficient", case) for case in (*efficient, {"padding": True, "queries": 1, "keys": 37}))


@pytest.mark.parametrize(("name", "case"), list(fake_cases()))
@pytest.mark.usefixtures("free", "without_data")
def test_signatures_shapes_and_dtypes_of_the_cuda_kernels(name, case):
    case = dict(case)
    fields = {field: case.pop(field) for field in ("causal", "window", "dropout") if field in case}
    documents, padding = case.pop("documents", False), case.pop("padding", False)
    q, k, v, d_o = empty(**case)
    if documents:
        fields["cu_seqlens"] = torch.empty(4, dtype=torch.int32, device="cuda")
    if padding:
        fields["key_mask"] = torch.empty(2, k.shape[2], dtype=torch.bool, device="cuda")
    result, lse = run(VENDORS[name], q, k, v, d_o, pattern(**fields))
    assert (lse.shape, lse.dtype) == (q.shape[:3], torch.float32)
    for actual, like in ((result.output, q), *zip(result.gradients.values(), (q, k, v), strict=True)):
        assert (actual.shape, actual.dtype, actual.device) == (like.shape, like.dtype, like.device)


@pytest.fixture
def recorded(monkeypatch):
    """The tensors in bf16 that every call of an aten op was given."""
    calls = []

    class Ops:
        def __getattr__(self, name):
            original = getattr(torch.ops.aten, name).default

            class Op:
                @staticmethod
                def default(*args, **keywords):
                    given = (t for t in args if isinstance(t, torch.Tensor) and t.dtype == torch.bfloat16)
                    calls.append(list(given))
                    return original(*args, **keywords)

            return Op

    replace_ops(monkeypatch, Ops())
    return calls


def replace_ops(monkeypatch, ops):
    for name in ("cudnn", "flash", "efficient"):
        monkeypatch.setattr(VENDORS[name], "aten", ops)


@pytest.mark.parametrize("name", ["cudnn", "flash", "efficient"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_cuda_kernels_are_given_rows_of_whole_16_bytes(name, layout, recorded):
    """Every tensor begins and steps by multiples of 16 bytes, its last stride 1; o and d_o of cuDNN have one layout."""
    q, k, v, d_o = empty(device="meta")
    q, k, v = (LAYOUTS[layout](t) for t in (q, k, v))
    saved = VENDORS[name].forward(q, k, v, pattern())
    for other in LAYOUTS.values():
        VENDORS[name].backward(other(d_o), q, k, v, saved, pattern())
    assert [len(call) for call in recorded] == [3, *[5] * len(LAYOUTS)]
    for t in itertools.chain(*recorded):
        assert t.stride(-1) == 1
        assert t.storage_offset() % 8 == 0
        assert all(stride > 0 and stride % 8 == 0 for stride in t.stride()[:-1])
    assert name != "cudnn" or all(d_o.stride() == o.stride() for d_o, *_, o in recorded[1:])


CUDA_CASES = [
    ("cudnn", {}),
    ("cudnn", {"causal": False}),
    ("flash", {}),
    ("flash", {"causal": False}),
    ("flash", {"window": 21}),
    ("flash", {"window": 21, "causal": False}),
    ("flash", {"documents": True}),
    ("flash", {"documents": True, "window": 21}),
    ("efficient", {}),
    ("efficient", {"causal": False}),
    ("efficient", {"padding": True}),
    ("efficient", {"padding": True, "causal": False}),
]


def case_of(name, fields, length, device, **options):
    """Inputs and pattern of one of these cases."""
    fields = dict(fields)
    documents, padding = fields.pop("documents", False), fields.pop("padding", False)
    tensors = inputs(length, batch=1 if documents else 3, device=device, **options)
    if documents:
        bounds = [0, length // 3, length // 3, length - 1, length]  # one of them empty
        fields["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32, device=device)
    if padding:
        fields["key_mask"] = torch.ones(3, length, dtype=torch.bool, device=device)
        fields["key_mask"][0, -5:], fields["key_mask"][1, :7], fields["key_mask"][2] = False, False, False
    return tensors, pattern(**fields)


def emulated(monkeypatch, name):
    """A CUDA kernel on emulated ops, which refuses no call."""
    replace_ops(monkeypatch, EmulatedOps())
    kernel = VENDORS[name]
    return SimpleNamespace(why_not=lambda *call: None, forward=kernel.forward, backward=kernel.backward)


@pytest.mark.parametrize(("name", "fields"), CUDA_CASES)
def test_cuda_kernels_are_called_right(monkeypatch, name, fields):
    vendor = emulated(monkeypatch, name)
    for kv_heads, (length, head_dim) in itertools.product((8, 2, 1), ((37, 16), (50, 13))):
        tensors, asked = case_of(
            name, fields, length, "cpu", kv_heads=kv_heads, head_dim=head_dim, dtype=torch.float16
        )
        assert_within_budget(vendor, tensors, asked, f"{name} {kv_heads} {length}")


@pytest.mark.parametrize(("name", "queries"), [("flash", 20), ("flash", 1), ("efficient", 1)])
def test_cuda_kernels_are_called_right_with_fewer_queries_than_keys(monkeypatch, name, queries):
    vendor = emulated(monkeypatch, name)
    for window in (None, 9) if name == "flash" else (None,):
        assert_within_budget(vendor, inputs(queries, 37, dtype=torch.float16), pattern(window=window), name)


def on_gpu(name, fields, length, **options):
    """Inputs and pattern of a case; skips what this GPU or this build cannot run."""
    tensors, asked = case_of(name, fields, length, "cuda", **options)
    reason = VENDORS[name].why_not(*tensors[:3], asked)
    if reason is not None:
        pytest.skip(reason)
    return tensors, asked


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("name", "fields"), CUDA_CASES)
@pytest.mark.usefixtures("free")
def test_cuda_budget(name, fields, dtype):
    if dtype == torch.float32 and name != "efficient":
        pytest.skip(f"{name} takes no float32")
    for kv_heads, (length, head_dim) in itertools.product((8, 2, 1), ((37, 64), (257, 128), (130, 20))):
        tensors, asked = on_gpu(name, fields, length, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)
        assert_within_budget(VENDORS[name], tensors, asked, f"{name} {kv_heads} {length}")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["flash", "efficient"])
def test_cuda_budget_of_fewer_queries_than_keys(name):
    for queries, keys in ((1, 37), (20, 37)):
        tensors = inputs(queries, keys, head_dim=64, dtype=torch.bfloat16, device="cuda")
        asked = pattern(causal=name == "flash" or queries == 1)
        assert_within_budget(VENDORS[name], tensors, asked, f"{name} {queries}")


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["cudnn", "flash", "efficient"])
@pytest.mark.usefixtures("free")
def test_cuda_layouts_are_within_budget(name, layout):
    tensors, asked = on_gpu(name, {}, 130, head_dim=64, dtype=torch.bfloat16)
    lay_out = LAYOUTS[layout]
    for chosen in itertools.product((False, True), repeat=4):
        laid_out = [lay_out(t) if other else t for t, other in zip(tensors, chosen, strict=True)]
        assert_within_budget(VENDORS[name], laid_out, asked, f"{name} {layout} {chosen}")


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "fields"), [case for case in CUDA_CASES if case[0] != "cudnn"])
def test_cuda_has_the_same_bits_under_deterministic_algorithms(name, fields):
    tensors, asked = on_gpu(name, fields, 1300, head_dim=64, dtype=torch.bfloat16)
    expected, _ = run(VENDORS[name], *tensors, asked)
    for _ in range(3):
        assert same_bits(run(VENDORS[name], *tensors, asked)[0], expected)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["cudnn", "flash", "efficient"])
@pytest.mark.usefixtures("free")
def test_cuda_forward_has_the_bits_of_scaled_dot_product_attention(name):
    backends = {
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
    }
    for causal in (True, False):
        (q, k, v, _), asked = on_gpu(
            name, {"causal": causal}, 257, kv_heads=8, head_dim=64, dtype=torch.bfloat16
        )
        o = VENDORS[name].forward(q, k, v, asked)[0]
        with sdpa_kernel(backends[name]):
            expected = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=0.3)
        assert torch.equal(o, expected)


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "fields"), CUDA_CASES)
@pytest.mark.usefixtures("free")
def test_cuda_never_waits_for_the_device(name, fields):
    tensors, asked = on_gpu(name, fields, 130, head_dim=64, dtype=torch.bfloat16)
    run(VENDORS[name], *tensors, asked)
    torch.cuda.set_sync_debug_mode("error")
    try:
        choose(*tensors[:3], asked)
        run(VENDORS[name], *tensors, asked)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "fields"), CUDA_CASES)
@pytest.mark.usefixtures("free")
def test_cuda_writes_nothing_that_it_was_given(name, fields):
    tensors, asked = on_gpu(name, fields, 130, head_dim=64, dtype=torch.bfloat16)
    saved = VENDORS[name].forward(*tensors[:3], asked)
    given = [t for t in (*tensors, *saved[:3]) if t.is_cuda]
    before = [t.clone() for t in given]
    gradients = VENDORS[name].backward(tensors[3], *tensors[:3], saved, asked)
    assert len({gradient.untyped_storage().data_ptr() for gradient in gradients}) == 3
    for gradient in gradients:
        gradient.fill_(torch.nan)
    for t, copy in zip(given, before, strict=True):
        assert torch.equal(t.view(torch.uint8) if t.dtype == torch.uint64 else t, copy.view_as(copy))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["flash", "efficient"])
@pytest.mark.usefixtures("free")
def test_cuda_dropout_drops_its_share(name):
    """With v of ones the output is the share of P that is kept, over what is expected of it."""
    q, k, v, d_o = inputs(512, head_dim=64, dtype=torch.bfloat16, device="cuda")
    asked = pattern(causal=False, scale=0.0, dropout=0.25)
    result, _ = run(VENDORS[name], q, k, torch.ones_like(v), torch.ones_like(d_o), asked)
    # 2 · 8 · 512 · 512 independent draws: the mean's standard deviation is 3e-4; bf16 rounds an output by 4e-3.
    assert abs(float(result.output.float().mean()) - 1) < 3e-3
    kept = result.gradients["v"].float().mean() / (HEADS / 2)  # backward drops the same
    assert abs(float(kept) - 1) < 3e-3
