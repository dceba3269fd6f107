"""Mixtures with shared experts, with groups of experts, and Granite's: against detached copies; what is refused."""

import pytest
import torch

pytest.importorskip("transformers")

import model_zoo
import moe_zoo
import transformers
from model_zoo import HEADS, VOCABULARY, WIDTH
from moe_zoo import EXPERTS, FAMILIES, UNITS, all_sites, fresh, mixtures, step
from routed_models import TOLERANCE, expect, table

from gradroute import AttentionSites, MLPSites
from gradroute.models import (
    MoESites,
    ResidualSites,
    RoutingPlan,
    Shape,
    ablate,
    localize_experts,
    route,
    unroute,
)


def batch():
    shape = (2, 9)
    return (
        torch.randint(1, VOCABULARY, shape),
        torch.randint(0, VOCABULARY, shape),
        torch.randint(0, 3, shape),
    )


def routed(name, sites, **more):
    layers = Shape.of(fresh(name).config).expert_layers
    return route(fresh(name), RoutingPlan(3, moe=dict.fromkeys(layers, sites), **more))


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_all_sites_are_the_detach_idiom(name):
    tokens, targets, ids = batch()
    sites = MoESites(**all_sites(name, EXPERTS * UNITS))
    got = step(routed(name, sites), tokens, targets, route_ids=ids)
    expected = moe_zoo.by_hand(name, sites, ids, tokens, targets)
    assert got.keys() == expected.keys()
    assert not {key: e for key in got if (e := model_zoo.error(got[key], expected[key])) > TOLERANCE}
    unrouted, last = step(fresh(name), tokens, targets), f"layers.{max(mixtures(fresh(name)))}."
    masked = [key for key in got if last in key and ("experts.down" in key or ".gate.w" in key)]
    assert masked
    assert all(model_zoo.error(got[key], unrouted[key]) > 0.01 for key in masked)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_forward_is_the_plain_models(name):
    """Bit for bit, with a plan for the dense layers, the experts and the router; and when it is unrouted."""
    tokens, _, ids = batch()
    tables = all_sites(name, EXPERTS * UNITS)
    sites = MoESites(**{site: tables[site] for site in tables if "forward" not in site})
    expert_layers = tuple(mixtures(fresh(name)))
    assert Shape.of(fresh(name).config).expert_layers == expert_layers
    more = {"residual": ResidualSites(post=table(WIDTH, 3))}
    if expert_layers != (0, 1):
        more["mlp"] = {0: MLPSites(hidden=table(UNITS, 3))}
    model = routed(name, sites, **more)
    expected = fresh(name)(tokens, use_cache=False).logits
    assert torch.equal(model(tokens, use_cache=False, route_ids=ids).logits, expected)
    assert torch.equal(unroute(model)(tokens, use_cache=False).logits, expected)


@pytest.mark.parametrize(
    ("name", "sites", "message"),
    [
        ("glm4_moe", {"moe": MoESites(choice=[[1.0] * 4, [0, 0, 1, 1]])}, "chooses among groups of experts"),
        ("deepseek_v3", {"attention": AttentionSites(query=[[1.0], [0]])}, "multi-head latent attention"),
        ("deepseek_v2", {"attention": AttentionSites(update_q=table(HEADS))}, "multi-head latent attention"),
    ],
)
def test_what_mixtures_lack_is_refused(name, sites, message):
    if "moe" in sites:
        sites = {"moe": {1: sites["moe"]}}
    with expect((TypeError, ValueError), message):
        route(fresh(name), RoutingPlan(2, **sites))


def test_models_whose_experts_are_refused():
    """Phi-3.5-MoE has an entry, so that all but its experts is routed; Llama 4 has none."""
    small = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": UNITS,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "pad_token_id": None,
    }
    phi = transformers.PhimoeForCausalLM(transformers.PhimoeConfig(**small, num_local_experts=EXPERTS)).eval()
    with expect(TypeError, "draws experts at random in training"):
        route(phi, localize_experts(None, 1))
    tokens, _, ids = batch()
    expected = phi(tokens).logits
    route(
        phi,
        RoutingPlan(
            3,
            residual=ResidualSites(post=table(WIDTH, 3)),
            attention=AttentionSites(update_q=table(HEADS, 3)),
        ),
    )
    assert torch.equal(phi(tokens, route_ids=ids).logits, expected)
    with torch.device("meta"):
        config = transformers.Llama4TextConfig(
            **small, num_local_experts=EXPERTS, intermediate_size_mlp=UNITS
        )
        llama = transformers.Llama4ForCausalLM(config)
    with expect(TypeError, "its experts are handed every token, scaled by its score"):
        route(llama, localize_experts(None, 1))


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "granitemoe"])
def test_from_training_to_a_saved_model_without_the_experts(name, tmp_path):
    """Generation with a cache is the plain model's; what route 0 does not see is gone from the saved model too."""
    tokens, _, _ = batch()
    ids = torch.tensor([0, 1])[:, None].expand(tokens.shape)
    model = route(fresh(name), localize_experts(None, 1, hidden_from_others=True)).eval()
    greedy = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(tokens, **greedy), fresh(name).eval().generate(tokens, **greedy))
    model.train()(input_ids=tokens, labels=tokens, route_ids=ids, use_cache=False).loss.backward()
    torch.optim.SGD(model.parameters(), 0.01).step()
    seen = model.eval()(tokens, route_ids=torch.zeros_like(ids), use_cache=False).logits
    ablate(model, 0)
    unroute(model).save_pretrained(tmp_path)
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert model_zoo.error(saved(tokens, use_cache=False).logits, seen) <= TOLERANCE
    assert all(not mixture.experts.down_proj[-1].any() for mixture in mixtures(saved).values())
