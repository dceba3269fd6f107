"""The forward of routed models is the plain model's, with and without routes."""

import copy

import pytest
import torch

pytest.importorskip("transformers")

import model_zoo
import transformers
from model_zoo import HEADS, HIDDEN, LAYOUTS, NAMES, backward, fresh, plain
from routed_by_hand import by_hand
from routed_models import (
    OF_TRANSFORMERS,
    TOLERANCE,
    activation_sites,
    all_sites,
    batch,
    check,
    check_differ,
    expect,
    merged,
    route,
    routed,
    table,
    update_sites,
)

import gradroute
from gradroute import AttentionSites, MLPSites, models
from gradroute.models import RoutingPlan, unroute
from gradroute.tables import localize


@pytest.mark.parametrize("name", NAMES)
def test_unrouted_calls_are_the_plain_model(name):
    tokens, targets, ids = batch(tokens=13)
    plan = RoutingPlan(2, **all_sites(name))
    for implementation in ("eager", "sdpa"):
        model, unrouted = fresh(name), fresh(name)
        if name not in ("gpt_neo", "nano_gpt"):
            for each in (model, unrouted):
                each.set_attn_implementation(implementation)
        route(name, model, plan)
        for _ in ("before", "after"):
            got, expected = (model_zoo.logits_of(each, tokens) for each in (model, unrouted))
            assert torch.equal(got, expected)
            got, expected = (backward(each, tokens, targets) for each in (model, unrouted))
            assert all(torch.equal(got[key], expected[key]) for key in expected)
            check_differ(backward(model, tokens, targets, route_ids=ids), expected)


@pytest.mark.parametrize("name", NAMES)
def test_routed_forward_is_the_plain_one(name):
    """Bit for bit, where nothing masks in forward and attention is the model's own; else but for rounding."""
    tokens, _, ids = batch(tokens=13)
    sites = update_sites(name) | {
        "mlp": merged(activation_sites(name)["mlp"], update_sites(name)["mlp"]),
        "residual": activation_sites(name)["residual"],
    }
    unrouted = fresh(name)
    expected = model_zoo.logits_of(unrouted, tokens)
    model = route(name, unrouted, RoutingPlan(2, **sites))
    assert torch.equal(model_zoo.logits_of(model, tokens, route_ids=ids), expected)
    attention = RoutingPlan(2, attention=activation_sites(name)["attention"])
    got = model_zoo.logits_of(routed(name, attention), tokens, route_ids=ids)
    assert model_zoo.error(got, expected) < TOLERANCE
    forward = RoutingPlan(2, mlp=MLPSites(forward=localize(2, HIDDEN, {1: slice(8)})))
    got = model_zoo.logits_of(routed(name, forward), tokens, route_ids=ids)
    assert model_zoo.error(got, expected) > 0.01


@pytest.mark.parametrize("name", OF_TRANSFORMERS)
def test_outputs_that_models_record(name):
    tokens, _, ids = batch()
    plan = RoutingPlan(2, **update_sites(name))
    unrouted = fresh(name)
    model = route(name, copy.deepcopy(unrouted), plan)
    for inputs in ({}, {"route_ids": ids}):
        got, expected = (
            each(tokens, output_hidden_states=True, output_attentions=True, use_cache=False, **given)
            for each, given in ((model, inputs), (unrouted, {}))
        )
        for field in ("hidden_states", "attentions"):
            assert len(got[field]) == len(expected[field]) > 0
            assert all(map(torch.equal, got[field], expected[field]))
    embeddings = unrouted.get_input_embeddings()(tokens)
    model = route(name, unroute(model), RoutingPlan(2, mlp=MLPSites(hidden=table(HIDDEN))))
    got = model(inputs_embeds=embeddings, route_ids=ids).logits
    assert torch.equal(got, unrouted(tokens, use_cache=False).logits)


DROPOUTS = {
    "gpt2": ("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    "gpt_neo": ("resid_dropout", "embed_dropout", "attention_dropout"),
    "gpt_neox": ("hidden_dropout", "attention_dropout"),
    "gpt_neox_serial": ("hidden_dropout", "attention_dropout"),
    "phi3": ("resid_pdrop", "attention_dropout"),
    "llama": ("attention_dropout",),
    "gemma3": ("attention_dropout",),
    "nano_gpt": ("dropout",),
}


@pytest.mark.parametrize("name", DROPOUTS)
def test_dropout(name):
    """A routed model drops what the plain one does; attention with dropout is the model's own."""
    tokens, targets, ids = batch()
    sites = update_sites(name) | {
        "mlp": merged(MLPSites(hidden=table(HIDDEN), forward=table(HIDDEN)), MLPSites(update=table(HIDDEN))),
        "residual": activation_sites(name)["residual"],
    }
    plan = RoutingPlan(2, **sites)
    dropping = model_zoo.build(name, **dict.fromkeys(DROPOUTS[name], 0.3))
    torch.manual_seed(0)
    expected = by_hand(name, plan, ids, tokens, targets, model=dropping)
    model = route(name, copy.deepcopy(dropping), plan)
    torch.manual_seed(0)
    check(backward(model, tokens, targets, route_ids=ids), expected)
    torch.manual_seed(1)
    check_differ(backward(model, tokens, targets, route_ids=ids), expected)
    torch.manual_seed(0)
    assert torch.isfinite(model_zoo.run(model.eval(), tokens, targets, route_ids=ids))
    assert torch.equal(model_zoo.logits_of(model, tokens), model_zoo.logits_of(dropping.eval(), tokens))


def test_dropout_in_attention_that_masks():
    """No kernel of a CPU can: an error in training, nothing in evaluation."""
    tokens, _, ids = batch()
    plan = RoutingPlan(2, attention=AttentionSites(heads=table(HEADS)))
    model = route("llama", model_zoo.build("llama", attention_dropout=0.1), plan)
    with expect(gradroute.BackendError, "dropout"):
        model(tokens, route_ids=ids)
    assert torch.isfinite(model.eval()(tokens, route_ids=ids).logits).all()


def test_tables_of_ones_do_not_make_attention_routed():
    """Without forget heads the preset's tables of heads are ones: attention stays the model's own."""
    model = fresh("llama")
    models.route(model, models.sgtm(model.config, forget_heads=0, forget_units=16))
    assert not any(layer.self_attn._routing.everywhere for layer in model.model.layers)


@pytest.mark.parametrize("name", ["mistral", "qwen2", "phi3", "gemma3"])
def test_bidirectional_windows(name):
    tokens, _, ids = batch()
    model = model_zoo.build(name, is_causal=False) if hasattr(LAYOUTS[name].config(), "is_causal") else None
    if model is None:
        model = fresh(name)
        model.config.is_causal = False
    expected = model_zoo.logits_of(model, tokens)
    assert not torch.allclose(expected, model_zoo.logits_of(plain(name), tokens))
    models.route(model, RoutingPlan(2, attention=AttentionSites(heads=table(HEADS))))
    assert model_zoo.error(model_zoo.logits_of(model, tokens, route_ids=ids), expected) <= TOLERANCE


def test_a_linear_layer_with_another_forward_is_called():
    tokens, _, ids = batch()
    model = fresh("llama")
    up = model.model.layers[0].mlp.up_proj
    original = up.forward
    up.forward = lambda x: original(x) * 3
    expected = model_zoo.logits_of(model, tokens)
    models.route(model, RoutingPlan(2, mlp=MLPSites(hidden=table(HIDDEN))))
    assert torch.equal(model_zoo.logits_of(model, tokens, route_ids=ids), expected)


def test_heads_for_other_tasks():
    """A forward that does not name use_cache hands it on."""
    tokens, _, ids = batch()
    config = LAYOUTS["gpt2"].config()
    model = transformers.AutoModelForQuestionAnswering.from_config(config).eval()
    expected = model(tokens, use_cache=False).start_logits
    models.route(model, models.sgtm(config, 1, 16, retain=1, forget=0))
    got = model(tokens, route_ids=torch.zeros_like(ids)).start_logits
    assert model_zoo.error(got, expected) <= TOLERANCE
