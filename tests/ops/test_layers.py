"""The layers: the ordinary layer's forward, keys and Parameters, the op's gradients, and sites that survive moves."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from layer_cases import (
    BATCH,
    CASES,
    D_FF,
    D_MODEL,
    D_OUT,
    LAYERS,
    ROUTES,
    SEQUENCE,
    VOCABULARY,
    Case,
    NanoMLP,
    assert_same,
    assert_same_layer,
    confine,
    gradients,
    input_of,
    pickled,
    routes_of,
    tables_of_groups,
)
from torch import nn

from gradroute import LinearSites, MLPSites, Routes, Table, layers
from gradroute.backends import BackendError
from gradroute.layers import (
    RoutedAttention,
    RoutedEmbedding,
    RoutedGatedMLP,
    RoutedLayerNorm,
    RoutedLinear,
    RoutedMLP,
    RoutedModule,
    RoutedRMSNorm,
)


@LAYERS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward_is_the_ordinary_layers(case: Case, dtype: torch.dtype) -> None:
    ordinary, routes, x = case.ordinary().to(dtype), routes_of(6, 4), input_of(case, dtype)
    layer, without_sites = case.convert(ordinary, case.sites), case.convert(ordinary, None)
    expected = ordinary(x)
    for got in (
        layer(x),
        layer(x, None),
        layer(x, routes),
        layer(x, routes=routes),
        without_sites(x, routes),
    ):
        assert_same(got, expected)


@LAYERS
def test_unrouted_gradients_are_the_ordinary_layers(case: Case) -> None:
    ordinary, x = case.ordinary(), input_of(case)
    layer, parameters = case.convert(ordinary, case.sites), list(ordinary.parameters())
    assert_same(gradients(layer(x), *parameters), gradients(ordinary(x), *parameters))


@LAYERS
@pytest.mark.parametrize("strength", [None, 0.25])
def test_gradients_are_the_functional_ops(case: Case, strength: float | None) -> None:
    layer, x = case.routed(sites=case.sites), input_of(case)
    routes = Routes.of(torch.randint(ROUTES, x.shape[:2]), ROUTES, strength)
    inputs = [*layer.parameters()]
    if x.is_floating_point():
        inputs.append(x.requires_grad_())
    got = gradients(layer(x, routes), *inputs)
    assert_same(got, gradients(case.functional(layer, x, routes, case.sites), *inputs))
    unrouted = gradients(layer(x), *inputs)
    assert not all(torch.equal(a, b) for a, b in zip(got, unrouted, strict=True))


@LAYERS
def test_backend_reaches_the_op(case: Case) -> None:
    layer, x, routes = case.routed(sites=case.sites), input_of(case), routes_of(6, 4)
    expected = layer(x)
    layer.backend = "reference"
    assert "backend='reference'" in repr(layer)
    assert_same(layer(x, routes), expected)
    layer.backend = "cuda"
    with pytest.raises(BackendError, match="cuda"):
        layer(x, routes)
    with pytest.raises(TypeError, match="routes: got a Tensor"):
        layer(x, routes.ids)


@LAYERS
def test_state_dict_is_the_ordinary_layers(case: Case) -> None:
    ordinary, layer, other = case.ordinary(), case.routed(sites=case.sites), case.ordinary()
    assert list(layer.state_dict()) == list(ordinary.state_dict())
    layer.load_state_dict(ordinary.state_dict())
    other.load_state_dict(layer.state_dict())
    assert_same(dict(other.state_dict()), dict(ordinary.state_dict()))


@LAYERS
def test_conversion_shares_parameters(case: Case) -> None:
    ordinary = case.ordinary().to(torch.float16).eval()
    first = next(ordinary.parameters()).requires_grad_(False)
    ordinary.register_forward_hook(lambda *_: 1 / 0)
    random_state = torch.get_rng_state()
    layer = case.convert(ordinary, case.sites)
    assert_same(torch.get_rng_state(), random_state)
    mine, theirs = dict(layer.named_parameters()), dict(ordinary.named_parameters())
    assert list(mine) == list(theirs)
    assert all(mine[name] is theirs[name] for name in theirs)
    assert not first.requires_grad
    assert not layer.training
    assert not layer._forward_hooks
    assert layer.sites is case.sites


@LAYERS
def test_sites_are_shown(case: Case) -> None:
    layer = case.routed(sites=case.sites)
    assert f"sites={case.sites}" in layer.extra_repr()
    layer.sites = None
    assert "sites=None" in layer.extra_repr()


def test_the_rest_of_the_text() -> None:
    linear = RoutedLinear(8, 4, sites=LinearSites(output=torch.zeros(2, 1)))
    assert linear.extra_repr() == (
        "in_features=8, out_features=4, bias=True, sites=LinearSites(output=Table([2, 1], blocks))"
    )
    assert "offset=1.0, casting_mode='gemma'" in repr(RoutedRMSNorm(8, offset=1.0, casting_mode="gemma"))
    assert "activation='relu2'" in repr(RoutedMLP(8, 4, activation="relu2"))


def saved_and_loaded(layer: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@LAYERS
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved_and_loaded], ids=lambda f: f.__name__)
def test_copies(case: Case, copied: Callable[[Any], Any]) -> None:
    layer = case.routed(sites=case.sites)
    other = copied(layer)
    assert not any(a is b for a, b in zip(layer.parameters(), other.parameters(), strict=True))
    assert_same_layer(other, layer, input_of(case))


@LAYERS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_tables_stay_fp32(case: Case, dtype: torch.dtype) -> None:
    ordinary = case.ordinary()
    layer = case.convert(ordinary, case.sites).to(dtype)
    x, routes = input_of(case, dtype), routes_of(6, 4)
    assert all(parameter.dtype == dtype for parameter in layer.parameters())
    assert all(table.weights.dtype == torch.float32 for table in layer.sites.tables.values())
    y = layer(x, routes)
    assert_same(y, ordinary.to(dtype)(x))
    assert all(gradient.dtype == dtype for gradient in gradients(y, *layer.parameters()))


@LAYERS
def test_meta_device(case: Case) -> None:
    expected = case.routed(sites=case.sites)
    with torch.device("meta"):
        sites = type(case.sites)(**case.sites.tables)
        layer = case.routed(sites=sites)
    assert all(parameter.is_meta for parameter in layer.parameters())
    assert all(table.weights.device.type == "cpu" for table in layer.sites.tables.values())
    layer.to_empty(device="cpu")
    layer.load_state_dict(expected.state_dict())
    assert_same_layer(layer, expected, input_of(case))


def test_sites_made_under_the_meta_device() -> None:
    weights = torch.zeros(ROUTES, D_OUT)
    with torch.device("meta"):
        layer = RoutedLinear(D_MODEL, D_OUT, sites=LinearSites(output=weights, input=[[1.0], [0.5]]))
    assert_same(layer.sites.output.weights, weights)
    assert_same(layer.sites.input.weights, torch.tensor([[1.0], [0.5]]))


@LAYERS
def test_tables_follow_the_parameters(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    copies = []
    monkeypatch.setattr(Table, "on", lambda table, device: copies.append((table, device)))
    tables = set(case.sites.tables.values())

    def copied(of: Any) -> bool:
        devices = {device.type for _, device in copies}
        done = {table for table, _ in copies}
        copies.clear()
        return devices == {"cpu"} and done == tables | tables_of_groups(of)

    layer = case.routed(sites=case.sites)
    assert copied(layer)
    layer.to(torch.float64)
    assert copied(layer)
    other = copy.deepcopy(layer)
    assert copied(other)
    layer.to("meta")
    assert not copies
    layer.to_empty(device="cpu")
    assert copied(layer)
    layer.sites = None
    layer.sites = case.sites
    assert copied(layer)


def test_tables_of_grouped_products_are_copied_where_products_are_grouped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    layer = CASES["linear"].routed(sites=CASES["linear"].sites)
    parameters = [SimpleNamespace(device=torch.device(name), is_meta=False) for name in ("cpu", "cuda")]
    monkeypatch.setattr(layer, "parameters", lambda: parameters)
    copies: list[tuple[Table, str]] = []
    monkeypatch.setattr(Table, "on", lambda table, device: copies.append((table, device.type)))
    of_groups = tables_of_groups(layer)
    assert of_groups
    for major, devices in ((8, {"cpu"}), (9, {"cpu", "cuda"})):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, major=major: (major, 0))
        layer._copy_tables()
        assert {device for table, device in copies if table in of_groups} == devices
        assert {device for table, device in copies if table not in of_groups} == {"cpu", "cuda"}
        copies.clear()


@LAYERS
def test_sites_can_change_between_steps(case: Case) -> None:
    layer, x, routes = case.routed(sites=case.sites), input_of(case), routes_of(6, 4)
    parameters = list(layer.parameters())
    routed = gradients(layer(x, routes), *parameters)
    layer.sites = None
    unrouted = gradients(layer(x, routes), *parameters)
    assert not all(torch.equal(a, b) for a, b in zip(routed, unrouted, strict=True))
    layer.sites = case.sites
    assert_same(gradients(layer(x, routes), *parameters), routed)


@LAYERS
def test_functional_call(case: Case) -> None:
    layer, other = case.routed(sites=case.sites), case.routed(sites=case.sites)
    x, routes = input_of(case), routes_of(6, 4)
    parameters = {name: parameter.detach().requires_grad_() for name, parameter in other.named_parameters()}
    got = torch.func.functional_call(layer, parameters, (x, routes))
    expected = other(x, routes)
    assert_same(got, expected)
    assert_same(gradients(got, *parameters.values()), gradients(expected, *other.parameters()))


@LAYERS
def test_a_step_changes_what_the_sites_allow(case: Case) -> None:
    layer, x = case.routed(sites=case.sites), input_of(case)
    before = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    layer(x, routes_of(0, 10)).pow(3).sum().backward()
    optimizer.step()
    for name, parameter in layer.named_parameters():
        allowed = torch.ones_like(parameter, dtype=torch.bool)
        allowed[case.untouched[name]] = False
        if isinstance(layer, nn.Embedding):
            allowed[layer.padding_idx] = False
        assert_same(parameter != before[name], allowed)


def test_from_mlp_keeps_names() -> None:
    ordinary, sites = NanoMLP(), MLPSites(update=confine(D_FF))
    layer = RoutedMLP.from_mlp(ordinary, sites, names=("c_fc", "c_proj"))
    assert list(layer.state_dict()) == list(ordinary.state_dict()) == ["c_fc.weight", "c_proj.weight"]
    assert layer.c_fc.weight is ordinary.c_fc.weight
    x = torch.randn(BATCH, SEQUENCE, D_MODEL)
    assert_same(layer(x, routes_of(6, 4)), ordinary(x))
    assert_same_layer(pickled(layer), layer, x)

    sequence = nn.Sequential(nn.Linear(D_MODEL, D_FF), nn.GELU(approximate="tanh"), nn.Linear(D_FF, D_MODEL))
    layer = RoutedMLP.from_mlp(sequence, sites, names=["0", "2"], activation="gelu_tanh")
    assert list(layer.state_dict()) == list(sequence.state_dict())
    assert_same(layer(x, routes_of(6, 4)), sequence(x))


@pytest.mark.parametrize("name", ["linear", "gated_mlp", "layer_norm", "embedding"])
def test_class_swap(name: str) -> None:
    case = CASES[name]
    layer: Any = case.ordinary()
    x, twin, routes = input_of(case), case.convert(layer, case.sites), routes_of(6, 4)
    parameters, expected = list(layer.parameters()), layer(x)
    layer.__class__ = type(twin)
    assert_same(layer(x, routes), expected)
    layer.sites = case.sites
    y, z = layer(x, routes), twin(x, routes)
    assert_same(y, z)
    assert_same(gradients(y, *parameters), gradients(z, *parameters))


def test_inherited_constructors() -> None:
    weight = torch.randn(VOCABULARY, D_MODEL)
    layer = RoutedEmbedding.from_pretrained(weight)
    assert layer.weight.data_ptr() == weight.data_ptr()
    assert not layer.weight.requires_grad
    norm = RoutedRMSNorm(D_MODEL, offset=1.0, casting_mode="gemma")
    assert_same(norm.weight.detach(), torch.zeros(D_MODEL))
    assert_same(RoutedRMSNorm(D_MODEL).weight.detach(), torch.ones(D_MODEL))


# Every layer, in the form that can honour every site.
COMPLETE: dict[str, Callable[..., Any]] = {
    "RoutedLinear": lambda sites=None: RoutedLinear(D_MODEL, D_OUT, sites=sites),
    "RoutedMLP": lambda sites=None: RoutedMLP(D_MODEL, D_FF, sites=sites),
    "RoutedGatedMLP": lambda sites=None: RoutedGatedMLP(D_MODEL, D_FF, bias=True, sites=sites),
    "RoutedAttention": lambda sites=None: RoutedAttention(D_MODEL, 4, bias=True, sites=sites),
    "RoutedRMSNorm": lambda sites=None: RoutedRMSNorm(D_MODEL, sites=sites),
    "RoutedLayerNorm": lambda sites=None: RoutedLayerNorm(D_MODEL, sites=sites),
    "RoutedEmbedding": lambda sites=None: RoutedEmbedding(VOCABULARY, D_MODEL, sites=sites),
}
SITES_OF_LAYERS = [(name, site) for name in COMPLETE for site in vars(layers)[name].sites_type.declared]


def test_every_layer_is_tested_with_its_sites() -> None:
    exported = {name: vars(layers)[name] for name in layers.__all__ if isinstance(vars(layers)[name], type)}
    of_layers = {name for name, cls in exported.items() if issubclass(cls, RoutedModule)} - {"RoutedModule"}
    assert set(COMPLETE) == of_layers


@pytest.mark.parametrize(("name", "site"), SITES_OF_LAYERS, ids=map("-".join, SITES_OF_LAYERS))
def test_every_site_of_a_layer_masks(name: str, site: str) -> None:
    """A layer takes every site that its sites class declares, and refuses a width that is not its own."""
    sites_type = vars(layers)[name].sites_type
    table = torch.full((ROUTES, ROUTES if site.endswith("_edges") else 1), 0.5)
    ordinary, layer = COMPLETE[name](), COMPLETE[name](sites_type(**{site: table}))
    layer.load_state_dict(ordinary.state_dict())
    x = torch.randn(BATCH, SEQUENCE, D_MODEL, requires_grad=True)
    if name == "RoutedEmbedding":
        x = torch.arange(VOCABULARY).view(BATCH, SEQUENCE)
    inputs = [x] if x.requires_grad else []
    expected = gradients(ordinary(x), *ordinary.parameters(), *inputs)
    got = gradients(layer(x, routes_of(6, 4)), *layer.parameters(), *inputs)
    change = max((one - other).abs().max().item() for one, other in zip(got, expected, strict=True))
    assert change > 0.01  # rounding alone changes a millionth
    with pytest.raises(ValueError, match=rf"\.{site}: got a table of 999 "):
        COMPLETE[name](sites_type(**{site: torch.ones(ROUTES, 999)}))
