"""Calls that routed models refuse, and routes that would not arrive."""

import copy
from types import MethodType

import pytest
import torch

pytest.importorskip("transformers")

import model_zoo
from model_zoo import HEADS, HIDDEN, LAYOUTS, WIDTH, backward, fresh
from routed_by_hand import by_hand
from routed_models import (
    all_sites,
    batch,
    check,
    expect,
    routed,
    shape_of,
    table,
    update_sites,
)

from gradroute import AttentionSites, EmbeddingSites, LinearSites, MLPSites, Routes, models
from gradroute.models import RoutingPlan


@pytest.fixture(scope="module")
def llamas():
    """One that masks in attention, one that does not."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randint(0, 2, (2, HIDDEN), generator=generator).float()
    return {
        "routed": routed("llama", RoutingPlan(2, attention=AttentionSites(heads=[[1.0], [0.0]]))),
        "own": routed("llama", RoutingPlan(2, mlp=MLPSites(hidden=hidden))),
    }


@pytest.mark.parametrize("attention", ["routed", "own"])
def test_errors_of_calls(llamas, attention):
    model = llamas[attention]
    tokens, _, ids = batch()
    for name in (
        "route_id",
        "routes_ids",
        "route_idx",
        "rout_strength",
        "strength",
        "route_strengths",
        "router",
        "route",
    ):
        with expect(TypeError, f"unexpected keyword argument {name!r}"):
            model(tokens, **{name: ids})
    for wrong, message in (
        (ids[:, :-1], "route_ids: got shape [2, 9], expected that of the tokens [2, 10]"),
        (ids[:1], "route_ids: got shape [1, 10]"),
        (ids[0], "route_ids: got shape [10]"),
        (ids.flatten(), "route_ids: got shape [20]"),
        (ids + 1, "ids: got "),
        (ids - 1, "ids: got "),
    ):
        with expect(ValueError, message):
            model(tokens, route_ids=wrong)
    with expect(TypeError, "integer or bool dtype"):
        model(tokens, route_ids=ids.float())
    with expect(ValueError, "route_ids: got None beside route_strength"):
        model(tokens, route_strength=torch.tensor(0.5))
    with expect(ValueError, "strength: got shape [10]"):
        model(tokens, route_ids=ids, route_strength=torch.rand(10))
    with expect(ValueError, "routes: got routes beside route_ids"):
        model(tokens, route_ids=ids, routes=Routes.of(ids, 2))
    with expect(TypeError, "routes: got a Tensor, expected gradroute.Routes"):
        model(tokens, routes=ids)
    with expect(ValueError, "routes: got 3 routes, expected the plan's num_routes = 2"):
        model(tokens, routes=Routes.of(ids, 3))
    with expect(ValueError, "route_ids: got shape [20]"):
        model(tokens, routes=Routes.of(ids.flatten(), 2))
    cache = model(tokens, use_cache=True).past_key_values
    with expect(ValueError, "got a cache beside routes"):
        model(tokens, route_ids=ids, past_key_values=cache)
    with expect(ValueError, "got a cache beside routes"):
        model(tokens, route_ids=ids, use_cache=True)
    assert model(tokens, route_ids=ids).past_key_values is None
    with expect(TypeError, "generate() got route_ids"):
        model.generate(tokens, route_ids=ids)
    assert torch.equal(  # after an error nothing is left of its routes
        model_zoo.logits_of(model, tokens), model_zoo.logits_of(fresh("llama"), tokens)
    )


def test_masks_that_are_refused(llamas):
    tokens, targets, ids = batch()
    causal = torch.ones(10, 10, dtype=torch.bool).tril().expand(2, 1, 10, 10)
    model = llamas["routed"]
    with expect(ValueError, "attention_mask: got [2, 1, 10, 10], expected a padding mask [2, 10]"):
        model(tokens, attention_mask=causal, route_ids=ids)
    with expect(ValueError, "attention_mask: got dict, expected a padding mask"):
        model(tokens, attention_mask={"full_attention": causal}, route_ids=ids)
    with expect(ValueError, "attention_mask: got [2, 9]"):
        model(tokens, attention_mask=torch.ones(2, 9), route_ids=ids)
    # The model's own attention takes what it always does.
    additive = torch.zeros(2, 1, 10, 10).masked_fill(~causal, torch.finfo(torch.float32).min)
    got = backward(llamas["own"], tokens, targets, attention_mask=additive, route_ids=ids)
    check(got, by_hand("llama", llamas["own"].routing_plan, ids, tokens, targets))


@pytest.mark.parametrize("name", ["llama", "gpt_neo", "nano_gpt"])
@pytest.mark.parametrize("part", ["layer", "mlp", "attention", "norm", "head"])
def test_routes_that_do_not_arrive(name, part):
    """A module that was replaced after the model was routed trains with routes no more: an error, not silence."""
    tokens, targets, ids = batch()
    sites = update_sites(name)
    model, unrouted = routed(name, RoutingPlan(2, **sites)), fresh(name)
    layout = LAYOUTS[name]
    path = {
        "layer": f"{layout.layers}.1",
        "mlp": f"{layout.layers}.1.mlp",
        "attention": f"{layout.layers}.1.{layout.attention}",
        "norm": f"{layout.layers}.1.{layout.norms[1]}",
        "head": "lm_head",
    }[part]
    owner, _, child = path.rpartition(".")
    setattr(model.get_submodule(owner), child, unrouted.get_submodule(path))
    with pytest.raises((RuntimeError, TypeError), match="routes"):
        model_zoo.run(model, tokens, targets, route_ids=ids)


def test_embeddings_that_routes_do_not_reach():
    tokens, _, ids = batch()
    model = routed("llama", RoutingPlan(2, embedding=EmbeddingSites(table(WIDTH))))
    with expect(ValueError, "inputs_embeds: got embeddings beside routes, expected input_ids"):
        model(inputs_embeds=model.model.embed_tokens(tokens).detach(), route_ids=ids)


def test_ids_of_all_kinds():
    """Lists, bools and small integers; strengths as numbers."""
    tokens, targets, ids = batch()
    plan = RoutingPlan(2, **all_sites("llama"))
    model = routed("llama", plan)
    expected = backward(model, tokens, targets, route_ids=ids)
    for same in (ids.tolist(), ids.bool(), ids.to(torch.uint8), ids.numpy()):
        got = backward(model, tokens, targets, route_ids=same)
        assert all(torch.equal(got[key], expected[key]) for key in expected)
    got = backward(model, tokens, targets, route_ids=ids, route_strength=0.25)
    check(got, by_hand("llama", plan, ids, tokens, targets, torch.tensor(0.25)))
    got = model(tokens, None, None, None, None, tokens, route_ids=ids)  # labels by position
    assert got.loss is not None


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neo", "gpt_neox"])
def test_ids_that_come_past_the_model_are_routed_in_its_base_model(name):
    """Whoever reads the head's weight himself calls the base model with all arguments that he does not know."""
    tokens, targets, ids = batch()
    plan = models.sgtm(shape_of(name), 1, 16, joint_embedding=False)
    model = routed(name, plan)
    expected = backward(model, tokens, targets, route_ids=ids)
    model.zero_grad()
    hidden = model.base_model(tokens, route_ids=ids).last_hidden_state
    logits = torch.nn.functional.linear(hidden, model.get_output_embeddings().weight)
    model_zoo.loss_of(logits, targets).backward()
    check(model_zoo.gradients(model), expected)


def test_a_head_that_is_routed_is_not_passed():
    tokens, _, ids = batch()
    sites = {"lm_head": LinearSites(update_rows=table(1)), "mlp": MLPSites(hidden=table(HIDDEN))}
    model = routed("llama", RoutingPlan(2, **sites))
    with expect(ValueError, "past the routed model whose lm_head the plan routes too"):
        model.model(tokens, route_ids=ids)
    model.forward = MethodType(lambda self, *args, **kwargs: self.model(*args, **kwargs), model)
    for training in (model, copy.deepcopy(model)):
        with expect(
            RuntimeError, "LlamaModel: got a forward in training mode without route_ids, past the routed"
        ):
            training.train()(tokens)
    with models.unrouted(model):
        model(tokens)
    with torch.no_grad():
        model(tokens)


@pytest.mark.parametrize(
    ("argument", "value"),
    [("output_attentions", True), ("logits_to_keep", 3), ("encoder_hidden_states", torch.zeros(1))],
)
def test_arguments_that_routed_models_cannot_honour(argument, value):
    tokens, _, ids = batch()
    sites = {"lm_head": LinearSites(update_rows=table(1)), "attention": AttentionSites(heads=table(HEADS))}
    model = routed("llama", RoutingPlan(2, **sites))
    with expect(ValueError, f"{argument}: got "):
        model(tokens, route_ids=ids, **{argument: value})
