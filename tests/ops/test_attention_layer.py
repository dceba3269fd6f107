"""RoutedAttention: the composition of routed linear layers and routed attention, and the detach idiom."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import cases
import pytest
import torch
import torch._dynamo.testing
from attention_layer_cases import (
    BATCH,
    D_MODEL,
    EVERY_BACKEND,
    FUNCTION_BACKENDS,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    ROUTES,
    SEQUENCE,
    LlamaAttention,
    all_sites,
    assert_same,
    assert_same_step,
    composed_by_hand,
    detached_by_hand,
    gradients,
    make_layer,
    random_input,
    random_routes,
    rotated,
)
from torch import Tensor

import gradroute
from gradroute import (
    AttentionSites,
    RoutedAttention,
    Routes,
    Table,
    backends,
    routed_attention,
    testing,
)
from gradroute.layers import children
from gradroute.tables import localize


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("backend", [None, *backends.OPS["routed_attention"]])
def test_is_the_composition_of_its_ops(backend: str | None, kv_heads: int, bias: bool) -> None:
    cases.require(backend, torch.device("cpu"))
    layer = make_layer(all_sites(kv_heads, bias), kv_heads, bias=bias, backend=backend)
    x, routes = random_input(), random_routes(strength=True)
    assert_same_step(layer(x, routes), composed_by_hand(layer, x, routes), x, *layer.parameters())


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@EVERY_BACKEND
def test_is_the_detach_idiom(backend: str, kv_heads: int, bias: bool) -> None:
    cases.require(backend, torch.device("cpu"))
    dtype = torch.float64 if torch.float64 in cases.dtypes(backend) else torch.float32
    layer = make_layer(all_sites(kv_heads, bias), kv_heads, bias=bias, backend=backend, dtype=dtype)
    x, routes = random_input(dtype), random_routes(strength=True)
    inputs = (x, *layer.parameters())
    got, expected = layer(x, routes), detached_by_hand(layer, x, routes)
    # Sums of some 50 products of order one, and softmax, rounded differently: some hundred eps.
    atol = 500 * torch.finfo(dtype).eps
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)
    torch.testing.assert_close(gradients(got, *inputs), gradients(expected, *inputs), rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("options", "keywords"),
    [
        ({"causal": False}, {}),
        ({"window": 3, "scale": 0.3}, {}),
        ({}, {"key_mask": torch.arange(SEQUENCE).expand(BATCH, -1) < 5}),
    ],
    ids=["not causal", "window and scale", "key_mask"],
)
def test_options_reach_attention(options: dict[str, Any], keywords: dict[str, Any]) -> None:
    layer, x, routes = make_layer(all_sites(), **options), random_input(), random_routes()
    expected = composed_by_hand(layer, x, routes, **options, **keywords)
    assert_same_step(layer(x, routes, **keywords), expected, x, *layer.parameters())
    assert not torch.equal(expected, make_layer(all_sites())(x, routes))


def test_documents_stay_apart() -> None:
    layer, x = make_layer(all_sites()), torch.randn(1, 9, D_MODEL)
    routes = Routes.of(torch.randint(ROUTES, (1, 9)), ROUTES)
    cu_seqlens = torch.tensor([0, 4, 9], dtype=torch.int32)
    got = layer(x, routes, cu_seqlens=cu_seqlens)
    assert_same(got, composed_by_hand(layer, x, routes, cu_seqlens=cu_seqlens))
    parts = [layer(x[:, part], routes[:, part]) for part in (slice(0, 4), slice(4, 9))]
    torch.testing.assert_close(got, torch.cat(parts, 1))  # sums over other numbers of keys round differently


def test_rotation_sees_queries_and_keys_by_head() -> None:
    layer, x, routes = make_layer(all_sites()), random_input(), random_routes()
    got = layer(x, routes, rotate=rotated)
    assert_same_step(got, composed_by_hand(layer, x, routes, rotated), x, *layer.parameters())
    assert not torch.equal(got, layer(x, routes))


@EVERY_BACKEND
def test_without_routes_or_sites_it_is_the_ordinary_layer(backend: str) -> None:
    cases.require(backend, torch.device("cpu"))
    ordinary, x, routes = LlamaAttention(), random_input(), random_routes()
    inputs = (x, *ordinary.parameters())
    layer, without_sites = (
        RoutedAttention.from_projections(ordinary, HEADS, KV_HEADS, sites, backend=backend)
        for sites in (all_sites(), None)
    )
    expected = ordinary(x)
    expected_gradients = gradients(expected, *inputs)
    for got in (layer(x), layer(x, None), without_sites(x, routes)):
        assert_same(got, layer(x))
        # Two implementations of attention in fp32; PyTorch's own tolerances.
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(gradients(got, *inputs), expected_gradients)


@EVERY_BACKEND
def test_sites_of_gradients_change_no_forward_bit(backend: str) -> None:
    cases.require(backend, torch.device("cpu"))
    sites = {name: table for name, table in all_sites().tables.items() if name != "forward_heads"}
    layer, x = make_layer(AttentionSites(**sites), backend=backend), random_input()
    assert_same(layer(x, random_routes()), layer(x))


def test_flat_ids() -> None:
    layer, x, routes = make_layer(all_sites()), random_input(), random_routes(strength=True)
    assert_same_step(layer(x, routes.reshape(-1)), layer(x, routes), x, *layer.parameters())


def test_update_fills_what_is_not_given() -> None:
    update, other = (testing.make_table("dense", ROUTES, HEADS, seed) for seed in range(2))
    x, routes = random_input(), random_routes()
    layer = make_layer(AttentionSites(update=update), HEADS)
    twin = copy.deepcopy(layer)
    for given in ({}, {"update_q": other}, {"update_kv": other}, {"update_out": other}):
        layer.sites = AttentionSites(update=update, **given)
        twin.sites = AttentionSites(**dict.fromkeys(("update_q", "update_kv", "update_out"), update) | given)
        got, expected = layer(x, routes), composed_by_hand(twin, x, routes)
        assert_same(got, expected)
        assert_same(gradients(got, *layer.parameters()), gradients(expected, *twin.parameters()))


def test_update_by_group_beside_update_of_keys() -> None:
    update, update_kv = (testing.make_table("dense", ROUTES, width) for width in (HEADS, KV_HEADS))
    layer, x, routes = (
        make_layer(AttentionSites(update=update, update_kv=update_kv)),
        random_input(),
        random_routes(),
    )
    twin = copy.deepcopy(layer)
    twin.sites = AttentionSites(update_q=update, update_kv=update_kv, update_out=update)
    got, expected = layer(x, routes), composed_by_hand(twin, x, routes)
    assert_same(gradients(got, *layer.parameters()), gradients(expected, *twin.parameters()))


def test_tables_of_one_column_stay_so() -> None:
    """Tables of one column are not expanded: a column for all features is the cheapest mask."""
    one = Table([[1.0], [0.0], [0.5]])
    layer = make_layer(AttentionSites(update_q=one, update_kv=one, update_out=one, query=one))
    held = {table for sites in layer._op_sites for table in sites.tables.values()}
    assert held == {one}
    x, routes = random_input(), random_routes()
    assert_same_step(layer(x, routes), composed_by_hand(layer, x, routes), x, *layer.parameters())


def confined(heads: int) -> Table:
    """Tokens of route 1 train the last half of the heads."""
    return localize(ROUTES, heads, {1: slice(heads // 2, None)})


def test_a_step_changes_what_the_sites_allow() -> None:
    sites = AttentionSites(
        update=confined(HEADS),
        update_kv=confined(KV_HEADS),
        update_output_bias=localize(ROUTES, D_MODEL, {1: [0]}),
    )
    layer = make_layer(sites, bias=True)
    before = copy.deepcopy(layer.state_dict())
    routes = Routes.of(torch.ones(BATCH, SEQUENCE, dtype=torch.int64), ROUTES)
    layer(random_input(), routes).pow(3).sum().backward()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter -= 0.5 * parameter.grad
    q_half, kv_half = (heads * HEAD_DIM // 2 for heads in (HEADS, KV_HEADS))
    untouched = {
        "q_proj.weight": slice(q_half),
        "q_proj.bias": slice(q_half),
        "k_proj.weight": slice(kv_half),
        "v_proj.weight": slice(kv_half),
        "v_proj.bias": slice(kv_half),
        "o_proj.weight": (slice(None), slice(q_half)),
        "o_proj.bias": slice(1, None),
    }
    for name, where in untouched.items():
        allowed = torch.ones_like(before[name], dtype=torch.bool)
        allowed[where] = False
        assert_same(layer.state_dict()[name] != before[name], allowed)
    # A bias of the keys moves all scores of a query alike: its gradient is 0 but for rounding.
    assert_same(layer.k_proj.bias.grad[:kv_half], torch.zeros(kv_half))


def test_backend_reaches_the_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for module, name in ((children, "routed_linear"), (gradroute.layers.attention, "routed_attention")):
        monkeypatch.setattr(module, name, recorded(getattr(gradroute, name), seen, "backend"))
    make_layer(all_sites(), backend="reference")(random_input(), random_routes())
    assert seen == ["reference"] * 5


def recorded(function: Callable[..., Any], seen: list[Any], argument: str) -> Callable[..., Any]:
    """`function`, which notes the value of one argument of every call."""

    def recording(*positional: Any, **keywords: Any) -> Any:
        seen.append(inspect.signature(function).bind(*positional, **keywords).arguments[argument])
        return function(*positional, **keywords)

    return recording


def test_dropout_in_training_only(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []

    def attention(q: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        seen.append(inspect.signature(routed_attention).bind(q, *arguments, **keywords).arguments["dropout"])
        return q

    monkeypatch.setattr(gradroute.layers.attention, "routed_attention", attention)
    layer, x = make_layer(dropout=0.25), random_input()
    layer(x)
    layer.eval()(x)
    layer.train()(x)
    assert seen == [0.25, 0.0, 0.25]


class Cache:
    """Keys and values so far, as a cache of transformers returns them from `update`."""

    def __init__(self) -> None:
        self.stored: list[tuple[Tensor, Tensor]] = []

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.stored.append((k, v))
        keys, values = zip(*self.stored, strict=True)
        return torch.cat(keys, 2), torch.cat(values, 2)


@pytest.mark.parametrize("routed", [False, True], ids=["unrouted", "routed"])
@EVERY_BACKEND
def test_a_cache_gives_the_last_rows(backend: str, routed: bool) -> None:
    cases.require(backend, torch.device("cpu"))
    layer, x = make_layer(all_sites(), backend=backend).eval(), random_input()
    routes = random_routes() if routed else None
    key_mask = torch.ones(BATCH, SEQUENCE, dtype=torch.bool)
    key_mask[1, 0] = False
    with torch.no_grad():
        whole = layer(x, routes, key_mask=key_mask)
        cache, rows = Cache(), []
        for start, stop in itertools.pairwise((0, 4, 6, 7)):
            new = None if routes is None else routes[:, start:stop]
            rows.append(layer(x[:, start:stop], new, cache=cache.update, key_mask=key_mask[:, :stop]))
    # Sums over other numbers of keys round differently, in fp32.
    torch.testing.assert_close(torch.cat(rows, 1), whole)


def test_no_tokens() -> None:
    layer, x = make_layer(all_sites()), torch.zeros(BATCH, 0, D_MODEL)
    y = layer(x, Routes.of(torch.zeros(BATCH, 0, dtype=torch.int64), ROUTES))
    assert y.shape == (BATCH, 0, D_MODEL)
    assert not any(gradient.any() for gradient in gradients(y, *layer.parameters()))


# Dynamo warns so whenever it traces an autograd.Function.
DYNAMO = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@DYNAMO
@pytest.mark.parametrize("backend", cases.tiered(FUNCTION_BACKENDS))
def test_compiled(backend: str) -> None:
    """One graph for all ids, and new sites take effect."""
    cases.require(backend, torch.device("cpu"))
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    layer = make_layer(all_sites(), backend=backend)
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    x, parameters = random_input(), list(layer.parameters())
    results, batches = [], [random_routes() for _ in range(3)]
    for routes in batches:
        got, expected = compiled(x, routes, rotate=rotated), layer(x, routes, rotate=rotated)
        results.append(gradients(got, x, *parameters))
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(results[-1], gradients(expected, x, *parameters))
    assert counter.frame_count == 1
    for one, other in itertools.pairwise(results):
        assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))

    layer.sites = AttentionSites(heads=torch.zeros(ROUTES, 1))
    *inner, output = gradients(compiled(x, routes, rotate=rotated), x, *parameters)
    assert not any(gradient.any() for gradient in inner)
    assert output.any()
