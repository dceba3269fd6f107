"""Attention's Triton kernels leave out exactly the tiles without weight, by lists that are made on the device."""

import itertools

import cases
import pytest
import torch

from gradroute import AttentionSites, Routes, backends, testing
from gradroute.primitives.attention_edges import TileBits
from gradroute.primitives.attention_pattern import Pattern

attention_tiles = pytest.importorskip("gradroute.kernels.attention.tiles")


@pytest.fixture
def lists(monkeypatch):
    """The lists of every attention_tiles_kernel that runs: its arguments, after it ran."""
    found = []
    launch = attention_tiles.launch

    def recorded(kernel, grid, config, **arguments):
        launch(kernel, grid, config, **arguments)
        if kernel is attention_tiles.attention_tiles_kernel:
            found.append(arguments)

    monkeypatch.setattr(attention_tiles, "launch", recorded)
    return found


def runs(length, lengths, num_routes, device):
    """ids `[1, length]` in runs of some lengths, route after route."""
    ids = torch.arange(len(lengths)).remainder(num_routes).repeat_interleave(torch.tensor(lengths))
    assert len(ids) == length
    return Routes.of(ids[None].to(device), num_routes)


def make(sites, device, causal=True, window=None, heads=2, kv_heads=1, **options):
    """A call on 300 tokens in runs of three routes, longer and shorter than a tile."""
    sizes = testing.Sizes(heads=heads, kv_heads=kv_heads, head_dim=16)
    options |= {"tokens": (1, 300), "sizes": sizes, "causal": causal, "window": window, "device": device}
    call = cases.make("routed_attention", **options)
    routes = runs(300, [130, 70, 20, 5, 75], 3, device)
    return call.with_routes(routes).with_sites(AttentionSites(**sites))


def seen_pairs(call):
    """Which keys each query sees, bool `[S, S]`."""
    far = torch.arange(300)[:, None] - torch.arange(300)
    seen = far >= 0 if call.keywords["causal"] else torch.ones_like(far, dtype=torch.bool)
    window = call.keywords["window"]
    return seen if window is None else seen & (far.abs() < window)


def tiles_with(pairs, rows, cols):
    """Which tiles of rows × cols have any of the pairs `[S, S]`, bool."""
    padded = torch.nn.functional.pad(pairs, (0, -pairs.shape[1] % cols, 0, -len(pairs) % rows))
    return padded.unflatten(1, (-1, cols)).unflatten(0, (-1, rows)).any(3).any(1)


def by_tiles(pairs):
    """Which pairs `[S, S]` are in pairs of tiles of TILE tokens with any of them."""
    coarse = tiles_with(pairs, attention_tiles.TILE, attention_tiles.TILE)
    length = len(pairs)
    for axis in range(2):
        coarse = coarse.repeat_interleave(attention_tiles.TILE, axis)
    return coarse[:length, :length]


def work(call, tables, rows, cols, by_key=False):
    """The lists of each tile of rows: of the tiles of cols with a pair that is seen and has an edge in any of tables.

    Two lists: the tiles that need no test, since every pair is seen and every edge in all tables is 1; and the others.
    Routes are known by tiles of TILE tokens.
    """
    seen = seen_pairs(call)
    has_edge, tested = seen | True, ~seen
    if tables:
        edges = torch.stack([edges_of(call, table) for table in tables])
        has_edge, tested = by_tiles((edges != 0).any(0)), tested | by_tiles((edges != 1).any(0))
    if by_key:
        seen, has_edge, tested = seen.T, has_edge.T, tested.T
    # Tiles of cols beyond the last token are tested: not all of their tokens exist.
    tested = tiles_with(torch.nn.functional.pad(tested, (0, -len(seen) % cols), value=True), rows, cols)
    some = tiles_with(seen, rows, cols) & tiles_with(has_edge, rows, cols)
    return [
        [row.nonzero()[:, 0].tolist() for row in two]
        for two in zip(some & ~tested, some & tested, strict=True)
    ]


def listed(arguments):
    """The lists `[lists][owners]` of a batch of one, each in two parts: tiles that need no test, and the others."""
    counts, whole_counts = arguments["counts"][0].cpu(), arguments["whole_counts"][0].cpu()
    tiles = arguments["tiles"].cpu().unflatten(0, counts.shape)
    return [
        [[own[:whole].tolist(), own[whole:n].tolist()] for own, n, whole in zip(*head, strict=True)]
        for head in zip(tiles, counts, whole_counts, strict=True)
    ]


EDGES = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 0.0, 1.0]])


def edges_of(call, table):
    """The edges `[S, S]` of a table, by query and key."""
    ids = call.routes.ids.cpu().long()
    return table[ids][:, ids]


@pytest.mark.parametrize(("causal", "window"), [(True, None), (False, None), (True, 90), (False, 40)])
def test_pairs_of_tiles_without_an_edge_are_left_out(causal, window, lists, device):
    cases.require("triton", device)
    call = make({"score_edges": EDGES, "value_edges": EDGES.T.contiguous()}, device, causal, window)
    call.assert_within_budget("triton")
    of_keys, of_queries = lists
    assert (of_keys["BY_KEY"], of_queries["BY_KEY"]) == (True, False)
    blocks = of_keys["BLOCK_K"], of_keys["BLOCK_Q"]
    expected = work(call, [EDGES, EDGES.T], *blocks, by_key=True)
    assert listed(of_keys) == [expected]
    assert window or expected != work(call, [], *blocks, by_key=True)
    blocks = of_queries["BLOCK_Q"], of_queries["BLOCK_K"]
    expected = work(call, [EDGES], *blocks)
    assert listed(of_queries) == [expected]
    assert all(any(part) for part in zip(*expected, strict=True))  # tiles that are tested, and others


def test_tiles_with_an_edge_other_than_one_are_tested(lists, device):
    cases.require("triton", device)
    edges = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.5, 0.0], [1.0, 0.0, 1.0]])
    call = make({"score_edges": edges}, device, causal=False)
    call.assert_within_budget("triton")
    (of_queries,) = lists
    expected = work(call, [edges], of_queries["BLOCK_Q"], of_queries["BLOCK_K"])
    assert listed(of_queries) == [expected]
    assert all(any(part) for part in zip(*expected, strict=True))


def test_every_tile_is_tested_where_keys_are_padding(lists, device):
    cases.require("triton", device)
    make({"score_edges": EDGES}, device, causal=False, padding=7).run("triton")
    ((own,),) = [listed(arguments) for arguments in lists]
    assert any(tested for _, tested in own)
    assert not any(whole for whole, _ in own)


def test_an_edge_that_may_be_anywhere_leaves_out_nothing(lists, device):
    """Without value edges every value learns."""
    cases.require("triton", device)
    make({"score_edges": EDGES}, device).assert_within_budget("triton")
    assert [arguments["BY_KEY"] for arguments in lists] == [False]
    lists.clear()
    make({"value_edges": EDGES}, device).assert_within_budget("triton")
    assert lists == []


@pytest.mark.parametrize("with_edge", [False, True])
def test_tiles_of_queries_whose_heads_learn_nothing_are_left_out(with_edge, lists, device):
    """By head: of head 0 no token learns, of head 1 those of route 0, of head 2 all, of head 3 those of route 1."""
    cases.require("triton", device)
    heads = torch.tensor([[0.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.5, 1.0], [0.0, 0.0, 1.0, 0.0]])
    sites = {"heads": heads}
    if with_edge:
        sites |= {"score_edges": EDGES, "value_edges": EDGES}
    call = make(sites, device, heads=4, kv_heads=2)
    call.assert_within_budget("triton")
    of_keys = lists[0]
    blocks = of_keys["BLOCK_K"], of_keys["BLOCK_Q"]
    found = work(call, [EDGES] if with_edge else [], *blocks, by_key=True)
    ids, expected = call.routes.ids.cpu().long(), []
    for kv_head in range(2):
        own = [[[], []] for _ in found]
        for member in range(2):
            learns = heads[ids, 2 * kv_head + member] != 0
            live = [bool(tile.any()) for tile in learns.split(of_keys["BLOCK_Q"])]
            for owner, part in itertools.product(range(len(found)), range(2)):
                listed_here = [tile for tile in found[owner][part] if live[tile]]
                own[owner][part] += [(member << of_keys["tile_bits"]) + tile for tile in listed_here]
        expected.append(own)
    assert listed(of_keys) == expected


@pytest.mark.parametrize("site", ["heads", "forward_heads"])
def test_heads_that_learn_nothing_have_gradients_of_exactly_zero(site, device):
    """Whatever arrives, and without reading it."""
    cases.require("triton", device)
    call = make({site: torch.tensor([[0.0, 1.0]] * 3)}, device)
    upstream = call.upstream.clone()
    upstream[:, ::2] = torch.nan
    result = call.with_upstream(upstream).run("triton")
    assert not result.gradients["q"][:, ::2].any()
    assert all(gradient.isfinite().all() for gradient in result.gradients.values())
    if site == "forward_heads":
        assert not result.output[:, ::2].any()


def test_keys_that_learn_nothing_have_gradients_of_exactly_zero(device):
    cases.require("triton", device)
    zero = torch.tensor([[1.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    call = make({"key": zero, "value": zero}, device, kv_heads=2)
    result = call.run("triton")
    testing.assert_result_within_budget(
        result, call.in_float64().run("reference"), call.run_plain(), "triton"
    )
    ids = call.routes.ids
    for route, head in ((1, 0), (2, 1)):
        for name in "kv":
            assert not result.gradients[name][0, head, ids == route].any()


def test_lists_are_made_once_a_batch(monkeypatch, device):
    """Lists that depend on ids and tables alone are kept with the routes, for the other layers."""
    cases.require("triton", device)
    made = []
    original = TileBits.of.__globals__["_tile_bits"]
    monkeypatch.setitem(
        TileBits.of.__globals__, "_tile_bits", lambda *args: made.append(1) or original(*args)
    )
    call = cases.make("routed_attention", tokens=5, device=device)
    for _ in range(2):
        call.run("triton")
    # One list of both tables, for the keys' gradients; one of the scores' alone, for the queries'.
    assert len(made) == 2


@pytest.mark.parametrize(
    ("levels", "num_routes"), list(itertools.product(("binary", "levels", "gather"), (2, 33, 64)))
)
def test_every_way_to_read_edges(levels, num_routes, device):
    """Bits of int32 and of int64; several values; too many of them."""
    cases.require("triton", device)
    generator = torch.Generator().manual_seed(0)
    table = torch.randint(0, 2, (num_routes, num_routes), generator=generator).float()
    if levels == "levels":
        table *= torch.randint(1, 4, table.shape, generator=generator) / 2
    if levels == "gather":
        table = torch.randn(table.shape, generator=generator)
    sizes = testing.Sizes(heads=2, kv_heads=1, head_dim=16)
    call = cases.make("routed_attention", tokens=(2, 70), num_routes=num_routes, sizes=sizes, device=device)
    sites = AttentionSites(score_edges=table, value_edges=table.T.contiguous())
    call.with_sites(sites).assert_within_budget("triton")


@pytest.mark.gpu
def test_batches_of_more_heads_than_a_grid_has_rows():
    """65535 is the limit of all dimensions of a grid of CUDA but the first."""
    sizes = testing.Sizes(heads=8, kv_heads=8, head_dim=16)
    call = cases.make(
        "routed_attention", tokens=(9000, 3), sizes=sizes, sites=("heads", "query"), device="cuda"
    )
    call.assert_within_budget("triton")


def test_triton_is_a_backend_of_attention():
    assert "triton" in backends.OPS["routed_attention"]


@pytest.mark.parametrize("heads_at_once", [1, 2, 3])
def test_the_forward_takes_the_heads_in_any_portions(heads_at_once, monkeypatch, device):
    """Every tile of queries of every head is computed once, in whichever order."""
    cases.require("triton", device)
    sizes = testing.Sizes(heads=3, kv_heads=3, head_dim=16)
    call = testing.sample("routed_attention", tokens=(1, 70), sizes=sizes, device=device)
    expected = call.call(call.tensors, "triton")
    forward = pytest.importorskip("gradroute.kernels.attention.forward")
    row = 2 * 16 * call.upstream.element_size()
    monkeypatch.setattr(forward, "CACHE_BYTES", heads_at_once * 70 * row)
    assert torch.equal(call.call(call.tensors, "triton"), expected)


@pytest.mark.parametrize("head_dim", [8, 64, 100, 128, 240, 256])
def test_masked_forwards_have_tiles_no_larger_than_plain_ones(head_dim):
    """On sm_90, in every dtype: masks need registers."""
    forward = pytest.importorskip("gradroute.kernels.attention.forward")
    kernels = pytest.importorskip("gradroute.backends.triton")
    plain = forward.ForwardArguments(None, None, None, Pattern(True, None, 1.0), None)
    masked = plain._replace(documents=torch.empty(2, 8, dtype=torch.int32, device="meta"))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        q = torch.empty(1, 2, 8, head_dim, dtype=dtype, device="meta")
        with kernels.record(90):
            sizes = [forward.forward_config(call, q)["BLOCK_K"] for call in (masked, plain)]
        assert sizes[0] <= sizes[1]
        assert head_dim != 128 or dtype == torch.float32 or sizes == [64, 128]


@pytest.mark.parametrize(
    ("tokens", "all_bytes", "bytes_at_once"),
    [(2**17, 134_217_728, 67_043_328), (2**20, 17_179_869_184, 242_221_056)],
)
def test_memory_of_lists_is_linear_in_tokens(tokens, all_bytes, bytes_at_once):
    """Of dK and dV with masked heads: 32 with 8 of keys, at 128k and at 1M tokens, on an H200."""
    heads, kv_heads, block_q, block_k = 32, 8, 64, 128
    members, others = heads // kv_heads, tokens // block_q
    list_bytes = members * others * attention_tiles.item_type(members, others).itemsize
    num_lists = kv_heads * tokens // block_k
    at_once = attention_tiles.lists_at_once(num_lists, list_bytes, heads * tokens, 132)
    assert (num_lists * list_bytes, at_once * list_bytes) == (all_bytes, bytes_at_once)
    assert bytes_at_once <= max(attention_tiles.MIN_BYTES, attention_tiles.BYTES_PER_QUERY * heads * tokens)


def test_lists_that_fit_are_made_in_one_launch_and_one_that_does_not_is_alone():
    assert attention_tiles.lists_at_once(0, 0, 0, 132) == 0
    assert attention_tiles.lists_at_once(1024, 4096, 2**20, 132) == 1024
    assert attention_tiles.lists_at_once(1024, 2**20, 0, 132) == 64
    assert attention_tiles.lists_at_once(2, 2**30, 0, 132) == 1


HEADS = {"heads": torch.tensor([[0.0, 1.0], [1.0, 0.5], [0.0, 1.0]])}
BOTH_EDGES = {"score_edges": EDGES, "value_edges": EDGES}
LISTED = {"both": HEADS | BOTH_EDGES, "heads": HEADS, "edges": BOTH_EDGES}


@pytest.mark.parametrize("sites", cases.tiered(list(LISTED)))
def test_lists_in_portions_give_the_same_bits(sites, lists, monkeypatch, device):
    """Of two batch elements: each launch has two lists at most, and all have them in the same memory."""
    cases.require("triton", device)
    sizes = testing.Sizes(heads=2, kv_heads=1, head_dim=16)
    call = cases.make("routed_attention", tokens=(2, 100), num_routes=3, sizes=sizes, device=device)
    call = call.with_sites(AttentionSites(**LISTED[sites]))
    expected = call.run("triton").gradients
    num_lists = [arguments["counts"].numel() for arguments in lists]
    lists.clear()
    monkeypatch.setattr(attention_tiles, "lists_at_once", lambda *_: 2)
    found = call.run("triton").gradients
    assert all(torch.equal(found[name], expected[name]) for name in "qkv")
    portions = [arguments for arguments in lists if arguments["order"] is not None]
    assert sum(len(arguments["order"]) for arguments in portions) == sum(num_lists)
    assert all(len(arguments["tiles"]) == 2 for arguments in portions)
    assert len(portions) == sum(-(-number // 2) for number in num_lists) > len(num_lists)
