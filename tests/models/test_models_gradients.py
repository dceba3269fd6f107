"""Gradients of routed models of every architecture, against the detach idiom and formulas hooked in by hand."""

import copy

import pytest
import torch

pytest.importorskip("transformers")

import model_zoo
from model_zoo import HEADS, HIDDEN, LAYOUTS, NAMES, backward, fresh, plain
from routed_by_hand import ByHand, by_hand
from routed_models import (
    OF_TRANSFORMERS,
    TOLERANCE,
    activation_sites,
    all_sites,
    batch,
    check,
    check_differ,
    expect,
    route,
    routed,
    table,
    update_sites,
)

from gradroute import AttentionSites, MLPSites, NormSites, Routes
from gradroute.models import ResidualSites, RoutingPlan
from gradroute.models.plan import _ONCE, _PER_LAYER


@pytest.mark.parametrize("name", NAMES)
def test_hand_is_autograd(name):
    """The oracle's formulas without masks are the plain model's gradients."""
    tokens, targets, ids = batch()
    nowhere = RoutingPlan(2, mlp=MLPSites())
    check(by_hand(name, nowhere, ids, tokens, targets), backward(fresh(name), tokens, targets))


@pytest.mark.parametrize("name", NAMES)
def test_activation_sites_are_the_detach_idiom(name):
    tokens, targets, ids = batch()
    plan = RoutingPlan(2, **activation_sites(name))
    got = backward(routed(name, plan), tokens, targets, route_ids=ids)
    hooked = fresh(name)
    hand = ByHand(hooked, name, plan, ids)
    model_zoo.run(hooked, tokens, targets).backward()
    check(got, model_zoo.gradients(hooked))  # autograd's own, through the idiom
    check(got, hand.collected())
    below = [key for key in got if ".0." in key or "embed" in key or "wte" in key or "wpe" in key]
    check_differ(got, backward(fresh(name), tokens, targets), below)


@pytest.mark.parametrize("name", NAMES)
def test_update_sites_mask_parameters_alone(name):
    tokens, targets, ids = batch()
    plan = RoutingPlan(2, **update_sites(name))
    got = backward(routed(name, plan), tokens, targets, route_ids=ids)
    check(got, by_hand(name, plan, ids, tokens, targets))
    unmasked = backward(fresh(name), tokens, targets)
    check_differ(got, unmasked)
    # Only where parameters are: the last layer's masks change nothing below.
    alone = RoutingPlan(2, mlp={1: update_sites(name)["mlp"]})
    got = backward(routed(name, alone), tokens, targets, route_ids=ids)
    masked = {key for key in got if ".1.mlp." in key}
    check_differ(got, unmasked, {key for key in masked if key.endswith("weight")})
    check(*({key: grads[key] for key in got if key not in masked} for grads in (got, unmasked)))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("strength", [None, "token"])
def test_all_sites_at_once(name, strength, device):
    """On a GPU the numbers of other kernels: fp32 sums in another order, the exponentials of another library."""
    tokens, targets, ids = batch(routes=3)
    strength = None if strength is None else torch.rand(ids.shape)
    sites = all_sites(name, routes=3)
    plan = RoutingPlan(3, **sites)
    model, there = routed(name, plan).to(device), (tokens.to(device), targets.to(device))
    got = on_cpu(backward(model, *there, route_ids=ids, route_strength=strength))  # they follow the tokens
    expected = by_hand(name, plan, ids, tokens, targets, strength)
    check(got, expected, 1e-4 if device.type == "cuda" else TOLERANCE)
    check_differ(got, backward(fresh(name), tokens, targets))
    again = on_cpu(backward(model, *there, routes=Routes.of(ids, 3, strength).to(device)))
    assert all(torch.equal(got[key], again[key]) for key in got)


def on_cpu(gradients):
    return {key: gradient.cpu() for key, gradient in gradients.items()}


@pytest.mark.parametrize("name", NAMES)
def test_layers_that_differ(name):
    """A layer that is not routed beside one that is, with attention masked in one and not in the other."""
    tokens, targets, ids = batch()
    last = len(plain(name).get_submodule(LAYOUTS[name].layers)) - 1
    sites = all_sites(name)
    plan = RoutingPlan(2, mlp={0: sites["mlp"]}, attention={last: sites["attention"]})
    got = backward(routed(name, plan), tokens, targets, route_ids=ids)
    check(got, by_hand(name, plan, ids, tokens, targets))
    as_list = RoutingPlan(
        2,
        mlp=[sites["mlp"], *[None] * last],
        attention=lambda index, shape: sites["attention"] if index == shape.layers - 1 else None,
    )
    again = backward(routed(name, as_list), tokens, targets, route_ids=ids)
    assert all(torch.equal(got[key], again[key]) for key in got)


@pytest.mark.parametrize("name", OF_TRANSFORMERS)
@pytest.mark.parametrize("site", ["score_edges", "value_edges", "both"])
def test_edges(name, site):
    """Binary edges, longer than the windows; the model's own window and scale hold."""
    tokens, targets, ids = batch(tokens=13)
    edges = [[1.0, 1.0], [0.0, 1.0]]
    names = ("score_edges", "value_edges") if site == "both" else (site,)
    plan = RoutingPlan(2, attention=AttentionSites(**dict.fromkeys(names, edges)))
    model = routed(name, plan)
    got = backward(model, tokens, targets, route_ids=ids)
    check(got, by_hand(name, plan, ids, tokens, targets))
    below = [key for key in got if ".0." in key and "weight" in key]
    unmasked = backward(fresh(name), tokens, targets)
    assert max(model_zoo.error(got[key], unmasked[key]) for key in below) > 0.01


@pytest.mark.parametrize("name", ["gpt2", "mistral", "phi3", "nano_gpt"])
def test_shorthand_update(name):
    """`update` is update_q, update_out, update_in, ..., where they are not given; tables of one column are for all."""
    tokens, targets, ids = batch()
    layout = LAYOUTS[name]
    kv = {} if layout.kv_heads == HEADS else {"update_kv": table(layout.kv_heads)}
    attention = AttentionSites(update=table(HEADS), **kv)
    plan = RoutingPlan(2, mlp=MLPSites(update=table(HIDDEN)), attention=attention)
    got = backward(routed(name, plan), tokens, targets, route_ids=ids)
    check(got, by_hand(name, plan, ids, tokens, targets))
    column = [[1.0], [0.5]]
    plan = RoutingPlan(
        2,
        mlp=MLPSites(hidden=column, update=column),
        attention=AttentionSites(heads=column, update=column, update_kv=column),
        residual=ResidualSites(post=column),
        norm=NormSites(column),
    )
    got = backward(routed(name, plan), tokens, targets, route_ids=ids)
    check(got, by_hand(name, plan, ids, tokens, targets))


@pytest.mark.parametrize("name", ["llama", "gpt_neo", "nano_gpt"])
def test_loss_of_the_model_itself(name):
    """With labels, as people call it."""
    tokens, _, ids = batch()
    plan = RoutingPlan(2, **all_sites(name))

    def own_loss(model, **inputs):
        if name == "nano_gpt":
            return model(tokens, tokens.roll(-1), **inputs)[1]
        return model(input_ids=tokens, labels=tokens, **inputs).loss

    model, hooked = routed(name, plan), fresh(name)
    own_loss(model, route_ids=ids).backward()
    hand = ByHand(hooked, name, plan, ids)
    own_loss(hooked).backward()
    check(model_zoo.gradients(model), hand.collected())


@pytest.mark.parametrize("name", sorted({*OF_TRANSFORMERS} - {"gpt_neo"}))
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_parameter_sites_leave_attention_as_it_is(name, implementation):
    """Where attention itself masks nowhere, the model's own implementation runs."""
    tokens, targets, ids = batch(tokens=13)
    plan = RoutingPlan(2, **update_sites(name))
    unrouted = fresh(name)
    unrouted.set_attn_implementation(implementation)
    model = route(name, copy.deepcopy(unrouted), plan)
    got, expected = model_zoo.logits_of(model, tokens, route_ids=ids), model_zoo.logits_of(unrouted, tokens)
    assert torch.equal(got, expected)
    got = backward(model, tokens, targets, route_ids=ids)
    check(got, by_hand(name, plan, ids, tokens, targets, model=unrouted))


SITES = _PER_LAYER | _ONCE  # the sites class of every part of a plan
del SITES["moe"]  # test_models_moe.py has those of mixtures of experts

# A model that can honour every site of a part of a plan; update of attention stands for heads of k and v too.
MODELS_OF_PARTS = dict.fromkeys(SITES, "llama") | {"attention": "gpt2", "qk_norm": "qwen3"}
SITES_OF_PARTS = [(part, site) for part, sites_type in SITES.items() for site in sites_type.declared]


@pytest.mark.parametrize(("part", "site"), SITES_OF_PARTS, ids=map("-".join, SITES_OF_PARTS))
def test_every_site_of_a_plan_masks(part, site):
    """Every site that a sites class declares is honoured, or refused with its name, and none is ignored."""
    name, (tokens, targets, ids) = MODELS_OF_PARTS[part], batch()
    table = torch.full((2, 2 if site.endswith("_edges") else 1), 0.5)
    plan = RoutingPlan(2, **{part: SITES[part](**{site: table})})
    if (part, site) == ("lm_head", "update_bias"):
        with expect(ValueError, "LinearSites.update_bias: got Table([2, 1], blocks), expected None"):
            routed(name, plan)
        return
    got = backward(routed(name, plan), tokens, targets, route_ids=ids)
    expected = backward(fresh(name), tokens, targets)
    assert max(model_zoo.error(got[key], expected[key]) for key in got) > 0.01
