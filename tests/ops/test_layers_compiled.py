"""Layers under torch.compile: one graph for all ids, and new sites take effect."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch._dynamo.testing
from layer_cases import (
    CASES,
    D_OUT,
    ROUTES,
    assert_same,
    confine,
    gradients,
    input_of,
    pickled,
    routes_of,
)
from torch import Tensor, nn

from gradroute import LinearSites, Routes
from gradroute.layers import (
    RoutedLinear,
)


class Model(nn.Module):
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


# Dynamo warns so whenever it traces an autograd.Function.
DYNAMO = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@pytest.mark.slow
@DYNAMO
def test_compiled_layers(device: torch.device) -> None:
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    model = Model().to(device)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    tokens, parameters = input_of(CASES["embedding"]).to(device), list(model.parameters())
    results = []
    for counts in [(6, 4), (1, 9), (10, 0)]:
        routes = routes_of(*counts).to(device)
        got, expected = compiled(tokens, routes), model(tokens, routes)
        results.append(gradients(got, *parameters))
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(results[-1], gradients(expected, *parameters))
    assert counter.frame_count == 1
    for one, other in itertools.pairwise(results):
        assert not all(torch.equal(a, b) for a, b in zip(one, other, strict=True))

    model.head.sites = LinearSites(output=torch.zeros(ROUTES, D_OUT))
    assert_same(
        gradients(compiled(tokens, routes), *parameters), tuple(torch.zeros_like(p) for p in parameters)
    )


@pytest.mark.gpu
def test_tables_follow_a_layer_to_the_gpu() -> None:
    """With the layer, not at its first call, which a CUDA graph may capture; also from a file."""
    layer = RoutedLinear(8, 4, sites=LinearSites(output=confine(4)))
    device = torch.device("cuda", torch.cuda.current_device())
    for moved in (layer.cuda(), pickled(layer)):
        assert device in moved.sites.output._copies
