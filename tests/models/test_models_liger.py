"""Liger's patches of models, on classes and on instances, before and after route: its forward and fused loss are kept.

Its kernels need a GPU, so torch's ops stand in their place (tests/liger.py); its modules and forwards are its own. The
right gradients are those of the ordinary routed model.
"""

import copy
import importlib
import inspect
import re
import types

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("liger_kernel")

import liger
import tiny_models as tiny
import transformers
from liger_kernel.transformers import monkey_patch
from tiny_models import assert_gradients_close, backward, mixed_ids, tokens

from gradroute import AttentionSites, EmbeddingSites, LinearSites, MLPSites, NormSites, Routes
from gradroute.models import RoutingPlan, route, unroute
from gradroute.tables import localize

D_MODEL, D_FF, HEADS = tiny.D_MODEL, tiny.D_FF, tiny.HEADS
HIDDEN = localize(2, D_FF, {1: slice(0, 8)}, off=0.5)
PRE = localize(2, D_FF, {1: slice(4, 12)}, off=-0.75)
OUTPUT = localize(2, D_MODEL, {1: slice(0, 4)})
MASKS = RoutingPlan(2, mlp=MLPSites(pre=PRE, hidden=HIDDEN, output=OUTPUT, update=HIDDEN))
HEADS_MASKED = AttentionSites(heads=localize(2, HEADS, {1: slice(0, 1)}))
FORWARD = RoutingPlan(2, mlp=MLPSites(forward=localize(2, D_FF, {0: slice(8, D_FF)})), attention=HEADS_MASKED)
NORMS = RoutingPlan(2, norm=NormSites(update=OUTPUT), final_norm=NormSites(update=OUTPUT))
HEAD = RoutingPlan(2, lm_head=LinearSites(update_rows=localize(2, tiny.VOCABULARY, {1: slice(0, 4)})))
EMBEDDING = RoutingPlan(2, embedding=EmbeddingSites(update=localize(2, 1, {0: [0]})))

_SIZES = {
    "vocab_size": tiny.VOCABULARY,
    "hidden_size": D_MODEL,
    "intermediate_size": D_FF,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "head_dim": tiny.HEAD_DIM,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
# By model type: the classes of the configuration and of the model, and Liger's function.
ARCHITECTURES = {
    "llama": ("LlamaConfig", "LlamaForCausalLM"),
    "mistral": ("MistralConfig", "MistralForCausalLM"),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
    "phi3": ("Phi3Config", "Phi3ForCausalLM"),
    "gemma3_text": ("Gemma3TextConfig", "Gemma3ForCausalLM"),
}


def made(name="llama"):
    configuration, model = (getattr(transformers, each) for each in ARCHITECTURES[name])
    torch.manual_seed(0)
    options = {key: value for key, value in _SIZES.items() if name != "phi3" or key != "head_dim"}
    return model(configuration(**options)).train()


@pytest.fixture
def calls(monkeypatch):
    """The names of Liger's kernels that run; what Liger's patches change is put back afterwards."""
    for name, (_, model) in ARCHITECTURES.items():
        family = name.removesuffix("_text")
        modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        for key, value in list(vars(modeling).items()):
            if key.endswith(("RMSNorm", "MLP")):
                monkeypatch.setattr(modeling, key, value)
        monkeypatch.setattr(getattr(transformers, model), "forward", getattr(transformers, model).forward)
    names = []
    liger.emulate(monkeypatch, names)
    return names


def patch(name="llama", model=None, **options):
    """Liger's own function; its RoPE, which needs a GPU, is left out."""
    getattr(monkey_patch, f"apply_liger_kernel_to_{name}")(rope=False, model=model, **options)


def patched_and_routed(order, plan, name="llama"):
    plain = made(name)
    if order == "class, route":
        patch(name)
        model = made(name)
        model.load_state_dict(plain.state_dict())
        return route(model, plan)
    if order == "instance, route":
        patch(name, plain)
        return route(plain, plan)
    route(plain, plan)
    patch(name, plain)
    return plain


ORDERS = ["class, route", "instance, route", "route, instance"]


@pytest.mark.setup(
    "Liger",
    "apply_liger_kernel_to_llama of the class or of an instance, before or after route; the fused loss is kept",
)
@pytest.mark.parametrize(
    "plan", [MASKS, FORWARD, NORMS, EMBEDDING], ids=["masks", "forward", "norms", "embedding"]
)
@pytest.mark.parametrize("order", ORDERS)
def test_gradients(order, plan, calls):
    """The right ones, with Liger's fused loss, and its kernels wherever the plan has no site."""
    x = tokens()
    ids = mixed_ids(x)
    expected = backward(route(made(), plan), x, route_ids=ids)
    model = patched_and_routed(order, plan)
    calls.clear()
    assert_gradients_close(backward(model, x, route_ids=ids), expected, 1e-5)
    mlps = 0 if plan is FORWARD else 2
    norms = 0 if plan is NORMS else 5
    assert [calls.count(name) for name in ("swiglu", "LigerRMSNormFunction", "fused loss")] == [
        mlps,
        norms,
        1,
    ]


@pytest.mark.setup("Liger", "the fused loss beside sites of the head: the head is called instead")
@pytest.mark.parametrize("order", ORDERS)
def test_a_routed_head_is_called(order, calls):
    """The fused loss reads the head's weight, which would be unrouted: then Liger's forward makes logits."""
    x = tokens()
    ids = mixed_ids(x)
    expected = backward(route(made(), HEAD), x, route_ids=ids)
    model = patched_and_routed(order, HEAD)
    calls.clear()
    assert_gradients_close(backward(model, x, route_ids=ids), expected, 1e-5)
    assert "fused loss" not in calls
    with pytest.raises(ValueError, match=re.escape("skip_logits: got True beside routes, expected False")):
        model(x, labels=x, route_ids=ids, skip_logits=True)


@pytest.mark.setup("Liger", "its patches of the other architectures")
@pytest.mark.parametrize("order", ORDERS[1:])
@pytest.mark.parametrize("name", list(ARCHITECTURES)[1:])
def test_architectures(name, order, calls):
    """Every family that gradroute and Liger share, with norms of heads and of Gemma's kind, which are routed too."""
    plan = RoutingPlan(
        2,
        mlp=MLPSites(hidden=HIDDEN, update=HIDDEN),
        attention=HEADS_MASKED,
        norm=NormSites(update=OUTPUT),
        qk_norm=NormSites(update=localize(2, tiny.HEAD_DIM, {1: slice(0, 2)}))
        if name in ("qwen3", "gemma3_text")
        else None,
    )
    x = tokens()
    ids = mixed_ids(x)
    expected = backward(route(made(name), plan), x, route_ids=ids)
    got = backward(patched_and_routed(order, plan, name), x, route_ids=ids)
    assert_gradients_close(got, expected, 1e-5)
    assert calls.count("fused loss") == 1


@pytest.mark.parametrize("name", ["qwen3", "gemma3_text"])
def test_architectures_of_patched_classes(name, calls):
    """Liger's norms say by their attributes how they compute; they have another epsilon's name than Gemma's."""
    plan = RoutingPlan(
        2,
        mlp=MLPSites(forward=HIDDEN),
        norm=NormSites(update=OUTPUT),
        qk_norm=NormSites(update=localize(2, tiny.HEAD_DIM, {1: slice(0, 2)})),
    )
    x = tokens()
    ids = mixed_ids(x)
    expected = backward(route(made(name), plan), x, route_ids=ids)
    assert_gradients_close(
        backward(patched_and_routed("class, route", plan, name), x, route_ids=ids), expected, 1e-5
    )


@pytest.mark.parametrize("order", ORDERS)
def test_forward_keeps_every_bit(order, calls):
    """Routed, unrouted, and before route."""
    x, plain = tokens(), made()
    patch(model=plain)
    expected = plain(x, skip_logits=False, labels=x).logits
    model = patched_and_routed(order, MASKS)
    assert torch.equal(model(x, route_ids=mixed_ids(x)).logits, expected)
    with torch.no_grad():
        assert torch.equal(model(x).logits, expected)


@pytest.mark.parametrize("order", ORDERS[1:])
def test_unroute_leaves_ligers_patch(order, calls):
    """Classes are transformers' own again, and Liger's forwards are where it had put them."""
    model, x = patched_and_routed(order, MASKS), tokens()
    backward(model, x, route_ids=mixed_ids(x))
    unroute(model)
    assert type(model) is transformers.LlamaForCausalLM
    for module in (model, model.model.layers[0].mlp, model.model.norm):
        assert type(module).__module__ == "transformers.models.llama.modeling_llama"
        assert vars(module)["forward"].__self__ is module
        assert vars(module)["forward"].__func__.__module__.startswith("liger_kernel.")
    plain = made()
    assert_gradients_close(backward(model, x), backward(plain, x), 1e-5)
    assert_gradients_close(
        backward(route(model, MASKS), x, route_ids=mixed_ids(x)),
        backward(route(plain, MASKS), x, route_ids=mixed_ids(x)),
        1e-5,
    )


def test_copies(calls):
    model, x = patched_and_routed("instance, route", MASKS), tokens()
    ids = mixed_ids(x)
    copied = copy.deepcopy(model)
    assert_gradients_close(backward(copied, x, route_ids=ids), backward(model, x, route_ids=ids), 0.0)


def test_a_refused_plan_leaves_ligers_patch(calls):
    model = made()
    patch(model=model)
    before = {name: vars(module).get("forward") for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=r"RoutingPlan\.mlp"):
        route(model, RoutingPlan(2, mlp=MLPSites(hidden=OUTPUT)))
    after = {name: vars(module).get("forward") for name, module in model.named_modules()}
    assert {
        name: isinstance(forward, types.MethodType) and forward.__func__ for name, forward in after.items()
    } == {
        name: isinstance(forward, types.MethodType) and forward.__func__ for name, forward in before.items()
    }
    assert type(model) is transformers.LlamaForCausalLM


def test_columns_of_trainer(calls):
    """Trainer keeps the columns that forward's signature names; here Liger's is behind it."""
    for order in ORDERS[1:]:
        names = inspect.signature(patched_and_routed(order, MASKS).forward).parameters
        assert {"route_ids", "skip_logits", "labels"} <= set(names)


@pytest.mark.setup("Liger", "Trainer(use_liger_kernel=True)")
@pytest.mark.slow
def test_trainer(calls, tmp_path):
    """Trainer(use_liger_kernel=True) patches a routed model, and trains as it would without Liger."""
    x = tokens()
    rows = [
        {"input_ids": row, "labels": row, "route_ids": ids} for row, ids in zip(x, mixed_ids(x), strict=True)
    ]

    def trained(**options):
        model = route(made(), MASKS)
        arguments = transformers.TrainingArguments(
            tmp_path, max_steps=2, per_device_train_batch_size=4, report_to="none", use_cpu=True, **options
        )
        transformers.Trainer(model, arguments, train_dataset=rows).train()
        return {name: parameter.detach() for name, parameter in model.named_parameters()}

    expected = trained()
    got = trained(use_liger_kernel=True, liger_kernel_config={"rope": False})
    assert calls.count("fused loss") == 2
    assert_gradients_close(got, expected, 1e-5)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("order", ORDERS)
def test_checkpointing(order, use_reentrant, calls):
    """Layers run again in backward, with Liger's kernels and with their routes."""
    x = tokens()
    ids = mixed_ids(x)
    expected = backward(route(made(), MASKS), x, route_ids=ids)
    model = patched_and_routed(order, MASKS)
    tiny.checkpoint_layers(model, use_reentrant)
    assert_gradients_close(backward(model, x, route_ids=ids), expected, 1e-5)


@pytest.mark.setup(
    "Liger",
    "a patch of an instance after route that compiled code meets first",
    refused="it is looked for outside of traced code",
)
def test_a_patch_that_traced_code_meets_first_is_refused(calls):
    """A class cannot change in traced code; a forward before that, or route() after the patch, is the way."""
    model, x = route(made(), MASKS), tokens()
    patch(model=model, fused_linear_cross_entropy=False)
    mlp, routes = model.model.layers[0].mlp, Routes.of(mixed_ids(x), 2)
    compiled = torch.compile(mlp, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="put there since the model was routed"):
        compiled(torch.ones(*x.shape, D_MODEL), routes=routes)
