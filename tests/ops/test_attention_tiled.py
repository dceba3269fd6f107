"""Attention in tiles: the numbers, what edges forbid exactly, and how much work and memory are left."""

import dataclasses
import math
from typing import NamedTuple

import cases
import pytest
import torch
from device_state import without_waiting
from torch import Tensor

from gradroute import AttentionSites, Routes, reference, testing
from gradroute.backends import tiled
from gradroute.backends.tiled import backward, forward, tiling
from gradroute.backends.tiled import edges as tiled_edges
from gradroute.primitives.attention_pattern import Pattern
from gradroute.tables import Table

NUM_ROUTES = 3
EDGES = {
    "none": None,
    "ones": torch.ones(3, 3),
    "zeros": torch.zeros(3, 3),
    "binary": torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]),
    "other binary": torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 0.0], [1.0, 0.0, 1.0]]),
    "fractional": torch.tensor([[1.0, 0.5, 0.0], [0.25, 1.0, 2.0], [1.0, 1.0, 1.0]]),
    "negative": torch.tensor([[1.0, -0.5, 0.0], [0.0, -1.0, 1.0], [0.5, 0.5, 1.0]]),
}

PATTERNS = {
    "all": {"causal": False},
    "causal": {"causal": True},
    "window": {"causal": True, "window": 11},
    "one key": {"causal": True, "window": 1},
    "window both ways": {"causal": False, "window": 11},
    "documents": {"causal": True, "documents": [0, 9, 9, 50, 67]},
    "documents both ways": {"causal": False, "documents": [0, 0, 20, 49, 61, 67, 67]},
    "documents, window": {"causal": True, "window": 7, "documents": [0, 20, 49, 61, 67]},
    "padding": {"causal": False, "padding": 0.3},
    "padding, causal": {"causal": True, "padding": 0.8},
    "padding, window": {"causal": True, "window": 11, "padding": 0.5},
}

# How edges and padding are handled: by picking rows and keys, from tables, all heads together, and as on a device.
WAYS = {
    "picked": {"FEW_SCORES": 0, "MIN_TOKENS_OF_A_CLASS": 1},
    "tables": {"FEW_SCORES": 0, "MIN_TOKENS_OF_A_CLASS": 1 << 30},
    "some of both": {"FEW_SCORES": 0, "MIN_TOKENS_OF_A_CLASS": 20},
    "together": {"FEW_SCORES": 1 << 30},
    "device": {"looks_at_data": lambda device: False},
}


@pytest.fixture
def take(monkeypatch):
    """take(way): tiles so small that a short sequence makes many, none of them full."""
    limits = {"ROWS": 24, "KEYS": 16, "DEVICE_ROWS": 20, "DEVICE_KEYS": 13, "DEVICE_SCORES": 1 << 10}

    def chosen(way):
        replace(monkeypatch, limits | WAYS[way])

    return chosen


def replace(monkeypatch, values):
    """Replaces what tiles are made by; each name stands in one module."""
    for name, value in values.items():
        monkeypatch.setattr(tiled_edges if hasattr(tiled_edges, name) else tiling, name, value)


class Outcome(NamedTuple):
    o: Tensor  # [B, H, S_q, D]
    dq: Tensor  # [B, H, S_q, D]
    dk: Tensor  # [B, G, S_k, D]
    dv: Tensor  # [B, G, S_k, D]


@dataclasses.dataclass(frozen=True)
class Call:
    """Inputs of a forward and a backward; edges are tables' weights."""

    d_o: Tensor  # [B, H, S_q, D]
    q: Tensor  # [B, H, S_q, D]
    k: Tensor  # [B, G, S_k, D]
    v: Tensor  # [B, G, S_k, D]
    pattern: Pattern
    routes: Routes | None = None
    score: Tensor | None = None  # [R, R]
    value: Tensor | None = None  # [R, R]

    def tiled(self, want_query=True, want_key_value=True) -> Outcome:
        o, lse = tiled.attention_forward(self.q, self.k, self.v, self.pattern)
        return Outcome(o, *self.backward(o, lse, want_query=want_query, want_key_value=want_key_value))

    def backward(self, o, lse, **wanted):
        tables = (None if weights is None else Table(weights) for weights in (self.score, self.value))
        operands = (self.d_o, self.q, self.k, self.v, o, lse)
        wanted = {"want_query": True, "want_key_value": True} | wanted
        return tiled.attention_backward(*operands, self.routes, *tables, self.pattern, **wanted)

    def exact(self) -> Outcome:
        """The reference in fp64."""
        return self.to(torch.float64).by_reference()

    def by_reference(self) -> Outcome:
        queries, keys = self.q.shape[2], self.k.shape[2]
        causal, window, scale, _, cu_seqlens, key_mask = self.pattern
        seen = reference.visible_keys(queries, keys, self.q.device, causal, window, cu_seqlens, key_mask)
        sites = AttentionSites(score_edges=self.score, value_edges=self.value)
        leaves = [t.detach().requires_grad_() for t in (self.q, self.k, self.v)]
        o = reference.Attention.apply(*leaves, self.routes, sites.effective, seen, scale)
        return Outcome(o.detach(), *torch.autograd.grad(o, leaves, self.d_o))

    def plain(self) -> Outcome:
        """The formulas in eager PyTorch, every intermediate in the inputs' dtype; heads are not grouped here."""
        group = self.q.shape[1] // self.k.shape[1]
        k, v = (t.repeat_interleave(group, 1) for t in (self.k, self.v))
        causal, window, scale, _, *masks = self.pattern
        seen = reference.visible_keys(k.shape[2], k.shape[2], k.device, causal, window, *masks)
        seen = seen[..., k.shape[2] - self.q.shape[2] :, :]
        p = torch.softmax((scale * self.q @ k.mT).masked_fill(~seen, -math.inf), -1)
        p = p.masked_fill(~seen.any(-1, keepdim=True), 0)
        o = p @ v
        edged = reference.Attention.edged
        score, value = (None if w is None else Table(w) for w in (self.score, self.value))
        dv = edged(value, self.routes, p).mT @ self.d_o
        ds = p * (self.d_o @ v.mT - (self.d_o * o).sum(-1, keepdim=True))
        ds = edged(score, self.routes, ds)
        dk, dv = (t.unflatten(1, (-1, group)).sum(2) for t in (scale * ds.mT @ self.q, dv))
        return Outcome(o, scale * ds @ k, dk, dv)

    def to(self, dtype) -> "Call":
        tensors = {name: getattr(self, name).to(dtype) for name in ("d_o", "q", "k", "v")}
        return dataclasses.replace(self, **tensors)

    def assert_within_budget(self, **wanted) -> None:
        """The budget of testing.excess. Terms of dS cancel where queries see one key each: do vᵀ k and do vᵀ q."""
        exact = self.exact()
        plain = exact if self.q.dtype == torch.float64 else self.plain()
        for name, *results in zip(Outcome._fields, self.tiled(**wanted), exact, plain, strict=True):
            actual, expected, at_dtype = results
            cancelling = self.size_of_terms() if self.pattern.window == 1 and name in ("dq", "dk") else 0.0
            excess = testing.excess(actual, expected, at_dtype.to(self.q.dtype), cancelling)
            assert excess is None, f"{name}: {excess}"

    def size_of_terms(self) -> float:
        return math.prod(float(t.abs().max()) for t in (self.d_o, self.v, self.k))


def make(
    lengths=(67, 67),
    heads=(4, 2),
    batch=1,
    dtype=torch.float64,
    score="none",
    value="none",
    causal=True,
    window=None,
    documents=None,
    padding=None,
    head_dim=6,
):
    """A call with random routes; `lengths` of queries and keys, `heads` of queries and keys."""
    (queries, keys), (query_heads, key_heads) = lengths, heads
    of_queries, of_keys = (batch, query_heads, queries, head_dim), (batch, key_heads, keys, head_dim)
    d_o, q, k, v = (torch.randn(*shape).to(dtype) for shape in (of_queries, of_queries, of_keys, of_keys))
    cu_seqlens = None if documents is None else torch.tensor(documents, dtype=torch.int32)
    key_mask = None if padding is None else torch.rand(batch, keys) >= padding
    pattern = Pattern(causal, window, 0.4, 0.0, cu_seqlens, key_mask)
    routes = Routes.of(torch.randint(0, NUM_ROUTES, (batch, keys)), NUM_ROUTES)
    return Call(d_o, q, k, v, pattern, routes, EDGES[score], EDGES[value])


def on(pattern, device):
    """The pattern with its masks on another device."""
    masks = {name: getattr(pattern, name) for name in ("cu_seqlens", "key_mask")}
    return pattern._replace(
        **{name: None if mask is None else mask.to(device) for name, mask in masks.items()}
    )


COVERING = list(
    cases.covering(
        {
            "pattern": list(PATTERNS),
            "way": list(WAYS),
            "heads": [(1, 1), (4, 1), (4, 4), (8, 2)],
            "score": list(EDGES),
            "value": list(EDGES),
        }
    )
)


@pytest.mark.parametrize("case", COVERING, ids=lambda case: "-".join(map(str, case.values())))
def test_tiles_are_the_reference(case, take):
    take(case["way"])
    options = PATTERNS[case["pattern"]]
    batch = 1 if "documents" in options else 2
    edges = {"score": case["score"], "value": case["value"]}
    make(heads=case["heads"], batch=batch, **edges, **options).assert_within_budget()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", WAYS)
def test_every_dtype_keeps_the_budget(dtype, way, take):
    take(way)
    for score, value in (("none", "none"), ("binary", "other binary"), ("fractional", "negative")):
        make(batch=2, dtype=dtype, score=score, value=value).assert_within_budget()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("lengths", [(1, 1), (1, 40), (30, 67), (67, 30), (0, 5), (5, 0), (0, 0)])
def test_any_number_of_queries_and_keys(lengths, way, take):
    take(way)
    for options in ({}, {"causal": False}, {"window": 5}, {"causal": False, "window": 5, "padding": 0.5}):
        call = make(lengths=lengths, batch=2, **options)
        dataclasses.replace(call, routes=None).assert_within_budget()


@pytest.mark.parametrize("way", WAYS)
def test_shipped_tile_sizes(way, monkeypatch):
    replace(monkeypatch, WAYS[way])
    make(lengths=(700, 700), score="binary", value="fractional").assert_within_budget()


@pytest.mark.parametrize("way", WAYS)
def test_lse_is_the_logarithm_of_the_sum(way, take):
    take(way)
    call = make(batch=2, window=9, padding=0.6)
    seen = reference.visible_keys(67, 67, call.q.device, True, 9, None, call.pattern.key_mask)
    scores = 0.4 * call.q @ call.k.repeat_interleave(2, 1).mT
    expected = torch.logsumexp(scores.masked_fill(~seen, -math.inf), -1)
    o, lse = tiled.attention_forward(call.q, call.k, call.v, call.pattern)
    torch.testing.assert_close(lse, expected, rtol=2**-40, atol=2**-40)
    assert (lse == -math.inf).any()
    assert (o[lse == -math.inf] == 0).all()


@pytest.mark.parametrize("none_seen", [-math.inf, math.inf])
@pytest.mark.parametrize("way", WAYS)
def test_a_vendors_lse_of_a_query_without_keys(none_seen, way, take):
    """It may be either infinity, and the output there anything."""
    take(way)
    call = make(batch=2, window=9, padding=0.6, score="fractional", value="fractional")
    o, lse = tiled.attention_forward(call.q, call.k, call.v, call.pattern)
    expected = call.backward(o, lse)
    lost = lse == -math.inf
    actual = call.backward(o.masked_fill(lost[..., None], math.nan), lse.masked_fill(lost, none_seen))
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


def test_scores_of_hundreds(take):
    """Rounding lse to fp32 errs by |lse| 2⁻²⁵, and so does P relatively: 2e-5 at 600; sums are of a few such terms."""
    take("picked")
    call = make(dtype=torch.float32, score="binary")
    call = dataclasses.replace(call, q=300 * call.q)
    for actual, expected in zip(call.tiled(), call.exact(), strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("way", WAYS)
def test_where_edges_forbid_nothing_passes_not_even_nan(way, take):
    """A query whose P is NaN and whose edges are 0: the gradients are those without it, exactly 0 its own."""
    take(way)
    call = make(score="binary", value="binary")
    ids = call.routes.ids.clone()
    ids[30] = 2  # a row of zeros
    call = dataclasses.replace(call, routes=Routes.of(ids[None], NUM_ROUTES))
    o, lse = tiled.attention_forward(call.q, call.k, call.v, call.pattern)
    expected = call.backward(o, lse)
    o[:, :, 30], lse[:, :, 30] = math.inf, math.nan
    dq, dk, dv = call.backward(o, lse)
    assert (dq[:, :, 30] == 0).all()
    assert all(torch.equal(*pair) for pair in zip((dq, dk, dv), expected, strict=True))


@pytest.mark.parametrize("way", ["picked", "some of both", "tables"])
def test_padding_and_rows_without_gradient_are_left_out_exactly(way, take):
    """Whatever is there, infinities and NaN too."""
    take(way)
    call = make(causal=False, padding=0.4, score="fractional", value="negative")
    silent = torch.arange(67) % 5 == 0
    call = dataclasses.replace(call, d_o=call.d_o.masked_fill(silent[:, None], 0))
    expected = call.tiled()
    (hidden,) = ~call.pattern.key_mask
    poisoned = {"k": call.k, "v": call.v}
    poisoned = {name: t.masked_fill(hidden[:, None], math.nan) for name, t in poisoned.items()}
    o, lse = tiled.attention_forward(call.q, call.k, call.v, call.pattern)
    q, o = (t.masked_fill(silent[:, None], math.nan) for t in (call.q, o))
    gradients = dataclasses.replace(call, q=q, **poisoned).backward(o, lse)
    assert all(torch.equal(*pair) for pair in zip(gradients, expected[1:], strict=True))
    assert (gradients[0][:, :, silent] == 0).all()
    assert (gradients[1][:, :, hidden] == 0).all()
    assert (gradients[2][:, :, hidden] == 0).all()


@pytest.mark.parametrize("way", WAYS)
def test_a_delta_that_is_known(way, take):
    take(way)
    call = make(batch=2, score="fractional", value="binary", padding=0.3)
    o, lse = tiled.attention_forward(call.q, call.k, call.v, call.pattern)
    expected = call.backward(o, lse)
    actual = call.backward(torch.full_like(o, math.nan), lse, delta=(call.d_o * o).sum(-1))
    for pair in zip(actual, expected, strict=True):
        torch.testing.assert_close(*pair, rtol=2**-40, atol=2**-40)


@pytest.mark.parametrize("way", WAYS)
def test_gradients_that_are_not_wanted(way, take):
    take(way)
    call = make(batch=2, score="fractional", value="binary")
    everything = call.tiled()
    only_query = call.tiled(want_key_value=False)
    only_keys = call.tiled(want_query=False)
    assert only_query.dk is None
    assert only_query.dv is None
    assert only_keys.dq is None
    torch.testing.assert_close(only_query.dq, everything.dq, rtol=2**-40, atol=2**-40)
    assert torch.equal(only_keys.dk, everything.dk)
    assert torch.equal(only_keys.dv, everything.dv)
    assert call.tiled(want_query=False, want_key_value=False)[1:] == (None, None, None)


@pytest.mark.parametrize("way", WAYS)
def test_any_strides(way, take):
    """Tensors as projections lay them out, and a gradient of zero strides."""
    take(way)
    call = make(batch=2, score="binary", value="fractional")
    call = dataclasses.replace(call, d_o=call.d_o[:, :, :1, :1].expand(-1, -1, 67, 6))
    strided = {name: getattr(call, name).transpose(1, 2).contiguous().transpose(1, 2) for name in "qkv"}
    apart = {name: torch.stack([t, t], -1)[..., 0] for name, t in strided.items()}
    expected = dataclasses.replace(call, d_o=call.d_o.contiguous()).tiled()
    for layout in (strided, apart):
        actual = dataclasses.replace(call, **layout).tiled()
        assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))
    assert dataclasses.replace(call, **strided).tiled().dq.stride() == strided["q"].stride()


@pytest.mark.parametrize("way", WAYS)
def test_same_inputs_same_bits_and_inputs_are_not_written(way, take):
    take(way)
    call = make(batch=2, score="fractional", value="binary", padding=0.3)
    before = [t.clone() for t in (call.d_o, call.q, call.k, call.v)]
    first, second = call.tiled(), call.tiled()
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
    after = (call.d_o, call.q, call.k, call.v)
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


# The work that is left


@pytest.fixture
def multiply_adds(monkeypatch):
    """multiply_adds(call): those of its backward, in products of tiles with `[n, D]`."""
    total = 0

    def counted(name, size):
        original = getattr(tiling.Tiling, name)

        def product(self, a, b, *rest):
            nonlocal total
            total += size(a, b, *rest)
            return original(self, a, b, *rest)

        monkeypatch.setattr(tiling.Tiling, name, product)

    counted("product", lambda a, b, tile: a.numel() * b.shape[-2])
    counted("accumulate", lambda sums, a, b: a.numel() * b.shape[-1])

    def of(call):
        nonlocal total
        o, lse = tiled.attention_forward(call.q, call.k, call.v, call.pattern)
        total = 0
        call.backward(o, lse)
        return total

    return of


def test_routes_that_do_not_teach_each_other_cost_their_share(take, multiply_adds):
    take("picked")
    call = make(lengths=(90, 90), causal=False)
    call = dataclasses.replace(call, routes=Routes.of((torch.arange(90) % 3)[None], 3))
    whole = multiply_adds(call)
    assert whole == 5 * 4 * 90 * 90 * 6
    apart = dataclasses.replace(call, score=torch.eye(3), value=torch.eye(3))
    apart.assert_within_budget()
    assert multiply_adds(apart) == whole / 3
    only_values = dataclasses.replace(call, score=torch.zeros(3, 3), value=torch.eye(3))
    assert multiply_adds(only_values) == whole * 2 / 5 / 3


def test_rows_without_gradient_and_padding_cost_nothing(take, multiply_adds):
    take("picked")
    call = make(lengths=(64, 64), causal=False)
    whole = multiply_adds(call)
    d_o = call.d_o.index_fill(1, torch.tensor([1, 3]), 0)  # no gradient in half of the heads
    half = dataclasses.replace(call, d_o=d_o)
    half.assert_within_budget()
    assert multiply_adds(half) == whole / 2
    key_mask = (torch.arange(64) >= 48)[None]
    quarter = dataclasses.replace(call, pattern=call.pattern._replace(key_mask=key_mask))
    assert multiply_adds(quarter) == whole / 4


@pytest.mark.parametrize("way", WAYS)
def test_tiles_that_are_not_seen_are_skipped(way, take, multiply_adds):
    """Each query sees 32 of 2048 keys, and visits at most two more tiles of them."""
    take(way)
    call = make(lengths=(2048, 2048), heads=(1, 1), window=32, head_dim=1)
    assert multiply_adds(call) <= 5 * 2048 * (32 + 24 + 16)


def test_documents_are_not_mixed(take, multiply_adds):
    take("picked")
    call = make(lengths=(640, 640), heads=(1, 1), causal=False, documents=[0, 320, 640], head_dim=1)
    assert multiply_adds(call) == 5 * 2 * 320 * 320


# Memory


def peak_bytes(run):
    """The most that `run` has allocated at any time, what it returns included."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    allocated = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return peak


@pytest.mark.slow
@pytest.mark.parametrize("way", ["picked", "tables", "device"])
def test_memory_grows_with_the_sequence_not_its_square(way, take, monkeypatch):
    take(way)
    replace(monkeypatch, dict.fromkeys(("ROWS", "KEYS", "DEVICE_ROWS", "DEVICE_KEYS"), 96))
    calls = [
        make(lengths=(n, n), head_dim=16, dtype=torch.float32, score="binary", value="fractional")
        for n in (512, 1024)
    ]
    small, large = (peak_bytes(call.tiled) for call in calls)
    assert large <= 2.2 * small
    assert large <= peak_bytes(calls[1].by_reference) / 8


# Where the host may not look at data


def test_a_device_is_never_waited_for(monkeypatch):
    """Tensors on the meta device have no data to look at: whoever asks for a value raises."""
    for module in (forward, backward):
        monkeypatch.setattr(module, "has_data", lambda tensor: True)
    for options in ({}, {"window": 5}, {"documents": [0, 9, 67]}, {"padding": 0.3, "causal": False}):
        call = make(score="fractional", value="binary", **options)
        pattern = on(call.pattern, "meta")
        flat = (call.q.to("meta"), call.k.to("meta"), call.v.to("meta"))
        o, lse = forward.forward_op(*flat, *pattern)
        edges = (call.routes.ids.to("meta"), call.score.to("meta"), call.value.to("meta"))
        gradients = backward.backward_op(o, *flat, o, lse, *edges, None, *pattern, True, True)
        assert [gradient.shape for gradient in gradients] == [t.shape for t in flat]
        assert all(gradient.is_meta for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_half_precision(dtype, take, monkeypatch):
    """As on CUDA: operands stay in half precision, products are fp32."""
    take("device")
    bmm, products = torch.bmm, []

    def in_fp32(a, b, out_dtype=None):
        products.append((a.dtype, b.dtype, out_dtype))
        return bmm(a, b) if out_dtype is None else bmm(a.to(out_dtype), b.to(out_dtype))

    monkeypatch.setattr(torch, "bmm", in_fp32)
    monkeypatch.setattr(tiling, "operand_dtype", lambda t: t.dtype)
    for options in ({}, {"score": "binary", "value": "fractional"}, {"padding": 0.3, "causal": False}):
        make(batch=2, dtype=dtype, **options).assert_within_budget()
    assert set(products) == {(dtype, dtype, torch.float32)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_pattern_on_a_device(dtype, device):
    """On a GPU nothing waits for it."""
    for options in PATTERNS.values():
        call = make(dtype=dtype, score="binary", value="fractional", **options)
        tensors = {name: getattr(call, name).to(device) for name in ("d_o", "q", "k", "v")}
        call = dataclasses.replace(
            call, routes=call.routes.to(device), pattern=on(call.pattern, device), **tensors
        )
        with without_waiting():
            call.tiled()
        call.assert_within_budget()


# torch.library


@pytest.mark.slow
def test_ops_pass_opcheck(device):
    for options in ({}, {"window": 5}, {"documents": [0, 9, 67]}, {"padding": 0.3, "causal": False}):
        call = make(dtype=torch.float32, score="fractional", value="binary", **options)
        flat = [t.to(device) for t in (call.q, call.k, call.v)]
        pattern = on(call.pattern, device)
        ops = torch.ops.gradroute
        o, lse = ops.attention_tiled_forward.default(*flat, *pattern)
        edges = [t.to(device) for t in (call.routes.ids, call.score, call.value)]
        gradient = call.d_o.to(device)
        calls = {ops.attention_tiled_forward.default: (*flat, *pattern)}
        calls[ops.attention_tiled_backward.default] = (
            gradient,
            *flat,
            o,
            lse,
            *edges,
            None,
            *pattern,
            True,
            True,
        )
        for op, arguments in calls.items():
            outcome = torch.library.opcheck(op, arguments)
            assert set(outcome.values()) == {"SUCCESS"}, outcome


def test_compiled_calls_are_the_same():
    call = make(batch=2, dtype=torch.float32, score="fractional", value="binary", padding=0.3)
    tables = Table(call.score), Table(call.value)
    wanted = {"want_query": True, "want_key_value": False}

    def both(d_o, q, k, v):
        o, lse = tiled.attention_forward(q, k, v, call.pattern)
        operands = (d_o, q, k, v, o, lse, call.routes, *tables, call.pattern)
        return o, tiled.attention_backward(*operands, **wanted)

    tensors = (call.d_o, call.q, call.k, call.v)
    o, gradients = torch.compile(both, fullgraph=True, backend="aot_eager")(*tensors)
    expected_o, expected = both(*tensors)
    assert torch.equal(o, expected_o)
    assert torch.equal(gradients[0], expected[0])
    assert gradients[1:] == expected[1:] == (None, None)
