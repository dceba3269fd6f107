"""Routed models saved, copied, compiled, checkpointed, and made ordinary again."""

import copy
import io
import json
import pickle

import pytest
import torch

pytest.importorskip("transformers")

import model_zoo
import transformers
from model_zoo import HIDDEN, LAYOUTS, NAMES, WIDTH, backward, fresh, plain
from routed_models import (
    OF_TRANSFORMERS,
    all_sites,
    batch,
    check,
    expect,
    route,
    routed,
    table,
)

from gradroute import MLPSites, NormSites
from gradroute.models import RoutingPlan, unroute


@pytest.mark.parametrize("name", OF_TRANSFORMERS)
def test_saved_model_is_the_plain_one(name, tmp_path):
    tokens, _, _ = batch()
    unrouted = fresh(name)
    unrouted.save_pretrained(tmp_path / "plain")
    model = routed(name, RoutingPlan(2, **all_sites(name)))
    assert list(model.state_dict()) == list(unrouted.state_dict())
    model.save_pretrained(tmp_path / "routed")
    configs = [json.loads((tmp_path / which / "config.json").read_text()) for which in ("plain", "routed")]
    assert configs[0] == configs[1]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "routed", attn_implementation="eager"
    )
    assert type(loaded) is type(unrouted)
    assert all(type(a) is type(b) for a, b in zip(loaded.modules(), unrouted.modules(), strict=True))
    assert list(loaded.state_dict()) == list(unrouted.state_dict())
    for key, value in unrouted.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)
    assert torch.equal(loaded(tokens).logits, unrouted.eval()(tokens).logits)


@pytest.mark.parametrize("name", NAMES)
def test_unroute(name):
    tokens, targets, ids = batch()
    model, unrouted = fresh(name), fresh(name)
    keys, parameters = list(model.state_dict()), list(model.parameters())
    called = []
    model.get_submodule(LAYOUTS[name].layers)[0].register_forward_hook(lambda *_: called.append(1))
    hooks = len(model.get_submodule(LAYOUTS[name].layers)[0]._forward_hooks)
    route(name, model, RoutingPlan(2, **all_sites(name)))
    assert isinstance(model, type(unrouted))
    assert list(model.state_dict()) == keys
    model_zoo.run(model, tokens, targets, route_ids=ids).backward()
    assert len(called) == 1
    assert unroute(model) is model
    assert len(model.get_submodule(LAYOUTS[name].layers)[0]._forward_hooks) == hooks
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    for (path, got), expected in zip(model.named_modules(), unrouted.modules(), strict=True):
        assert type(got) is type(expected), path
        assert vars(got).keys() == vars(expected).keys(), path
    assert list(model.state_dict()) == keys
    assert torch.equal(model_zoo.logits_of(model, tokens), model_zoo.logits_of(unrouted, tokens))
    got, expected = (backward(each, tokens, targets) for each in (model, unrouted))
    assert all(torch.equal(got[key], expected[key]) for key in expected)
    with expect(ValueError, "not routed"):
        unroute(model)
    route(name, model, RoutingPlan(2, mlp=MLPSites(hidden=table(HIDDEN))))  # and once more


def by_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def by_pickle(model):
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize(
    ("name", "copied"),
    [(name, copy.deepcopy) for name in NAMES]
    + [("llama", by_pickle), ("gpt_neo", by_torch), ("nano_gpt", by_torch)],
)
def test_copies_are_routed(name, copied):
    """Also before any call, and with a plan that is a function."""
    tokens, targets, ids = batch()
    hidden = table(HIDDEN)
    sites = all_sites(name) | {"mlp": lambda index: MLPSites(hidden=hidden)}
    model = routed(name, RoutingPlan(2, **sites))
    logits = model_zoo.logits_of(model, tokens, route_ids=ids)
    early = copied(model)
    expected = backward(model, tokens, targets, route_ids=ids)
    for other in (early, copied(model)):
        assert not {id(p) for p in other.parameters()} & {id(p) for p in model.parameters()}
        got = backward(other, tokens, targets, route_ids=ids)
        assert all(torch.equal(got[key], expected[key]) for key in expected)
        unroute(other)
        assert type(other) is type(plain(name))
    assert torch.equal(model_zoo.logits_of(model, tokens, route_ids=ids), logits)


@pytest.mark.setup("torch.compile", "copies of a model with compiled layers")
# Dynamo's own, of hidden states that a compiled layer is given.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_copies_of_compiled_layers_are_their_own():
    """torch.compile binds what it keeps on a module to that very module."""
    tokens, targets, ids = batch()
    model = routed("llama", RoutingPlan(2, mlp=MLPSites(hidden=table(HIDDEN))))
    for layer in model.model.layers:
        layer.compile(backend="eager")
    expected = backward(model, tokens, targets, route_ids=ids)
    model.zero_grad()
    got = backward(copy.deepcopy(model), tokens, targets, route_ids=ids)
    check(got, expected)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.setup("Checkpointing", "around the final norm alone", refused="it cannot know its routes")
def test_a_checkpoint_of_the_whole_model_after_routed_training():
    tokens, targets, ids = batch()
    model = routed("llama", RoutingPlan(2, final_norm=NormSites(table(WIDTH))))
    expected = backward(fresh("llama"), tokens, targets)
    backward(model, tokens, targets, route_ids=ids)
    model.zero_grad()
    logits = torch.utils.checkpoint.checkpoint(
        lambda: model_zoo.logits_of(model, tokens), use_reentrant=False
    )
    model_zoo.loss_of(logits, targets).backward()
    check(model_zoo.gradients(model), expected)
    with expect(RuntimeError, "got a recomputation in backward without routes"):
        model.zero_grad()
        hidden = model.model(tokens).last_hidden_state
        torch.utils.checkpoint.checkpoint(model.model.norm, hidden, use_reentrant=False).sum().backward()


def test_an_instance_of_a_routed_class_is_not_routed_itself():
    tokens, _, ids = batch()
    model = routed("llama", RoutingPlan(2, mlp=MLPSites(hidden=table(HIDDEN))))
    other = type(model)(model.config)
    with expect(TypeError, "that route() never saw"):
        other(tokens, route_ids=ids)
