"""The layers: the ordinary layer's forward, keys and Parameters, the op's gradients, and sites that survive moves."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor, nn

from gradroute import LinearSites, MLPSites, Routes, Table, routed_gated_mlp, routed_linear, routed_mlp
from gradroute.backends import BackendError
from gradroute.embedding import EmbeddingSites, routed_embedding
from gradroute.layers import (
    RoutedEmbedding,
    RoutedGatedMLP,
    RoutedLayerNorm,
    RoutedLinear,
    RoutedMLP,
    RoutedRMSNorm,
)
from gradroute.norm import NormSites, routed_layer_norm, routed_rms_norm
from gradroute.tables import localize

ROUTES, VOCABULARY, D_MODEL, D_OUT, D_FF = 2, 10, 8, 6, 12
BATCH, SEQUENCE = 2, 5


class OrdinaryMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc_in, self.fc_out = nn.Linear(D_MODEL, D_FF), nn.Linear(D_FF, D_MODEL)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc_out(F.gelu(self.fc_in(x)))


class NanoMLP(nn.Module):
    """As in nanoGPT."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.c_fc = nn.Linear(D_MODEL, D_FF, bias=False)
        self.gelu = nn.GELU()
        self.c_proj = nn.Linear(D_FF, D_MODEL, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class OrdinaryGatedMLP(nn.Module):
    """As in Llama."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(D_MODEL, D_FF, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(D_FF, D_MODEL, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class LlamaRMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D_MODEL))
        self.variance_epsilon = 1e-5

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(x.dtype)


class GemmaRMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(D_MODEL))
        self.eps = 1e-5

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (wide * (1.0 + self.weight.float())).type_as(x)


class Case(NamedTuple):
    ordinary: Callable[[], nn.Module]
    routed: Callable[..., Any]  # takes sites=
    convert: Callable[[Any, Any], Any]  # the ordinary layer and sites
    functional: Callable[[Any, Tensor, Routes, Any], Tensor]  # the routed layer, x, routes, sites
    sites: Any
    untouched: dict[str, Any]  # what tokens of route 1 do not train under these sites


def confine(features: int, inside: float = 1.0, outside: float = 0.0) -> Table:
    return localize(ROUTES, features, {1: slice(features // 2, None)}, on=inside, off=outside)


LOW_ROWS = (slice(D_FF // 2),)
LOW_COLUMNS = (slice(None), slice(D_FF // 2))
LOW_FEATURES = (..., slice(D_MODEL // 2))

CASES = {
    "linear": Case(
        lambda: nn.Linear(D_MODEL, D_OUT),
        lambda sites=None: RoutedLinear(D_MODEL, D_OUT, sites=sites),
        RoutedLinear.from_linear,
        lambda layer, x, routes, sites: routed_linear(x, layer.weight, layer.bias, routes, sites),
        LinearSites(output=confine(D_OUT, 2.0, 0.5), update_rows=confine(D_OUT), input=confine(D_MODEL)),
        {"weight": (slice(D_OUT // 2),), "bias": (slice(D_OUT // 2),)},
    ),
    "linear_without_bias": Case(
        lambda: nn.Linear(D_MODEL, D_OUT, bias=False),
        lambda sites=None: RoutedLinear(D_MODEL, D_OUT, bias=False, sites=sites),
        RoutedLinear.from_linear,
        lambda layer, x, routes, sites: routed_linear(x, layer.weight, None, routes, sites),
        LinearSites(update_cols=confine(D_MODEL)),
        {"weight": (slice(None), slice(D_MODEL // 2))},
    ),
    "mlp": Case(
        OrdinaryMLP,
        lambda sites=None: RoutedMLP(D_MODEL, D_FF, sites=sites),
        RoutedMLP.from_mlp,
        lambda layer, x, routes, sites: routed_mlp(
            x,
            layer.fc_in.weight,
            layer.fc_in.bias,
            layer.fc_out.weight,
            layer.fc_out.bias,
            routes,
            sites,
            "gelu",
        ),
        MLPSites(
            update=confine(D_FF),
            hidden=confine(D_FF, 0.5, 2.0),
            output=[[1.0], [0.5]],
            update_output_bias=confine(D_MODEL),
        ),
        {
            "fc_in.weight": LOW_ROWS,
            "fc_in.bias": LOW_ROWS,
            "fc_out.weight": LOW_COLUMNS,
            "fc_out.bias": LOW_FEATURES,
        },
    ),
    "gated_mlp": Case(
        OrdinaryGatedMLP,
        lambda sites=None: RoutedGatedMLP(D_MODEL, D_FF, sites=sites),
        RoutedGatedMLP.from_mlp,
        lambda layer, x, routes, sites: routed_gated_mlp(
            x, layer.gate_proj.weight, layer.up_proj.weight, layer.down_proj.weight, routes, sites, "silu"
        ),
        MLPSites(update=confine(D_FF), pre=confine(D_FF, 0.5, 2.0)),
        {
            "gate_proj.weight": LOW_ROWS,
            "up_proj.weight": LOW_ROWS,
            "down_proj.weight": LOW_COLUMNS,
        },
    ),
    "rms_norm": Case(
        lambda: nn.RMSNorm(D_MODEL),
        lambda sites=None: RoutedRMSNorm(D_MODEL, sites=sites),
        RoutedRMSNorm.from_rms_norm,
        lambda layer, x, routes, sites: routed_rms_norm(x, layer.weight, routes, sites, None),
        NormSites(update=confine(D_MODEL)),
        {"weight": LOW_FEATURES},
    ),
    "llama_norm": Case(
        LlamaRMSNorm,
        lambda sites=None: RoutedRMSNorm(D_MODEL, 1e-5, casting_mode="llama", sites=sites),
        lambda norm, sites: RoutedRMSNorm.from_rms_norm(norm, sites, casting_mode="llama"),
        lambda layer, x, routes, sites: routed_rms_norm(
            x, layer.weight, routes, sites, 1e-5, casting_mode="llama"
        ),
        NormSites(update=confine(D_MODEL)),
        {"weight": LOW_FEATURES},
    ),
    "gemma_norm": Case(
        GemmaRMSNorm,
        lambda sites=None: RoutedRMSNorm(D_MODEL, 1e-5, offset=1.0, casting_mode="gemma", sites=sites),
        lambda norm, sites: RoutedRMSNorm.from_rms_norm(norm, sites, offset=1.0, casting_mode="gemma"),
        lambda layer, x, routes, sites: routed_rms_norm(x, layer.weight, routes, sites, 1e-5, 1.0, "gemma"),
        NormSites(update=confine(D_MODEL)),
        {"weight": LOW_FEATURES},
    ),
    "layer_norm": Case(
        lambda: nn.LayerNorm(D_MODEL, 1e-4),
        lambda sites=None: RoutedLayerNorm(D_MODEL, 1e-4, sites=sites),
        RoutedLayerNorm.from_layer_norm,
        lambda layer, x, routes, sites: routed_layer_norm(x, layer.weight, layer.bias, routes, sites, 1e-4),
        NormSites(update=confine(D_MODEL)),
        {"weight": LOW_FEATURES, "bias": LOW_FEATURES},
    ),
    "embedding": Case(
        lambda: nn.Embedding(VOCABULARY, D_MODEL, padding_idx=3),
        lambda sites=None: RoutedEmbedding(VOCABULARY, D_MODEL, padding_idx=3, sites=sites),
        RoutedEmbedding.from_embedding,
        lambda layer, x, routes, sites: routed_embedding(x, layer.weight, routes, sites, 3),
        EmbeddingSites(update=confine(D_MODEL)),
        {"weight": LOW_FEATURES},
    ),
}

LAYERS = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def input_of(case: Case, dtype: torch.dtype = torch.float32) -> Tensor:
    """`[B, S, D]`, or for the embedding `[B, S]`: every token of the vocabulary once."""
    if case.ordinary is CASES["embedding"].ordinary:
        return torch.arange(VOCABULARY).view(BATCH, SEQUENCE)
    return torch.randn(BATCH, SEQUENCE, D_MODEL, dtype=dtype)


def routes_of(*counts: int) -> Routes:
    ids = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    return Routes.of(ids.view(BATCH, SEQUENCE), ROUTES)


def gradients(output: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    return torch.autograd.grad(output, inputs, torch.randn_like(output))


def assert_same(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def assert_same_layer(layer: Any, other: Any, x: Tensor) -> None:
    """The same parameters, sites, outputs and gradients."""
    routes = routes_of(6, 4)
    assert_same(dict(layer.state_dict()), dict(other.state_dict()))
    assert repr(layer) == repr(other)
    for name, table in layer.sites.tables.items():
        assert_same(table.weights, other.sites.tables[name].weights)
    y, z = layer(x, routes), other(x, routes)
    assert_same(y, z)
    assert_same(gradients(y, *layer.parameters()), gradients(z, *other.parameters()))


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


def pickled(layer: Any) -> Any:
    return pickle.loads(pickle.dumps(layer))


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

    def copied() -> bool:
        devices = {device.type for _, device in copies}
        done = {table for table, _ in copies}
        copies.clear()
        return devices == {"cpu"} and done == tables

    layer = case.routed(sites=case.sites)
    assert copied()
    layer.to(torch.float64)
    assert copied()
    copy.deepcopy(layer)
    assert copied()
    layer.to("meta")
    assert not copies
    layer.to_empty(device="cpu")
    assert copied()
    layer.sites = None
    layer.sites = case.sites
    assert copied()


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


class Scaled(nn.Embedding):
    pass


class LoRALinear(nn.Linear):
    pass


def with_child(mlp: Any, name: str, child: nn.Module) -> Any:
    mlp.add_module(name, child)
    return mlp


def patched(linear: nn.Linear) -> nn.Linear:
    linear.forward = lambda x: x  # type: ignore[method-assign]
    return linear


ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "width": (
        lambda: RoutedLinear(8, 4, sites=LinearSites(input=torch.ones(2, 4))),
        ValueError,
        r"LinearSites\.input: got a table of 4 features, expected 8 or 1",
    ),
    "width of the model": (
        lambda: RoutedMLP(8, 4, sites=MLPSites(output=torch.zeros(2, 4))),
        ValueError,
        r"MLPSites\.output: got a table of 4 features, expected 8 or 1",
    ),
    "width of a norm": (
        lambda: RoutedLayerNorm(8, sites=NormSites(update=torch.zeros(2, 4))),
        ValueError,
        r"NormSites\.update: got a table of 4 features, expected 8 or 1",
    ),
    "width when reassigned": (
        lambda: setattr(RoutedEmbedding(8, 4), "sites", EmbeddingSites(update=torch.zeros(2, 8))),
        ValueError,
        r"EmbeddingSites\.update: got a table of 8 features, expected 4 or 1",
    ),
    "routes": (
        lambda: RoutedLinear(8, 4, sites=LinearSites(input=torch.zeros(2, 8), output=torch.zeros(3, 4))),
        ValueError,
        r"LinearSites\.input: got a table of 2 routes, expected 3 \(as in output\)",
    ),
    "bias site": (
        lambda: RoutedLinear(8, 4, bias=False, sites=LinearSites(update_bias=torch.ones(2, 4))),
        ValueError,
        r"LinearSites\.update_bias: got Table.*expected None: the layer has no bias",
    ),
    "bias site of an MLP": (
        lambda: RoutedGatedMLP(8, 4, sites=MLPSites(update_output_bias=torch.ones(2, 8))),
        ValueError,
        r"MLPSites\.update_output_bias: got Table.*expected None: the MLP has no output bias",
    ),
    "sites of another layer": (
        lambda: RoutedLinear(8, 4, sites=MLPSites()),  # type: ignore[arg-type]
        TypeError,
        r"sites: got a MLPSites, expected gradroute\.LinearSites or None",
    ),
    "activation": (lambda: RoutedMLP(8, 4, activation="swish"), ValueError, "activation: got 'swish'"),
    "casting mode": (lambda: RoutedRMSNorm(8, casting_mode="bert"), ValueError, "casting_mode: got 'bert'"),
    "max_norm": (
        lambda: RoutedEmbedding(8, 4, max_norm=1.0),
        ValueError,
        r"max_norm: got 1\.0, expected None",
    ),
    "scale_grad_by_freq": (
        lambda: RoutedEmbedding.from_embedding(nn.Embedding(8, 4, scale_grad_by_freq=True)),
        ValueError,
        "scale_grad_by_freq: got True, expected False",
    ),
    "sparse": (
        lambda: RoutedEmbedding.from_embedding(nn.Embedding(8, 4, sparse=True)),
        ValueError,
        "sparse: got True, expected False",
    ),
    "norm without weight": (
        lambda: RoutedRMSNorm(8, elementwise_affine=False),
        ValueError,
        "elementwise_affine: got False, expected True",
    ),
    "layer norm without weight": (
        lambda: RoutedLayerNorm.from_layer_norm(nn.LayerNorm(8, elementwise_affine=False)),
        ValueError,
        "elementwise_affine: got False, expected True",
    ),
    "RMS norm without weight": (
        lambda: RoutedRMSNorm.from_rms_norm(nn.RMSNorm(8, elementwise_affine=False)),
        TypeError,
        r"norm: got a RMSNorm of parameters {}, expected a weight \[D\]",
    ),
    "norm over two dimensions": (
        lambda: RoutedLayerNorm((4, 8)),
        ValueError,
        r"normalized_shape: got \(4, 8\), expected one dimension",
    ),
    "norm with a bias": (
        lambda: RoutedRMSNorm.from_rms_norm(nn.LayerNorm(8)),
        TypeError,
        r"norm: got a LayerNorm of parameters {'weight': \[8\], 'bias': \[8\]}",
    ),
    "norm without epsilon": (
        lambda: RoutedRMSNorm.from_rms_norm(nn.PReLU(8)),
        TypeError,
        "norm: got a PReLU, expected a module with variance_epsilon or eps",
    ),
    "norm of unknown rounding": (
        lambda: RoutedRMSNorm.from_rms_norm(LlamaRMSNorm()),
        ValueError,
        "casting_mode: got None for a LlamaRMSNorm",
    ),
    "subclass of a linear": (
        lambda: RoutedLinear.from_linear(LoRALinear(8, 4)),
        TypeError,
        r"linear: got a LoRALinear, expected a torch\.nn\.Linear itself",
    ),
    "parametrised linear": (
        lambda: RoutedLinear.from_linear(nn.utils.parametrizations.weight_norm(nn.Linear(8, 4))),
        TypeError,
        "linear: got a ParametrizedLinear",
    ),
    "patched linear": (
        lambda: RoutedLinear.from_linear(patched(nn.Linear(8, 4))),
        TypeError,
        "linear: got a Linear whose forward or weight was replaced",
    ),
    "subclass of an embedding": (
        lambda: RoutedEmbedding.from_embedding(Scaled(8, 4)),
        TypeError,
        r"embedding: got a Scaled, expected a torch\.nn\.Embedding itself",
    ),
    "LoRA in an MLP": (
        lambda: RoutedMLP.from_mlp(with_child(OrdinaryMLP(), "fc_out", LoRALinear(D_FF, D_MODEL))),
        TypeError,
        r"mlp\.fc_out: got a LoRALinear.*gradroute\.routed_activation \(gated: gradroute\.routed_glu\)",
    ),
    "names": (
        lambda: RoutedMLP.from_mlp(NanoMLP()),
        ValueError,
        "names: got 'fc_in', expected submodules of NanoMLP: c_fc, gelu, c_proj, dropout",
    ),
    "number of names": (
        lambda: RoutedGatedMLP.from_mlp(NanoMLP(), names=("c_fc", "c_proj")),
        ValueError,
        r"names: got \('c_fc', 'c_proj'\), expected 3 names",
    ),
    "order of names": (
        lambda: RoutedGatedMLP.from_mlp(OrdinaryGatedMLP(), names=("down_proj", "up_proj", "gate_proj")),
        ValueError,
        r"names: got up_proj of shape \[12, 8\], expected \[8, 12\]: gate_proj is \[12, 8\]",
    ),
    "other parameters": (
        lambda: RoutedMLP.from_mlp(with_child(OrdinaryMLP(), "norm", nn.RMSNorm(D_FF))),
        ValueError,
        r"mlp: got parameters or buffers norm\.weight, expected only those of \('fc_in', 'fc_out'\)",
    ),
    "dropout": (
        lambda: RoutedMLP.from_mlp(NanoMLP(dropout=0.1), names=("c_fc", "c_proj")),
        ValueError,
        r"mlp\.dropout: got dropout with p = 0\.1, expected none",
    ),
    "another activation": (
        lambda: RoutedMLP.from_mlp(NanoMLP(), names=("c_fc", "c_proj"), activation="silu"),
        ValueError,
        r"activation: got 'silu', expected 'gelu', which mlp\.gelu is",
    ),
}


@pytest.mark.parametrize(("call", "kind", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(call: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        call()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = CASES["embedding"].routed(CASES["embedding"].sites)
        self.norm = CASES["rms_norm"].routed(CASES["rms_norm"].sites)
        self.gated = CASES["gated_mlp"].routed(CASES["gated_mlp"].sites)
        self.layer_norm = CASES["layer_norm"].routed(CASES["layer_norm"].sites)
        self.mlp = CASES["mlp"].routed(CASES["mlp"].sites)
        self.head = CASES["linear"].routed(CASES["linear"].sites)

    def forward(self, tokens: Tensor, routes: Routes | None = None) -> Tensor:
        x = self.embedding(tokens, routes)
        x = x + self.gated(self.norm(x, routes), routes)
        x = x + self.mlp(self.layer_norm(x, routes), routes)
        return self.head(x, routes)


def check_compiled(device: str) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    block = Block().to(device)
    compiled = torch.compile(block, fullgraph=True, backend=counter)
    tokens, parameters = input_of(CASES["embedding"]).to(device), list(block.parameters())
    results = []
    for counts in [(6, 4), (1, 9), (10, 0)]:
        routes = routes_of(*counts).to(device)
        got, expected = compiled(tokens, routes), block(tokens, routes)
        results.append(gradients(got, *parameters))
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(results[-1], gradients(expected, *parameters))
    assert counter.frame_count == 1
    for one, other in itertools.pairwise(results):
        assert not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))

    block.head.sites = LinearSites(output=torch.zeros(ROUTES, D_OUT))
    assert_same(
        gradients(compiled(tokens, routes), *parameters), tuple(torch.zeros_like(p) for p in parameters)
    )


# Dynamo's own, whenever it traces an autograd.Function.
DYNAMO = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@DYNAMO
def test_compiled_block() -> None:
    check_compiled("cpu")


@DYNAMO
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_block_on_a_gpu() -> None:
    check_compiled("cuda")
    layer = RoutedLinear(8, 4, sites=LinearSites(output=confine(4)))
    device = torch.device("cuda", torch.cuda.current_device())
    for moved in (layer.cuda(), pickled(layer)):
        assert device in moved.sites.output._copies
