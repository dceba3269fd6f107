"""PEFT's LoRA in routed models: adapters against plain autograd and against plain PEFT models, one route at a time."""

import copy
import pickle
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("peft")

import peft
import tiny_models as tiny
from peft import LoraConfig, get_peft_model
from tiny_models import assert_gradients_close, assert_gradients_equal, backward, mixed_ids, tokens
from transformers.pytorch_utils import Conv1D

from gradroute import AttentionSites, EmbeddingSites, LinearSites, MLPSites, NormSites, Routes, Table
from gradroute.models import RoutingPlan, route, unroute
from gradroute.models.lora import LoRALinear, is_lora
from gradroute.models.swapped import Swapped, swap, unswap
from gradroute.tables import localize

# get_peft_model reads what transformers 5.23 calls by another name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

LLAMA_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DUAL = {"retain": [0], "forget": [1]}
HIDDEN = localize(2, tiny.D_FF, {1: slice(16, 24)})

# By architecture: the model, the modules that get adapters, and what else their configuration says.
MODELS = {
    "llama": (tiny.llama, [*LLAMA_LINEARS, "lm_head"], {}),
    "gpt2": (tiny.gpt2, ["c_attn", "c_proj", "c_fc"], {"fan_in_fan_out": True}),
    "gpt_neo": (tiny.gpt_neo, ["q_proj", "k_proj", "v_proj", "out_proj", "c_fc", "c_proj"], {}),
    "gpt_neox": (tiny.neox, ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"], {}),
}


def expect(error, message):
    return pytest.raises(error, match=re.escape(message))


def lora(target_modules=LLAMA_LINEARS, r=3, **options):
    """Neither A nor B begins at zero, so that every gradient says something."""
    options = {"init_lora_weights": False, "lora_alpha": 6} | options
    return LoraConfig(target_modules=target_modules, r=r, task_type="CAUSAL_LM", **options)


def peft_model(base=None, config=None, names=("default",)):
    """A model with adapters of these names, all of them active and trained."""
    config = lora() if config is None else config
    model = get_peft_model(tiny.llama() if base is None else base, config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    if len(names) > 1:
        model.base_model.set_adapter(list(names))
    return model


def summed_loss(logits, labels):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


def summed_gradients(model, input_ids, **arguments):
    """The gradients of a sum over tokens, so that those of parts of a batch add up."""
    model.zero_grad()
    summed_loss(model(input_ids=input_ids, **arguments).logits, input_ids).backward()
    return tiny.gradients(model)


def by_row(plain, input_ids, row_routes, num_routes):
    """For each route the gradients of the plain model on the rows of that route alone."""
    return [summed_gradients(plain, input_ids[row_routes == route]) for route in range(num_routes)]


# One layer


def parameter_masked(x, weight, rows, cols):
    """x Wᵀ, where a token updates W only as far as its masks [T, O] and [T, I] say: by plain autograd."""
    z = rows * F.linear(cols * x.detach(), weight)
    return F.linear(x, weight.detach()) + z - z.detach()


def masked(x, mask):
    """The detach idiom."""
    return mask * x + (1 - mask) * x.detach()


def any_of(weights):
    return (weights != 0).any(dim=1, keepdim=True).double()


def lora_layer(form, names, **options):
    base = nn.Linear(5, 4) if form == "linear" else Conv1D(4, 5)
    holder = nn.Module()
    holder.layer = base
    config = LoraConfig(target_modules=["layer"], r=3, lora_alpha=6, init_lora_weights=False, **options)
    peft.LoraModel(holder, dict.fromkeys(names, config), names[0])
    for name in names[1:]:
        holder.layer.update_layer(name, 3, 6, config)
    holder.layer.set_adapter(list(names))
    holder.layer.double().requires_grad_(True)
    return holder.layer


@pytest.mark.setup("PEFT", "LoRA in a routed model, every site")
@pytest.mark.parametrize("lora_bias", [False, True])
@pytest.mark.parametrize("form", ["linear", "conv1d"])
def test_every_site_against_autograd(form, lora_bias):
    """Three routes: a fractional one, one that may update no row, one that may update no column."""
    layer = lora_layer(form, ("a", "b"), lora_bias=lora_bias, fan_in_fan_out=form == "conv1d")
    nn.init.normal_(layer.base_layer.bias)
    if lora_bias:
        nn.init.normal_(layer.lora_B["a"].bias)
    table = {
        "output": torch.rand(3, 4),
        "input": torch.rand(3, 5),
        "update_rows": torch.tensor([[1.0, 0.5, 0.0, -1.0], [0.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 2.0]]),
        "update_cols": torch.tensor([[1.0, 0.0, 0.5, 2.0, 1.0], [1.0, 0.0, 0.0, 1.0, 1.0], [0.0] * 5]),
        "update_bias": torch.rand(3, 4),
    }
    adapters = {"a": torch.tensor([[1.0], [0.0], [1.0]])}
    x = torch.randn(2, 7, 5, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 7, 4, dtype=torch.float64)
    ids = mixed_ids(x[..., 0], 3)
    m = {name: weights.double()[ids] for name, weights in table.items()}
    rows, cols, bias = m["update_rows"], m["update_cols"], m["update_bias"]

    def oracle():
        base = layer.base_layer
        weight = base.weight.t() if form == "conv1d" else base.weight
        inner = masked(x, m["input"])
        y = parameter_masked(inner, weight, rows, cols) + masked(base.bias.expand_as(bias), bias)
        for name in ("a", "b"):
            mine = adapters.get(name, torch.ones(3, 1)).double()[ids]
            low = parameter_masked(
                inner, layer.lora_A[name].weight, any_of(table["update_rows"])[ids] * mine, cols
            )
            lora_b = layer.lora_B[name]
            high = parameter_masked(low, lora_b.weight, rows, any_of(table["update_cols"])[ids] * mine)
            if lora_bias:
                high = high + masked(lora_b.bias.expand_as(bias), bias * mine)
            y = y + 2.0 * high  # lora_alpha / r
        return masked(y, m["output"])

    leaves = {"x": x} | dict(layer.named_parameters())
    want_y = oracle()
    want = torch.autograd.grad(want_y, list(leaves.values()), upstream)
    plain = layer(x)
    swap(layer, LoRALinear, LinearSites(**table), None)
    layer.route_adapters({name: Table(weights) for name, weights in adapters.items()})
    y = layer(x, routes=Routes.of(ids, 3))
    got = torch.autograd.grad(y, list(leaves.values()), upstream)
    assert torch.equal(layer(x), plain)
    assert (y - want_y).abs().max() < 1e-12  # fp64: some roundings
    for name, a, b in zip(leaves, got, want, strict=True):
        assert (a - b).abs().max() < 1e-12, name
    if form == "linear":
        assert torch.equal(y, plain)


def test_a_layer_of_which_nothing_is_routed_is_only_called():
    """Whatever the adapters are: here DoRA, which cannot be routed itself."""
    layer = lora_layer("linear", ("a",), use_dora=True)
    x = torch.randn(3, 5, dtype=torch.float64)
    plain = layer(x)
    swap(layer, LoRALinear, None, None)
    assert torch.equal(layer(x, routes=Routes.of([0, 1, 1], 2)), plain)
    assert not any(isinstance(child, Swapped) for child in layer.modules() if child is not layer)


def test_is_lora():
    assert is_lora(lora_layer("linear", ("a",)))
    assert not is_lora(nn.Linear(2, 2))
    assert not is_lora(lora_layer("linear", ("a",)).base_layer)


# A model


@pytest.mark.setup("PEFT", "an adapter for each route")
@pytest.mark.parametrize("architecture", MODELS)
def test_dual_adapters(architecture):
    """Rows of one route each: an adapter's gradient is that of the plain model on its rows alone."""
    make, targets, options = MODELS[architecture]
    model = peft_model(make(), lora(targets, **options), ("retain", "forget"))
    plain = copy.deepcopy(model)
    route(model, RoutingPlan(2, adapters=DUAL))
    x, row_routes = tokens(), torch.tensor([0, 1, 1, 0])
    got = summed_gradients(model, x, route_ids=row_routes[:, None].expand_as(x))
    retain, forget = by_row(plain, x, row_routes, 2)
    assert any(".lm_head." in name for name in got) == (architecture == "llama")
    assert_gradients_close(got, {n: (forget if ".forget." in n else retain)[n] for n in got}, 2e-5)

    alone = summed_gradients(model, x, route_ids=torch.zeros_like(x))
    assert {bool(g.any()) for n, g in alone.items() if ".forget." in n} == {False}
    assert {bool(g.any()) for n, g in alone.items() if ".retain." in n} == {True}


def test_dual_adapters_change_neither_the_forward_nor_the_gradient_that_flows_on():
    model = peft_model(names=("retain", "forget"))
    plain = copy.deepcopy(model)
    route(model, RoutingPlan(2, adapters=DUAL))
    x = torch.randn(2, 5, tiny.D_MODEL, requires_grad=True)
    upstream = torch.randn(2, 5, tiny.VOCABULARY)
    logits = model(inputs_embeds=x, route_ids=mixed_ids(x[..., 0])).logits
    plain_logits = plain(inputs_embeds=x).logits
    assert torch.equal(logits, plain_logits)
    (got,), (want,) = (torch.autograd.grad(y, [x], upstream) for y in (logits, plain_logits))
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


def test_an_adapter_of_several_routes_and_one_of_none():
    model = peft_model(names=("shared", "frozen", "free"))
    plain = copy.deepcopy(model)
    route(model, RoutingPlan(3, adapters={"shared": [0, 2], "frozen": []}))
    x, row_routes = tokens(), torch.tensor([0, 1, 2, 1])
    got = summed_gradients(model, x, route_ids=row_routes[:, None].expand_as(x))
    parts = by_row(plain, x, row_routes, 3)
    weights = {"shared": (1, 0, 1), "frozen": (0, 0, 0), "free": (1, 1, 1)}

    def want(name):
        mine = next(weights[adapter] for adapter in weights if f".{adapter}." in name)
        return sum(weight * part[name] for weight, part in zip(mine, parts, strict=True))

    assert_gradients_close(got, {name: want(name) for name in got}, 2e-5)


UPDATES = {
    "mlp": MLPSites(update=HIDDEN),
    "attention": AttentionSites(
        update=localize(2, tiny.HEADS, {1: [3]}), update_kv=localize(2, tiny.KV_HEADS, {1: []})
    ),
    "lm_head": LinearSites(update_rows=localize(2, tiny.VOCABULARY, {1: slice(0, 8)})),
}


def update_masks():
    """By linear layer, what a token of route 1 may update, as (rows, columns); written out by hand."""
    units = torch.zeros(tiny.D_FF)
    units[16:] = 1
    head = torch.zeros(tiny.D_MODEL)
    head[12:] = 1  # the last of four heads
    words = torch.zeros(tiny.VOCABULARY)
    words[:8] = 1
    nothing = torch.zeros(tiny.KV_HEADS * tiny.HEAD_DIM)
    model, hidden = torch.ones(tiny.D_MODEL), torch.ones(tiny.D_MODEL)
    return {
        "gate_proj": (units, hidden),
        "up_proj": (units, hidden),
        "down_proj": (model, units),
        "q_proj": (head, hidden),
        "k_proj": (nothing, hidden),
        "v_proj": (nothing, hidden),
        "o_proj": (model, head),
        "lm_head": (words, hidden),
    }


@pytest.mark.parametrize("adapters", [None, {"default": [0, 1]}, {"default": [0]}])
def test_update_masks_by_route(adapters):
    """Rows of one route each: the sum of each route's plain gradients, masked by hand."""
    model = peft_model(config=lora([*LLAMA_LINEARS, "lm_head"]))
    plain = copy.deepcopy(model)
    route(model, RoutingPlan(2, **UPDATES, adapters=adapters))
    x, row_routes = tokens(), torch.tensor([1, 0, 1, 0])
    got = summed_gradients(model, x, route_ids=row_routes[:, None].expand_as(x))
    of_all, of_masked = by_row(plain, x, row_routes, 2)
    may_train = adapters is None or 1 in adapters["default"]

    def want(name):
        rows, cols = next(masks for part, masks in update_masks().items() if f".{part}." in name)
        mask = cols * rows.any() if ".lora_A." in name else rows[:, None] * cols.any()
        return of_all[name] + (mask * of_masked[name] if may_train else 0)

    assert_gradients_close(got, {name: want(name) for name in got}, 2e-5)


@pytest.mark.setup("PEFT", "LoRA and DoRA in a routed model, masks of hidden units")
@pytest.mark.parametrize("use_dora", [False, True])
def test_hidden_masks_equal_the_detach_idiom(use_dora):
    """In a gated MLP whose linear layers must be called: DoRA, too, may stand there."""
    model = peft_model(config=lora(use_dora=use_dora))
    plain = copy.deepcopy(model)
    x = tokens()
    ids = mixed_ids(x)
    for name, module in plain.named_modules():
        if name.endswith("mlp.down_proj"):
            module.register_forward_pre_hook(
                lambda _, arguments: (masked(arguments[0], HIDDEN.weights[ids]),)
            )
    route(model, RoutingPlan(2, mlp=MLPSites(hidden=HIDDEN)))
    got = backward(model, x, route_ids=ids)
    assert_gradients_close(got, backward(plain, x), 1e-5)
    unrouted = backward(model, x)
    assert any((got[name] - unrouted[name]).abs().max() > 1e-3 for name in got)


def test_hidden_masks_under_another_method_of_peft():
    """(IA)³ has no B and A, but is called like any other."""
    config = peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(tiny.llama(), config)
    plain = copy.deepcopy(model)
    x = tokens()
    ids = mixed_ids(x)
    for name, module in plain.named_modules():
        if name.endswith("mlp.down_proj"):
            module.register_forward_pre_hook(
                lambda _, arguments: (masked(arguments[0], HIDDEN.weights[ids]),)
            )
    route(model, RoutingPlan(2, mlp=MLPSites(hidden=HIDDEN)))
    assert_gradients_close(backward(model, x, route_ids=ids), backward(plain, x), 1e-5)
    unroute(model)
    with expect(TypeError, "got sites for peft.tuners.ia3.layer.Linear"):
        route(model, RoutingPlan(2, mlp=MLPSites(update=HIDDEN)))
    assert not any(isinstance(module, Swapped) for module in model.modules())


def test_only_active_adapters_take_part():
    model = peft_model(names=("retain", "forget"))
    model.set_adapter("forget")
    plain = copy.deepcopy(model)
    route(model, RoutingPlan(2, adapters=DUAL))
    x = tokens()
    got = backward(model, x, route_ids=torch.ones_like(x))
    assert_gradients_close(got, backward(plain, x))
    with model.disable_adapter(), plain.disable_adapter():
        logits = model(input_ids=x, route_ids=torch.ones_like(x)).logits
        assert torch.equal(logits, plain(input_ids=x).logits)


@pytest.mark.setup("PEFT", "modules_to_save")
def test_modules_to_save():
    """The copies that PEFT trains are routed, those that it leaves alone are not."""
    saved = ["lm_head", "embed_tokens", "norm"]  # two norms a layer, and the final one
    model = peft_model(config=lora(["q_proj"], modules_to_save=saved))
    plain = copy.deepcopy(model)
    retain_only = NormSites([[1.0], [0.0]])
    plan = RoutingPlan(
        2,
        lm_head=UPDATES["lm_head"],
        embedding=EmbeddingSites([[1.0], [0.0]]),
        norm=retain_only,
        final_norm=retain_only,
    )
    keys = list(model.state_dict())
    route(model, plan)
    assert list(model.state_dict()) == keys
    x, row_routes = tokens(), torch.tensor([1, 0, 1, 0])
    got = summed_gradients(model, x, route_ids=row_routes[:, None].expand_as(x))
    of_all, of_masked = by_row(plain, x, row_routes, 2)

    def mask(name):
        if ".lm_head." in name:
            return update_masks()["lm_head"][0][:, None]
        return 1.0 if ".lora_" in name else 0.0

    want = {name: of_all[name] + mask(name) * of_masked[name] for name in got}
    assert sum(".modules_to_save." in name for name in got) == 2 + 2 * tiny.LAYERS + 1
    assert_gradients_close(got, want, 2e-5)
    unroute(model)
    assert not any(isinstance(module, Swapped) for module in model.modules())


def test_copies_and_strength():
    """Copied and pickled, a model is routed as before; strength 0 makes every token one of route 0."""
    model = peft_model(names=("retain", "forget"))
    route(model, RoutingPlan(2, **UPDATES, adapters=DUAL))
    x = tokens()
    ids = mixed_ids(x)
    want = backward(model, x, route_ids=ids)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_gradients_equal(backward(other, x, route_ids=ids), want)
    off = backward(model, x, route_ids=ids, route_strength=torch.tensor(0.0))
    assert_gradients_close(off, backward(model, x, route_ids=torch.zeros_like(ids)))


def routed_batches(layers):
    """A routed model of dual adapters and masks, its tokens, and three batches of ids with their gradients."""
    base = tiny.llama(num_hidden_layers=layers)
    model = peft_model(base, lora(["q_proj", "down_proj"]), ("retain", "forget"))
    route(model, RoutingPlan(2, mlp=MLPSites(hidden=HIDDEN, update=HIDDEN), adapters=DUAL))
    x = tokens()
    ids_of_batches = [mixed_ids(x, seed=seed) for seed in range(3)]
    return model, x, [(ids, backward(model, x, route_ids=ids)) for ids in ids_of_batches]


@pytest.mark.setup("PEFT", "activation checkpointing")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant):
    """Bit for bit the gradients of the model without it. transformers makes the embedding's output need a gradient."""
    model, x, batches = routed_batches(layers=2)
    tiny.checkpoint_layers(model.get_base_model(), use_reentrant)
    for ids, want in batches:
        assert_gradients_equal(backward(model, x, route_ids=ids), want)


@pytest.mark.slow
def test_compilation():
    """One graph serves all ids."""
    model, x, batches = routed_batches(layers=1)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for ids, want in batches:
            model.zero_grad()
            compiled(input_ids=x, labels=x, route_ids=ids).loss.backward()
            assert_gradients_close(tiny.gradients(model), want)


def test_saved_adapters_load_in_a_plain_model(tmp_path):
    base = tiny.llama()
    model = peft_model(copy.deepcopy(base), names=("retain", "forget"))
    keys = list(model.state_dict())
    route(model, RoutingPlan(2, mlp=UPDATES["mlp"], adapters=DUAL))
    assert list(model.state_dict()) == keys
    x = tokens()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    backward(model, x, route_ids=mixed_ids(x))
    optimizer.step()
    # The base model has no folder of its own, so that PEFT cannot look up the size of its vocabulary there.
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "retain", adapter_name="retain")
    loaded.load_adapter(tmp_path / "forget", adapter_name="forget")
    loaded.base_model.set_adapter(["retain", "forget"])
    model.eval()
    want = model(input_ids=x).logits
    assert torch.equal(loaded(input_ids=x).logits, want)

    unroute(model)
    assert not any(isinstance(module, Swapped) for module in model.modules())
    merged = model.merge_and_unload()
    assert (merged(input_ids=x).logits - want).abs().max() < 1e-4  # fp32 sums in another order


# Refusals


@pytest.mark.setup("PEFT", "adapters that are added after route", refused="nothing of them would be routed")
def test_adapters_around_a_routed_model():
    model = route(tiny.llama(), RoutingPlan(2, mlp=MLPSites(hidden=HIDDEN)))
    model = get_peft_model(model, lora())
    x = tokens()
    assert model(input_ids=x).logits.isfinite().all()
    with expect(RuntimeError, "expected route() after the adapter was added"):
        model(input_ids=x, route_ids=mixed_ids(x))


@pytest.mark.parametrize("options", [{"target_modules": ["lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_adapters_around_a_routed_head(options):
    model = route(tiny.llama(), RoutingPlan(2, lm_head=UPDATES["lm_head"]))
    model = get_peft_model(model, lora(**({"target_modules": ["q_proj"]} | options)))
    x = tokens()
    with expect(RuntimeError, "lm_head"):
        model(input_ids=x, route_ids=mixed_ids(x))


def test_an_adapter_added_to_a_routed_model():
    model = peft_model()
    route(model, RoutingPlan(2, mlp=UPDATES["mlp"]))
    model.add_adapter("late", lora())
    x = tokens()
    backward(model, x, route_ids=mixed_ids(x))
    model.set_adapter("late")
    with expect(RuntimeError, "got adapter 'late', which was added since the model was routed"):
        model(input_ids=x, route_ids=mixed_ids(x))
    assert model(input_ids=x).logits.isfinite().all()


@pytest.mark.setup("PEFT", "training with merged adapters", refused="their parameters have no gradient")
def test_merged_adapters():
    model = peft_model()
    route(model, RoutingPlan(2, mlp=UPDATES["mlp"]))
    x = tokens()
    model.merge_adapter()
    with expect(RuntimeError, "got merged adapters beside routes, expected unmerge_adapter()"):
        model(input_ids=x, route_ids=mixed_ids(x))
    model.unmerge_adapter()
    backward(model, x, route_ids=mixed_ids(x))


@pytest.mark.setup("PEFT", "adapter_names in a routed batch", refused="a batch has one set of adapters")
def test_adapter_names():
    model = peft_model()
    route(model, RoutingPlan(2, mlp=UPDATES["mlp"]))
    model.eval()
    x = tokens()
    names = ["default", "__base__"] * 2
    assert model(input_ids=x, adapter_names=names).logits.isfinite().all()
    with expect(ValueError, "adapter_names: got a value beside routes, expected none"):
        model(input_ids=x, adapter_names=names, route_ids=mixed_ids(x))


@pytest.mark.setup(
    "PEFT", "tables of parameters for DoRA and other variants", refused="they compute more than B A x"
)
@pytest.mark.parametrize("plan", [{"mlp": UPDATES["mlp"]}, {"adapters": {"default": [0]}}])
def test_variants(plan):
    model = peft_model(config=lora(use_dora=True))
    with expect(TypeError, "got DoraLinearVariant in adapter 'default', expected plain LoRA"):
        route(model, RoutingPlan(2, **plan))
    assert not any(isinstance(module, Swapped) for module in model.modules())


def test_adapters_that_are_not_there():
    for base, message in (
        (peft_model(), "RoutingPlan.adapters: got 'other', expected one of 'default'"),
        (tiny.llama(), "RoutingPlan.adapters: got 'other', expected a model with LoRA adapters"),
    ):
        with expect(ValueError, message):
            route(base, RoutingPlan(2, mlp=UPDATES["mlp"], adapters={"other": [0]}))
        assert not any(isinstance(module, Swapped) for module in base.modules())


def test_adapters_where_no_route_arrives():
    model = peft_model(config=lora(["q_proj", "embed_tokens"]))
    with expect(
        TypeError, "RoutingPlan.adapters: got peft.tuners.lora.layer.Embedding at model.embed_tokens"
    ):
        route(model, RoutingPlan(2, adapters={"default": [0]}))
    assert not any(isinstance(module, Swapped) for module in model.modules())


@pytest.mark.parametrize(
    ("adapters", "error", "message"),
    [
        (["default"], TypeError, "RoutingPlan.adapters: got a list, expected a dict {adapter: routes}"),
        ({"default": 0}, TypeError, "RoutingPlan.adapters['default']: got 0, expected a list of routes"),
        (
            {"default": [2]},
            ValueError,
            "RoutingPlan.adapters['default']: got routes [2], expected routes from 0 to 1",
        ),
        ({"default": [-1]}, ValueError, "got routes [-1]"),
    ],
)
def test_plans_that_are_none(adapters, error, message):
    with expect(error, message):
        RoutingPlan(2, adapters=adapters)


def test_unswapping_a_layer():
    layer = lora_layer("linear", ("a",))
    before = type(layer)
    swap(layer, LoRALinear, LinearSites(update_rows=[[1.0], [0.0]]), None)
    for module in layer.modules():
        unswap(module)
    assert type(layer) is before
    assert "_routing" not in vars(layer)
