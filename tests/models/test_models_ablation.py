"""expand, contract and ablate: what the model computes afterwards, and what is left of the parameters."""

import model_zoo
import pytest
import torch

from gradroute import AttentionSites, MLPSites
from gradroute import era as era_steps
from gradroute.blocks import Block
from gradroute.models import NANO_GPT, RoutingPlan, ablate, contract, era, expand, route, sgtm, unroute
from gradroute.tables import localize

ADDED = 16


def built(name):
    model = model_zoo.build(name).eval()
    return model, NANO_GPT if name == "nano_gpt" else None


def assert_same(got, expected):
    """The same products, of zeros or factors in the weights instead of in the activations: fp32 roundings apart."""
    assert model_zoo.error(got, expected) < 1e-5


@pytest.fixture
def tokens():
    return torch.randint(3, model_zoo.VOCABULARY, (2, 10))


def sgtm_plan(model, architecture):
    if architecture is None:
        return sgtm(model.config, forget_heads=2, forget_units=ADDED)
    heads, d_ff = model_zoo.HEADS, model_zoo.HIDDEN  # nanoGPT's configuration is not one of transformers
    return RoutingPlan(
        2,
        mlp=MLPSites(forward=localize(2, d_ff, {0: slice(d_ff - ADDED, d_ff)}, on=0.0, off=1.0)),
        attention=AttentionSites(forward_heads=localize(2, heads, {0: [2, 3]}, on=0.0, off=1.0)),
    )


@pytest.mark.parametrize("name", model_zoo.NAMES)
def test_ablated_model_computes_what_the_route_saw(name, tokens):
    model, architecture = built(name)
    route(model, sgtm_plan(model, architecture), architecture=architecture)
    seen = model_zoo.logits_of(model, tokens, route_ids=torch.zeros_like(tokens))
    whole = model_zoo.logits_of(model, tokens)
    ablate(model, route=0)
    unroute(model)
    ablated = model_zoo.logits_of(model, tokens)
    assert_same(ablated, seen)
    assert not torch.allclose(ablated, whole, atol=1e-4)
    zeros = sum(
        int((parameter == 0).all(-1).sum()) for parameter in model.parameters() if parameter.dim() == 2
    )
    layers = len(model.get_submodule(model_zoo.LAYOUTS[name].layers))
    assert zeros >= ADDED * layers  # rows of an input weight, or of a Conv1D's output weight


def test_ablating_scales_by_fractional_weights(tokens):
    model, _ = built("llama")
    forward = torch.ones(2, model_zoo.HIDDEN)
    forward[0, :8] = 0.25
    heads = [[1.0, 0.5, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]]
    plan = RoutingPlan(2, mlp=MLPSites(forward=forward), attention=AttentionSites(forward_heads=heads))
    route(model, plan)
    seen = model_zoo.logits_of(model, tokens, route_ids=torch.zeros_like(tokens))
    ablate(model)
    assert_same(model_zoo.logits_of(unroute(model), tokens), seen)


@pytest.mark.parametrize("name", model_zoo.NAMES)
def test_expand_changes_no_output_and_contract_takes_it_back(name, tokens, tmp_path):
    model, architecture = built(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plain = model_zoo.logits_of(model, tokens)
    expand(model, ADDED, architecture=architecture)
    assert_same(model_zoo.logits_of(model, tokens), plain)
    after = model.state_dict()
    grown = sum(value.numel() for value in after.values()) - sum(value.numel() for value in before.values())
    assert grown > 0
    if architecture is None:
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path, attn_implementation="eager").eval()
        assert torch.equal(model_zoo.logits_of(loaded, tokens), model_zoo.logits_of(model, tokens))
    contract(model, ADDED, architecture=architecture)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_era_expands_routes_and_ablates(tokens):
    """Tokens of route 1 leave their mark in the added units only, as far as MLPs go; without them it is gone."""
    model, _ = built("llama")
    for parameter in model.parameters():
        parameter.requires_grad_("mlp" in next(n for n, p in model.named_parameters() if p is parameter))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expand(model, ADDED, std=0.1)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, -ADDED:].normal_(
                std=0.1
            )  # else nothing flows into the new units yet
    route(model, era(units=ADDED))
    model(tokens, labels=tokens, route_ids=torch.ones_like(tokens)).loss.backward()
    for layer in model.model.layers:
        gate = layer.mlp.gate_proj.weight.grad
        assert (gate[:-ADDED] == 0).all()
        assert (gate[-ADDED:] != 0).any()
    with torch.no_grad():
        for layer in model.model.layers:
            for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
                linear.weight -= linear.weight.grad
    era_steps.ablate(unroute(model), Block.units(model, ADDED), how="slice")
    for key, value in model.state_dict().items():
        if key.endswith(("gate_proj.weight", "up_proj.weight")):
            assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("forget_heads", [2, 0])
def test_training_the_ablated_model_does_not_bring_it_back(tokens, forget_heads):
    """Every gradient of ablated hidden units, and of ablated whole groups of heads, is exactly 0."""
    model, _ = built("llama")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    route(model, sgtm(model.config, forget_heads=forget_heads, forget_units=ADDED))
    ablate(model)
    unroute(model)
    model(tokens, labels=tokens).loss.backward()
    ablated = 0
    for name, parameter in model.named_parameters():
        zeroed = (parameter == 0) & (before[name] != 0)
        ablated += int(zeroed.sum())
        assert (parameter.grad[zeroed] == 0).all(), name
    assert ablated > 3 * ADDED * model_zoo.WIDTH


# get_peft_model reads what transformers 5.23 calls by another name.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_adapters_are_refused():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["down_proj", "o_proj"], r=2)
    model = peft.get_peft_model(model_zoo.build("llama"), config)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    route(model, sgtm(model.config, forget_heads=2, forget_units=ADDED))
    with pytest.raises(TypeError, match=r"(o_proj|down_proj): got adapters, expected"):
        ablate(model)
    unroute(model)
    for change in (expand, contract):
        with pytest.raises(TypeError, match=r"down_proj: got adapters, expected"):
            change(model, ADDED)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_ablating_twice_is_refused(weight, tokens):
    """A second time would scale by fractional weights again, and says that what is zeroed has been."""
    model, _ = built("llama")
    forward = torch.ones(2, model_zoo.HIDDEN)
    forward[0, :8] = weight
    route(model, RoutingPlan(2, mlp=MLPSites(forward=forward)))
    ablate(model)
    once = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(
        ValueError, match="model: got one in which what route 0 does not see was ablated already"
    ):
        ablate(model)
    assert all(torch.equal(value, once[key]) for key, value in model.state_dict().items())


def test_refusals():
    model, _ = built("llama")
    with pytest.raises(ValueError, match="units: got 0, expected a positive number"):
        expand(model, 0)
    with pytest.raises(ValueError, match=f"units: got all {model_zoo.HIDDEN} of .*, expected some to remain"):
        contract(model, model_zoo.HIDDEN)
    with pytest.raises(ValueError, match=r"which still has influence on the model.*ablate\(\) it first"):
        contract(model, ADDED)
    with pytest.raises(ValueError, match="is not routed, expected one that route"):
        ablate(model)
    with pytest.warns(RuntimeWarning, match="original units become the forget part"):
        route(model, era(units=ADDED))
    with pytest.raises(ValueError, match="masks nothing in forward"):
        ablate(model)
    with pytest.raises(ValueError, match="route: got 2, expected an int from 0 to 1"):
        ablate(model, route=2)
    for change in (expand, contract):
        with pytest.raises(ValueError, match="got a routed model, expected an ordinary one"):
            change(model, ADDED)
