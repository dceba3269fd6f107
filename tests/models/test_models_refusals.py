"""Plans and models that cannot be routed are refused, and nothing has changed then."""

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import model_zoo
import transformers
from model_zoo import HEADS, HIDDEN, WIDTH, fresh, plain
from routed_models import (
    batch,
    expect,
    route,
    routed,
    table,
    update_sites,
)

from gradroute import AttentionSites, EmbeddingSites, LinearSites, MLPSites, NormSites, models
from gradroute.models import NANO_GPT, ResidualSites, RoutingPlan, unroute

BAD_PLANS = [
    ("llama", lambda: {"mlp": {5: MLPSites()}}, ValueError, "got layers [5], expected indices from 0 to 1"),
    ("llama", lambda: {"mlp": {-1: MLPSites()}}, ValueError, "got layers [-1]"),
    ("llama", lambda: {"mlp": MLPSites(hidden=table(63))}, ValueError, "layer 0: RoutingPlan.mlp: "),
    ("llama", lambda: {"mlp": MLPSites(hidden=table(63))}, ValueError, "63 features, expected 64 or 1"),
    ("llama", lambda: {"mlp": {1: MLPSites(output=table(64))}}, ValueError, "layer 1: RoutingPlan.mlp: "),
    (
        "llama",
        lambda: {"attention": AttentionSites(value=table(HEADS))},
        ValueError,
        "AttentionSites.value: got a table of 4 features, expected 2 or 1",
    ),
    ("llama", lambda: {"attention": AttentionSites(query=table(2))}, ValueError, "expected 4 or 1"),
    ("llama", lambda: {"attention": AttentionSites(update=table(HEADS))}, ValueError, "update_kv"),
    ("mistral", lambda: {"mlp": MLPSites(update_output_bias=table(WIDTH))}, ValueError, "update_output_bias"),
    (
        "mistral",
        lambda: {"attention": AttentionSites(update_output_bias=table(WIDTH))},
        ValueError,
        "o_proj has no bias",
    ),
    ("llama", lambda: {"attention": AttentionSites(score_edges=table(3))}, ValueError, "score_edges"),
    ("llama", lambda: {"mlp": AttentionSites()}, TypeError, "RoutingPlan.mlp: got a AttentionSites"),
    ("llama", lambda: {"residual": {0: "pre"}}, TypeError, "expected ResidualSites or None"),
    ("llama", lambda: {"norm": 3}, TypeError, "RoutingPlan.norm: got 3"),
    ("llama", lambda: {"mlp": [MLPSites()]}, ValueError, "got a sequence of 1, expected one entry for each"),
    ("llama", lambda: {"mlp": lambda index: 3}, TypeError, "got 3, expected MLPSites or None"),
    ("llama", lambda: {"mlp": MLPSites(hidden=table(64, 3))}, ValueError, "has 3 routes, expected"),
    ("llama", lambda: {"mlp": {}}, ValueError, "got no sites in any layer"),
    ("llama", lambda: {"mlp": [None, None]}, ValueError, "got no sites in any layer"),
    ("llama", lambda: {"qk_norm": NormSites(table(8))}, TypeError, "without q_norm, expected qk_norm"),
    ("llama", lambda: {"norm": {1: NormSites(table(8))}}, ValueError, "layer 1: RoutingPlan.norm: "),
    ("llama", lambda: {"final_norm": NormSites(table(8))}, ValueError, "RoutingPlan.final_norm: "),
    ("llama", lambda: {"embedding": EmbeddingSites(table(8))}, ValueError, "RoutingPlan.embedding: "),
    ("llama", lambda: {"lm_head": LinearSites(output=table(8))}, ValueError, "RoutingPlan.lm_head: "),
    ("llama", lambda: {"lm_head": LinearSites(update_bias=table(50))}, ValueError, "update_bias"),
    ("llama", lambda: {"residual": ResidualSites(mid=table(31))}, ValueError, "layer 0: ResidualSites.mid"),
    ("gpt_neox", lambda: {"residual": ResidualSites(mid=table(WIDTH))}, ValueError, "in parallel"),
    ("qwen3", lambda: {"qk_norm": NormSites(table(8))}, ValueError, "expected 16 or 1"),
    ("gpt2", lambda: {"mlp": {1: MLPSites(hidden=table(63))}}, ValueError, "layer 1: RoutingPlan.mlp: "),
    ("gpt_neo", lambda: {"attention": {1: AttentionSites(heads=table(3))}}, ValueError, "layer 1: "),
    ("nano_gpt", lambda: {"attention": {1: AttentionSites(heads=table(3))}}, ValueError, "layer 1: "),
]


@pytest.mark.parametrize("name", sorted({name for name, *_ in BAD_PLANS}))
def test_errors_of_plans_change_nothing(name):
    model, unrouted = fresh(name), plain(name)
    for plan_of, errors, message in (case[1:] for case in BAD_PLANS if case[0] == name):
        with expect(errors, message):
            route(name, model, RoutingPlan(2, **plan_of()))
        for (path, got), expected in zip(model.named_modules(), unrouted.modules(), strict=True):
            assert type(got) is type(expected), (message, path)
            assert vars(got).keys() == vars(expected).keys(), (message, path)


def test_errors_of_plans_themselves():
    with expect(ValueError, "RoutingPlan: got no sites"):
        RoutingPlan(2)
    with expect(TypeError, "num_routes: got 2.0"):
        RoutingPlan(2.0, mlp=MLPSites())
    with expect(ValueError, "num_routes: got 0"):
        RoutingPlan(0, mlp=MLPSites())
    with expect(TypeError, "RoutingPlan.final_norm: got a MLPSites, expected NormSites or None"):
        RoutingPlan(2, final_norm=MLPSites())
    with expect(ValueError, "RoutingPlan.embedding: got EmbeddingSites.update, which has 3 routes"):
        RoutingPlan(2, embedding=EmbeddingSites(table(WIDTH, 3)))
    with expect(TypeError, "unexpected keyword argument"):
        RoutingPlan(2, mpl=MLPSites())


def test_models_that_are_refused():
    plan = RoutingPlan(2, mlp=MLPSites(hidden=table(HIDDEN)))
    model = fresh("llama")
    with expect(TypeError, "plan: got a dict, expected a RoutingPlan"):
        models.route(model, {})
    with expect(TypeError, "model: got a str, expected a torch.nn.Module"):
        models.route("llama", plan)
    with expect(TypeError, "model: got a Linear of model_type None, expected one of llama, "):
        models.route(nn.Linear(2, 2), plan)
    with expect(TypeError, "model: got a Linear without transformer.h"):
        models.route(nn.Linear(2, 2), plan, architecture=NANO_GPT)
    opt = transformers.OPTConfig(
        vocab_size=50, hidden_size=32, ffn_dim=64, num_hidden_layers=1, num_attention_heads=4
    )
    with expect(TypeError, "of model_type 'opt', expected one of llama"):
        models.route(transformers.OPTForCausalLM(opt), plan)
    with expect(TypeError, "compiled module, expected to route the model before torch.compile"):
        models.route(torch.compile(model), plan)
    with expect(TypeError, "got a GPT2LMHeadModel without gpt_neox.layers"):
        models.route(fresh("gpt2"), plan, architecture=models.ARCHITECTURES["gpt_neox"])
    with expect(TypeError, "layer 0: got a GPT2Block with cross-attention"):
        models.route(model_zoo.build("gpt2", add_cross_attention=True), plan)
    assert type(model) is type(plain("llama"))


def test_model_of_another_form_is_refused():
    plan = RoutingPlan(2, mlp=MLPSites(hidden=table(HIDDEN)))
    wrong = models.Architecture(
        "model.layers", "model.embed_tokens", "model.norm", models.ARCHITECTURES["gpt_neox"].layer
    )
    model = fresh("llama")
    with expect(TypeError, "layer 0: got a LlamaDecoderLayer without attention"):
        models.route(model, plan, architecture=wrong)
    assert all(type(a) is type(b) for a, b in zip(model.modules(), plain("llama").modules(), strict=True))


def test_an_embedding_that_was_flattened():
    """As FSDP1 leaves parameters of a model that it wraps whole: rows and columns are not there to be counted."""
    model = fresh("llama")
    model.model.embed_tokens.weight = torch.nn.Parameter(model.model.embed_tokens.weight.detach().flatten())
    with expect(TypeError, "FSDP flattens what it shards, so route the model before that"):
        models.route(model, RoutingPlan(2, embedding=EmbeddingSites(table(WIDTH))))


@pytest.mark.setup("FSDP2", "route after fully_shard", refused="FSDP keeps the class that it found")
@pytest.mark.setup("FSDP1", "route after its layers were wrapped", refused="the wrappers hide them")
@pytest.mark.parametrize("where", ["model", "layer", "mlp"])
def test_what_was_done_to_modules_before(where):
    """Sharding, compilation and replaced forwards of any part are refused, and nothing has changed."""
    plan = RoutingPlan(2, mlp=MLPSites(hidden=table(HIDDEN)))

    def part(model):
        layer = model.model.layers[1]
        return {"model": model, "layer": layer, "mlp": layer.mlp}[where]

    model = fresh("llama")
    part(model).forward = lambda *args, **kwargs: None
    with expect(TypeError, "whose forward was replaced"):
        models.route(model, plan)
    del part(model).forward
    sharded = type("FSDPPart", (type(part(model)),), {"_get_fsdp_state": lambda self: None})
    part(model).__class__ = sharded
    with expect(TypeError, "that FSDP manages, expected to route the model before it is sharded"):
        models.route(model, plan)
    part(model).__class__ = sharded.__base__
    if where != "model":
        owner, name = (model.model.layers, "1") if where == "layer" else (model.model.layers[1], "mlp")
        setattr(owner, name, torch.compile(getattr(owner, name)))
        with expect(TypeError, "compiled module"):
            models.route(model, plan)
        setattr(owner, name, getattr(owner, name)._orig_mod)
    assert all(type(a) is type(b) for a, b in zip(model.modules(), plain("llama").modules(), strict=True))
    models.route(model, plan)
    with expect(ValueError, "routed already"):
        models.route(model, plan)
    model.__class__ = type("FSDPPart", (type(model),), {})
    with expect(TypeError, "something made another class of since it was routed"):
        unroute(model)


def test_layers_that_were_routed_alone():
    """A model of which a part is routed is refused, and that part stays as it was."""
    plan = RoutingPlan(2, mlp=MLPSites(hidden=table(HIDDEN)))
    model = fresh("llama")
    models.route(model.model, plan)
    classes = [type(module) for module in model.modules()]
    with expect(ValueError, "routed already"):
        models.route(model, plan)
    assert [type(module) for module in model.modules()] == classes


@pytest.mark.parametrize("part", ["layer", "mlp", "gate_proj"])
def test_modules_in_two_places(part):
    """One module cannot have two sets of sites; where it has none of its own, it may be in two places."""
    plan = RoutingPlan(2, mlp=MLPSites(hidden=table(HIDDEN), update=table(HIDDEN)))
    model = fresh("llama")
    layers = model.model.layers
    if part == "layer":
        layers[1] = layers[0]
    elif part == "mlp":
        layers[1].mlp = layers[0].mlp
    else:
        layers[1].mlp.up_proj = layers[1].mlp.gate_proj
    classes = [type(module) for module in model.modules()]
    with expect(ValueError, "that is in two places of the model and is routed in the first"):
        models.route(model, plan)
    assert [type(module) for module in model.modules()] == classes
    if part == "gate_proj":
        models.route(model, RoutingPlan(2, mlp=MLPSites(hidden=table(HIDDEN))))
        assert unroute(model) is model


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "nano_gpt"])
def test_tied_parameters(name):
    options = {"architecture": NANO_GPT} if name == "nano_gpt" else {}
    embedding, head = EmbeddingSites([[1.0], [0.0]]), LinearSites(update_rows=[[1.0], [0.0]])
    with pytest.warns(RuntimeWarning, match="RoutingPlan.embedding is given and lm_head is not"):
        models.route(fresh(name), RoutingPlan(2, embedding=embedding), **options)
    with pytest.warns(RuntimeWarning, match="RoutingPlan.lm_head is given and embedding is not"):
        models.route(fresh(name), RoutingPlan(2, lm_head=head), **options)
    models.route(fresh(name), RoutingPlan(2, embedding=embedding, lm_head=head), **options)  # no warning
    models.route(fresh("llama"), RoutingPlan(2, lm_head=head))  # is not tied


def test_model_without_a_head():
    """A base model alone, as it is inside of others: the same paths without the first name."""
    tokens, _, ids = batch()
    whole = routed("llama", RoutingPlan(2, **update_sites("llama") | {"lm_head": None}))
    base = fresh("llama").model
    models.route(base, whole.routing_plan)
    states = base(tokens, route_ids=ids).last_hidden_state
    whole.lm_head(states).sum().backward()
    got = {f"model.{key}": value for key, value in model_zoo.gradients(base).items()}
    whole(tokens, route_ids=ids).logits.sum().backward()
    expected = model_zoo.gradients(whole)
    assert all(torch.equal(got[key], expected[key]) for key in got)
    with expect(ValueError, "RoutingPlan.lm_head: got sites, expected None: LlamaModel has no lm_head"):
        models.route(fresh("llama").model, RoutingPlan(2, lm_head=LinearSites(update_rows=[[1.0], [0.0]])))


def test_sites_of_modules_with_routed_parts_are_the_plans():
    model = models.route(fresh("llama"), models.localize_mlp([0], 8))
    mlp = model.model.layers[0].mlp
    with pytest.raises(TypeError, match=r"LlamaMLP\.sites: got sites for a module whose parts"):
        mlp.sites = mlp.sites
