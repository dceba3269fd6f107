"""PyTorch's attention kernels for CUDA: on tensors without data, on emulated ops, or on a GPU."""

import itertools

import cases
import emulated_vendors
import pytest
import torch
import torch.nn.functional as F
from device_state import without_waiting
from torch.nn.attention import SDPBackend, sdpa_kernel
from vendor_cases import (
    HALVES,
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

    emulated_vendors.replace_ops(monkeypatch, Ops())
    return calls


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


@pytest.fixture
def kernels(device, monkeypatch):
    """The vendors' kernels for CUDA; on the CPU they are emulated."""
    if device.type == "cpu":
        emulated_vendors.use_on_the_cpu(monkeypatch)
    return VENDORS


def able_case(kernel, name, fields, length, device, **options):
    """Inputs and pattern of a case; skips what this GPU or this build cannot run."""
    tensors, asked = case_of(name, fields, length, device, **options)
    reason = kernel.why_not(*tensors[:3], asked)
    if reason is not None:
        pytest.skip(reason)
    return tensors, asked


def dtypes_of_kernels():
    """(kernel, pattern's fields, dtype); only efficient attention takes fp32."""
    for name, fields in CUDA_CASES:
        for dtype in (*HALVES, torch.float32) if name == "efficient" else HALVES:
            yield name, fields, dtype


@pytest.mark.parametrize(("name", "fields", "dtype"), list(dtypes_of_kernels()))
@pytest.mark.usefixtures("free")
def test_budget(name, fields, dtype, kernels, device):
    shapes = [(37, 16), (50, 13), (41, 20)]
    shapes += [(37, 64), (257, 128)] if device.type == "cuda" else []  # seconds where it is emulated
    for kv_heads, (length, head_dim) in itertools.product((8, 2, 1), shapes):
        tensors, asked = able_case(
            kernels[name], name, fields, length, device, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype
        )
        assert_within_budget(kernels[name], tensors, asked, f"{name} {kv_heads} {length}")


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("queries", [1, 20])
@pytest.mark.parametrize("name", ["flash", "efficient"])
def test_budget_of_fewer_queries_than_keys(name, queries, dtype, kernels, device):
    tensors = inputs(queries, 37, head_dim=64, dtype=dtype, device=device)
    for window in (None, 9) if name == "flash" else (None,):
        asked = pattern(causal=name == "flash" or queries == 1, window=window)
        assert_within_budget(kernels[name], tensors, asked, f"{name} {queries}")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["cudnn", "flash", "efficient"])
@pytest.mark.usefixtures("free")
def test_layouts_are_within_budget(name, layout, kernels, device):
    length = 130 if device.type == "cuda" else 33
    tensors, asked = able_case(kernels[name], name, {}, length, device, head_dim=64, dtype=torch.bfloat16)
    lay_out = LAYOUTS[layout]
    for chosen in itertools.product((False, True), repeat=4):
        laid_out = [lay_out(t) if other else t for t, other in zip(tensors, chosen, strict=True)]
        assert_within_budget(kernels[name], laid_out, asked, f"{name} {layout} {chosen}")


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "fields"), [case for case in CUDA_CASES if case[0] != "cudnn"])
def test_cuda_has_the_same_bits_under_deterministic_algorithms(name, fields):
    tensors, asked = able_case(VENDORS[name], name, fields, 1300, "cuda", head_dim=64, dtype=torch.bfloat16)
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
        options = {"kv_heads": 8, "head_dim": 64, "dtype": torch.bfloat16}
        (q, k, v, _), asked = able_case(VENDORS[name], name, {"causal": causal}, 257, "cuda", **options)
        o = VENDORS[name].forward(q, k, v, asked)[0]
        with sdpa_kernel(backends[name]):
            expected = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=0.3)
        assert torch.equal(o, expected)


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "fields"), CUDA_CASES)
@pytest.mark.usefixtures("free")
def test_cuda_never_waits_for_the_device(name, fields):
    tensors, asked = able_case(VENDORS[name], name, fields, 130, "cuda", head_dim=64, dtype=torch.bfloat16)
    run(VENDORS[name], *tensors, asked)
    with without_waiting():
        choose(*tensors[:3], asked)
        run(VENDORS[name], *tensors, asked)


@pytest.mark.parametrize(("name", "fields"), CUDA_CASES)
@pytest.mark.usefixtures("free")
def test_nothing_that_a_kernel_was_given_is_written(name, fields, kernels, device):
    """Neither by its backward nor by whoever writes to the gradients."""
    tensors, asked = able_case(kernels[name], name, fields, 130, device, head_dim=64, dtype=torch.bfloat16)
    saved = kernels[name].forward(*tensors[:3], asked)
    given = [t for t in (*tensors, *saved) if t.device.type == device.type]
    before = [cases.bytes_of(t).clone() for t in given]
    gradients = kernels[name].backward(tensors[3], *tensors[:3], saved, asked)
    assert len({gradient.untyped_storage().data_ptr() for gradient in gradients}) == 3
    for gradient in gradients:
        gradient.fill_(torch.nan)
    for t, copy in zip(given, before, strict=True):
        assert torch.equal(cases.bytes_of(t), copy)


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
