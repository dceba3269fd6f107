"""Errors of the layers: the type, and the words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from layer_cases import (
    D_FF,
    D_MODEL,
    LlamaRMSNorm,
    NanoMLP,
    OrdinaryGatedMLP,
    OrdinaryMLP,
)
from torch import nn
from transformers.activations import NewGELUActivation

from gradroute import LinearSites, MLPSites
from gradroute.embedding import EmbeddingSites
from gradroute.layers import (
    RoutedEmbedding,
    RoutedGatedMLP,
    RoutedLayerNorm,
    RoutedLinear,
    RoutedMLP,
    RoutedRMSNorm,
)
from gradroute.norm import NormSites


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
    "an activation of transformers": (
        lambda: RoutedMLP.from_mlp(with_child(OrdinaryMLP(), "act", NewGELUActivation())),
        ValueError,
        r"activation: got 'gelu', expected 'gelu_new', which mlp\.act is",
    ),
    "an unknown activation": (
        lambda: RoutedMLP.from_mlp(with_child(OrdinaryMLP(), "act", nn.Mish())),
        ValueError,
        r"activation: got None, expected the name of what mlp\.act computes, a Mish",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
