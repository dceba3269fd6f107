"""Hooks on parts of a routed model and on every module: they run with routes as they do without."""

import pytest
import torch

pytest.importorskip("transformers")

import model_zoo
from model_zoo import HIDDEN, NAMES, WIDTH, backward, fresh
from routed_models import activation_sites, batch, check, routed, table
from torch.nn.modules.module import register_module_forward_hook
from torch.utils.flop_counter import FlopCounterMode

from gradroute import MLPSites
from gradroute.models import ResidualSites, RoutingPlan


@pytest.mark.setup(
    "Modules and hooks", "hooks of all modules (register_module_forward_hook) beside a routed model"
)
@pytest.mark.parametrize("name", NAMES)
def test_hooks_of_every_module_run(name):
    """What runs without routes runs with them, activations and linear layers too, and the gradients stay."""
    tokens, targets, ids = batch()
    plan = RoutingPlan(2, **activation_sites(name))
    model, ran = routed(name, plan), []
    expected = backward(model, tokens, targets, route_ids=ids)
    # Routed attention of GPT-Neo is the module within the one that chooses it, and computes its own dropout.
    passed_over = [".attn", "attn_dropout"] if name == "gpt_neo" else []
    names = {module: path for path, module in model.named_modules() if not path.endswith(tuple(passed_over))}
    handle = register_module_forward_hook(lambda module, inputs, output: ran.append(names.get(module)))
    try:
        backward(model, tokens, targets)
        unrouted, ran[:] = sorted(path for path in ran if path is not None), []
        got = backward(model, tokens, targets, route_ids=ids)
    finally:
        handle.remove()
    assert sorted(path for path in ran if path is not None) == unrouted
    check(got, expected)


@pytest.mark.setup("Modules and hooks", "hooks on an activation of a routed model")
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_hooks_on_an_activation_run(name):
    """The masks stand around a called activation as in the fused op; its hook changes the output as without routes."""
    tokens, targets, ids = batch()
    gradients = []
    for model, options in ((routed(name, plan_of(name)), {"route_ids": ids}), (fresh(name), {})):
        activation = next(
            module for path, module in model.named_modules() if "act" in path.rsplit(".", 1)[-1]
        )
        activation.register_forward_hook(lambda module, inputs, output: output * 2)
        logits = model_zoo.logits_of(model, tokens, **options)
        gradients.append((logits, backward(model, tokens, targets, **options)))
    (routed_logits, masked), (logits, whole) = gradients
    assert torch.equal(routed_logits, logits)
    key = next(key for key in whole if "wte" in key or "embed_tokens" in key)
    assert not torch.allclose(masked[key], whole[key])


def plan_of(name):
    return RoutingPlan(2, mlp=MLPSites(hidden=table(HIDDEN), pre=[[1.0], [0.5]]))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_hooks_on_an_activation_run_beside_forward(name):
    """Hidden units that tokens do not see are masked behind a called activation as in the fused op."""
    tokens, targets, ids = batch()
    sites = MLPSites(forward=table(HIDDEN), hidden=[[1.0], [0.5]])
    fused, called = (routed(name, RoutingPlan(2, mlp=sites)) for _ in range(2))
    for path, module in called.named_modules():
        if "act" in path.rsplit(".", 1)[-1]:
            module.register_forward_hook(lambda module, inputs, output: None)
    logits = (model_zoo.logits_of(model, tokens, route_ids=ids) for model in (fused, called))
    assert model_zoo.error(*logits) <= 1e-6
    expected = backward(fused, tokens, targets, route_ids=ids)
    check(backward(called, tokens, targets, route_ids=ids), expected)


def test_operations_are_counted():
    """torch's counter watches every module by hooks of all of them."""
    tokens, _, ids = batch()
    model = routed("llama", RoutingPlan(2, mlp=MLPSites(hidden=table(HIDDEN), update=table(HIDDEN))))
    counts = []
    for options in ({}, {"route_ids": ids}):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(tokens, **options)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.setup(
    "Modules and hooks", "hooks that write to a decoder layer's output in place, as steering does"
)
@pytest.mark.parametrize("name", NAMES)
def test_hooks_write_to_the_output_of_a_layer(name):
    """Behind its mask, and to what its norms get behind the mask in the middle: gradients are those of a new tensor."""
    tokens, targets, ids = batch()
    sites = ResidualSites(mid=None if name == "gpt_neox" else table(WIDTH), post=table(WIDTH))
    gradients = []
    for hook in (write, write_anew):
        model = routed(name, RoutingPlan(2, residual=sites))
        layers = next(part for part in model.modules() if isinstance(part, torch.nn.ModuleList))
        layers[0].register_forward_hook(hook)
        gradients.append(backward(model, tokens, targets, route_ids=ids))
    check(gradients[0], gradients[1], 0.0)


def write(module, inputs, output):
    output = output[0] if isinstance(output, tuple) else output
    output[..., 0] += 4.0
    output.mul_(2.0)


def write_anew(module, inputs, output):
    x = output[0] if isinstance(output, tuple) else output
    x = torch.cat([x[..., :1] + 4.0, x[..., 1:]], dim=-1) * 2.0
    return (x, *output[1:]) if isinstance(output, tuple) else x
