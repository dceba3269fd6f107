"""The dense models that one entry suffices for: gradients against the detach idiom, and the plain model's forward."""

import copy

import pytest
import torch

pytest.importorskip("transformers")

import model_zoo
from model_zoo import FAMILIES, HEADS, HIDDEN, WIDTH, backward, fresh, plain
from routed_by_hand import ByHand
from routed_models import (
    all_sites,
    batch,
    expect,
    route,
    routed,
    table,
    update_sites,
)

from gradroute import AttentionSites, MLPSites, NormSites
from gradroute.models import ResidualSites, RoutingPlan, unroute

# Attention in another order of sums, in all layers.
TOLERANCE = 3e-5


def sites_of(name):
    """Every site that a model has."""
    layout, sites = FAMILIES[name], all_sites(name)
    if layout.has_wide_qk_norm:
        sites["qk_norm"] = NormSites(table(WIDTH))
    if not layout.masks_attention:
        sites["attention"] = update_sites(name)["attention"]
    return {entry: None if entry in layout.lacks else each for entry, each in sites.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_all_sites_are_the_detach_idiom(name):
    tokens, targets, ids = batch(tokens=8)
    plan = RoutingPlan(2, **sites_of(name))
    got = backward(routed(name, plan), tokens, targets, route_ids=ids)
    expected = ByHand(fresh(name), name, plan, ids).gradients(tokens, targets)
    assert got.keys() == expected.keys()
    assert not {key: error for key in got if (error := model_zoo.error(got[key], expected[key])) > TOLERANCE}
    unmasked = backward(fresh(name), tokens, targets)
    assert all(model_zoo.error(got[key], unmasked[key]) > 0.01 for key in got)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_forward_is_the_plain_models(name):
    """Bit for bit with routes where nothing masks in forward and norms are their own; and when unrouted again."""
    tokens, _, ids = batch(tokens=8)
    sites = sites_of(name)
    sites |= dict.fromkeys(("norm", "qk_norm", "final_norm"))
    if sites["mlp"] is not None:
        sites["mlp"] = MLPSites(**{site: t for site, t in sites["mlp"].tables.items() if site != "forward"})
    sites["attention"] = update_sites(name)["attention"]
    model = fresh(name)
    expected = model_zoo.logits_of(model, tokens)
    route(name, model, RoutingPlan(2, **sites))
    assert torch.equal(model_zoo.logits_of(model, tokens, route_ids=ids), expected)
    assert torch.equal(model_zoo.logits_of(unroute(model), tokens), expected)


@pytest.mark.parametrize(
    ("name", "entry", "message"),
    [
        ("apertus", "mlp", "got the activation XIELUActivation"),
        ("cohere", "qk_norm", "without q_norm, expected qk_norm to be None"),
        ("cohere_qk_norm", "qk_norm", "expected a norm with a weight of one dimension"),
        (
            "olmo",
            "norm",
            "got a transformers.models.olmo.modeling_olmo.OlmoLayerNorm, expected a norm with a weight",
        ),
        ("olmo", "final_norm", "RoutingPlan.final_norm: got a transformers"),
        ("stablelm_parallel", "residual", "attention and MLP are computed in parallel"),
        ("cohere", "residual", "attention and MLP are computed in parallel"),
        ("gemma2", "attention", "caps its scores (attn_logit_softcapping)"),
        ("hunyuan", "qk_norm", "without q_norm, expected qk_norm to be None"),
    ],
)
def test_sites_that_a_model_lacks_are_refused(name, entry, message):
    sites = {
        "mlp": MLPSites(hidden=table(HIDDEN)),
        "norm": NormSites(table(WIDTH)),
        "final_norm": NormSites(table(WIDTH)),
        "qk_norm": NormSites(table(1)),
        "residual": ResidualSites(mid=table(WIDTH)),
        "attention": AttentionSites(query=table(HEADS)),
    }
    model = copy.deepcopy(plain(name))
    with expect((TypeError, ValueError), message):
        route(name, model, RoutingPlan(2, **{entry: sites[entry]}))
    assert type(model) is type(plain(name))
