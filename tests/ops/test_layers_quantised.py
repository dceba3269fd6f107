"""Layers whose weights torchao quantised: their own class multiplies, and masks of activations stand around it."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("torchao")

from torch import Tensor
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from gradroute import LinearSites, MLPSites, RoutedLinear, RoutedMLP, Routes, Table
from gradroute.tables import localize

IDS = torch.tensor([[0, 1, 1, 0, 1]])
ROUTES = Routes.of(IDS, 2)
HIDDEN, OUTPUT = localize(2, 12, {1: slice(0, 5)}, on=0.5), localize(2, 8, {1: slice(0, 3)})


def masked(x: Tensor, table: Table) -> Tensor:
    m = table.weights[IDS]
    return m * x + (1 - m) * x.detach()


def gradient(y: Tensor, x: Tensor) -> Tensor:
    torch.manual_seed(1)
    return torch.autograd.grad(y, x, torch.randn_like(y))[0]


def test_submodules_are_called() -> None:
    layer = RoutedMLP(8, 12, sites=MLPSites(hidden=HIDDEN, output=OUTPUT))
    quantize_(layer, Int8WeightOnlyConfig())
    x = torch.randn(1, 5, 8, requires_grad=True)
    y = layer(x, ROUTES)
    expected = masked(layer.fc_out(masked(torch.nn.functional.gelu(layer.fc_in(x)), HIDDEN)), OUTPUT)
    assert torch.equal(y, expected)
    torch.testing.assert_close(gradient(y, x), gradient(expected, x))


def test_a_routed_linear() -> None:
    layer = RoutedLinear(8, 8, sites=LinearSites(input=[[1.0], [0.5]], output=OUTPUT))
    quantize_(layer, Int8WeightOnlyConfig())
    x = torch.randn(1, 5, 8, requires_grad=True)
    y = layer(x, ROUTES)
    expected = masked(layer(masked(x, Table([[1.0], [0.5]]))), OUTPUT)
    assert torch.equal(y, expected)
    torch.testing.assert_close(gradient(y, x), gradient(expected, x))
    layer.sites = LinearSites(update_rows=OUTPUT)
    layer.requires_grad_()
    with pytest.raises(TypeError, match=r"update_rows: got tables beside a weight that is a .*Tensor"):
        layer(x, ROUTES)
