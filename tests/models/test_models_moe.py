"""Mixtures of experts, routed in place: gradients against the detach idiom, and what stays of the ordinary model."""

import copy

import pytest
import torch

pytest.importorskip("transformers")

import model_zoo
from model_zoo import VOCABULARY, WIDTH
from moe_zoo import BY_EXPERT, BY_UNIT, EXPERTS, NAMES, UNITS, all_sites, by_hand, fresh, mixtures, step
from routed_models import TOLERANCE, check_differ, expect, table

from gradroute import AttentionSites, MLPSites, NormSites, Routes, era, models
from gradroute.blocks import Block
from gradroute.models import MoESites, ResidualSites, RoutingPlan, Shape, localize_experts, route, unroute

CHOICE = [[1.0, 1, 1, 1], [0, 1, 0, 1], [1, 0, 1, 1]]


def batch(rows=2, tokens=9, routes=3):
    shape = (rows, tokens)
    return (
        torch.randint(1, VOCABULARY, shape),
        torch.randint(0, VOCABULARY, shape),
        torch.randint(0, routes, shape),
    )


def plan_of(name, sites, **more):
    layers = Shape.of(fresh(name).config).expert_layers
    return RoutingPlan(3, moe=dict.fromkeys(layers, sites), **more)


def routed(name, sites, implementation="grouped_mm", **more):
    return route(fresh(name, implementation), plan_of(name, sites, **more))


def check(got, expected):
    assert got.keys() == expected.keys()
    for key in expected:
        assert model_zoo.error(got[key], expected[key]) <= TOLERANCE, key


@pytest.mark.parametrize("implementation", ["grouped_mm", "eager"])
@pytest.mark.parametrize("name", NAMES)
def test_all_sites_are_the_detach_idiom(name, implementation):
    tokens, targets, ids = batch()
    sites = MoESites(**all_sites(name, EXPERTS * UNITS), choice=CHOICE)
    got = step(routed(name, sites, implementation), tokens, targets, route_ids=ids)
    check(got, by_hand(name, sites, ids, tokens, targets))
    check_differ(got, step(fresh(name), tokens, targets), [key for key in got if ".0." in key])


@pytest.mark.parametrize("site", [*BY_UNIT, *BY_EXPERT, "update", "output", "choice"])
def test_every_site_alone(site):
    """Forward is touched by three sites only; where there is one table, nothing else hides what it does."""
    tokens, targets, ids = batch()
    width = UNITS if site in (*BY_UNIT, "update") else WIDTH if site == "output" else EXPERTS
    weights = CHOICE if site == "choice" else table(width, 3)
    sites = MoESites(**{site: weights})
    got, unrouted = (
        step(routed("olmoe", sites), tokens, targets, route_ids=ids),
        step(fresh("olmoe"), tokens, targets),
    )
    check(got, by_hand("olmoe", sites, ids, tokens, targets))
    assert max(model_zoo.error(got[key], unrouted[key]) for key in got if "mlp" in key) > 0.01
    in_forward = site in ("forward", "forward_experts", "choice")
    assert torch.equal(got["logits"], unrouted["logits"]) != in_forward


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_strength(name):
    """From route 0, whose weights must be those of all experts alike."""
    tokens, targets, ids = batch()
    strength = torch.rand(ids.shape)
    sites = MoESites(**all_sites(name, EXPERTS * UNITS, base=True))
    model = routed(name, sites)
    got = step(model, tokens, targets, route_ids=ids, route_strength=strength)
    check(got, by_hand(name, sites, ids, tokens, targets, strength))
    unequal = routed(name, MoESites(experts=[[1.0, 0, 1, 1]] * 3))
    with expect(
        ValueError, "route_strength: got one beside MoESites whose weights of route 0 differ from expert"
    ):
        unequal(tokens, route_ids=ids, route_strength=strength)
    chosen = routed(name, MoESites(choice=CHOICE))
    with expect(ValueError, "route_strength: got one beside MoESites.choice"):
        chosen(tokens, route_ids=ids, route_strength=strength)


@pytest.mark.parametrize("name", NAMES)
def test_beside_the_other_parts_of_a_plan(name):
    """Attention, norms and the dense layer of a model with both; sinks leave attention's own masks out."""
    tokens, targets, ids = batch()
    attention = {
        "update_q": [[1.0], [0.5], [0.0]],
        "update_kv": table(2, 3),
        "update_out": [[1.0], [0.5], [0.0]],
    }
    if name != "gpt_oss":
        attention |= {"heads": [[1.0], [0.5], [0.0]]}
    more = {
        "attention": AttentionSites(**attention),
        "norm": NormSites(table(WIDTH, 3)),
        "residual": ResidualSites(post=table(WIDTH, 3)),
    }
    if name == "qwen3_moe":
        more["mlp"] = {1: MLPSites(hidden=table(UNITS, 3))}
    model = routed(name, MoESites(hidden=table(UNITS, 3)), **more)
    got = step(model, tokens, targets, route_ids=ids)
    unrouted = step(fresh(name), tokens, targets)
    assert model_zoo.error(got["logits"], unrouted["logits"]) <= TOLERANCE
    check_differ(got, unrouted, [key for key in got if "model.layers.0.self_attn.q_proj" in key])


@pytest.mark.parametrize("name", NAMES)
def test_the_ordinary_model_stays(name, tmp_path):
    """Bit for bit without routes and with them where nothing masks in forward, and unroute gives it back."""
    tokens, targets, ids = batch()
    for implementation in ("grouped_mm", "eager"):
        before = fresh(name, implementation)
        expected = step(before, tokens, targets)
        sites = all_sites(name, EXPERTS * UNITS)
        sites = MoESites(**{site: sites[site] for site in sites if "forward" not in site})
        model = route(copy.deepcopy(before), plan_of(name, sites))
        assert torch.equal(step(model, tokens, targets, route_ids=ids)["logits"], expected["logits"])
        model.eval()  # a routed model that trains without routes warns
        assert torch.equal(model(tokens, use_cache=False).logits, expected["logits"])
        model.train()
        assert list(model.state_dict()) == list(before.state_dict())
        unroute(model)
        assert [type(one) for one in model.modules()] == [type(one) for one in before.modules()]
        assert [sorted(vars(one)) for one in model.modules()] == [
            sorted(vars(one)) for one in before.modules()
        ]
        again = step(model, tokens, targets)
        assert all(torch.equal(again[key], expected[key]) for key in expected)


def test_saved_as_the_plain_model(tmp_path):
    tokens, _, _ = batch()
    model = routed("mixtral", MoESites(hidden=table(UNITS, 3)))
    model.save_pretrained(tmp_path)
    loaded = type(fresh("mixtral")).from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.equal(loaded(tokens).logits, fresh("mixtral")(tokens).logits)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_checkpointed_layers(name):
    from tiny_models import checkpoint_layers

    tokens, targets, ids = batch()
    sites = MoESites(**all_sites(name, UNITS), choice=CHOICE)
    model = routed(name, sites)
    expected = step(model, tokens, targets, route_ids=ids)
    checkpoint_layers(model)
    got = step(model, tokens, targets, route_ids=ids)
    assert all(torch.equal(got[key], expected[key]) for key in expected)


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
def test_backends(backend):
    tokens, targets, ids = batch()
    sites = MoESites(**all_sites("mixtral", EXPERTS * UNITS), choice=CHOICE)
    model = route(fresh("mixtral"), plan_of("mixtral", sites), backend=backend)
    check(step(model, tokens, targets, route_ids=ids), by_hand("mixtral", sites, ids, tokens, targets))


def test_load_balancing_loss_passes_the_router_site():
    """The auxiliary loss reads the router's logits, so its gradient is masked there with the rest."""
    tokens, _, ids = batch()
    model = routed("mixtral", MoESites(router=[[0.0], [0.0], [0.0]]))
    output = model(tokens, labels=tokens, route_ids=ids, output_router_logits=True)
    assert output.aux_loss > 0
    output.loss.backward()
    assert all(mixture.gate.weight.grad.abs().max() == 0 for mixture in mixtures(model).values())


def test_a_token_masked_to_zero_teaches_an_expert_nothing():
    """Exactly, also where its gradient is not finite."""
    tokens, targets, _ = batch()
    ids = torch.ones_like(tokens)
    for site in ("experts", "update_experts"):
        model = routed("mixtral", MoESites(**{site: [[1.0] * EXPERTS, [0.0, 1, 1, 1], [1.0] * EXPERTS]}))
        gradients = step(model, tokens, targets, route_ids=ids)
        for i in mixtures(model):
            for part in ("gate_up_proj", "down_proj"):
                of_experts = gradients[f"model.layers.{i}.mlp.experts.{part}"]
                assert of_experts[0].abs().max() == 0
                assert of_experts[1:].abs().amax((1, 2)).min() > 0
    logits = model(tokens, routes=Routes.of(ids, 3)).logits
    (logits.sum() * float("inf")).backward()
    assert not model.model.layers[1].mlp.experts.down_proj.grad[1:].isfinite().all()
    assert model.model.layers[1].mlp.experts.down_proj.grad[0].abs().max() == 0


@pytest.mark.parametrize(
    ("name", "sites", "message"),
    [
        (
            "llama",
            MoESites(hidden=[[1.0]] * 3),
            "got MoESites for a LlamaMLP, which has no experts, expected None",
        ),
        (
            "mixtral",
            MLPSites(hidden=[[1.0]] * 3),
            "RoutingPlan.mlp: got MLPSites for a MixtralSparseMoeBlock",
        ),
        (
            "mixtral",
            MoESites(hidden=table(UNITS - 1, 3)),
            "MoESites.hidden: got a table of 23 features, expected 24",
        ),
        (
            "mixtral",
            MoESites(experts=table(UNITS, 3)),
            "MoESites.experts: got a table of 24 features, expected 4",
        ),
        ("mixtral", MoESites(update_output_bias=[[1.0]] * 3), "the experts have no output bias"),
        (
            "mixtral",
            MoESites(choice=[[1.0, 0.5, 1, 1]] * 3),
            "of weights other than 0 and 1, expected those alone",
        ),
        (
            "mixtral",
            MoESites(choice=[[1.0] * 4, [0.0, 0, 1, 0], [1.0] * 4]),
            "got 1 experts for route 1, expected at",
        ),
    ],
)
def test_refusals(name, sites, message):
    model = model_zoo.fresh(name) if name == "llama" else fresh(name)
    entry = "mlp" if isinstance(sites, MLPSites) else "moe"
    with pytest.raises((TypeError, ValueError), match="RoutingPlan") as error:
        route(model, RoutingPlan(3, **{entry: {0: sites}}))
    assert message in str(error.value)
    assert type(model.model.layers[0].mlp).__mro__[1] is torch.nn.Module  # nothing has changed


def test_refused_when_called():
    tokens, _, ids = batch()
    model = routed("mixtral", MoESites(hidden=[[1.0], [0.5], [0.0]]), "batched_mm")
    with expect(
        ValueError,
        "experts_implementation: got 'batched_mm' beside routes, expected one of eager, grouped_mm",
    ):
        model(tokens, route_ids=ids)
    with pytest.raises(TypeError, match="attention sinks"):
        routed("gpt_oss", MoESites(hidden=[[1.0]] * 3), attention=AttentionSites(heads=[[1.0]] * 2 + [[0.5]]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_compiled_as_one_graph(name):
    """Where the plain model is one."""
    tokens, targets, ids = batch()
    sites = MoESites(**all_sites(name, EXPERTS * UNITS), choice=CHOICE)
    model = routed(name, sites)
    expected = step(model, tokens, targets, route_ids=ids)
    model.forward = torch.compile(model.forward, fullgraph=True)
    check(step(model, tokens, targets, route_ids=ids), expected)


def test_localize_experts():
    """Gradients pass through the chosen experts alone; what the others do not see, ablate takes out."""
    tokens, targets, ids = batch(routes=2)
    plan = localize_experts([0], 1, hidden_from_others=True)
    model = route(fresh("mixtral"), plan)
    sites = model.model.layers[0].mlp.sites
    assert sites.experts.weights.tolist() == [[1.0] * 4, [0.0, 0, 0, 1]]
    assert sites.forward_experts.weights.tolist() == [[1.0, 1, 1, 0], [1.0] * 4]
    gradients = step(model, tokens, targets, route_ids=torch.ones_like(ids))
    of_experts = gradients["model.layers.0.mlp.experts.down_proj"].abs().amax((1, 2))
    assert of_experts[:3].max() == 0
    assert of_experts[3] > 0
    seen = model(tokens, route_ids=torch.zeros_like(ids)).logits
    models.ablate(model, 0)
    unroute(model)
    assert not model.model.layers[0].mlp.experts.gate_up_proj[3].any()
    assert torch.equal(model(tokens, use_cache=False).logits, seen)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_ablate_units_and_experts(name):
    """What a route does not see, and fractions of it, biases too."""
    tokens, _, ids = batch(routes=2)
    width = EXPERTS * UNITS
    sites = MoESites(forward=table(width), forward_experts=table(EXPERTS))
    model = route(fresh(name), RoutingPlan(2, moe={0: sites}))
    seen = model(tokens, route_ids=torch.ones_like(ids)).logits
    models.ablate(model, 1)
    unroute(model)
    assert model_zoo.error(model(tokens, use_cache=False).logits, seen) <= TOLERANCE
    chosen = route(fresh(name), RoutingPlan(3, moe=MoESites(choice=CHOICE, forward=table(UNITS, 3))))
    with expect(ValueError, "route: got 1, whose tokens MoESites.choice does not send to every expert"):
        models.ablate(chosen, 1)


def test_other_presets_on_mixtures():
    """The dense layer of Qwen3-MoE gets the MLP's sites, the mixture those of every expert's units."""
    model = route(fresh("qwen3_moe"), models.localize_mlp([0, 1], slice(-4, None)))
    mixture, dense = (layer.mlp for layer in model.model.layers)
    assert torch.equal(mixture.sites.hidden.weights, dense.sites.hidden.weights)
    plan = models.sgtm(fresh("qwen3_moe").config, 2, 4)
    model = route(fresh("qwen3_moe"), plan)
    mixture, dense = (layer.mlp for layer in model.model.layers)
    assert mixture.sites.tables.keys() == dense.sites.tables.keys() == {"forward", "update_in", "update_out"}
    model = route(fresh("gpt_oss"), models.localize_mlp([0], 4))
    assert model.model.layers[0].mlp.sites.hidden.features == UNITS
    with expect(
        ValueError, "layers: got layer 0, which is a mixture of experts, to which gradroute.era.expand adds"
    ):
        route(fresh("mixtral"), models.era())
    with expect(ValueError, "layers: got [1], which have no experts, expected some of (0,)"):
        route(fresh("qwen3_moe"), localize_experts([0, 1], 1))
    with expect(ValueError, "layers: got a model without mixtures of experts, expected one with some"):
        route(model_zoo.fresh("llama"), localize_experts(None, 1))


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_blocks_of_experts(name):
    """An expert gated by 0 adds nothing, and one that was ablated has no influence and no gradient."""
    tokens, _, _ = batch()
    model = fresh(name)
    block = Block.experts(model, [1])
    hidden = MoESites(forward_experts=[[1.0, 0, 1, 1]])
    masked = route(
        fresh(name), RoutingPlan(1, moe={int(part.module.split(".")[2]): hidden for part in block.parts})
    )
    expected = masked(tokens, route_ids=torch.zeros_like(tokens)).logits
    assert block.has_influence(model)
    with era.gate(model, block, 0.0):
        assert model_zoo.error(model(tokens, use_cache=False).logits, expected) <= TOLERANCE
    era.ablate(model, block)
    assert model_zoo.error(model(tokens, use_cache=False).logits, expected) <= TOLERANCE
    assert not block.has_influence(model)
    with expect(ValueError, "whose router goes on choosing among all of them"):
        era.contract(model, block)
    with pytest.raises(TypeError, match="with a mixture of experts in layer 0"):
        era.expand(model, 4)
    with expect(ValueError, "experts: got index 4"):
        Block.experts(model, [4])
    if name == "qwen3_moe":
        with expect(ValueError, "layers: got [1], which have no experts, expected some of [0]"):
            Block.experts(model, [1], layers=[0, 1])
