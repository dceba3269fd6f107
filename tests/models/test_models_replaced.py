"""Parts of a routed model that something replaced since: right numbers, or an error that says so; never unrouted."""

import copy
import re

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import tiny_models as tiny
from tiny_models import assert_gradients_close, backward, mixed_ids, tokens

from gradroute import AttentionSites, EmbeddingSites, LinearSites, MLPSites, NormSites
from gradroute.models import RoutingPlan, route
from gradroute.tables import localize

OUTPUT = localize(2, tiny.D_MODEL, {1: slice(0, 4)})
HIDDEN = localize(2, tiny.D_FF, {1: slice(0, 8)})
BY_HEAD = localize(2, tiny.HEADS, {1: slice(0, 1)})
PLAN = RoutingPlan(
    2,
    mlp=MLPSites(hidden=HIDDEN, update=HIDDEN),
    attention=AttentionSites(heads=BY_HEAD, update_q=BY_HEAD, update_out=BY_HEAD),
    norm=NormSites(update=OUTPUT),
    lm_head=LinearSites(update_cols=OUTPUT),
    embedding=EmbeddingSites(update=localize(2, 1, {0: [0]})),
)
LAYER = "model.layers.0"


def model_and_plain(plan=PLAN):
    torch.manual_seed(0)
    plain = tiny.llama()
    return route(copy.deepcopy(plain), plan), plain


def expect(message):
    return pytest.raises(RuntimeError, match=re.escape(message))


@pytest.mark.setup("Modules and hooks", "a torch.nn.Linear put in the place of a routed one")
@pytest.mark.parametrize("name", ["mlp.up_proj", "mlp.down_proj", "self_attn.q_proj", "self_attn.o_proj"])
def test_linear_layers_in_the_place_of_routed_ones_are_routed(name):
    """The sublayer around them knows the sites, and reads an ordinary linear layer as it reads the routed one."""
    model, plain = model_and_plain()
    x = tokens()
    expected = backward(model, x, route_ids=mixed_ids(x))
    model.set_submodule(f"{LAYER}.{name}", copy.deepcopy(plain.get_submodule(f"{LAYER}.{name}")))
    assert_gradients_close(backward(model, x, route_ids=mixed_ids(x)), expected, 0.0)


@pytest.mark.setup(
    "Modules and hooks", "another module put in the place of a routed one", refused="routes would end there"
)
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mlp", "LlamaMLP, which takes no routes, in the place of a module that route() had made routed"),
        ("input_layernorm", "LlamaRMSNorm, which takes no routes, in the place of a module that route()"),
        ("self_attn", f"route_ids: got routes that did not reach {LAYER}.self_attn"),
        ("", f"route_ids: got routes that did not reach {LAYER},"),
    ],
)
def test_modules_in_the_place_of_routed_ones_are_refused(name, message):
    """Also those whose forward takes any keyword, and would drop the routes: attention, and whole layers."""
    model, plain = model_and_plain()
    path = f"{LAYER}.{name}".removesuffix(".")
    model.set_submodule(path, copy.deepcopy(plain.get_submodule(path)))
    with expect(message):
        backward(model, tokens(), route_ids=mixed_ids(tokens()))


@pytest.mark.parametrize("name", ["lm_head", "model.embed_tokens"])
def test_outer_modules_in_the_place_of_routed_ones_are_refused(name):
    model, plain = model_and_plain()
    model.set_submodule(name, copy.deepcopy(plain.get_submodule(name)))
    with expect(f"route_ids: got routes that did not reach {name}: something replaced or wraps them"):
        backward(model, tokens(), route_ids=mixed_ids(tokens()))


class Scaled(nn.Linear):
    """A linear layer whose forward is not torch's."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_linear_layers_of_another_class_are_refused():
    """They cannot be read, and take no routes."""
    model, _ = model_and_plain()
    model.set_submodule(f"{LAYER}.self_attn.q_proj", Scaled(tiny.D_MODEL, tiny.D_MODEL, bias=False))
    with expect("Scaled, which takes no routes, in the place of a module that route() had made routed"):
        backward(model, tokens(), route_ids=mixed_ids(tokens()))


def bind(model, plain, name):
    """The ordinary forward, put on the instance of a routed module."""
    module = model.get_submodule(name)
    module.forward = type(plain.get_submodule(name)).forward.__get__(module)


@pytest.mark.parametrize("name", [f"{LAYER}.mlp", f"{LAYER}.input_layernorm"])
def test_forwards_that_take_no_routes_are_named(name):
    model, plain = model_and_plain()
    bind(model, plain, name)
    with expect(
        "since it was routed, which takes none; expected unroute(), the replacement, and route() then"
    ):
        backward(model, tokens(), route_ids=mixed_ids(tokens()))


@pytest.mark.setup(
    "Modules and hooks",
    "a forward put on a routed module that swallows the routes",
    refused="nothing within would be routed",
)
@pytest.mark.parametrize("name", [f"{LAYER}.self_attn", LAYER])
def test_forwards_that_swallow_routes_are_found_out(name):
    """transformers' attention and layers take any keyword: a module is reached when its routed forward runs."""
    model, plain = model_and_plain()
    bind(model, plain, name)
    with expect("route_ids: got routes that did not reach"):
        backward(model, tokens(), route_ids=mixed_ids(tokens()))


@pytest.mark.parametrize(
    "plan",
    [PLAN, RoutingPlan(2, lm_head=LinearSites(update_cols=OUTPUT))],
    ids=["layers", "the head alone"],
)
def test_another_forward_of_the_model_is_found_out(plan):
    """Where no decoder layer is routed, nothing but the model itself would notice that ids were swallowed."""
    model, plain = model_and_plain(plan)
    bind(model, plain, "")
    with pytest.raises(ValueError, match="past the routed model whose lm_head the plan routes too"):
        backward(model, tokens(), route_ids=mixed_ids(tokens()))


@pytest.mark.parametrize("name", ["lm_head", "mlp"])
def test_a_forward_of_the_model_that_drops_ids_is_found_out(name):
    """By the base model, which knows that it is a part of a routed one, or by the model where that is not called."""
    model, plain = model_and_plain(RoutingPlan(2, **{name: getattr(PLAN, name)}))
    ordinary = type(plain).forward
    model.forward = lambda input_ids, labels, **others: ordinary(model, input_ids=input_ids, labels=labels)
    with expect("without route_ids, past the routed model"):
        backward(model, tokens(), route_ids=mixed_ids(tokens()))
    model.forward = lambda **others: plain(others["input_ids"])
    with expect("route_ids: got routes for a model whose forward was replaced since route()"):
        model(input_ids=tokens(), route_ids=mixed_ids(tokens()))


@pytest.mark.parametrize("name", ["mlp", "embedding"])
def test_the_ordinary_forward_of_the_model_hands_ids_on(name):
    """To the base model, which takes routes too."""
    plan = RoutingPlan(2, **{name: getattr(PLAN, name)})
    model, plain = model_and_plain(plan)
    x = tokens()
    expected = backward(model, x, route_ids=mixed_ids(x))
    bind(model, plain, "")
    assert_gradients_close(backward(model, x, route_ids=mixed_ids(x)), expected, 0.0)


def test_forwards_that_pass_everything_on_stay():
    """A wrapper of any arguments around the routed forward, of a sublayer and of the model."""
    model, _ = model_and_plain()
    x = tokens()
    expected = backward(model, x, route_ids=mixed_ids(x))
    for module in (model, model.model.layers[0].mlp, model.model.layers[1].self_attn):
        routed = module.forward
        module.forward = lambda *args, routed=routed, **kwargs: routed(*args, **kwargs)
    assert_gradients_close(backward(model, x, route_ids=mixed_ids(x)), expected, 0.0)
