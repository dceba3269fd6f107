"""PyTorch's attention kernels called below autograd: the CPU's for real, CUDA's on tensors without data, or a GPU."""

import itertools
from types import SimpleNamespace

import cases
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, _registry, sdpa_kernel

from gradroute import AttentionSites, Routes, reference
from gradroute.backends.vendor import VENDORS, choose, machine
from gradroute.primitives.attention_pattern import Pattern
from gradroute.testing import Result, assert_result_within_budget

HEADS = 8
CPU = VENDORS["cpu_flash"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HALVES = (torch.bfloat16, torch.float16)
TOP_LEFT = (
    "its causal mask is aligned at the top left, not at the bottom right, which differs where S_q ≠ S_k"
)


@pytest.fixture
def free():
    """Without deterministic algorithms, which exclude some kernels."""
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(True)


def pattern(**fields):
    return Pattern(**{"causal": True, "window": None, "scale": 0.3} | fields)


def inputs(queries=37, keys=None, kv_heads=2, head_dim=16, batch=2, dtype=torch.float32, device="cpu"):
    """q, k, v and d_o."""
    keys = queries if keys is None else keys
    generator = torch.Generator().manual_seed(queries + kv_heads)
    shapes = [(HEADS, queries), (kv_heads, keys), (kv_heads, keys), (HEADS, queries)]
    return [torch.randn(batch, *shape, head_dim, generator=generator).to(device, dtype) for shape in shapes]


def run(vendor, q, k, v, d_o, pattern):
    """The vendor's o, dq, dk, dv, and the log-sum-exp."""
    assert vendor.why_not(q, k, v, pattern) is None
    o, lse, *rest = vendor.forward(q, k, v, pattern)
    dq, dk, dv = vendor.backward(d_o, q, k, v, (o, lse, *rest), pattern)
    return Result(o, {"q": dq, "k": dk, "v": dv}), lse


def visible(q, k, pattern):
    return reference.visible_keys(
        q.shape[2], k.shape[2], q.device, pattern.causal, pattern.window, pattern.cu_seqlens, pattern.key_mask
    )


def exact(q, k, v, d_o, pattern):
    """The reference in float64, and the log-sum-exp."""
    leaves = [t.to(torch.float64, copy=True).requires_grad_() for t in (q, k, v)]
    routes = Routes.of(
        torch.zeros(q.shape[0], q.shape[2], dtype=torch.int32, device=q.device), 1, validate=False
    )
    o = reference.routed_attention(
        *leaves,
        routes,
        AttentionSites(),
        pattern.causal,
        pattern.window,
        pattern.scale,
        pattern.cu_seqlens,
        pattern.key_mask,
    )
    gradients = torch.autograd.grad(o, leaves, d_o.double())
    q, k, _ = (leaf.detach() for leaf in leaves)
    scores = pattern.scale * q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT
    lse = scores.masked_fill(~visible(q, k, pattern), -torch.inf).logsumexp(-1)
    return Result(o.detach(), dict(zip("qkv", gradients, strict=True))), lse


def plain(q, k, v, d_o, pattern):
    """Eager PyTorch at the inputs' dtype."""
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    keys, values = (t.repeat_interleave(HEADS // t.shape[1], 1) for t in leaves[1:])
    seen = visible(q, k, pattern)
    scores = (leaves[0] @ keys.mT * pattern.scale).masked_fill(~seen, torch.finfo(q.dtype).min)
    o = (scores.softmax(-1) * seen.any(-1, keepdim=True)) @ values
    return Result(o.detach(), dict(zip("qkv", torch.autograd.grad(o, leaves, d_o), strict=True)))


def assert_within_budget(vendor, tensors, pattern, name):
    (actual, lse), (expected, exact_lse) = run(vendor, *tensors, pattern), exact(*tensors, pattern)
    assert_result_within_budget(actual, expected, plain(*tensors, pattern), name)
    wide = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    assert lse.dtype == wide
    sees = exact_lse > -torch.inf
    # Sums of at most 300 exponentials of scores that are sums of at most 256 products.
    torch.testing.assert_close(lse[sees].double(), exact_lse[sees], rtol=0, atol=1e3 * torch.finfo(wide).eps)
    assert not lse[~sees].any()


def same_bits(actual, expected):
    return torch.equal(actual.output, expected.output) and all(
        torch.equal(gradient, expected.gradients[name]) for name, gradient in actual.gradients.items()
    )


@pytest.mark.parametrize("dtype", cases.tiered(DTYPES))
@pytest.mark.parametrize("causal", [True, False])
def test_cpu_budget(dtype, causal):
    for kv_heads, (length, head_dim) in itertools.product((8, 2, 1), ((37, 16), (130, 13), (257, 32))):
        tensors = inputs(length, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)
        for scale in (0.3, head_dim**-0.5):
            asked = pattern(causal=causal, scale=scale)
            assert_within_budget(CPU, tensors, asked, f"{dtype} {kv_heads} {length}")


@pytest.mark.parametrize("dtype", cases.tiered(DTYPES))
@pytest.mark.parametrize("causal", [True, False])
def test_cpu_forward_has_the_bits_of_scaled_dot_product_attention(dtype, causal):
    for kv_heads, (length, head_dim) in itertools.product((8, 2, 1), ((37, 16), (257, 13), (513, 64))):
        q, k, v, _ = inputs(length, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)
        o, _ = CPU.forward(q, k, v, pattern(causal=causal))
        expected = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=0.3, enable_gqa=True)
        assert torch.equal(o, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [True, False])
def test_cpu_budget_with_padding(dtype, causal):
    """Also before the first token, and of a whole sequence: queries that see no key give 0, and no gradient."""
    for length in (37, 130):
        q, k, v, d_o = inputs(length, batch=4, dtype=dtype)
        key_mask = torch.ones(4, length, dtype=torch.bool)
        key_mask[0, -5:], key_mask[1, :7], key_mask[2] = False, False, False
        asked = pattern(causal=causal, key_mask=key_mask)
        assert_within_budget(CPU, [q, k, v, d_o], asked, f"{dtype} {length}")
        result, _ = run(CPU, q, k, v, d_o, asked)
        for hidden in (result.output, *result.gradients.values()):
            assert not hidden[2].any()
        if not causal:
            ordinary = F.scaled_dot_product_attention(
                q, k, v, attn_mask=key_mask[:, None, None], scale=0.3, enable_gqa=True
            )
            assert torch.equal(result.output, ordinary)


@pytest.mark.parametrize("causal", [True, False])
def test_cpu_single_query_sees_every_key(causal):
    tensors = inputs(1, 37)
    assert_within_budget(CPU, tensors, pattern(causal=causal), "one query")
    key_mask = (torch.arange(37) > 18).expand(2, -1)
    assert_within_budget(CPU, tensors, pattern(causal=causal, key_mask=key_mask), "one query, with padding")


@pytest.mark.parametrize("dtype", DTYPES)
def test_cpu_single_key(dtype):
    """Its probability is 1: o = v, and the gradients of scores are differences of equal sums of 16 products."""
    q, k, v, d_o = inputs(1, kv_heads=HEADS, dtype=dtype)
    result, lse = run(CPU, q, k, v, d_o, pattern())
    assert torch.equal(result.output, v)
    assert torch.equal(result.gradients["v"], d_o)
    torch.testing.assert_close(lse, (0.3 * q.to(lse.dtype) * k.to(lse.dtype)).sum(-1))
    for name in "qk":
        assert float(result.gradients[name].abs().max()) < 64 * torch.finfo(lse.dtype).eps


@pytest.mark.parametrize(("queries", "keys"), [(20, 37), (37, 20)])
def test_cpu_other_numbers_of_queries_and_keys(queries, keys):
    tensors = inputs(queries, keys)
    assert_within_budget(CPU, tensors, pattern(causal=False), f"{queries} {keys}")
    reason = CPU.why_not(*tensors[:3], pattern())
    assert reason == TOP_LEFT


def sliced(t, before, after):
    wide = t.new_full((*t.shape[:-1], before + t.shape[-1] + after), torch.nan)
    return wide.narrow(-1, before, t.shape[-1]).copy_(t)


def strided(t):
    wide = t.new_full((*t.shape, 2), torch.nan)
    return wide.select(-1, 0).copy_(t)


LAYOUTS = {
    "contiguous": lambda t: t,
    "sliced": lambda t: sliced(t, 0, 3),
    "shifted": lambda t: sliced(t, 1, 7),
    "strided": strided,
    "tokens first": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "features first": lambda t: t.mT.contiguous().mT,
    "expanded": lambda t: t.select(1, 0).unsqueeze(1).expand_as(t),
}


@pytest.mark.parametrize("dtype", cases.tiered(DTYPES))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_cpu_layouts(layout, dtype):
    tensors = inputs(130, dtype=dtype, head_dim=24)
    for chosen in itertools.product((False, True), repeat=4):
        laid_out = [LAYOUTS[layout](t) if other else t for t, other in zip(tensors, chosen, strict=True)]
        assert_within_budget(CPU, laid_out, pattern(), f"{dtype} {layout} {chosen}")
        q, k, v, _ = laid_out
        if all(t.stride(-1) == 1 for t in (q, k, v)):
            expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)
            assert torch.equal(CPU.forward(q, k, v, pattern())[0], expected)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cpu_has_the_same_bits_on_the_same_number_of_threads(dtype, threads):
    """Between numbers of threads its bits differ where its products are MKL's: on Intel, not on AMD."""
    tensors = inputs(300, dtype=dtype)
    try:
        torch.set_num_threads(threads)
        expected, _ = run(CPU, *tensors, pattern())
        for _ in range(3):
            assert same_bits(run(CPU, *tensors, pattern())[0], expected)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", HALVES)
def test_cpu_gradients_of_a_group_are_rounded_once_more(dtype):
    q, k, v, d_o = inputs(300, dtype=dtype)
    grouped, _ = run(CPU, q, k, v, d_o, pattern())
    ungrouped, _ = run(CPU, q, *(t.repeat_interleave(4, 1) for t in (k, v)), d_o, pattern())
    assert torch.equal(grouped.gradients["q"], ungrouped.gradients["q"])
    for name in "kv":
        summed = ungrouped.gradients[name].float().unflatten(1, (2, 4)).sum(2).to(dtype)
        assert torch.equal(grouped.gradients[name], summed)


@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cpu_writes_nothing_that_it_was_given_and_its_gradients_are_free_to_write(dtype, kv_heads):
    tensors = inputs(dtype=dtype, kv_heads=kv_heads)
    key_mask = torch.arange(37).expand(2, -1) < 30
    asked = pattern(key_mask=key_mask)
    saved = CPU.forward(*tensors[:3], asked)
    given = (*tensors, *saved, key_mask)
    before = [t.clone() for t in given]
    gradients = CPU.backward(tensors[3], *tensors[:3], saved, asked)
    for gradient in gradients:
        gradient.fill_(torch.nan)
    for t, copy in zip(given, before, strict=True):
        assert torch.equal(t, copy)
    again = CPU.backward(tensors[3], *tensors[:3], saved, asked)
    again[0].zero_()
    again[1].zero_()
    assert all(gradient.isfinite().all() for gradient in again)
    assert again[2].any()
    assert all(gradient.isnan().all() for gradient in gradients)


def empty(queries=128, keys=None, kv_heads=2, head_dim=64, batch=2, dtype=torch.bfloat16, device="cuda"):
    keys = queries if keys is None else keys
    shapes = [(HEADS, queries), (kv_heads, keys), (kv_heads, keys), (HEADS, queries)]
    return [torch.empty(batch, *shape, head_dim, dtype=dtype, device=device) for shape in shapes]


@pytest.fixture
def without_data():
    with FakeTensorMode() as mode:
        yield mode


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


class EmulatedOps:
    """aten's CUDA ops on the CPU, as their sources and their documentation have them: layouts, alignment, windows."""

    def __getattr__(self, name):
        return type(name, (), {"default": staticmethod(getattr(type(self), "op" + name))})

    @staticmethod
    def forward(q, k, v, scale, visible, bias=None):
        """o [B, H, S_q, D] and lse [B, H, S_q], 0 where a query sees no key, in fp32."""
        assert q.shape[-1] % 8 == 0
        q, k, v = q.float(), *(t.float().repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        scores = (scale * q @ k.mT + (0 if bias is None else bias)).masked_fill(~visible, -torch.inf)
        lse = scores.logsumexp(-1)
        return (scores - lse.unsqueeze(-1)).exp().nan_to_num(0) @ v, lse.masked_fill(lse == -torch.inf, 0)

    @staticmethod
    def backward(d_o, q, k, v, o, lse, scale, visible, bias=None):
        dtype, heads, kv_heads = q.dtype, q.shape[1], k.shape[1]
        d_o, q, k, v, o = (t.float() for t in (d_o, q, k, v, o))
        k, v = (t.repeat_interleave(heads // kv_heads, 1) for t in (k, v))
        scores = (scale * q @ k.mT + (0 if bias is None else bias)).masked_fill(~visible, -torch.inf)
        p = (scores - lse.unsqueeze(-1)).exp()
        ds = scale * p * (d_o @ v.mT - (d_o * o).sum(-1, keepdim=True))
        dk, dv = (t.unflatten(1, (kv_heads, -1)).sum(2) for t in (ds.mT @ q, p.mT @ d_o))
        return [t.to(dtype) for t in (ds @ k, dk, dv)]

    @staticmethod
    def seen(q, k, causal, aligned=0, left=None, right=None):
        """Keys from `left` before to `right` after a query's own, which lies `aligned` after its number."""
        far = torch.arange(q.shape[2])[:, None] + aligned - torch.arange(k.shape[2])
        seen = far >= 0 if causal else torch.ones_like(far, dtype=torch.bool)
        seen = seen if left is None else seen & (far <= left)
        return seen if right is None else seen & (-far <= right)

    @staticmethod
    def op_scaled_dot_product_cudnn_attention(q, k, v, bias, with_lse, dropout, causal, *, scale):
        assert with_lse
        assert bias is None
        o, lse = EmulatedOps.forward(q, k, v, scale, EmulatedOps.seen(q, k, causal))
        seed = torch.zeros((), dtype=torch.long)
        return o.to(q.dtype), lse.unsqueeze(-1), None, None, q.shape[2], k.shape[2], seed, seed, None

    @staticmethod
    def op_scaled_dot_product_cudnn_attention_backward(d_o, q, k, v, o, lse, *rest, scale):
        *_, queries, keys, dropout, causal = rest
        assert (lse.dim(), queries, keys, dropout) == (4, q.shape[2], k.shape[2], 0)
        return EmulatedOps.backward(d_o, q, k, v, o, lse.squeeze(-1), scale, EmulatedOps.seen(q, k, causal))

    @staticmethod
    def op_scaled_dot_product_efficient_attention(q, k, v, bias, with_lse, dropout, causal, *, scale):
        assert with_lse
        assert q.shape[1] == k.shape[1] == v.shape[1]
        assert bias is None or bias.dtype == q.dtype
        assert bias is None or all(stride % 16 == 0 for stride in bias.stride()[:-1])
        o, lse = EmulatedOps.forward(q, k, v, scale, EmulatedOps.seen(q, k, causal), bias)
        seed = torch.zeros((), dtype=torch.long)
        return o.to(q.dtype), F.pad(lse, (0, -q.shape[2] % 32), value=torch.inf), seed, seed

    @staticmethod
    def op_scaled_dot_product_efficient_attention_backward(d_o, q, k, v, bias, o, lse, *rest, scale):
        _, _, dropout, wanted, causal = rest
        assert (lse.shape[-1] % 32, dropout, wanted) == (0, 0, [True, True, True, False])
        assert q.shape[1] == k.shape[1] == v.shape[1]
        lse, seen = lse[..., : q.shape[2]], EmulatedOps.seen(q, k, causal)
        return *EmulatedOps.backward(d_o, q, k, v, o, lse, scale, seen, bias), None

    @staticmethod
    def flash(tensors, cu_seqlens, longest, causal, left, right):
        """The tensors heads first, and which keys a query sees."""
        tensors = [(t if cu_seqlens is None else t.unsqueeze(0)).transpose(1, 2) for t in tensors]
        q, k = tensors[:2]
        assert longest == (q.shape[2], k.shape[2])
        seen = EmulatedOps.seen(q, k, causal, k.shape[2] - q.shape[2], left, right)
        if cu_seqlens is not None:
            document = torch.searchsorted(cu_seqlens[1:], torch.arange(q.shape[2]), right=True)
            seen = seen & (document[:, None] == document)
        return tensors, seen

    @staticmethod
    def op_flash_attention_forward(
        q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, debug, *, scale, **window
    ):
        left, right = window["window_size_left"], window["window_size_right"]
        tensors, seen = EmulatedOps.flash([q, k, v], cu_q, (max_q, max_k), causal, left, right)
        o, lse = EmulatedOps.forward(*tensors, scale, seen)
        o, lse = o.transpose(1, 2), lse if cu_q is None else lse[0]
        seed = torch.zeros(2, dtype=torch.long)
        return (o if cu_q is None else o[0]).to(q.dtype), lse, seed, seed, seed

    @staticmethod
    def op_flash_attention_backward(d_o, q, k, v, o, lse, cu_q, cu_k, max_q, max_k, *rest, scale, **window):
        dropout, causal, _, _ = rest
        assert dropout == 0
        left, right = window["window_size_left"], window["window_size_right"]
        tensors, seen = EmulatedOps.flash([q, k, v, d_o, o], cu_q, (max_q, max_k), causal, left, right)
        q, k, v, d_o, o = tensors
        assert lse.dim() == (3 if cu_q is None else 2)
        gradients = EmulatedOps.backward(d_o, q, k, v, o, lse, scale, seen)
        return [t.transpose(1, 2) if cu_q is None else t.transpose(1, 2)[0] for t in gradients]


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


REFUSED = [
    ("cpu_flash", {}, {"window": 4}, "it has no window"),
    ("cpu_flash", {"batch": 1}, {"cu_seqlens": "documents"}, "it takes no cu_seqlens"),
    ("cpu_flash", {}, {"dropout": 0.5}, "it has no dropout that can be relied on"),
    ("cpu_flash", {"queries": 0}, {}, "it takes no empty tensors; got q [2, 8, 0, 64] and k [2, 2, 0, 64]"),
    (
        "cpu_flash",
        {"queries": 3, "keys": 0},
        {},
        "it takes no empty tensors; got q [2, 8, 3, 64] and k [2, 2, 0, 64]",
    ),
    ("cudnn", {}, {"window": 4}, "it has no window"),
    ("cudnn", {"batch": 1}, {"cu_seqlens": "documents"}, "it takes no cu_seqlens"),
    ("cudnn", {}, {"key_mask": "mask"}, "it takes no key_mask"),
    ("cudnn", {}, {"dropout": 0.5}, "it has no dropout that can be relied on"),
    ("cudnn", {"head_dim": 136}, {}, "its backward is certain for head dimensions up to 128; got 136"),
    ("cudnn", {"queries": 1}, {}, "single queries and keys are wrong in some of its versions; got 1 and 1"),
    (
        "cudnn",
        {"queries": 1, "keys": 9},
        {},
        "single queries and keys are wrong in some of its versions; got 1 and 9",
    ),
    (
        "cudnn",
        {"queries": 5, "keys": 9},
        {},
        TOP_LEFT,
    ),
    (
        "cudnn",
        {"dtype": torch.float32},
        {},
        "it takes q, k and v of one dtype out of torch.float16, torch.bfloat16; got torch.float32, torch.float32 and "
        "torch.float32",
    ),
    ("flash", {}, {"key_mask": "mask"}, "it takes no key_mask"),
    ("flash", {"head_dim": 264}, {}, "it has head dimensions up to 256; got 264"),
    (
        "flash",
        {"queries": 9, "keys": 5},
        {},
        "with S_q > S_k the first queries see no key, and not every version gives them 0",
    ),
    (
        "flash",
        {"queries": 5, "keys": 9, "batch": 1},
        {"cu_seqlens": "documents"},
        "cu_seqlens are those of the queries and of the keys, and S_q ≠ S_k",
    ),
    ("efficient", {}, {"window": 4}, "it has no window"),
    ("efficient", {"batch": 1}, {"cu_seqlens": "documents"}, "it takes no cu_seqlens"),
    (
        "efficient",
        {"dtype": torch.float64},
        {},
        "it takes q, k and v of one dtype out of torch.float16, torch.bfloat16, torch.float32; got torch.float64, "
        "torch.float64 and torch.float64",
    ),
    (
        "efficient",
        {"batch": 65536, "queries": 1},
        {},
        "a grid of CUDA has room for 65535 sequences and 65535 heads",
    ),
]


@pytest.mark.parametrize(("name", "shape", "fields", "reason"), REFUSED)
@pytest.mark.usefixtures("free", "without_data")
def test_refusals(name, shape, fields, reason):
    device = "cpu" if name == "cpu_flash" else "cuda"
    q, k, v, _ = empty(**shape, device=device)
    made = {
        "documents": torch.empty(3, dtype=torch.int32, device=device),
        "mask": torch.empty(2, k.shape[2], dtype=torch.bool, device=device),
    }
    fields = {field: made.get(value, value) for field, value in fields.items()}
    assert VENDORS[name].why_not(q, k, v, pattern(**fields)) == reason
    chosen, why = choose(q, k, v, pattern(**fields))
    assert chosen != name
    assert chosen is not None or f"{name}: {reason}" in why


@pytest.mark.usefixtures("free", "without_data")
def test_refusals_of_devices():
    on_gpu, on_cpu = empty()[:3], empty(device="cpu")[:3]
    assert CPU.why_not(*on_gpu, pattern()) == "it takes tensors on cpu; these are on cuda:0"
    for name in ("cudnn", "flash", "efficient"):
        assert VENDORS[name].why_not(*on_cpu, pattern()) == "it takes tensors on cuda; these are on cpu"
    name, reason = choose(*empty(device="xpu")[:3], pattern())
    assert name is None
    assert reason.count("; these are on xpu") == 4


def gpu(monkeypatch, capability, cudnn=91900):
    monkeypatch.setattr(machine, "capability", lambda index: capability)
    monkeypatch.setattr(machine, "cudnn_version", lambda: cudnn)


@pytest.mark.parametrize(
    ("capability", "name"),
    [((7, 5), None), ((8, 0), "flash"), ((9, 0), "cudnn"), ((10, 0), "cudnn"), ((12, 0), "flash")],
)
@pytest.mark.usefixtures("free", "without_data")
def test_choice_by_gpu(monkeypatch, capability, name):
    gpu(monkeypatch, capability)
    chosen, reason = choose(*empty()[:3], pattern())
    assert chosen == name
    if name is None:
        too_old = "it needs compute capability 8.0; cuda:0 has 7.5"
        assert reason == "; ".join(f"{other}: {too_old}" for other in ("flash", "cudnn", "efficient"))
    elif name == "cudnn":
        assert reason == (
            f"on compute capability {capability[0]}.{capability[1]} cuDNN's backward is 1.7 to 2.3 times as fast as "
            "FlashAttention 2's"
        )
    assert choose(*empty(dtype=torch.float32)[:3], pattern())[0] == (None if name is None else "efficient")


@pytest.mark.usefixtures("free", "without_data")
def test_choice_moves_on_with_the_reasons(monkeypatch):
    gpu(monkeypatch, (9, 0), cudnn=91002)
    name, reason = choose(*empty()[:3], pattern())
    assert name == "flash"
    assert reason.endswith(
        "; cudnn: before version 9.15.1 it is wrong for some lengths; got version number 91002"
    )
    gpu(monkeypatch, (9, 0))
    assert choose(*empty(head_dim=256)[:3], pattern())[0] == "flash"
    assert choose(*empty()[:3], pattern(window=4))[0] == "flash"
    key_mask = torch.empty(2, 128, dtype=torch.bool, device="cuda")
    name, reason = choose(*empty()[:3], pattern(key_mask=key_mask))
    assert name == "efficient"
    assert reason.endswith("cudnn: it takes no key_mask; flash: it takes no key_mask")
    name, reason = choose(*empty()[:3], pattern(key_mask=key_mask, window=4))
    assert name is None
    assert reason == "cudnn: it has no window; flash: it takes no key_mask; efficient: it has no window"


@pytest.mark.usefixtures("free", "without_data")
def test_head_dimensions_that_small_gpus_cannot_train(monkeypatch):
    gpu(monkeypatch, (8, 9))
    for head_dim, dropout, fits in ((192, 0.5, True), (200, 0.0, False), (256, 0.0, True), (256, 0.5, False)):
        reason = VENDORS["flash"].why_not(*empty(head_dim=head_dim)[:3], pattern(dropout=dropout))
        assert (reason is None) == fits
        if not fits:
            assert (
                reason
                == f"its backward needs more shared memory than cuda:0 has for head dimension {head_dim}"
            )


@pytest.mark.usefixtures("free", "without_data")
def test_the_users_switches_are_honoured(monkeypatch):
    gpu(monkeypatch, (9, 0))
    tensors = empty()[:3]
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        name, reason = choose(*tensors, pattern())
        assert name == "efficient"
        for switch in ("cudnn", "flash"):
            assert (
                f"{switch}: it is switched off (torch.nn.attention.sdpa_kernel or "
                f"torch.backends.cuda.enable_{switch}_sdp)"
            ) in reason
        assert choose(*empty(device="cpu")[:3], pattern())[0] is None
    with sdpa_kernel(SDPBackend.MATH):
        name, reason = choose(*tensors, pattern())
        assert name is None
        assert reason.count("it is switched off") == 3
    assert choose(*tensors, pattern())[0] == "cudnn"


@pytest.mark.usefixtures("without_data")
def test_deterministic_algorithms_exclude_kernels(monkeypatch):
    gpu(monkeypatch, (9, 0))
    name, reason = choose(*empty()[:3], pattern())
    assert name == "flash"
    assert "cudnn: its backward is not deterministic, and deterministic algorithms are asked for" in reason
    assert VENDORS["efficient"].why_not(*empty()[:3], pattern()) is None
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        name, reason = choose(*empty()[:3], pattern())
    finally:
        torch.use_deterministic_algorithms(True)
    assert name is None
    only = (
        "its backward is deterministic only under torch.use_deterministic_algorithms(True, warn_only=False)"
    )
    assert f"flash: {only}" in reason
    assert f"efficient: {only}" in reason


ACTIVATED = [
    ("FA3", (9, 0), {}, {}, None),
    ("FA3", (9, 0), {"head_dim": 256}, {"window": 5}, None),
    ("FA3", (10, 0), {}, {}, "the activated FA3 does not run on compute capability 10.0"),
    ("FA3", (9, 0), {}, {"dropout": 0.1}, "the activated FA3 has no dropout"),
    ("FA4", (10, 0), {}, {}, None),
    (
        "FA4",
        (9, 0),
        {"head_dim": 192},
        {},
        "the activated FA4 is certain for head dimensions up to 128; got 192",
    ),
    ("FA4", (8, 0), {}, {}, "the activated FA4 does not run on compute capability 8.0"),
    ("FA9", (9, 0), {}, {}, "the activated FA9 is not known"),
]


@pytest.mark.parametrize(("active", "capability", "shape", "fields", "reason"), ACTIVATED)
@pytest.mark.usefixtures("free", "without_data")
def test_activated_flash_attention(monkeypatch, active, capability, shape, fields, reason):
    gpu(monkeypatch, capability)
    monkeypatch.setattr(_registry, "_FLASH_ATTENTION_ACTIVE", (active, None))
    tensors = empty(**shape)[:3]
    assert VENDORS["flash"].why_not(*tensors, pattern(**fields)) == reason
    name, why = choose(*tensors, pattern(**fields))
    assert (name == "flash") == (reason is None)
    assert why.startswith(
        f"{active} was activated in place of FlashAttention 2" if name is not None else "flash: "
    )
    torch.use_deterministic_algorithms(True)
    reason = VENDORS["flash"].why_not(*empty()[:3], pattern())
    assert reason == f"the backward of the activated {active} is not deterministic in all of its versions"


def test_shapes_on_the_meta_device():
    q, k, v, d_o = empty(37, head_dim=20, device="meta")
    assert choose(q, k, v, pattern())[0] == "cpu_flash"
    result, lse = run(CPU, q, k, v, d_o, pattern())
    assert lse.shape == q.shape[:3]
    assert [t.shape for t in (result.output, *result.gradients.values())] == [t.shape for t in (q, q, k, v)]


def test_dynamo_specialises_no_refusal_to_a_length():
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    def step(q, k, v):
        return q * (2 if choose(q, k, v, pattern())[0] is None else 3)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=count)
    for queries, keys in ((20, 37), (21, 40), (30, 55)):
        q, k, v, _ = inputs(queries, keys)
        assert torch.equal(compiled(q, k, v), 2 * q)
    assert len(graphs) == 1


def test_dynamo_traces_choice_and_kernels():
    tensors = inputs(dtype=torch.bfloat16)
    key_mask = torch.arange(37).expand(2, -1) < 30
    asked = pattern(key_mask=key_mask)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(q, k, v, d_o):
        with torch.no_grad():
            name, _ = choose(q, k, v, asked)
            return run(VENDORS[name], q, k, v, d_o, asked)

    (actual, lse), (expected, expected_lse) = step(*tensors), run(CPU, *tensors, asked)
    assert same_bits(actual, expected)
    assert torch.equal(lse, expected_lse)


@pytest.mark.parametrize("name", ["cudnn", "flash", "efficient"])
@pytest.mark.usefixtures("free")
def test_dynamo_traces_the_cuda_kernels(name):
    """No GPU is needed to trace: the graph's calls are counted, and never run."""
    backends = {
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
    }
    calls = []

    def count(graph, _):
        calls.extend(str(node.target) for node in graph.graph.nodes if "attention" in str(node.target))
        return lambda *args: args[-1:]

    def step(x):
        q, k, v, d_o = empty()
        chosen, _ = choose(q, k, v, pattern())
        run(VENDORS[chosen], q, k, v, d_o, pattern())
        return x + 1

    torch._dynamo.reset()
    with sdpa_kernel([backends[name], SDPBackend.MATH]):
        torch.compile(step, fullgraph=True, backend=count)(torch.zeros(3))
    kernel = {"cudnn": "cudnn_attention", "flash": "flash_attention", "efficient": "efficient_attention"}[
        name
    ]
    assert len(calls) == 2
    assert all(kernel in call for call in calls)


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
