"""RoutedAttention made, converted, copied, cast and moved: its keys, its Parameters, and its sites' tables."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from attention_layer_cases import (
    D_MODEL,
    HEADS,
    KV_HEADS,
    PROJECTIONS,
    LlamaAttention,
    all_sites,
    assert_same,
    gradients,
    make_layer,
    random_input,
    random_routes,
)
from layer_cases import tables_of_groups
from torch import nn

from gradroute import (
    AttentionSites,
    RoutedAttention,
    Table,
)


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
        return devices == {"cpu"} and done == held | tables_of_groups(layer) and len(held) == 10

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
