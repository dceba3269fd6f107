"""Properties over arbitrary shapes, ids and weights, found by hypothesis."""

import pytest
import torch

pytest.importorskip("hypothesis")  # a machine that runs the GPU proof alone may lack it

from hypothesis import given, settings
from hypothesis import strategies as st

from gradroute import Routes, Table, backends, testing
from gradroute.testing import assert_result_within_budget, sample


@settings(max_examples=60, deadline=None)
@given(
    op=st.sampled_from([op for op in backends.OPS if op != "routed_attention"]),
    tokens=st.lists(st.integers(0, 5), min_size=1, max_size=3).map(tuple),
    widths=st.tuples(st.integers(1, 19), st.integers(1, 19)),
    num_routes=st.integers(2, 6),
    strength=st.sampled_from(testing.STRENGTHS),
    tables=st.sampled_from(testing.TABLE_KINDS),
    gradient=st.sampled_from(testing.LAYOUTS),
    seed=st.integers(0, 9),
)
def test_any_shape_is_the_detach_idiom(op, tokens, widths, num_routes, strength, tables, gradient, seed):
    d_model, d_ff = widths
    if op.endswith("_norm"):
        d_model += 2  # the gradient of a norm of one or two features cancels to nothing but rounding
    call = sample(
        op,
        dtype=torch.float64,
        tokens=tokens,
        sizes=testing.Sizes(d_model, d_ff),
        num_routes=num_routes,
        strength=strength,
        tables=tables,
        gradient=gradient,
        seed=seed,
    )
    detached = call.run_detached()
    assert_result_within_budget(call.run("torch"), detached, detached, op)


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 2),
    length=st.integers(5, 9),
    heads=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    head_dim=st.integers(1, 5),
    causal=st.booleans(),
    window=st.none() | st.integers(3, 9),
    tables=st.sampled_from(("ones", "fractional", "negative", "dense")),
    seed=st.integers(0, 9),
)
def test_any_attention_is_the_detach_idiom(batch, length, heads, head_dim, causal, window, tables, seed):
    kv_heads, group = heads
    call = sample(
        "routed_attention",
        dtype=torch.float64,
        tokens=(batch, length),
        sizes=testing.Sizes(heads=kv_heads * group, kv_heads=kv_heads, head_dim=head_dim),
        tables=tables,
        seed=seed,
        causal=causal,
        window=window,
    )
    detached = call.run_detached()
    assert_result_within_budget(call.run("reference"), detached, detached, "routed_attention")


@given(ids=st.lists(st.integers(0, 6), max_size=40), num_routes=st.integers(7, 9))
def test_order_and_counts_of_routes(ids, num_routes):
    routes = Routes.of(torch.tensor(ids, dtype=torch.int64), num_routes)
    assert routes.order.tolist() == sorted(range(len(ids)), key=lambda token: ids[token])
    assert routes.order.dtype == routes.counts.dtype == torch.int32
    assert routes.counts.tolist() == [ids.count(route) for route in range(num_routes)]
    assert routes.host_counts == tuple(routes.counts.tolist())


@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 6)),
    start=st.integers(-7, 7),
    stop=st.integers(-7, 7),
    step=st.integers(1, 3),
)
def test_a_slice_of_routes_is_that_of_the_ids(shape, start, stop, step):
    ids, index = (
        torch.arange(24)[: shape[0] * shape[1]].view(shape) % 5,
        (slice(None), slice(start, stop, step)),
    )
    sliced, expected = (
        Routes.of(ids, 5, strength=ids / 5)[index],
        Routes.of(ids[index], 5, strength=ids[index] / 5),
    )
    assert sliced.shape == expected.shape
    for name in ("ids", "strength", "order", "counts"):
        assert torch.equal(getattr(sliced, name), getattr(expected, name)), name


@given(st.lists(st.lists(st.sampled_from([0.0, 1.0, 0.5]), min_size=7, max_size=7), min_size=1, max_size=3))
def test_segments_of_a_table_cover_what_is_not_one(weights):
    table = Table(weights)
    outside = torch.ones_like(table.weights, dtype=torch.bool)
    for start, stop in table.segments:
        assert (table.weights[:, start:stop] == table.weights[:, start : start + 1]).all()
        outside[:, start:stop] = False
    assert (table.weights[outside] == 1).all()
    assert table.density == pytest.approx((table.weights != 0).float().mean().item())
    assert table.binary == {0.0, 1.0}.issuperset({weight for row in weights for weight in row})
