"""The programs of attention's Triton backward: heaviest first over all heads, and groups split where few are long."""

import cases
import pytest
import torch

from gradroute import AttentionSites, Routes, testing
from gradroute.primitives.attention_edges import TILE, TileBits

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
dkdv = pytest.importorskip("gradroute.kernels.attention.dkdv")
schedule = pytest.importorskip("gradroute.kernels.attention.schedule")
attention_tiles = pytest.importorskip("gradroute.kernels.attention.tiles")

MULTIPROCESSORS = 132  # an H100's or H200's
LENGTH, BLOCK_Q, BLOCK_K = 4096, 64, 128


@triton.jit
def places_kernel(order, num_owners, num_shared, places):
    owner, entry = attention_tiles.place_of(order, num_owners, num_shared)
    tl.store(places + 2 * tl.program_id(0), entry)
    tl.store(places + 2 * tl.program_id(0) + 1, owner)


@pytest.mark.parametrize("lists", [None, 2, 6])
def test_kernels_find_their_places_in_the_order_that_is_computed_here(lists, device):
    """Of two batch elements with three entries each: known beforehand, by a list a batch element, by one an entry."""
    cases.require("triton", device)
    entries, owners = 6, 5
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(3, (lists or 1, owners), generator=generator, dtype=torch.int32)
    order = None
    if lists:
        order = attention_tiles.heaviest_first(counts.to(device))
    places = torch.empty(entries * owners, 2, dtype=torch.int32, device=device)
    places_kernel[(entries * owners,)](order, owners, entries // (lists or 1), places)
    expected = schedule.launch_order(counts.tolist(), entries, by_count=bool(lists))
    assert [tuple(place) for place in places.tolist()] == expected
    assert sorted(expected) == [(entry, owner) for entry in range(entries) for owner in range(owners)]


def seen(queries, keys, causal, window):
    """Which queries see each key, bool `[keys, queries]`."""
    far = torch.arange(queries) + keys - queries - torch.arange(keys)[:, None]
    pairs = far >= 0 if causal else torch.ones_like(far, dtype=torch.bool)
    return pairs if window is None else pairs & (far.abs() < window)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 40, 500])
@pytest.mark.parametrize(("queries", "keys"), [(300, 300), (70, 300), (1, 300), (0, 5)])
def test_tiles_of_queries_are_counted_as_they_are_seen(queries, keys, causal, window):
    pairs = seen(queries, keys, causal, window)
    expected = [
        sum(bool(tile.any()) for tile in own.split(16, dim=1) if tile.shape[1]) for own in pairs.split(32)
    ]
    assert schedule.count_tiles_of_queries(queries, keys, causal, window, 16, 32) == expected


def balance(batch, kv_heads, group, counts=None, listed=False, by_entry=False):
    """Of dK and dV at LENGTH, causal; counts `[lists, owners]` of one query head where lists say them."""
    known = schedule.count_tiles_of_queries(LENGTH, LENGTH, True, None, BLOCK_Q, BLOCK_K)
    weights = tuple(BLOCK_Q * count for count in known)
    entries = batch * kv_heads
    parts = schedule.parts_of(weights, -(-entries // 2) if listed else entries, group, MULTIPROCESSORS)
    if by_entry:
        counts = [own for own in counts for _ in range(parts)]
    overhead = schedule.PROGRAM_COST + schedule.PARTIAL_COST * (parts > 1)
    work = schedule.program_work(
        counts or [known], entries * parts, group // parts, by_count=listed, cost=BLOCK_Q, overhead=overhead
    )
    return schedule.balance(work, MULTIPROCESSORS)


@pytest.mark.parametrize(
    ("batch", "kv_heads", "group"), [(4, 8, 4), (1, 8, 4), (4, 1, 32), (1, 1, 32)], ids=str
)
def test_multiprocessors_have_equally_much_to_do(batch, kv_heads, group):
    """At the target shape, of one sequence, and where all 32 heads read one key head."""
    assert balance(batch, kv_heads, group) >= 0.97


@pytest.mark.parametrize("batch", [4, 1])
def test_multiprocessors_have_equally_much_to_do_where_half_of_the_heads_have_nothing(batch):
    known = schedule.count_tiles_of_queries(LENGTH, LENGTH, True, None, BLOCK_Q, BLOCK_K)
    counts = [known if head < 4 else [0] * len(known) for _ in range(batch) for head in range(8)]
    assert balance(batch, 8, 4, counts, listed=True, by_entry=True) >= 0.97


@pytest.mark.parametrize("batch", [4, 1])
def test_multiprocessors_have_equally_much_to_do_where_edges_leave_out_tiles(batch):
    """Routes in runs of 64 to 512 tokens; each teaches itself, and all teach route 0."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(batch):
        lengths = torch.randint(64, 513, (64,), generator=generator)
        rows.append(torch.randint(4, (64,), generator=generator).repeat_interleave(lengths)[:LENGTH])
    routes = Routes.of(torch.stack(rows), 4)
    edges = torch.eye(4)
    edges[:, 0] = 1
    bits = TileBits.of(routes, (batch, LENGTH), AttentionSites(score_edges=edges).tables["score_edges"])
    pairs = (bits.present[:, :, None] & bits.reach[:, None]) != 0
    pairs &= seen(LENGTH, LENGTH, True, None)[TILE - 1 :: TILE, TILE - 1 :: TILE]
    tiles = pairs.unflatten(2, (-1, BLOCK_Q // TILE)).unflatten(1, (-1, BLOCK_K // TILE)).any(4).any(2)
    assert balance(batch, 8, 4, tiles.sum(2).tolist(), listed=True) >= 0.97


def test_heads_are_split_only_where_that_ends_sooner():
    """Few long programs are split, into no more parts than needed; many, or short ones, are not."""
    weights = tuple(range(4096, 0, -128))
    assert schedule.parts_of(weights, 32, 4, MULTIPROCESSORS) == 1
    assert schedule.parts_of(weights, 4, 32, MULTIPROCESSORS) == 2
    assert schedule.parts_of(weights, 1, 32, MULTIPROCESSORS) == 8
    assert schedule.parts_of((64,), 1, 2, MULTIPROCESSORS) == 1
    assert schedule.parts_of((), 1, 2, MULTIPROCESSORS) == 1
    assert schedule.parts_of((4096,) * 32, 32, 4, MULTIPROCESSORS) == 1


SPLIT = {
    "plain": {},
    "heads": {"heads": torch.tensor([[1.0, 0.0, 0.5, 1.0], [0.0, 1.0, 1.0, 0.0]])},
    "edges": dict.fromkeys(("score_edges", "value_edges"), torch.tensor([[1.0, 1.0], [0.0, 1.0]])),
    "key": {"key": torch.tensor([[1.0], [0.0]]), "value": torch.tensor([[0.5], [0.0]])},
}


@pytest.mark.parametrize("sites", SPLIT.values(), ids=SPLIT)
def test_parts_of_a_group_sum_to_its_gradients(sites, monkeypatch, device):
    """Of 4 heads with one key head; two runs have the same bits."""
    cases.require("triton", device)
    used = []
    monkeypatch.setattr(dkdv, "parts_of", lambda *_: used.append(2) or 2)
    sizes = testing.Sizes(heads=4, kv_heads=1, head_dim=16)
    call = cases.make("routed_attention", tokens=(1, 40), num_routes=2, sizes=sizes, device=device)
    call = call.with_sites(AttentionSites(**sites))
    call.assert_within_budget("triton")
    assert used
    first, second = (call.run("triton").gradients for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in "qkv")


def test_documents_of_different_lengths_begin_with_the_longest(monkeypatch, device):
    cases.require("triton", device)
    found = []
    original = attention_tiles.heaviest_first
    monkeypatch.setattr(
        attention_tiles, "heaviest_first", lambda counts: found.append(counts) or original(counts)
    )
    sizes = testing.Sizes(heads=2, kv_heads=1, head_dim=16)
    call = cases.make("routed_attention", tokens=(1, 300), sizes=sizes, sites=(), documents=3, device=device)
    call.assert_within_budget("triton")
    of_keys, of_queries = (counts.flatten().tolist() for counts in found)
    assert len(set(of_keys)) > 1
    assert len(set(of_queries)) > 1
    assert found[0].flatten()[original(found[0])].tolist() == sorted(of_keys, reverse=True)


ON_HOPPER = {
    "window": {"window": 90},
    "padding": {"padding": 7, "causal": False},
    "documents": {"documents": 3, "sites": ("heads", "key", "value")},
    "edges": {"sites": ("score_edges", "value_edges")},
    "binary edges": {"sites": ("score_edges", "value_edges"), "tables": "blocks"},
    "binary edges and padding": {"sites": ("score_edges", "value_edges"), "tables": "blocks", "padding": 7},
    "binary edges of scores and masks": {"sites": ("score_edges", "heads"), "tables": "blocks"},
    "binary edges and masks": {"sites": ("score_edges", "value_edges", "heads", "value"), "tables": "blocks"},
    "weights": {"sites": ("heads", "forward_heads", "key", "value"), "strength": "token"},
}


@pytest.mark.parametrize("call", ON_HOPPER.values(), ids=ON_HOPPER)
def test_kernels_for_hopper_test_only_tiles_that_are_not_seen_whole(call, monkeypatch, device):
    """150 tokens have tiles of both kinds, and last ones that are not full."""
    cases.require("triton", device)
    monkeypatch.setattr(dkdv, "_is_hopper", lambda call: True)
    sizes = testing.Sizes(heads=2, kv_heads=1, head_dim=16)
    options = {"sites": ()} | call
    cases.make(
        "routed_attention", tokens=(1, 150), sizes=sizes, device=device, **options
    ).assert_within_budget("triton")


@pytest.mark.parametrize("is_hopper", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_one_table_for_scores_and_values_is_tested_once(is_hopper, dtype, weight, monkeypatch, device):
    """Ids in runs, so that some tiles have all edges, some have none and others have a part of them."""
    cases.require("triton", device)
    monkeypatch.setattr(dkdv, "_is_hopper", lambda call: is_hopper)
    same, original = [], dkdv.launch
    monkeypatch.setattr(
        dkdv, "launch", lambda *args, **given: same.append(given["SAME_EDGES"]) or original(*args, **given)
    )
    sizes = testing.Sizes(heads=2, kv_heads=1, head_dim=16)
    call = cases.make(
        "routed_attention", tokens=(1, 200), num_routes=3, sizes=sizes, sites=(), dtype=dtype, device=device
    )
    edges = torch.tensor([[1.0, weight, 1.0], [1.0, 1.0, weight], [weight, 1.0, 1.0]], device="cpu")
    ids = (torch.arange(200, device=device) // 70).expand(1, 200)
    call = call.with_routes(Routes.of(ids, 3)).with_sites(
        AttentionSites(score_edges=edges, value_edges=edges.clone())
    )
    call.assert_within_budget("triton")
    assert same == [is_hopper and weight == 0]
