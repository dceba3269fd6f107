"""One case a layer: the ordinary layer, the routed one, its op, and sites whose effect is known."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor, nn

from gradroute import LinearSites, MLPSites, Routes, Table, routed_gated_mlp, routed_linear, routed_mlp
from gradroute.embedding import EmbeddingSites, routed_embedding
from gradroute.layers import (
    RoutedEmbedding,
    RoutedGatedMLP,
    RoutedLayerNorm,
    RoutedLinear,
    RoutedMLP,
    RoutedRMSNorm,
)
from gradroute.layers.lora_sites import sites_around
from gradroute.norm import NormSites, routed_layer_norm, routed_rms_norm
from gradroute.skipping.tiling import tables_in
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
    """nanoGPT's MLP."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.c_fc = nn.Linear(D_MODEL, D_FF, bias=False)
        self.gelu = nn.GELU()
        self.c_proj = nn.Linear(D_FF, D_MODEL, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class OrdinaryGatedMLP(nn.Module):
    """Llama's MLP."""

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
    untouched: dict[str, Any]  # the elements that tokens of route 1 do not train under these sites


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


def pickled(layer: Any) -> Any:
    return pickle.loads(pickle.dumps(layer))


def tables_of_groups(layer: Any) -> set[Table]:
    """The tables of grouped products: of each of the layer's ops, and of LoRA around it, whose sites are others."""
    of_ops = [sites for sites in layer._op_sites if sites is not None]
    of_lora = [sites for of_op in of_ops for sites in sites_around(of_op) if sites is not None]
    return {table for sites in of_ops + of_lora for table in tables_in(getattr(sites, "tilings", None))}
