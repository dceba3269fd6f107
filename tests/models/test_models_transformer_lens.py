"""A routed model inside TransformerLens' bridge has the gradients it has alone; without pass_routes it says so."""

import model_zoo
import pytest
import torch

from gradroute import AttentionSites, EmbeddingSites, LinearSites, MLPSites, NormSites, Table
from gradroute.models import ResidualSites, RoutingPlan, Shape, route
from gradroute.models.transformer_lens import pass_routes
from gradroute.tables import localize

sources = pytest.importorskip("transformer_lens.model_bridge.sources")

EVERY_OTHER = Table([[1.0], [0.0]])  # [R, 1]: route 1 may not update it


def whole_plan(config):
    """Masks at every kind of site."""
    shape = Shape.of(config)
    half = {1: slice(shape.d_model // 2)}
    return RoutingPlan(
        2,
        mlp=MLPSites(
            hidden=localize(2, shape.d_ff, {1: slice(48, 64)}),
            update=localize(2, shape.d_ff, {1: slice(32, 64)}),
        ),
        attention=AttentionSites(
            heads=localize(2, shape.heads, {1: [3]}),
            update=localize(2, shape.heads, {1: [2, 3]}),
            update_kv=localize(2, shape.kv_heads, {1: [1]}),
            score_edges=[[1.0, 1.0], [0.0, 1.0]],
        ),
        residual={1: ResidualSites(pre=localize(2, shape.d_model, half), post=[[1.0], [0.5]])},
        norm=NormSites(EVERY_OTHER),
        final_norm=NormSites(EVERY_OTHER),
        embedding=EmbeddingSites(EVERY_OTHER),
        lm_head=LinearSites(update_rows=EVERY_OTHER),
    )


def bridged(model):
    return sources.build_bridge_from_module(model, type(model).__name__, hf_config=model.config)


def loss_of(logits, tokens):
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def gradients(parameters, loss):
    for parameter in parameters:
        parameter.grad = None
    loss.backward()
    return [parameter.grad.clone() for parameter in parameters]


@pytest.fixture
def batch():
    tokens = torch.randint(3, model_zoo.VOCABULARY, (2, 10))
    return tokens, torch.randint(0, 2, tokens.shape)


@pytest.mark.setup("TransformerLens", "a TransformerBridge after pass_routes")
@pytest.mark.parametrize("name", [name for name in model_zoo.NAMES if name != "nano_gpt"])
def test_gradients_are_those_of_the_model_alone(name, batch):
    tokens, ids = batch
    model = model_zoo.build(name)
    route(model, whole_plan(model.config))
    parameters = list(model.parameters())
    alone = gradients(parameters, loss_of(model(tokens, route_ids=ids).logits, tokens))
    unrouted = gradients(parameters, loss_of(model(tokens).logits, tokens))
    bridge = pass_routes(bridged(model))
    inside = gradients(parameters, loss_of(bridge(tokens, route_ids=ids), tokens))
    for gradient, expected in zip(inside, alone, strict=True):
        # fp32 sums of the same terms; the bridge adds a bias of zeros to the head.
        torch.testing.assert_close(
            gradient, expected, rtol=0, atol=1e-5 * max(1e-3, float(expected.abs().max()))
        )
    assert any(not torch.allclose(a, b) for a, b in zip(alone, unrouted, strict=True))


def test_without_pass_routes_the_first_batch_says_what_routes_did_not_reach(batch):
    tokens, ids = batch
    model = model_zoo.build("llama")
    bridge = bridged(route(model, whole_plan(model.config)))
    with pytest.raises(RuntimeError, match=r"did not reach model\.layers\.0\.self_attn, .*expected route"):
        bridge(tokens, route_ids=ids)


def test_hooks_run_as_in_any_bridge(batch):
    tokens, ids = batch
    model = route(model_zoo.build("llama"), whole_plan(model_zoo.build("llama").config))
    stock = bridged(model)
    expected, cache = stock.run_with_cache(tokens)
    pass_routes(stock)
    logits, other = stock.run_with_cache(tokens)
    assert torch.equal(logits, expected)
    assert set(other) == set(cache)
    seen = []
    with stock.hooks(fwd_hooks=[("blocks.0.mlp.hook_out", lambda value, hook: seen.append(value.shape))]):
        stock(tokens, route_ids=ids)
    assert seen == [(2, 10, model_zoo.WIDTH)]


@pytest.mark.setup("TransformerLens", "processed weights", refused="the bridge then computes MLPs itself")
def test_refusals():
    model = model_zoo.build("llama")
    with pytest.raises(ValueError, match="expected to route it before"):
        pass_routes(bridged(model))
    routed = model_zoo.build("llama")
    bridge = bridged(route(routed, whole_plan(routed.config)))
    bridge.enable_compatibility_mode()
    with pytest.raises(ValueError, match="got processed weights"):
        pass_routes(bridge)
