"""Attention's Triton kernels leave out exactly the tiles without weight, by lists that are made on the device."""

import itertools

import cases
import pytest
import torch

from gradroute import AttentionSites, Routes, backends, testing
from gradroute.primitives.attention_edges import TileBits

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


def make(sites, device, causal=True, window=None, heads=2, kv_heads=1):
    """A call on 300 tokens in runs of three routes, longer and shorter than a tile."""
    sizes = testing.Sizes(heads=heads, kv_heads=kv_heads, head_dim=16)
    call = cases.make(
        "routed_attention", tokens=(1, 300), sizes=sizes, causal=causal, window=window, device=device
    )
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
    padded = torch.nn.functional.pad(pairs, (0, -len(pairs) % cols, 0, -len(pairs) % rows))
    return padded.unflatten(1, (-1, cols)).unflatten(0, (-1, rows)).any(3).any(1)


def work(call, edges, rows, cols, by_key=False):
    """The lists: for each tile of rows the tiles of cols with a pair that is seen, and with an edge.

    Routes are known by tiles of TILE tokens.
    """
    seen, pairs = seen_pairs(call), has_edge(call, edges)
    coarse = tiles_with(pairs, attention_tiles.TILE, attention_tiles.TILE)
    pairs = coarse.repeat_interleave(attention_tiles.TILE, 0).repeat_interleave(attention_tiles.TILE, 1)[
        :300, :300
    ]
    if by_key:
        seen, pairs = seen.T, pairs.T
    return [
        row.nonzero()[:, 0].tolist() for row in tiles_with(seen, rows, cols) & tiles_with(pairs, rows, cols)
    ]


def listed(arguments):
    """The lists `[lists][owners]` of a batch of one."""
    tiles, counts = arguments["tiles"][0].cpu(), arguments["counts"][0].cpu()
    return [
        [own[:n].tolist() for own, n in zip(*head, strict=True)] for head in zip(tiles, counts, strict=True)
    ]


EDGES = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 0.0, 1.0]])


def has_edge(call, edges):
    """Bool `[S, S]`, by query and key."""
    ids = call.routes.ids.cpu().long()
    return edges[ids][:, ids] != 0


@pytest.mark.parametrize(("causal", "window"), [(True, None), (False, None), (True, 90), (False, 40)])
def test_pairs_of_tiles_without_an_edge_are_left_out(causal, window, lists, device):
    cases.require("triton", device)
    call = make({"score_edges": EDGES, "value_edges": EDGES.T.contiguous()}, device, causal, window)
    call.assert_within_budget("triton")
    of_keys, of_queries = lists
    assert (of_keys["BY_KEY"], of_queries["BY_KEY"]) == (True, False)
    blocks = of_keys["BLOCK_K"], of_keys["BLOCK_Q"]
    expected = work(call, EDGES + EDGES.T, *blocks, by_key=True)
    assert listed(of_keys) == [expected]
    assert window or expected != work(call, torch.ones(3, 3), *blocks, by_key=True)
    blocks = of_queries["BLOCK_Q"], of_queries["BLOCK_K"]
    assert listed(of_queries) == [work(call, EDGES, *blocks)]


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
    found = work(call, EDGES if with_edge else torch.ones(3, 3), *blocks, by_key=True)
    tiles = len(range(0, 300, of_keys["BLOCK_Q"]))
    ids, expected = call.routes.ids.cpu().long(), []
    for kv_head in range(2):
        own = [[] for _ in found]
        for member in range(2):
            learns = heads[ids, 2 * kv_head + member] != 0
            live = [bool(tile.any()) for tile in learns.split(of_keys["BLOCK_Q"])]
            for owner, some in enumerate(found):
                own[owner] += [member * tiles + tile for tile in some if live[tile]]
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
