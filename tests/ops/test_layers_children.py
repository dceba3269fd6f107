"""Submodules of layers that are more than a torch.nn.Linear: hooks, parametrizations, pruning, modules in their place.

A layer reads the weights of its linear submodules only where a call would do nothing else. Every case is compared with
the same submodules called in the ordinary way, with the detach idiom `m * x + (1 - m) * x.detach()` between them.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as every_module
from torch.nn.utils import parametrizations, prune

from gradroute import (
    AttentionSites,
    LinearSites,
    MLPSites,
    RoutedAttention,
    RoutedEmbedding,
    RoutedGatedMLP,
    RoutedLayerNorm,
    RoutedLinear,
    RoutedMLP,
    Routes,
    Table,
)
from gradroute.layers.reading import is_readable
from gradroute.tables import localize

D_MODEL, D_FF, HEADS, HEAD_DIM = 8, 12, 2, 4
HIDDEN = localize(2, D_FF, {1: slice(0, 5)}, on=0.5)
OUTPUT = localize(2, D_MODEL, {1: slice(0, 3)})
BY_HEAD = localize(2, HEADS, {1: [0]})
IDS = torch.tensor([[0, 1, 1, 0, 1], [1, 0, 0, 1, 1]])
ROUTES = Routes.of(IDS, 2)


def masked(x: Tensor, table: Table) -> Tensor:
    """The detach idiom."""
    m = table.weights[IDS].to(x.dtype)
    return m * x + (1 - m) * x.detach()


def by_hand(layer: Any, x: Tensor) -> Tensor:
    """The layers below with the sites HIDDEN and OUTPUT, or BY_HEAD: every submodule is called."""
    if isinstance(layer, RoutedMLP):
        return masked(layer.fc_out(masked(nn.functional.gelu(layer.fc_in(x)), HIDDEN)), OUTPUT)
    if isinstance(layer, RoutedGatedMLP):
        h = nn.functional.silu(layer.gate_proj(x)) * layer.up_proj(x)
        return masked(layer.down_proj(masked(h, HIDDEN)), OUTPUT)
    q, k, v = (
        getattr(layer, name)(x).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)
        for name in ("q_proj", "k_proj", "v_proj")
    )
    z = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)
    z = masked(z.flatten(2), Table(BY_HEAD.weights.repeat_interleave(HEAD_DIM, dim=1)))
    return layer.o_proj(z)


LAYERS: dict[str, Callable[[], Any]] = {
    "mlp": lambda: RoutedMLP(D_MODEL, D_FF, sites=MLPSites(hidden=HIDDEN, output=OUTPUT)),
    "gated_mlp": lambda: RoutedGatedMLP(
        D_MODEL, D_FF, bias=True, sites=MLPSites(hidden=HIDDEN, output=OUTPUT)
    ),
    "attention": lambda: RoutedAttention(D_MODEL, HEADS, sites=AttentionSites(heads=BY_HEAD)),
}


def hooked(linear: nn.Module) -> nn.Module:
    linear.register_forward_hook(lambda module, args, output: output * 1.5)
    return linear


def pre_hooked(linear: nn.Module) -> nn.Module:
    linear.register_forward_pre_hook(lambda module, args: (args[0] + 0.5,))
    return linear


def backward_hooked(linear: nn.Module) -> nn.Module:
    linear.register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * 2,))
    return linear


def backward_pre_hooked(linear: nn.Module) -> nn.Module:
    linear.register_full_backward_pre_hook(lambda module, outputs: (outputs[0] * 2,))
    return linear


def patched(linear: nn.Module) -> nn.Module:
    plain = linear.forward
    linear.forward = lambda x: plain(x).tanh()  # type: ignore[method-assign]
    return linear


def quietly(function: Callable[..., Any]) -> Callable[..., Any]:
    def wrapped(linear: nn.Module) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function(linear)

    return wrapped


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def doubled(linear: nn.Module) -> nn.Module:
    nn.utils.parametrize.register_parametrization(linear, "weight", Doubled())
    return linear


class Scaled(nn.Linear):
    """A linear layer whose forward is its own, as that of a quantised one is."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 3


def scaled(linear: nn.Linear) -> nn.Module:
    return Scaled(linear.in_features, linear.out_features, linear.bias is not None)


CHILDREN: dict[str, Callable[[Any], nn.Module]] = {
    "forward hook": hooked,
    "forward pre-hook": pre_hooked,
    "backward hook": backward_hooked,
    "backward pre-hook": backward_pre_hooked,
    "another forward": patched,
    "pruned": lambda linear: prune.l1_unstructured(linear, "weight", amount=0.5),
    "old weight_norm": quietly(nn.utils.weight_norm),
    "old spectral_norm": nn.utils.spectral_norm,
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": lambda linear: parametrizations.orthogonal(linear),
    "parametrized": doubled,
    "another class": scaled,
    "several modules": lambda linear: nn.Sequential(linear, nn.Identity()),
}


def train(function: Callable[[Any, Tensor], Tensor], layer: Any, steps: int = 2) -> list[Tensor]:
    """Outputs and gradients of two steps: a weight that a hook computes is stale in the second."""
    torch.manual_seed(1)
    layer.double()
    x = torch.randn(*IDS.shape, D_MODEL, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(*IDS.shape, D_MODEL, dtype=torch.float64)
    optimizer, seen = torch.optim.SGD(layer.parameters(), lr=0.1), []
    for _ in range(steps):
        optimizer.zero_grad()
        x.grad = None
        y = function(layer, x)
        (y * direction).sum().backward()
        seen += [y.detach(), x.grad.clone(), *(p.grad.clone() for p in layer.parameters())]
        optimizer.step()
    return seen


def twins(layer: Any, changed: Callable[[Any], nn.Module] = lambda linear: linear) -> tuple[Any, Any]:
    """Two equal layers whose submodules are each `changed` in the same way."""
    made = [layer, copy.deepcopy(layer)]
    for one in made:
        torch.manual_seed(2)
        for name in one.names:
            setattr(one, name, changed(getattr(one, name)))
    return made[0], made[1]


def assert_close(got: list[Tensor], expected: list[Tensor]) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.setup(
    "Modules and hooks", "hooks, parametrize, weight_norm, prune and other modules below gradroute's layers"
)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("change", CHILDREN)
def test_submodules_do_what_a_call_of_them_does(layer: str, change: str) -> None:
    """Whatever a submodule became, two steps of training are those of calling it."""
    one, other = twins(LAYERS[layer](), CHILDREN[change])
    assert_close(train(lambda layer, x: layer(x, ROUTES), one), train(by_hand, other))


@pytest.mark.parametrize("layer", LAYERS)
def test_unrouted_layers_call_them_too(layer: str) -> None:
    one, other = twins(LAYERS[layer](), hooked)
    x = torch.randn(*IDS.shape, D_MODEL)
    torch.testing.assert_close(one(x), by_hand(other, x))
    other.sites = None
    torch.testing.assert_close(other(x, ROUTES), one(x))


@contextmanager
def everywhere(register: str, hook: Callable[..., Any]) -> Iterator[None]:
    handle = getattr(every_module, register)(hook)
    try:
        yield
    finally:
        handle.remove()


GLOBAL_HOOKS: dict[str, Callable[..., Any]] = {
    "register_module_forward_hook": lambda module, args, output: (
        output * 1.5 if type(module) is nn.Linear else None
    ),
    "register_module_forward_pre_hook": lambda module, args: (
        (args[0] + 0.5,) if type(module) is nn.Linear else None
    ),
    "register_module_full_backward_hook": lambda module, inputs, outputs: (
        (inputs[0] * 2,) if type(module) is nn.Linear else None
    ),
    "register_module_full_backward_pre_hook": lambda module, outputs: (
        (outputs[0] * 2,) if type(module) is nn.Linear else None
    ),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("register", GLOBAL_HOOKS)
def test_hooks_of_every_module_run(layer: str, register: str) -> None:
    one, other = twins(LAYERS[layer]())
    with everywhere(register, GLOBAL_HOOKS[register]):
        assert_close(train(lambda layer, x: layer(x, ROUTES), one), train(by_hand, other))
        assert not is_readable(nn.Linear(2, 2))
    assert is_readable(nn.Linear(2, 2))


def test_updates_of_a_parametrized_submodule() -> None:
    """A computed weight is read once, so that update sites reach what it is computed of."""
    update = localize(2, D_FF, {1: slice(0, 5)})
    layer = RoutedGatedMLP(D_MODEL, D_FF, sites=MLPSites(update=update))
    for name in layer.names:
        setattr(layer, name, doubled(getattr(layer, name)))
    plain = RoutedGatedMLP(D_MODEL, D_FF, sites=MLPSites(update=update))
    for name in plain.names:
        getattr(plain, name).weight.data = getattr(layer, name).weight.detach().clone()
    x = torch.randn(*IDS.shape, D_MODEL)
    layer(x, ROUTES).pow(3).sum().backward()
    plain(x, ROUTES).pow(3).sum().backward()
    for name in plain.names:
        original = getattr(layer, name).parametrizations.weight.original
        torch.testing.assert_close(original.grad, 2 * getattr(plain, name).weight.grad)


@pytest.mark.setup(
    "Modules and hooks",
    "tables of parameters for submodules with hooks, weight_norm or prune",
    refused="their gradients cannot be routed; RoutedLinear's can",
)
@pytest.mark.parametrize("change", ["forward hook", "pruned", "old weight_norm", "another class"])
def test_updates_of_submodules_that_must_be_called_are_refused(change: str) -> None:
    """Who may update a weight cannot be said around a call; the message says what can."""
    layer = RoutedGatedMLP(D_MODEL, D_FF, sites=MLPSites(update=localize(2, D_FF, {1: slice(0, 5)})))
    layer.down_proj = CHILDREN[change](layer.down_proj)
    x = torch.randn(*IDS.shape, D_MODEL)
    with pytest.raises(
        TypeError, match=r"RoutedGatedMLP\.down_proj: got .*update_in, update_out|.*\(update\)"
    ):
        layer(x, ROUTES)
    layer(x)
    attention = RoutedAttention(D_MODEL, HEADS, sites=AttentionSites(update=BY_HEAD))
    attention.v_proj = CHILDREN[change](attention.v_proj)
    with pytest.raises(TypeError, match=r"RoutedAttention\.v_proj: got .*v_proj = RoutedLinear\.from_linear"):
        attention(x, ROUTES)


def test_a_routed_linear_in_the_place_of_a_submodule_takes_the_sites() -> None:
    """The way out that the refusal names: update sites, hooks and pruning at once, with the plain layer's gradients."""
    sites = MLPSites(hidden=HIDDEN, update=localize(2, D_FF, {1: slice(0, 5)}), output=OUTPUT)
    layer, plain = (RoutedMLP(D_MODEL, D_FF, sites=sites) for _ in range(2))
    calls = []
    for name in layer.names:
        linear = RoutedLinear.from_linear(getattr(layer, name))
        setattr(layer, name, prune.l1_unstructured(linear, "weight", amount=0.5))
        linear.register_forward_hook(lambda module, args, output: calls.append(module))
        linear(torch.zeros(1, linear.in_features))
        getattr(plain, name).load_state_dict({"weight": linear.weight.detach(), "bias": linear.bias.detach()})
    calls.clear()
    x = torch.randn(*IDS.shape, D_MODEL)
    for one in (layer, plain):
        one(x, ROUTES).pow(2).sum().backward()
    assert calls == [layer.fc_in, layer.fc_out]
    for name in layer.names:
        got, expected = getattr(layer, name), getattr(plain, name)
        torch.testing.assert_close(got.weight_orig.grad, got.weight_mask * expected.weight.grad)
        torch.testing.assert_close(got.bias.grad, expected.bias.grad)


def test_sites_in_two_places_are_refused() -> None:
    layer = RoutedMLP(D_MODEL, D_FF, sites=MLPSites(output=OUTPUT))
    layer.fc_out = RoutedLinear(D_FF, D_MODEL, sites=LinearSites(output=OUTPUT))
    x = torch.randn(*IDS.shape, D_MODEL)
    with pytest.raises(TypeError, match=r"RoutedMLP\.fc_out: got LinearSites.* of its own beside MLPSites"):
        layer(x, ROUTES)
    layer.sites = MLPSites(hidden=HIDDEN)
    layer(x, ROUTES).sum().backward()
    torch.testing.assert_close(layer.fc_out.bias.grad, OUTPUT.weights[IDS].sum((0, 1)))


@pytest.mark.parametrize("routes", [None, ROUTES])
def test_submodules_that_do_not_fit_are_refused(routes: Routes | None) -> None:
    x = torch.randn(*IDS.shape, D_MODEL)
    layer = RoutedGatedMLP(D_MODEL, D_FF, sites=MLPSites(hidden=HIDDEN))
    layer.up_proj = nn.Linear(D_MODEL, D_FF + 1)
    with pytest.raises(
        ValueError, match=r"RoutedGatedMLP: got up_proj of shape \[13, 8\], expected \[12, 8\]"
    ):
        layer(x, routes)
    layer.up_proj = nn.Linear(D_MODEL, D_FF)
    assert layer(x, routes).shape == x.shape
    attention = RoutedAttention(D_MODEL, HEADS, sites=AttentionSites(heads=[[1.0], [0.0]]))
    attention.k_proj = attention.v_proj = nn.Linear(D_MODEL, HEAD_DIM)  # one head: attention itself would run
    with pytest.raises(ValueError, match=r"RoutedAttention: got k_proj of shape \[4, 8\], expected \[8, 8\]"):
        attention(x, routes)


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (RoutedLinear(D_MODEL, D_MODEL, sites=LinearSites(output=OUTPUT)), torch.randn(*IDS.shape, D_MODEL)),
        (RoutedLayerNorm(D_MODEL), torch.randn(*IDS.shape, D_MODEL)),
        (RoutedEmbedding(4, D_MODEL), torch.zeros_like(IDS)),
        (LAYERS["mlp"](), torch.randn(*IDS.shape, D_MODEL)),
        (LAYERS["attention"](), torch.randn(*IDS.shape, D_MODEL)),
    ],
    ids=["linear", "norm", "embedding", "mlp", "attention"],
)
def test_a_hook_that_returns_another_input_keeps_the_routes(layer: Any, x: Tensor) -> None:
    """Routes are handed on as a keyword, whatever way they came: a pre-hook's result replaces positional arguments."""
    seen = []
    handles = [
        layer.register_forward_pre_hook(lambda module, args: args[0]),
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append((len(args), kwargs["routes"])), with_kwargs=True
        ),
    ]
    y = layer(x, ROUTES)
    assert seen == [(1, ROUTES)]
    for handle in handles:
        handle.remove()
    parameters = list(layer.parameters())
    got = torch.autograd.grad(y.pow(2).sum(), parameters)
    torch.testing.assert_close(
        got, torch.autograd.grad(layer(x, routes=ROUTES).pow(2).sum(), parameters), rtol=0, atol=0
    )


def test_a_parametrized_routed_linear() -> None:
    """RoutedLinear is a torch.nn.Linear to parametrize: its mask stands before what makes the weight."""
    layer, plain = (RoutedLinear(D_MODEL, D_MODEL, sites=LinearSites(output=OUTPUT)) for _ in range(2))
    doubled(layer)
    plain.load_state_dict({"weight": layer.weight.detach(), "bias": layer.bias.detach()})
    x = torch.randn(*IDS.shape, D_MODEL)
    masked(nn.Linear.forward(plain, x), OUTPUT).pow(3).sum().backward()
    layer(x, ROUTES).pow(3).sum().backward()
    torch.testing.assert_close(layer.parametrizations.weight.original.grad, 2 * plain.weight.grad)


def test_nobody_updates_a_frozen_submodule() -> None:
    """Beside update sites a frozen submodule may be anything."""
    layer = RoutedMLP(D_MODEL, D_FF, sites=MLPSites(update=localize(2, D_FF, {1: slice(0, 5)})))
    layer.fc_in = Scaled(D_MODEL, D_FF).requires_grad_(False)
    x = torch.randn(*IDS.shape, D_MODEL, requires_grad=True)
    torch.testing.assert_close(layer(x, ROUTES), layer.fc_out(nn.functional.gelu(layer.fc_in(x))))
    layer.fc_in.requires_grad_()
    with pytest.raises(TypeError, match=r"RoutedMLP\.fc_in: got .*Scaled"):
        layer(x, ROUTES)
