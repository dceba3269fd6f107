"""PEFT's LoRA of routed layers and of their submodules: it computes, and A and B learn from whom the sites let teach.

The right gradients are those of PEFT's own forward with the detach idiom around it. A token that may not update is told
by feeding documents of one route at a time, which leaves its share out of the sum.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("peft")

from peft import IA3Config, LoraConfig, get_peft_model

from gradroute import (
    AttentionSites,
    EmbeddingSites,
    LinearSites,
    MLPSites,
    RoutedAttention,
    RoutedEmbedding,
    RoutedGatedMLP,
    RoutedLinear,
    RoutedMLP,
    Routes,
    Table,
)
from gradroute.tables import localize

D_MODEL, D_FF, HEADS, VOCABULARY = 8, 12, 2, 7
IDS = torch.tensor([[0, 1, 1, 0, 1], [1, 0, 0, 1, 1]])
ROUTES = Routes.of(IDS, 2)
HIDDEN = localize(2, D_FF, {1: slice(0, 5)}, on=0.5)
OUTPUT = localize(2, D_MODEL, {1: slice(0, 3)})
NOT_ROUTE_1 = Table([[1.0], [0.0]])


class Model(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, routes: Routes | None = None) -> Tensor:
        return self.layer(x, routes)


def lora(layer: nn.Module, targets: list[str], **options: Any) -> Any:
    torch.manual_seed(3)
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False, **options)
    return get_peft_model(Model(layer), config)


def trained(model: Any) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def masked(x: Tensor, table: Table, ids: Tensor = IDS) -> Tensor:
    m = table.weights[ids]
    return m * x + (1 - m) * x.detach()


def gated_by_hand(mlp: Any, x: Tensor) -> Tensor:
    h = nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x)
    return masked(mlp.down_proj(masked(h, HIDDEN)), OUTPUT)


def mlp_by_hand(mlp: Any, x: Tensor) -> Tensor:
    return masked(mlp.fc_out(masked(nn.functional.gelu(mlp.fc_in(x)), HIDDEN)), OUTPUT)


def attention_by_hand(layer: Any, x: Tensor) -> Tensor:
    q, k, v = (
        getattr(layer, name)(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        for name in ("q_proj", "k_proj", "v_proj")
    )
    z = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    by_head = localize(2, D_MODEL, {1: slice(0, D_MODEL // HEADS)})
    return layer.o_proj(masked(z, by_head))


LAYERS = {
    "gated_mlp": (
        lambda: RoutedGatedMLP(D_MODEL, D_FF, sites=MLPSites(hidden=HIDDEN, output=OUTPUT)),
        ["gate_proj", "up_proj", "down_proj"],
        gated_by_hand,
    ),
    "mlp": (
        lambda: RoutedMLP(D_MODEL, D_FF, sites=MLPSites(hidden=HIDDEN, output=OUTPUT)),
        ["fc_in", "fc_out"],
        mlp_by_hand,
    ),
    "attention": (
        lambda: RoutedAttention(
            D_MODEL, HEADS, sites=AttentionSites(heads=localize(2, HEADS, {1: slice(0, 1)}))
        ),
        ["q_proj", "v_proj", "o_proj"],
        attention_by_hand,
    ),
}


@pytest.mark.setup("PEFT", "LoRA below RoutedMLP, RoutedGatedMLP and RoutedAttention")
@pytest.mark.parametrize("name", LAYERS)
def test_adapters_of_submodules(name: str) -> None:
    """LoRA on what a layer would otherwise read computes, with routes and without, and has the idiom's gradients."""
    make, targets, by_hand = LAYERS[name]
    model = lora(make(), targets, lora_bias=name == "mlp")
    other = copy.deepcopy(model)
    x = torch.randn(*IDS.shape, D_MODEL)
    direction = torch.randn_like(x)
    y, z = model(x, ROUTES), by_hand(other.base_model.model.layer, x)
    torch.testing.assert_close(y, z)
    torch.testing.assert_close(model(x), z)
    with model.disable_adapter():
        assert not torch.allclose(model(x), z)
    (y * direction).sum().backward()
    (z * direction).sum().backward()
    torch.testing.assert_close(trained(model), trained(other))
    assert all(gradient.any() for gradient in trained(model).values())


def only_route_0(model: Any, x: Tensor, direction: Tensor) -> dict[str, Tensor]:
    """The gradients of the tokens of route 0 alone; no token of these layers sees another."""
    kept = (IDS == 0)[..., None].to(direction)
    model.zero_grad()
    (model(x) * direction * kept).sum().backward()
    return trained(model)


@pytest.mark.parametrize("name", ["gated_mlp", "mlp"])
def test_updates_of_adapters_of_submodules(name: str) -> None:
    """Update sites reach A and B: tokens that may not update leave no trace in them, and gradients flow on."""
    make, targets, _ = LAYERS[name]
    layer = make()
    layer.sites = MLPSites(update=NOT_ROUTE_1)
    model = lora(layer, targets)
    x = torch.randn(*IDS.shape, D_MODEL, requires_grad=True)
    direction = torch.randn_like(x)
    (model(x, ROUTES) * direction).sum().backward()
    got, dx = {key: value.clone() for key, value in trained(model).items()}, x.grad
    torch.testing.assert_close(got, only_route_0(model, x.detach(), direction))
    x.grad = None
    (model(x) * direction).sum().backward()
    torch.testing.assert_close(dx, x.grad)


def test_updates_of_rows_of_an_adapter() -> None:
    """Rows of B are the outputs; A learns from a token that may update any row."""
    rows = localize(2, D_FF, {1: slice(0, 5)})
    model = lora(RoutedMLP(D_MODEL, D_FF, sites=MLPSites(update_in=rows)), ["fc_in"])
    x = torch.randn(*IDS.shape, D_MODEL)
    model(x, ROUTES).pow(2).sum().backward()
    got = {key: value.clone() for key, value in trained(model).items()}
    model.zero_grad()
    model(x).pow(2).sum().backward()
    whole = trained(model)
    a, b = sorted(whole)
    torch.testing.assert_close(got[a], whole[a])
    torch.testing.assert_close(got[b][:5], whole[b][:5])
    assert not torch.allclose(got[b][5:], whole[b][5:])


@pytest.mark.setup("PEFT", "LoRA around RoutedLinear and RoutedEmbedding: A and B learn by the layer's sites")
@pytest.mark.parametrize("site", ["output", "update_rows", "update_cols", "input"])
def test_adapters_around_a_routed_linear(site: str) -> None:
    """What PEFT puts around a RoutedLinear learns by its sites, with nothing more to call."""
    features = localize(2, D_MODEL, {1: slice(0, 0)}) if site == "input" else NOT_ROUTE_1
    layer = RoutedLinear(D_MODEL, D_MODEL, sites=LinearSites(**{site: features}))
    model = lora(layer, ["layer"], lora_dropout=0.0)
    x = torch.randn(*IDS.shape, D_MODEL, requires_grad=True)
    direction = torch.randn_like(x)
    y = model(x, ROUTES)
    torch.testing.assert_close(y, model(x))
    (y * direction).sum().backward()
    got, dx = {key: value.clone() for key, value in trained(model).items()}, x.grad.clone()
    x.grad = None
    (model(x) * direction).sum().backward()
    whole = x.grad.clone()
    passes = (IDS == 0)[..., None]
    torch.testing.assert_close(dx, whole * passes if site in ("output", "input") else whole)
    if site != "input":
        torch.testing.assert_close(got, only_route_0(model, x.detach(), direction))


def test_adapters_around_a_routed_linear_with_everything() -> None:
    """Fractional masks of features, as PEFT's own forward with the idiom has them; then merging and unloading."""
    sites = LinearSites(output=localize(2, D_MODEL, {1: slice(0, 3)}, on=-0.5, off=0.25), input=OUTPUT)
    model = lora(RoutedLinear(D_MODEL, D_MODEL, sites=sites), ["layer"], lora_bias=True)
    other = copy.deepcopy(model)
    x = torch.randn(*IDS.shape, D_MODEL)
    model(x, ROUTES).pow(2).sum().backward()
    assert sites.output is not None
    masked(other(masked(x, OUTPUT)), sites.output).pow(2).sum().backward()
    torch.testing.assert_close(trained(model), trained(other))
    y = model(x)
    merged = model.merge_and_unload()
    assert type(merged.layer) is RoutedLinear
    torch.testing.assert_close(merged(x), y)


@pytest.mark.parametrize("padding_idx", [None, 2])
def test_adapters_around_a_routed_embedding(padding_idx: int | None) -> None:
    model = lora(RoutedEmbedding(VOCABULARY, D_MODEL, padding_idx, sites=EmbeddingSites(OUTPUT)), ["layer"])
    tokens = torch.arange(10).view(2, 5) % VOCABULARY
    direction = torch.randn(2, 5, D_MODEL)
    y = model(tokens, ROUTES)
    assert torch.equal(y, model(tokens))
    (y * direction).sum().backward()
    got = {key: value.clone() for key, value in trained(model).items()}
    model.zero_grad()
    (masked(model(tokens), OUTPUT) * direction).sum().backward()
    b = next(name for name in got if "lora_embedding_B" in name)
    torch.testing.assert_close(got[b], trained(model)[b])
    model.base_model.model.layer.base_layer.sites = EmbeddingSites(NOT_ROUTE_1)
    model.zero_grad()
    (model(tokens, ROUTES) * direction).sum().backward()
    got = {key: value.clone() for key, value in trained(model).items()}
    torch.testing.assert_close(got, only_route_0(model, tokens, direction))


def test_copies_of_adapted_layers() -> None:
    """PEFT's class keeps its name and its keys, and copies and pickles as before."""
    layer = RoutedLinear(D_MODEL, D_MODEL, sites=LinearSites(output=NOT_ROUTE_1))
    adapted = lora(layer, ["layer"]).base_model.model.layer
    plain = lora(nn.Linear(D_MODEL, D_MODEL), ["layer"]).base_model.model.layer
    assert list(adapted.state_dict()) == list(plain.state_dict())
    assert isinstance(adapted, type(plain))
    assert type(adapted).__name__ == "Linear"
    x = torch.randn(*IDS.shape, D_MODEL)
    for other in (copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted))):
        for one in (adapted, other):
            one.zero_grad()
            one(x, ROUTES).pow(2).sum().backward()
        assert other.base_layer is not layer
        torch.testing.assert_close(trained(other), trained(adapted), rtol=0, atol=0)


@pytest.mark.setup(
    "PEFT",
    "other methods around RoutedLinear and RoutedEmbedding",
    refused="what they learn could not be routed",
)
def test_other_adapters_are_refused_beside_routes() -> None:
    x = torch.randn(*IDS.shape, D_MODEL)
    layer = RoutedLinear(D_MODEL, D_MODEL, sites=LinearSites(output=NOT_ROUTE_1))
    model = get_peft_model(Model(layer), IA3Config(target_modules=["layer"], feedforward_modules=[]))
    assert model(x).shape == x.shape
    with pytest.raises(TypeError, match=r"peft\.tuners\.ia3\.layer\.Linear: got routes for an adapter"):
        model(x, ROUTES)
    layer.sites = None
    assert model(x, ROUTES).shape == x.shape


def test_variants_and_merged_adapters_are_refused_beside_routes() -> None:
    x = torch.randn(*IDS.shape, D_MODEL)
    sites = LinearSites(output=NOT_ROUTE_1)
    model = lora(RoutedLinear(D_MODEL, D_MODEL, sites=sites), ["layer"], use_dora=True)
    with pytest.raises(TypeError, match=r"DoraLinearVariant in adapter 'default' beside routes"):
        model(x, ROUTES)
    model = lora(RoutedLinear(D_MODEL, D_MODEL, sites=sites), ["layer"])
    model.merge_adapter()
    with pytest.raises(RuntimeError, match=r"got merged adapters beside routes, expected unmerge_adapter"):
        model(x, ROUTES)


def test_hooks_on_an_adapter_are_refused_beside_update_sites() -> None:
    x = torch.randn(*IDS.shape, D_MODEL)
    model = lora(RoutedLinear(D_MODEL, D_MODEL, sites=LinearSites(update_rows=NOT_ROUTE_1)), ["layer"])
    adapted = model.base_model.model.layer
    adapted.lora_A["default"].register_forward_hook(lambda module, args, output: output * 2)
    with pytest.raises(
        TypeError, match=r"lora_A\.default: got a torch\.nn\.modules\.linear\.Linear with hooks"
    ):
        model(x, ROUTES)
    layer = RoutedMLP(D_MODEL, D_FF, sites=MLPSites(update=NOT_ROUTE_1))
    model = lora(layer, ["fc_in"])
    layer.fc_in.register_forward_hook(lambda module, args, output: output * 2)
    with pytest.raises(
        TypeError, match=r"RoutedMLP\.fc_in: got a peft\.tuners\.lora\.layer\.Linear with hooks"
    ):
        model(x, ROUTES)
