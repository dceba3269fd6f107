"""A routed model's forward is the unrouted one's bit for bit, whatever dtypes its parts and its caller have."""

import contextlib
import copy

import model_zoo
import pytest
import torch
import transformers
from model_zoo import NAMES, backward, fresh, logits_of
from routed_by_hand import by_hand
from routed_models import activation_sites, all_sites, batch, check, expect, merged, route, update_sites
from torch import nn

from gradroute import Routes, activations
from gradroute.models import RoutingPlan

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def plan_of(name):
    """Every site that leaves the forward and attention's own kernel as they are."""
    activation, update = activation_sites(name), update_sites(name)
    mlp = merged(activation["mlp"], update["mlp"])
    return RoutingPlan(2, **update | {"mlp": mlp, "residual": activation["residual"]})


def norms_to(model, dtype):
    for module in model.modules():
        if "Norm" in type(module).__name__:
            module.to(dtype)
    return model


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_forward_in_every_dtype(name, dtype):
    """Models cast to fp32 inside, from fp64 too: their norms, some of their softmaxes."""
    tokens, targets, ids = batch(tokens=13)
    plan, plain = plan_of(name), fresh(name).to(dtype)
    model = route(name, copy.deepcopy(plain), plan)
    got, expected = logits_of(model, tokens, route_ids=ids), logits_of(plain, tokens)
    assert got.dtype == expected.dtype
    assert torch.equal(got, expected)
    if dtype == torch.float64:
        got = backward(model, tokens, targets, route_ids=ids)
        check(got, by_hand(name, plan, ids, tokens, targets, model=plain))
        assert {gradient.dtype for gradient in got.values()} == {dtype}


# What is changed of a model of fp32 → the change, and what its calls are made in.
MIXED = {
    "autocast of fp32": (lambda model: model, True),
    "autocast of fp64": (nn.Module.double, True),
    "autocast of bf16 with norms in fp32": (lambda model: norms_to(model.bfloat16(), torch.float32), True),
    "fp32 with norms in bf16": (lambda model: norms_to(model, torch.bfloat16), False),
}


@pytest.mark.parametrize("mixture", MIXED)
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_forward_of_mixed_dtypes(name, mixture):
    change, autocast = MIXED[mixture]
    if name == "gpt2" and not autocast:
        name = "qwen3"  # torch's layer norm takes no weight of bf16 beside fp32
    tokens, targets, ids = batch(tokens=13)
    plain = change(fresh(name))
    model = route(name, copy.deepcopy(plain), plan_of(name))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got, expected = logits_of(model, tokens, route_ids=ids), logits_of(plain, tokens)
    assert got.dtype == expected.dtype
    assert torch.equal(got, expected)
    model_zoo.loss_of(got, targets).backward()
    for parameter in model.parameters():
        assert parameter.grad.dtype == parameter.dtype
        assert 0 < parameter.grad.abs().max() < torch.inf


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_the_default_dtype_of_a_call_changes_nothing(name):
    """Neither a constant of a forward nor a buffer of a backward takes it."""
    tokens, targets, ids = batch(tokens=13)
    model = route(name, fresh(name), RoutingPlan(2, **all_sites(name)))
    plain = fresh(name)
    expected, unrouted = backward(model, tokens, targets, route_ids=ids), logits_of(plain, tokens)
    with default_dtype(torch.float64):
        got = backward(model, tokens, targets, route_ids=ids)
        assert torch.equal(logits_of(model, tokens), logits_of(plain, tokens))
    assert torch.equal(logits_of(plain, tokens), unrouted)
    assert all(torch.equal(got[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", ["llama", "gpt_neo"])
def test_training_after_inference(name):
    """What inference_mode has made (ids, routes, the tables' copies) trains as if it had been made outside."""
    tokens, targets, ids = batch(tokens=13)
    plan = RoutingPlan(2, **all_sites(name))
    expected = backward(route(name, fresh(name), plan), tokens, targets, route_ids=ids)
    model = route(name, fresh(name), plan)
    with torch.inference_mode():
        logits_of(model, tokens, route_ids=ids)
        made = ({"route_ids": ids.clone()}, {"routes": Routes.of(ids, 2)})
    for inputs in ({"route_ids": ids}, *made):
        got = backward(model, tokens, targets, **inputs)
        assert all(torch.equal(got[key], expected[key]) for key in expected)


# The activations of transformers that routed MLPs have, bit for bit, and some that they refuse.
OF_TRANSFORMERS = {
    "silu": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_new",
    "gelu_accurate": "gelu_new",
    "gelu_python_tanh": "gelu_new",
    "gelu_fast": "gelu_fast",
    "relu": "relu",
    "relu2": "relu2",
    "gelu_python": None,
    "quick_gelu": None,
}


@pytest.mark.parametrize("name", OF_TRANSFORMERS)
def test_activations_of_transformers(name):
    module = transformers.activations.ACT2FN[name]
    known = OF_TRANSFORMERS[name]
    assert activations.name_of_module(module) == known
    if known is None:
        with expect(TypeError, "got the activation "):
            activations.check_module(module)
        return
    for dtype in DTYPES:
        a = 4 * torch.randn(200, 33).to(dtype)
        assert torch.equal(activations.ACTIVATIONS[known].value(a), module(a))


@pytest.mark.parametrize("activation", ["gelu_fast", "gelu_new", "gelu_python"])
def test_a_model_with_another_activation(activation):
    """An option of the configuration: the model's forward, or a refusal before anything is changed."""
    tokens, _, ids = batch(tokens=13)
    plain = model_zoo.build("gpt_neox", hidden_act=activation).bfloat16()
    plan = plan_of("gpt_neox")
    if activation == "gelu_python":
        with expect(TypeError, "got the activation GELUActivation with a formula in Python, expected"):
            route("gpt_neox", plain, plan)
        assert not any("Routed" in type(module).__name__ for module in plain.modules())
        return
    model = route("gpt_neox", copy.deepcopy(plain), plan)
    assert torch.equal(logits_of(model, tokens, route_ids=ids), logits_of(plain, tokens))
