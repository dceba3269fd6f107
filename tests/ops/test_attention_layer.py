"""RoutedAttention: the composition of routed linear layers and routed attention, its hooks, and its sites' moves."""

from __future__ import annotations

import copy
import inspect
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import cases
import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor, nn

import gradroute
from gradroute import (
    AttentionSites,
    LinearSites,
    RoutedAttention,
    Routes,
    Table,
    backends,
    routed_attention,
    routed_linear,
    testing,
)
from gradroute.tables import localize

ROUTES, D_MODEL, HEADS, KV_HEADS, HEAD_DIM = 3, 12, 4, 2, 4
BATCH, SEQUENCE = 2, 7
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")

EVERY_BACKEND = pytest.mark.parametrize("backend", backends.OPS["routed_attention"])
FUNCTION_BACKENDS = [name for name in backends.OPS["routed_attention"] if name != "reference"]


class LlamaAttention(nn.Module):
    """As in Llama, less the rotation."""

    def __init__(self, bias: bool = False, kv_heads: int = KV_HEADS) -> None:
        super().__init__()
        self.q_proj = nn.Linear(D_MODEL, HEADS * HEAD_DIM, bias)
        self.k_proj, self.v_proj = (nn.Linear(D_MODEL, kv_heads * HEAD_DIM, bias) for _ in range(2))
        self.o_proj = nn.Linear(HEADS * HEAD_DIM, D_MODEL, bias)

    def forward(self, x: Tensor) -> Tensor:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (linear(x).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for linear in projections)
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(z.transpose(1, 2).flatten(2))


def all_sites(kv_heads: int = KV_HEADS, bias: bool = False) -> AttentionSites:
    """Every site that a layer of these numbers of heads has, each another table of {0, 1, 0.5, -0.75}."""
    widths = {
        **dict.fromkeys(("query", "heads", "forward_heads", "update_q", "update_out"), HEADS),
        **dict.fromkeys(("key", "value", "update_kv"), kv_heads),
        **dict.fromkeys(("score_edges", "value_edges"), ROUTES),
        **({"update_output_bias": D_MODEL} if bias else {}),
    }
    return AttentionSites(
        **{
            name: testing.make_table("dense", ROUTES, width, seed)
            for seed, (name, width) in enumerate(widths.items())
        }
    )


def make_layer(sites: Any = None, kv_heads: int = KV_HEADS, **options: Any) -> RoutedAttention:
    return RoutedAttention(
        D_MODEL, HEADS, kv_heads, HEAD_DIM, sites=sites, **{"backend": "reference"} | options
    )


def random_routes(strength: bool = False) -> Routes:
    ids = torch.randint(ROUTES, (BATCH, SEQUENCE))
    return Routes.of(ids, ROUTES, strength=torch.rand(BATCH, SEQUENCE) if strength else None)


def random_input(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(BATCH, SEQUENCE, D_MODEL, dtype=dtype).requires_grad_()


def rotated(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """RoPE as in Llama, for positions from 0."""

    def turn(x: Tensor) -> Tensor:  # [B, heads, S, D]
        length, width = x.shape[2:]
        frequencies = 10_000.0 ** (-torch.arange(0, width, 2) / width)
        angles = torch.outer(torch.arange(length), frequencies).repeat(1, 2).to(x.dtype)
        first, second = x.chunk(2, dim=-1)
        return x * angles.cos() + torch.cat((-second, first), dim=-1) * angles.sin()

    return turn(q), turn(k)


def by_head(x: Tensor) -> Tensor:  # [B, S, heads * D] → [B, heads, S, D]
    return x.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)


def by_feature(table: Any) -> Table | None:
    """A table by head, for the features of the heads; a `[R, 1]` one is for all."""
    if table is None:
        return None
    return Table(table.weights if table.features == 1 else table.weights.repeat_interleave(HEAD_DIM, 1))


def attention_sites_of(sites: AttentionSites) -> AttentionSites:
    return AttentionSites(
        **{name: table for name, table in sites.tables.items() if not name.startswith("update")}
    )


def composed_by_hand(
    layer: Any, x: Tensor, routes: Routes, rotate: Any = lambda q, k: (q, k), **keywords: Any
) -> Tensor:
    """What the layer is to be, by its ops; its sites name each of update_q, update_kv and update_out."""
    sites = layer.sites

    def linear(name: str, inputs: Tensor, linear_sites: LinearSites) -> Tensor:
        module = getattr(layer, name)
        return routed_linear(inputs, module.weight, module.bias, routes, linear_sites, backend=layer.backend)

    of_keys = LinearSites(update_rows=by_feature(sites.update_kv))
    q = by_head(linear("q_proj", x, LinearSites(update_rows=by_feature(sites.update_q))))
    k, v = (by_head(linear(name, x, of_keys)) for name in ("k_proj", "v_proj"))
    q, k = rotate(q, k)
    z = routed_attention(q, k, v, routes, attention_sites_of(sites), **keywords, backend=layer.backend)
    of_output = LinearSites(update_cols=by_feature(sites.update_out), update_bias=sites.update_output_bias)
    return linear("o_proj", z.transpose(1, 2).flatten(2), of_output)


def detached_by_hand(layer: Any, x: Tensor, routes: Routes) -> Tensor:
    """The same by the detach idiom, every token with its own copy of every parameter."""
    sites, marks = layer.sites, testing.Marks(routes, layer.sites.tables, copies=True)

    def linear(name: str, inputs: Tensor, **routed: Any) -> Tensor:
        module = getattr(layer, name)
        return marks.linear(inputs, module.weight, module.bias, **routed)

    q_rows, kv_rows = by_feature(sites.update_q), by_feature(sites.update_kv)
    q = by_head(linear("q_proj", x, rows=q_rows, bias_rows=q_rows))
    k, v = (by_head(linear(name, x, rows=kv_rows, bias_rows=kv_rows)) for name in ("k_proj", "v_proj"))
    z = testing.OPS["routed_attention"].formula(marks, q, k, v).transpose(1, 2).flatten(2)
    return linear("o_proj", z, cols=by_feature(sites.update_out), bias_rows=sites.update_output_bias)


def gradients(output: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    return torch.autograd.grad(output, inputs, torch.randn_like(output))


def assert_same(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def assert_same_step(got: Tensor, expected: Tensor, *inputs: Tensor) -> None:
    """The same bits in the output, and in the gradients of all inputs."""
    assert_same(got, expected)
    assert_same(gradients(got, *inputs), gradients(expected, *inputs))


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
    """They are not expanded: a column for all features is the cheapest mask."""
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
    for name in ("routed_linear", "routed_attention"):
        monkeypatch.setattr(
            gradroute.layers.attention, name, recorded(getattr(gradroute, name), seen, "backend")
        )
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


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_state_dict_is_that_of_llama(bias: bool) -> None:
    ordinary, other = LlamaAttention(bias), LlamaAttention(bias)
    layer = make_layer(all_sites(bias=bias), bias=bias)
    assert list(layer.state_dict()) == list(ordinary.state_dict())
    layer.load_state_dict(ordinary.state_dict())
    other.load_state_dict(layer.state_dict())
    assert_same(dict(other.state_dict()), dict(ordinary.state_dict()))


def test_the_ordinary_constructor() -> None:
    layer = RoutedAttention(D_MODEL, 3)
    shapes = {name: list(parameter.shape) for name, parameter in layer.named_parameters()}
    assert shapes == {f"{name}.weight": [D_MODEL, D_MODEL] for name in PROJECTIONS}
    assert (layer.heads, layer.kv_heads, layer.head_dim) == (3, 3, 4)
    layer = RoutedAttention(D_MODEL, 6, 2, head_dim=5, dtype=torch.bfloat16)
    assert layer.k_proj.weight.shape == (10, D_MODEL)
    assert layer.o_proj.weight.shape == (D_MODEL, 30)
    assert layer.o_proj.weight.dtype == torch.bfloat16


def test_the_text() -> None:
    layer = make_layer(AttentionSites(query=torch.zeros(2, 1)), window=8)
    assert layer.extra_repr() == (
        "heads=4, kv_heads=2, head_dim=4, causal=True, window=8, scale=None, dropout=0.0, "
        "sites=AttentionSites(query=Table([2, 1], blocks)), backend='reference'"
    )


def test_from_projections_shares_parameters() -> None:
    ordinary = LlamaAttention().to(torch.float16).eval()
    ordinary.q_proj.weight.requires_grad_(False)
    ordinary.register_forward_hook(lambda *_: 1 / 0)
    random_state, sites = torch.get_rng_state(), all_sites()
    layer = RoutedAttention.from_projections(
        ordinary, HEADS, KV_HEADS, sites, causal=False, window=3, scale=0.5, dropout=0.1, backend="reference"
    )
    assert_same(torch.get_rng_state(), random_state)
    mine, theirs = dict(layer.named_parameters()), dict(ordinary.named_parameters())
    assert list(mine) == list(theirs)
    assert all(mine[name] is theirs[name] for name in theirs)
    assert not layer.q_proj.weight.requires_grad
    assert not layer.training
    assert not layer._forward_hooks
    assert layer.sites is sites
    options = (layer.causal, layer.window, layer.scale, layer.dropout, layer.backend)
    assert options == (False, 3, 0.5, 0.1, "reference")


def test_from_projections_keeps_names() -> None:
    ordinary = nn.ModuleDict({name: nn.Linear(D_MODEL, D_MODEL) for name in ("wq", "wk", "wv", "wo")})
    layer: Any = RoutedAttention.from_projections(
        ordinary,
        HEADS,
        sites=all_sites(HEADS, bias=True),
        names=["wq", "wk", "wv", "wo"],
        backend="reference",
    )
    assert list(layer.state_dict()) == list(ordinary.state_dict())
    assert (layer.kv_heads, layer.head_dim) == (HEADS, 3)
    twin = RoutedAttention(D_MODEL, HEADS, sites=layer.sites, bias=True, backend="reference")
    twin.load_state_dict(
        {
            key.replace(old, new): value
            for key, value in layer.state_dict().items()
            for old, new in zip(layer.names, PROJECTIONS, strict=True)
            if key.startswith(old)
        }
    )
    x, routes = random_input(), random_routes()
    assert_same(layer(x, routes), twin(x, routes))
    assert_same(
        gradients(layer(x, routes), *layer.parameters()), gradients(twin(x, routes), *twin.parameters())
    )


def assert_same_layer(layer: Any, other: Any) -> None:
    """The same parameters, sites, outputs and gradients."""
    x, routes = random_input(), random_routes()
    assert_same(dict(layer.state_dict()), dict(other.state_dict()))
    assert repr(layer) == repr(other)
    for name, table in layer.sites.tables.items():
        assert_same(table.weights, other.sites.tables[name].weights)
    y, z = layer(x, routes), other(x, routes)
    assert_same(y, z)
    assert_same(gradients(y, *layer.parameters()), gradients(z, *other.parameters()))


def pickled(layer: Any) -> Any:
    return pickle.loads(pickle.dumps(layer))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled], ids=lambda f: f.__name__)
def test_copies(copied: Callable[[Any], Any]) -> None:
    layer = make_layer(all_sites(bias=True), bias=True)
    other = copied(layer)
    assert not any(a is b for a, b in zip(layer.parameters(), other.parameters(), strict=True))
    assert_same_layer(other, layer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_tables_stay_fp32(dtype: torch.dtype) -> None:
    layer = make_layer(all_sites()).to(dtype)
    assert all(parameter.dtype == dtype for parameter in layer.parameters())
    held = [table for sites in layer._op_sites for table in sites.tables.values()]
    assert all(table.weights.dtype == torch.float32 for table in held)
    y = layer(random_input(dtype), random_routes())
    assert y.dtype == dtype
    assert all(gradient.dtype == dtype for gradient in gradients(y, *layer.parameters()))


def test_meta_device() -> None:
    expected = make_layer(all_sites())
    with torch.device("meta"):
        layer = make_layer(AttentionSites(**expected.sites.tables))
    assert all(parameter.is_meta for parameter in layer.parameters())
    layer.to_empty(device="cpu")
    layer.load_state_dict(expected.state_dict())
    assert_same_layer(layer, expected)


def test_tables_follow_the_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    copies = []
    monkeypatch.setattr(Table, "on", lambda table, device: copies.append((table, device)))

    def copied(layer: Any) -> bool:
        held = {table for sites in layer._op_sites for table in sites.tables.values()}
        devices, done = {device.type for _, device in copies}, {table for table, _ in copies}
        copies.clear()
        return devices == {"cpu"} and done == held and len(held) == 10

    layer = make_layer(all_sites())
    assert copied(layer)
    layer.to(torch.float64)
    assert copied(layer)
    assert copied(copy.deepcopy(layer))
    layer.to("meta")
    assert not copies
    layer.to_empty(device="cpu")
    assert copied(layer)
    layer.sites = None
    assert not copies
    layer.sites = all_sites()
    assert copied(layer)


def test_sites_can_change_between_steps() -> None:
    layer, x, routes = make_layer(all_sites()), random_input(), random_routes()
    sites, parameters = layer.sites, list(layer.parameters())
    routed = gradients(layer(x, routes), *parameters)
    layer.sites = None
    unrouted = gradients(layer(x, routes), *parameters)
    assert not any(torch.equal(a, b) for a, b in zip(routed, unrouted, strict=True))
    assert_same(unrouted, gradients(layer(x), *parameters))
    layer.sites = sites
    assert_same(gradients(layer(x, routes), *parameters), routed)


def test_functional_call() -> None:
    layer, other = make_layer(all_sites()), make_layer(all_sites())
    x, routes = random_input(), random_routes()
    parameters = {name: parameter.detach().requires_grad_() for name, parameter in other.named_parameters()}
    got, expected = torch.func.functional_call(layer, parameters, (x, routes)), other(x, routes)
    assert_same(got, expected)
    assert_same(gradients(got, *parameters.values()), gradients(expected, *other.parameters()))


def test_no_tokens() -> None:
    layer, x = make_layer(all_sites()), torch.zeros(BATCH, 0, D_MODEL)
    y = layer(x, Routes.of(torch.zeros(BATCH, 0, dtype=torch.int64), ROUTES))
    assert y.shape == (BATCH, 0, D_MODEL)
    assert not any(gradient.any() for gradient in gradients(y, *layer.parameters()))


# Dynamo's own, whenever it traces an autograd.Function.
DYNAMO = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@DYNAMO
@pytest.mark.parametrize("backend", FUNCTION_BACKENDS)
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
    *of_inputs, of_output = gradients(compiled(x, routes, rotate=rotated), x, *parameters)
    assert not any(gradient.any() for gradient in of_inputs)
    assert of_output.any()


def with_child(module: Any, name: str, child: nn.Module) -> Any:
    module.add_module(name, child)
    return module


class LoRALinear(nn.Linear):
    pass


def call(*shape: int, **sites: Any) -> Any:
    layer = make_layer(AttentionSites(**sites))
    return layer(torch.zeros(shape), Routes.of(torch.zeros(BATCH, SEQUENCE, dtype=torch.int64), 2))


ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "update with fewer key heads": (
        lambda: make_layer(AttentionSites(update=torch.zeros(2, 4))),
        ValueError,
        r"AttentionSites\.update_kv: got None beside update, expected a table \[R, 2\] or \[R, 1\]: with 4 query heads",
    ),
    "update with fewer key heads, reassigned": (
        lambda: setattr(make_layer(), "sites", AttentionSites(update=torch.zeros(2, 1))),
        ValueError,
        r"AttentionSites\.update_kv: got None beside update",
    ),
    "query": (
        lambda: make_layer(AttentionSites(query=torch.zeros(2, 2))),
        ValueError,
        r"AttentionSites\.query: got a table of 2 features, expected 4 or 1",
    ),
    "key": (
        lambda: make_layer(AttentionSites(key=torch.zeros(2, 4))),
        ValueError,
        r"AttentionSites\.key: got a table of 4 features, expected 2 or 1",
    ),
    "update_q by feature": (
        lambda: make_layer(AttentionSites(update_q=torch.zeros(2, 16))),
        ValueError,
        r"AttentionSites\.update_q: got a table of 16 features, expected 4 or 1",
    ),
    "update_kv": (
        lambda: make_layer(AttentionSites(update_kv=torch.zeros(2, 4))),
        ValueError,
        r"AttentionSites\.update_kv: got a table of 4 features, expected 2 or 1",
    ),
    "update_out": (
        lambda: make_layer(AttentionSites(update_out=torch.zeros(2, 2))),
        ValueError,
        r"AttentionSites\.update_out: got a table of 2 features, expected 4 or 1",
    ),
    "update_output_bias": (
        lambda: make_layer(AttentionSites(update_output_bias=torch.zeros(2, 4)), bias=True),
        ValueError,
        r"AttentionSites\.update_output_bias: got a table of 4 features, expected 12 or 1",
    ),
    "update_output_bias without a bias": (
        lambda: make_layer(AttentionSites(update_output_bias=torch.zeros(2, 12))),
        ValueError,
        r"AttentionSites\.update_output_bias: got Table.*expected None: o_proj has no bias",
    ),
    "edges": (
        lambda: make_layer(AttentionSites(score_edges=torch.zeros(2, 3))),
        ValueError,
        r"AttentionSites\.score_edges: got a table of 3 features, expected 2 or 1",
    ),
    "edges of one column": (
        lambda: make_layer(AttentionSites(value_edges=torch.zeros(2, 1))),
        ValueError,
        r"AttentionSites\.value_edges: got a table of 1 columns, expected \[R, R\].*R = 2",
    ),
    "numbers of routes": (
        lambda: make_layer(AttentionSites(query=torch.zeros(2, 4), update_q=torch.zeros(3, 4))),
        ValueError,
        r"AttentionSites\.update_q: got a table of 3 routes, expected 2 \(as in query\)",
    ),
    "sites of another layer": (
        lambda: make_layer(LinearSites()),
        TypeError,
        r"sites: got a LinearSites, expected gradroute\.AttentionSites or None",
    ),
    "heads of d_model": (
        lambda: RoutedAttention(8, 3),
        ValueError,
        "heads: got 3, expected a divisor of d_model, 8",
    ),
    "no heads": (lambda: RoutedAttention(8, 0), ValueError, "heads: got 0, expected a positive number"),
    "key heads": (
        lambda: RoutedAttention(8, 4, 3),
        ValueError,
        "kv_heads: got 3, expected a divisor of heads = 4",
    ),
    "no key heads": (
        lambda: RoutedAttention(8, 4, 0),
        ValueError,
        "kv_heads: got 0, expected a divisor of heads = 4",
    ),
    "head_dim": (
        lambda: RoutedAttention(8, 4, head_dim=0),
        ValueError,
        "head_dim: got 0, expected a positive number of features per head",
    ),
    "width of x": (
        lambda: call(BATCH, SEQUENCE, 8),
        ValueError,
        r"x: got shape \[2, 7, 8\], expected \[any, any, 12\]",
    ),
    "dimensions of x": (
        lambda: call(SEQUENCE, D_MODEL),
        ValueError,
        r"x: got shape \[7, 12\], expected \[any, any, 12\]",
    ),
    "tokens": (
        lambda: call(BATCH, 5, D_MODEL),
        ValueError,
        r"routes: got ids of shape \[2, 7\], expected x's leading shape \[2, 5\]",
    ),
    "routes of a call": (
        lambda: call(BATCH, SEQUENCE, D_MODEL, update_q=torch.zeros(3, 4)),
        ValueError,
        r"AttentionSites\.update_q: got a table of 3 routes, expected 2 \(routes\.num_routes\)",
    ),
    "a tensor for routes": (
        lambda: make_layer(all_sites())(random_input(), torch.zeros(BATCH, SEQUENCE)),
        TypeError,
        r"routes: got a Tensor, expected gradroute\.Routes",
    ),
    "LoRA": (
        lambda: RoutedAttention.from_projections(
            with_child(LlamaAttention(), "v_proj", LoRALinear(D_MODEL, KV_HEADS * HEAD_DIM)), HEADS, KV_HEADS
        ),
        TypeError,
        r"module\.v_proj: got a LoRALinear.*call such modules, with gradroute\.routed_attention between them",
    ),
    "names": (
        lambda: RoutedAttention.from_projections(LlamaAttention(), HEADS, names=("wq", "wk", "wv", "wo")),
        ValueError,
        "names: got 'wq', expected submodules of LlamaAttention: q_proj, k_proj, v_proj, o_proj",
    ),
    "number of names": (
        lambda: RoutedAttention.from_projections(LlamaAttention(), HEADS, names=("q_proj", "o_proj")),
        ValueError,
        r"names: got \('q_proj', 'o_proj'\), expected 4 names",
    ),
    "other parameters": (
        lambda: RoutedAttention.from_projections(
            with_child(LlamaAttention(), "q_norm", nn.RMSNorm(HEAD_DIM)), HEADS, KV_HEADS
        ),
        ValueError,
        r"module: got parameters or buffers q_norm\.weight, expected only those of \('q_proj', 'k_proj'",
    ),
    "dropout": (
        lambda: RoutedAttention.from_projections(
            with_child(LlamaAttention(), "attn_dropout", nn.Dropout(0.1)), HEADS, KV_HEADS
        ),
        ValueError,
        r"module\.attn_dropout: got dropout with p = 0\.1, expected none",
    ),
    "heads of a projection": (
        lambda: RoutedAttention.from_projections(LlamaAttention(), 3, 1),
        ValueError,
        "heads: got 3, expected a divisor of the outputs of q_proj, 16",
    ),
    "key heads of a projection": (
        lambda: RoutedAttention.from_projections(LlamaAttention(), HEADS),
        ValueError,
        r"names: got k_proj of shape \[8, 12\], expected \[16, 12\]: q_proj is \[16, 12\], with 4 heads and 4 key",
    ),
    "order of names": (
        lambda: RoutedAttention.from_projections(
            LlamaAttention(), HEADS, KV_HEADS, names=("q_proj", "k_proj", "o_proj", "v_proj")
        ),
        ValueError,
        r"names: got o_proj of shape \[12, 16\], expected \[8, 12\]",
    ),
}


@pytest.mark.parametrize(("make", "kind", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(make: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        make()
