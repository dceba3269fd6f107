"""Classes that somebody gave another forward: routed modules compute themselves, so they say that it is not called."""

import functools

import pytest
import torch
from model_zoo import backward, fresh, logits_of
from routed_models import all_sites, batch, check, expect
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama as llama
from transformers.pytorch_utils import Conv1D

from gradroute import AttentionSites, MLPSites
from gradroute.models import RoutingPlan, localize_mlp, route, unroute

KINDS = [
    llama.LlamaDecoderLayer,
    llama.LlamaAttention,
    llama.LlamaMLP,
    llama.LlamaRMSNorm,
    nn.Embedding,
    nn.Linear,
]


def plan():
    return RoutingPlan(2, **all_sites("llama"))


def patched(kind, monkeypatch):
    """A forward that does more, under the name and the module of the ordinary one."""
    ordinary = kind.forward

    @functools.wraps(ordinary)
    def forward(self, *args, **kwargs):
        y = ordinary(self, *args, **kwargs)
        return (y[0] * 2, *y[1:]) if isinstance(y, tuple) else y * 2

    monkeypatch.setattr(kind, "forward", forward)


@pytest.mark.setup(
    "Modules and hooks",
    "route after a class was given another forward",
    refused="routed modules would not call it",
)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_patch_before_route_is_refused(kind, monkeypatch):
    model = fresh("llama")
    words, _, _ = batch()
    patched(kind, monkeypatch)
    plain = logits_of(model, words)
    with expect(TypeError, f"{kind.__name__} whose class has the forward {__name__}.forward"):
        route(model, plan())
    assert torch.equal(logits_of(model, words), plain)


@pytest.mark.setup(
    "Modules and hooks",
    "a class that is given another forward after route",
    refused="routed modules would not call it",
)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_patch_after_route_is_refused_in_the_next_routed_forward(kind, monkeypatch):
    """Without routes it is called, and so it is after unroute."""
    model, other = fresh("llama"), fresh("llama")
    words, targets, ids = batch()
    route(model, plan())
    patched(kind, monkeypatch)
    plain = logits_of(other, words)
    assert torch.equal(logits_of(model, words), plain)
    with expect(RuntimeError, f"{kind.__name__}: got routes for a module whose class was given the forward"):
        backward(model, words, targets, route_ids=ids)
    assert torch.equal(logits_of(unroute(model), words), plain)


@pytest.mark.parametrize(("name", "kind"), [("llama", nn.Linear), ("gpt2", Conv1D)])
def test_linear_layers_that_a_patch_changes_are_called(name, kind, monkeypatch):
    """Where nobody routes their weights, nothing needs to be refused."""
    model, other = fresh(name), fresh(name)
    words, targets, _ = batch()
    ones = torch.ones_like(words)
    route(model, RoutingPlan(2, mlp=MLPSites(hidden=[[1.0], [0.5]])))
    outputs = [
        module for path, module in other.named_modules() if path.endswith(("mlp.down_proj", "mlp.c_proj"))
    ]
    for output in outputs:
        output.register_forward_pre_hook(lambda _, args: (args[0] / 2 + args[0].detach() / 2,))
    patched(kind, monkeypatch)
    check(backward(model, words, targets, route_ids=ones), backward(other, words, targets), 1e-5)


class Clipped(llama.LlamaMLP):
    """Overrides the forward, and has the submodules."""

    def forward(self, x):
        return super().forward(x).clamp(-1, 1)


class Alike(nn.Module):
    """Computes something else with submodules of the same names."""

    def __init__(self, mlp):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = (
            mlp.gate_proj,
            mlp.up_proj,
            mlp.down_proj,
            mlp.act_fn,
        )

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))


@pytest.mark.parametrize("kind", [Clipped, Alike])
def test_other_classes_with_the_same_submodules_are_refused(kind):
    model = fresh("llama")
    mlp = model.model.layers[1].mlp
    model.model.layers[1].mlp = Clipped(model.config) if kind is Clipped else Alike(mlp)
    with pytest.raises(TypeError, match=rf"got a {kind.__name__} .*forward {__name__}\..*forward"):
        route(model, localize_mlp([0, 1], 4))
    assert type(model.model.layers[0].mlp) is llama.LlamaMLP


def test_an_activation_that_a_patch_changes_is_called(monkeypatch):
    model, other = fresh("llama"), fresh("llama")
    words, targets, _ = batch()
    route(model, RoutingPlan(2, mlp=MLPSites(hidden=[[1.0], [0.5]])))
    for layer in other.model.layers:
        layer.mlp.down_proj.register_forward_pre_hook(lambda _, args: (args[0] / 2 + args[0].detach() / 2,))
    patched(type(other.model.layers[0].mlp.act_fn), monkeypatch)
    check(
        backward(model, words, targets, route_ids=torch.ones_like(words)),
        backward(other, words, targets),
        1e-5,
    )


@pytest.mark.setup(
    "Modules and hooks",
    "attention of one's own (AttentionInterface.register) beside plans that mask attention",
    refused="routed attention would stand in its place",
)
def test_attention_of_ones_own(monkeypatch):
    """Also under the name of transformers' own, before route or after; other plans call it."""
    words, targets, ids = batch()
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attention(module, query, *args, **kwargs):
        return sdpa(module, query * 2, *args, **kwargs)

    heads = RoutingPlan(2, attention=AttentionSites(heads=[[1.0], [0.0]]))
    model, late, other = fresh("llama"), route(fresh("llama"), heads), fresh("llama")
    for one in (model, late, other):
        one.set_attn_implementation("sdpa")
    plain = logits_of(other, words)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", attention)
    with expect(ValueError, "layer 0: RoutingPlan.attention: attn_implementation: got 'sdpa', which is "):
        route(model, heads)
    with expect(ValueError, "attn_implementation: got 'sdpa', which is "):
        backward(late, words, targets, route_ids=ids)
    route(model, RoutingPlan(2, mlp=MLPSites(hidden=[[1.0], [0.0]])))
    got = logits_of(model, words, route_ids=ids)
    assert torch.equal(got, logits_of(other, words))
    assert not torch.equal(got, plain)
