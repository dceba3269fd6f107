"""Edges through FlashAttention-4's backward: the passes, the lists of blocks, and all around the library, emulated."""

import emulated_fa4
import hypothesis
import pytest
import torch
from cases import tiered
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from gradroute import AttentionSites, Routes, Table, reference
from gradroute.backends import fa4
from gradroute.backends.fa4 import refusals
from gradroute.backends.fa4.blocks import BLOCK, Blocks
from gradroute.backends.fa4.operands import Operands
from gradroute.backends.fa4.passes import LEAST_DIVISOR, Pass, passes
from gradroute.backends.fa4.spans import Spans
from gradroute.primitives.attention_pattern import Pattern

ROUTES = 4
BINARY = torch.tensor([[1, 0, 0, 1], [1, 1, 0, 0], [0, 0, 1, 0], [1, 0, 1, 1.0]])
FRACTIONAL = BINARY * torch.tensor([[0.5, 2.0, 0.25, 1.5]])
POSITIVE = torch.tensor([[1, 0.5, 0.25, 1], [2, 1, 0.125, 1], [1, 0.5, 4, 1], [1, 1, 1, 3.0]])
NEGATIVE = BINARY - 0.75

# By name the tables of scores and of values, and how many passes they take.
TABLES = {
    "both, binary": (BINARY, BINARY, 1),
    "both, fractional": (FRACTIONAL, FRACTIONAL, 1),
    "both, positive": (POSITIVE, POSITIVE, 1),
    "scores, binary": (BINARY, None, 1),
    "scores, negative": (NEGATIVE, None, 1),
    "values, positive": (None, POSITIVE, 1),
    "values, binary": (None, BINARY, 2),
    "values, fractional": (None, FRACTIONAL, 2),
    "values, tiny": (None, POSITIVE * LEAST_DIVISOR / 8, 2),
}
PATTERNS = {
    "causal": {},
    "everything": {"causal": False},
    "window": {"window": 9},
    "both sides": {"causal": False, "window": 140},
    "documents": {"cu_seqlens": [0, 1, 90, 90, 200]},
    "padding": {"padding": True},
    "documents, window, padding": {"cu_seqlens": [0, 130, 200], "window": 20, "padding": True},
}
LENGTH = 200  # two blocks, one of them cut off


def as_table(weights):
    return None if weights is None else Table(weights)


def as_pattern(causal=True, window=None, cu_seqlens=None, padding=False, batch=1, length=LENGTH):
    """A pattern; padding is before, inside and behind what is read, so that some queries see no key."""
    key_mask = None
    if padding:
        key_mask = torch.ones(batch, length, dtype=torch.bool)
        key_mask[:, :5] = key_mask[:, 30:50] = key_mask[:, -9:] = False
    documents = None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int32)
    return Pattern(causal, window, 0.3, 0.0, documents, key_mask)


def visible(pattern, length):
    return reference.visible_keys(length, length, torch.device("cpu"), *pattern[:2], *pattern[4:])


def forward(q, k, v, pattern):
    """An unmasked forward's o and log-sum-exp, which is 0 where a query sees no key."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = (pattern.scale * q @ k.mT).masked_fill(~visible(pattern, q.shape[2]), -torch.inf)
    lse = scores.logsumexp(-1)
    lse = lse.masked_fill(lse == -torch.inf, 0)
    return (scores - lse[..., None]).exp() @ v, lse


def exact(q, k, v, d_o, routes, score, value, pattern):
    """The gradients of the reference."""
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    sites = AttentionSites(score_edges=score, value_edges=value)
    z = reference.routed_attention(*leaves, routes, sites, *pattern[:3], *pattern[4:])
    return torch.autograd.grad(z, leaves, d_o)


def drawn(batch=1, heads=4, kv_heads=2, length=LENGTH, head_dim=8, num_routes=ROUTES, run=1):
    """q, k, v, d_o in fp64, and ids in runs of tokens."""
    generator = torch.Generator().manual_seed(length + run)
    q, k, v, d_o = (
        torch.randn(batch, number, length, head_dim, generator=generator, dtype=torch.float64)
        for number in (heads, kv_heads, kv_heads, heads)
    )
    ids = torch.randint(num_routes, (batch, -(-length // run)), generator=generator)
    return q, k, v, d_o, Routes.of(ids.repeat_interleave(run, 1)[:, :length], num_routes)


# Logarithms and quotients of the weights are in fp32: an eps of it in P̃, and the same in dS.
TOLERANCE = {"binary": 1e-12, "others": 16 * torch.finfo(torch.float32).eps}


def assert_gradients(library, tensors, tables, pattern):
    """The gradients of q, k and v are the reference's."""
    q, k, v, d_o, routes = tensors
    score, value = map(as_table, tables)
    o, lse = forward(q, k, v, pattern)
    found = fa4.attention_backward(d_o, q, k, v, o, lse, routes, score, value, pattern)
    is_binary = all(table is None or table.binary for table in (score, value))
    tolerance = TOLERANCE["binary" if is_binary else "others"]
    for name, one, expected in zip(
        "qkv", found, exact(q, k, v, d_o, routes, score, value, pattern), strict=True
    ):
        torch.testing.assert_close(one, expected, rtol=tolerance, atol=tolerance * 30, msg=f"d{name}")
        assert not one[expected == 0].any()
    assert len(library.masked) == len(passes(score, value))


@pytest.mark.parametrize("capability", tiered([(9, 0), (10, 0)]), ids=str)
@pytest.mark.parametrize("options", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("tables", TABLES.values(), ids=TABLES)
def test_passes_make_the_gradients_of_the_reference(monkeypatch, tables, options, capability):
    """From an unmasked forward's o and log-sum-exp, in fp64, for grouped heads."""
    library = emulated_fa4.use_on_the_cpu(monkeypatch, capability)
    *edges, number = tables
    assert_gradients(library, drawn(run=7), edges, as_pattern(**options))
    assert len(library.masked) == number


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 1)])
@pytest.mark.parametrize("name", ["both, binary", "both, fractional", "scores, negative", "values, binary"])
def test_groups_of_heads(monkeypatch, name, heads, kv_heads):
    library = emulated_fa4.use_on_the_cpu(monkeypatch)
    tensors = drawn(batch=2, heads=heads, kv_heads=kv_heads, length=130)
    assert_gradients(library, tensors, TABLES[name][:2], as_pattern())


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("num_routes", [1, 2, 31, 32, 33, 63, 64])
def test_numbers_of_routes(monkeypatch, num_routes, padding):
    """Up to 32 routes have their bits in int32, more in int64; padding is a route more."""
    library = emulated_fa4.use_on_the_cpu(monkeypatch)
    q, k, v, d_o, routes = drawn(num_routes=num_routes, heads=1, kv_heads=1)
    routes.ids[:num_routes] = torch.arange(num_routes)
    table = (torch.arange(num_routes)[:, None] + torch.arange(num_routes)) % 3 != 1
    pattern = as_pattern(padding=padding)
    if num_routes == 64 and padding:
        expected = "beside a key_mask it takes 63 routes, for padding is one more; got 64"
        half = [torch.empty(1, 1, LENGTH, 64, dtype=torch.bfloat16)] * 3
        assert refusals.why_not(*half, num_routes, None, None, pattern) == expected
        return
    assert_gradients(library, (q, k, v, d_o, routes), (table, table), pattern)
    one = Operands.of(Pass(as_table(table), None), routes, (1, LENGTH), pattern)
    wide = num_routes + padding > 32
    if num_routes > 1 or padding:
        assert one.bits.dtype == (torch.int64 if wide else torch.int32)


def test_runs_of_tokens_leave_blocks_out_and_blocks_without_a_mask(monkeypatch):
    """What is computed follows the edges: documents of one route each see themselves."""
    library = emulated_fa4.use_on_the_cpu(monkeypatch)
    tensors = drawn(heads=1, kv_heads=1, length=4 * BLOCK)
    tensors[-1].ids.copy_(torch.arange(4).repeat_interleave(BLOCK))
    assert_gradients(library, tensors, (torch.eye(4), torch.eye(4)), as_pattern())
    assert library.masked == [(4 * BLOCK * (BLOCK + 1) // 2, 0)]
    assert_gradients(
        emulated_fa4.use_on_the_cpu(monkeypatch), tensors, (None, POSITIVE), as_pattern(causal=False)
    )


@hypothesis.given(
    length=st.integers(1, 5 * BLOCK),
    run=st.sampled_from([1, 40, 128, 300]),
    causal=st.booleans(),
    window=st.sampled_from([None, 1, 100, 400]),
    cuts=st.lists(st.integers(0, 5 * BLOCK), max_size=4),
    padded=st.booleans(),
    density=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    seed=st.integers(0, 3),
)
@hypothesis.settings(max_examples=20)
def test_lists_of_blocks(length, run, causal, window, cuts, padded, density, seed):
    """Full where every query sees every key and has an edge; in no list only where none does."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(ROUTES, (2, length // run + 1), generator=generator).repeat_interleave(run, 1)[
        :, :length
    ]
    keys = ids.masked_fill(torch.rand(2, length, generator=generator) < 0.01, ROUTES) if padded else ids
    has_edge = torch.nn.functional.pad(torch.rand(ROUTES, ROUTES, generator=generator) < density, (0, 1))
    cuts = None if not cuts else torch.tensor([0, *sorted(min(cut, length) for cut in cuts), length]).int()
    pattern = Pattern(causal, window, 1.0, 0.0, cuts)
    blocks = Blocks.of(Spans.of(pattern, length, ids.device), ids.int(), keys.int(), has_edge)
    exists = visible(pattern, length)[0] & has_edge[ids[:, :, None], keys[:, None, :]]
    for one in range(2):
        partial, full = emulated_fa4.blocks_of(blocks, one, length)
        assert not (partial & full).any()
        assert not (exists[one] & ~partial & ~full).any()
        for query in range(0, length, BLOCK):
            for key in range(0, length, BLOCK):
                there = slice(query, query + BLOCK), slice(key, key + BLOCK)
                assert full[there].all() == exists[one][there].all()


def test_lists_name_every_block_once():
    ids = torch.zeros(1, 3 * BLOCK, dtype=torch.int32)
    blocks = Blocks.of(Spans.of(as_pattern(), 3 * BLOCK, ids.device), ids, ids, None)
    assert blocks.partial_count.tolist() == [[[1, 1, 1]]]
    assert blocks.partial_index[0, 0, :, 0].tolist() == [0, 1, 2]
    assert blocks.full_count.tolist() == [[[2, 1, 0]]]
    assert blocks.full_index[0, 0, 0, :2].tolist() == [1, 2]
    assert all((index.sort(-1).values == torch.arange(3)).all() for index in blocks[1::2])


def test_operands_are_made_once_a_batch():
    routes = drawn()[-1]
    one, pattern = Pass(as_table(BINARY), None), as_pattern(cu_seqlens=[0, 90, LENGTH])
    made = Operands.of(one, routes, (1, LENGTH), pattern)
    assert Operands.of(one, routes, (1, LENGTH), pattern) is made
    other = pattern._replace(cu_seqlens=pattern.cu_seqlens.clone())
    assert Operands.of(one, routes, (1, LENGTH), other) is not made
    pattern.cu_seqlens[1] = 50
    changed = Operands.of(one, routes, (1, LENGTH), pattern)
    assert changed.stop[0] == 1
    assert changed.first[60] == 50


@pytest.mark.parametrize("options", PATTERNS.values(), ids=PATTERNS)
def test_operands_are_made_without_waiting_for_a_number(options):
    """On meta there are none, and what asks for one raises."""
    pattern = as_pattern(**options)
    pattern = pattern._replace(
        **{
            name: None if t is None else t.to("meta")
            for name, t in zip(pattern._fields[4:], pattern[4:], strict=True)
        }
    )
    routes = Routes.of(torch.zeros(2, LENGTH, dtype=torch.int32, device="meta"), ROUTES, validate=False)
    made = Operands.of(Pass(as_table(FRACTIONAL), as_table(BINARY)), routes, (2, LENGTH), pattern)
    assert made.bits.shape == made.key_routes.shape == (2, LENGTH)
    assert made.blocks.full_index.shape == (2, 1, 2, 2)


INSTALLED = dict(refusals.VERSIONS)


@pytest.fixture
def gpu(monkeypatch):
    """A function that says why a call on a GPU is refused, where the packages `versions` are installed."""

    def refusal(
        versions=INSTALLED, capability=(9, 0), score=BINARY, value=BINARY, num_routes=ROUTES, **options
    ):
        monkeypatch.setattr(refusals, "installed_version", versions.get)
        monkeypatch.setattr(refusals.machine, "capability", lambda index: capability)
        shape = {"head_dim": 128, "keys": 8, "dtype": torch.bfloat16, "device": "cuda"}
        shape |= {name: options.pop(name) for name in shape.keys() & options.keys()}
        with FakeTensorMode():
            q, k, v = (
                torch.empty(2, 4, length, shape["head_dim"], dtype=shape["dtype"], device=shape["device"])
                for length in (8, shape["keys"], shape["keys"])
            )
            pattern = Pattern(**{"causal": True, "window": None, "scale": 1.0} | options)
            return refusals.why_not(q, k, v, num_routes, as_table(score), as_table(value), pattern)

    return refusal


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"versions": {}}, "the package flash-attn-4 is not installed (gradroute's extra fa4)"),
        (
            {"versions": INSTALLED | {"flash-attn-4": "4.1.0"}},
            "its kernels were compiled with flash-attn-4 4.0.0b36, and 4.1.0 is installed",
        ),
        (
            {"versions": INSTALLED | {"quack-kernels": "0.7"}},
            "its kernels were compiled with quack-kernels 0.6.5, and 0.7 is installed",
        ),
        ({"device": "cpu"}, "it takes tensors on cuda; these are on cpu"),
        (
            {"dtype": torch.float32},
            "it takes q, k and v of one dtype out of torch.float16, torch.bfloat16; got torch.float32, torch.float32 "
            "and torch.float32",
        ),
        ({"capability": (8, 0)}, "it needs compute capability 9.0; cuda:0 has 8.0"),
        (
            {"capability": (12, 0)},
            "it was compiled for compute capabilities 9.0 and 10.0; cuda:0 has 12.0",
        ),
        ({"head_dim": 256}, "it was compiled for head dimensions 64, 96, 128; got 256"),
        ({"keys": 9}, "edges are between as many queries as keys"),
        ({"dropout": 0.1}, "it has no dropout"),
        (
            {"value": FRACTIONAL},
            "score_edges and value_edges differ, and it takes one table for both, or for one of them",
        ),
        (
            {"score": NEGATIVE, "value": NEGATIVE},
            "it adds the logarithm of value_edges to the scores, and their smallest weight is -0.75",
        ),
    ],
)
@pytest.mark.usefixtures("free")
def test_refusals(gpu, options, reason):
    assert gpu() is None
    assert gpu(**options) == reason


@pytest.mark.usefixtures("free")
def test_what_is_taken(gpu):
    for score, value, _ in TABLES.values():
        assert gpu(score=score, value=value) is None
    assert gpu(capability=(10, 0), dtype=torch.float16, head_dim=64, causal=False, window=3) is None


def test_deterministic_algorithms_are_respected(gpu):
    assert gpu() == "its backward adds up dQ by atomics, and deterministic algorithms are asked for"
