"""The bits by which kernels of attention know which tiles have edges, against the edges of all pairs of tokens."""

import pytest
import torch

from gradroute import AttentionSites, Routes
from gradroute.primitives.attention_edges import TILE, TileBits

pytest.importorskip("hypothesis")  # a machine that runs the GPU proof alone may lack it

from hypothesis import given, settings
from hypothesis import strategies as st


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(1, 3 * TILE + 1),
    num_routes=st.sampled_from([1, 2, 3, 33, 64]),
    most_tokens=st.integers(1, 2 * TILE),
    values=st.sampled_from([(0, 1), (1,), (0, 0.5, 1), (1, 2), (0,)]),
    seed=st.integers(0, 2**20),
)
def test_bits_of_tiles_say_where_edges_are_and_where_all_are_one(
    length, num_routes, most_tokens, values, seed
):
    """For one table and for two, of runs of up to `most_tokens` tokens of a route."""
    generator = torch.Generator().manual_seed(seed)
    runs = torch.randint(1, most_tokens + 1, (2 * length,), generator=generator)
    ids = torch.randint(num_routes, (2 * length,), generator=generator).repeat_interleave(runs)
    ids = ids[: 2 * length].view(2, length)
    picks = torch.randint(len(values), (2, num_routes, num_routes), generator=generator)
    weights = torch.tensor(values, dtype=torch.float32)[picks]
    sites = AttentionSites(score_edges=weights[0], value_edges=weights[1])
    routes = Routes.of(ids, num_routes)
    for names in (("score_edges",), ("score_edges", "value_edges")):
        bits = TileBits.of(routes, (2, length), *(sites.tables[name] for name in names))
        edges = weights[: len(names)].any(0), (weights[: len(names)] != 1).any(0)
        for of_queries, pairs in zip((bits.reach, bits.partial), edges, strict=True):
            found = (of_queries[:, :, None] & bits.present[:, None]) != 0
            for entry, own in enumerate(ids):
                tiles = [block.split(TILE, 1) for block in pairs[own][:, own].split(TILE)]
                assert found[entry].tolist() == [[bool(tile.any()) for tile in row] for row in tiles]
