"""Quantised weights in routed models: the ordinary quantised model with the detach idiom, or a refusal with the reason.

torchao's weights are tensor subclasses inside an ordinary torch.nn.Linear, which say themselves what a linear layer of
them computes; bitsandbytes has layers of its own. Neither may be read as if it were a matrix.
"""

import copy
import re

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("torchao")

import peft
import tiny_models as tiny
import transformers
from tiny_models import assert_gradients_close, backward, mixed_ids, tokens
from torchao import quantization
from torchao.float8 import Float8LinearConfig, convert_to_float8_training
from torchao.prototype.quantized_training import bitnet_training, int8_mixed_precision_training

from gradroute import (
    AttentionSites,
    EmbeddingSites,
    LinearSites,
    MLPSites,
    NormSites,
    RoutedLinear,
    Routes,
    blocks,
    era,
    routed_embedding,
    routed_gated_mlp,
    routed_linear,
    routed_mlp,
    routed_rms_norm,
)
from gradroute.checks import is_plain
from gradroute.models import RoutingPlan, ablate, route
from gradroute.tables import localize

D_MODEL, D_FF, HEADS = 64, 128, 4
HIDDEN = localize(2, D_FF, {1: slice(0, 16)}, off=0.5)
OUTPUT = localize(2, D_MODEL, {1: slice(0, 8)}, off=-0.75)
BY_HEAD = localize(2, HEADS, {1: slice(0, 1)})
SEEN = localize(2, D_FF, {0: slice(8, D_FF)})
VOCABULARY = localize(2, tiny.VOCABULARY, {1: slice(0, 4)})
ROWS = LinearSites(update_rows=HIDDEN)

#: All that masks activations around linear layers, and the head among them.
PLAN = RoutingPlan(
    2,
    mlp=MLPSites(hidden=HIDDEN, output=OUTPUT, forward=SEEN),
    attention=AttentionSites(heads=BY_HEAD),
    lm_head=LinearSites(input=OUTPUT, output=VOCABULARY),
)

CONFIGURATIONS = {
    "int8": quantization.Int8WeightOnlyConfig,
    "intx": quantization.IntxWeightOnlyConfig,
    "int8 activations": quantization.Int8DynamicActivationInt8WeightConfig,
    "float8": quantization.Float8WeightOnlyConfig,
    "bitnet": bitnet_training,
    "int8 training": int8_mixed_precision_training,
}


def expect(error, message):
    return pytest.raises(error, match=re.escape(message))


def llama():
    torch.manual_seed(0)
    return tiny.llama(hidden_size=D_MODEL, intermediate_size=D_FF)


def quantised(name="int8"):
    """Llama whose linear layers, the head among them, are quantised; embeddings and norms are trained."""
    model = llama()
    # With quantised activations torchao's layers pass no gradient on: one of the head would reach nothing.
    whole = model.model if name == "int8 activations" else model
    quantization.quantize_(whole, CONFIGURATIONS[name]())
    return model


def detached(x, table, ids):
    m = table.weights[ids]
    return m * x + (1 - m) * x.detach()


def with_idiom(model, ids, plan=PLAN):
    """A copy of an ordinary model with the detach idiom around the linear layers that it calls."""
    model = copy.deepcopy(model)

    def before(linear, *tables):
        linear.register_forward_pre_hook(lambda module, args: _masked(args[0], tables, ids))

    def after(linear, table):
        linear.register_forward_hook(lambda module, args, y: detached(y, table, ids))

    for layer in model.model.layers:
        if plan.mlp.forward is not None:
            layer.mlp.down_proj.register_forward_pre_hook(lambda m, args: (args[0] * SEEN.weights[ids],))
        before(layer.mlp.down_proj, plan.mlp.hidden)
        if plan.mlp.output is not None:
            after(layer.mlp.down_proj, plan.mlp.output)
        if plan.attention is not None:
            before(layer.self_attn.o_proj, _by_feature(BY_HEAD))
    if plan.lm_head is not None:
        before(model.lm_head, plan.lm_head.input)
        after(model.lm_head, plan.lm_head.output)
    return model


def _masked(x, tables, ids):
    for table in tables:
        x = detached(x, table, ids)
    return (x,)


def _by_feature(table):
    return localize(2, D_MODEL, {1: slice(0, D_MODEL // HEADS)})


HIDDEN_ALONE = RoutingPlan(2, mlp=MLPSites(hidden=HIDDEN))


@pytest.mark.setup("torchao", "quantised weights, masks of activations")
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_masks_of_activations_equal_the_detach_idiom(name):
    """Also where the weight is trained through its subclass, whose gradient is formed by that."""
    model, x = quantised(name), tokens()
    ids = mixed_ids(x)
    assert not is_plain(model.model.layers[0].mlp.up_proj.weight)
    expected = backward(with_idiom(model, ids), x)
    found = backward(route(model, PLAN), x, route_ids=ids)
    assert found.keys() == expected.keys()
    for parameter, gradient in expected.items():
        # Where a sum rounds otherwise, as attention's may, a quantised activation falls on the next of 127 codes.
        allowed = float(gradient.abs().max()) / 127 if name == "int8 activations" else 1e-5
        assert (found[parameter] - gradient).abs().max() <= allowed, parameter


def test_quantising_after_route():
    """Whether a weight is read is decided when it is called."""
    model, x = route(llama(), PLAN), tokens()
    ids = mixed_ids(x)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    expected = backward(with_idiom(quantised(), ids), x)
    assert_gradients_close(backward(model, x, route_ids=ids), expected, 1e-5)


def test_update_sites_of_weights_quantised_after_route():
    model = route(llama(), RoutingPlan(2, mlp=MLPSites(update_in=HIDDEN)))
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    with expect(
        RuntimeError, "update_rows: got tables for torch.nn.modules.linear.Linear with a weight of Int8Tensor"
    ):
        backward(model, tokens(), route_ids=mixed_ids(tokens()))


def float8(model):
    return convert_to_float8_training(model.model, config=Float8LinearConfig(emulate=True))


@pytest.mark.setup("torchao", "convert_to_float8_training before or after route, masks of activations")
def test_layers_converted_to_float8_training():
    """Before and after route: modules of a class of their own, which are called."""
    x = tokens()
    ids, plain, after = mixed_ids(x), llama(), route(llama(), HIDDEN_ALONE)
    float8(plain)
    float8(after)
    expected = backward(with_idiom(plain, ids, HIDDEN_ALONE), x)
    assert_gradients_close(backward(after, x, route_ids=ids), expected)
    assert_gradients_close(backward(route(plain, HIDDEN_ALONE), x, route_ids=ids), expected)


def test_routed_layers_that_conversion_replaces():
    model = route(llama(), RoutingPlan(2, mlp=MLPSites(update_in=HIDDEN)))
    float8(model)
    with expect(RuntimeError, "Float8Linear, which takes no routes, in the place of a module"):
        backward(model, tokens(), route_ids=mixed_ids(tokens()))


@pytest.mark.setup(
    "torchao", "tables of parameters for quantised weights", refused="their class decides what an update is"
)
@pytest.mark.parametrize(
    "plan",
    [
        RoutingPlan(2, mlp=MLPSites(update=HIDDEN)),
        RoutingPlan(2, attention=AttentionSites(update_q=BY_HEAD)),
        RoutingPlan(2, lm_head=LinearSites(update_rows=VOCABULARY)),
    ],
    ids=["mlp", "attention", "head"],
)
@pytest.mark.parametrize("name", ["int8", "bitnet"])
def test_update_sites_are_refused(plan, name):
    """Who may update a weight is decided where its gradient is formed. After the refusal the model is ordinary."""
    model = quantised(name)
    with expect(TypeError, "expected none: it is frozen, or its own class forms its gradient"):
        route(model, plan)
    assert type(model) is transformers.LlamaForCausalLM
    assert_gradients_close(backward(model, tokens()), backward(quantised(name), tokens()), 0.0)


def test_all_ones_say_nothing():
    """Update sites of ones mask nothing, so a quantised weight can have them."""
    ones = localize(2, D_FF, {})
    x, plan = tokens(), RoutingPlan(2, mlp=MLPSites(hidden=HIDDEN, update=ones))
    ids, model = mixed_ids(x), quantised()
    expected = backward(with_idiom(model, ids, HIDDEN_ALONE), x)
    assert_gradients_close(backward(route(model, plan), x, route_ids=ids), expected)


@pytest.mark.parametrize(
    "plan",
    [
        RoutingPlan(2, embedding=EmbeddingSites(update=localize(2, 1, {0: [0]}))),
        RoutingPlan(2, norm=NormSites(update=OUTPUT)),
        RoutingPlan(2, final_norm=NormSites(update=OUTPUT)),
    ],
    ids=["embedding", "norm", "final norm"],
)
def test_quantised_embeddings_and_norms_are_refused(plan):
    model = llama()
    quantization.quantize_(
        model,
        quantization.IntxWeightOnlyConfig(),
        filter_fn=lambda module, name: isinstance(module, nn.Embedding),
    )
    for norm in (model.model.norm, model.model.layers[0].input_layernorm):
        norm.weight = subclassed(norm.weight)
    with expect(TypeError, "expected ordinary tensors"):
        route(model, plan)


class Opaque(torch.Tensor):
    """A subclass that computes otherwise; only its class is asked."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError("computed with")


def subclassed(parameter):
    inner = parameter.detach()
    wrapper = torch.Tensor._make_wrapper_subclass(Opaque, inner.shape, dtype=inner.dtype)
    wrapper._is_param = True
    return wrapper


def test_functions_refuse_to_read():
    """Every public op that takes parameters names the one that is no ordinary tensor."""
    routes, x = Routes.of(torch.tensor([0, 1]), 2), torch.ones(2, D_MODEL)
    square, wide, tall = torch.ones(D_MODEL, D_MODEL), torch.ones(D_FF, D_MODEL), torch.ones(D_MODEL, D_FF)
    bias, sites = torch.ones(D_MODEL), MLPSites(hidden=HIDDEN)
    output = LinearSites(output=OUTPUT)
    for name, call in {
        "weight": lambda: routed_linear(x, subclassed(square), None, routes, output),
        "bias": lambda: routed_linear(x, square, subclassed(bias), routes, output),
        "w_out": lambda: routed_mlp(x, wide, None, subclassed(tall), None, routes, sites),
        "w_up": lambda: routed_gated_mlp(x, wide, subclassed(wide), tall, routes, sites),
        "b_down": lambda: routed_gated_mlp(x, wide, wide, tall, routes, sites, b_down=subclassed(bias)),
    }.items():
        with expect(TypeError, f"{name}: got a Opaque, expected an ordinary tensor"):
            call()
    with expect(TypeError, "weight: got a Opaque"):
        routed_rms_norm(x, subclassed(bias), routes, NormSites(update=OUTPUT))
    with expect(TypeError, "weight: got a Opaque"):
        routed_embedding(
            torch.tensor([0, 1]), subclassed(square), routes, EmbeddingSites(update=localize(2, 1, {0: [0]}))
        )


def test_layers_refuse_quantised_children():
    linear = nn.Sequential(nn.Linear(D_MODEL, D_FF))
    quantization.quantize_(linear, quantization.Int8WeightOnlyConfig())
    with expect(TypeError, "linear: got a Linear whose weight is a Int8Tensor"):
        RoutedLinear.from_linear(linear[0], LinearSites(output=HIDDEN))


def test_subclasses_that_compute_as_tensors_are_read():
    """A name of its own changes nothing that a linear layer computes."""

    class Named(nn.Parameter):
        pass

    assert is_plain(Named(torch.ones(2)))
    assert not is_plain(subclassed(torch.ones(2)))


def test_blocks_and_ablation_refuse_to_read():
    """What copies and overwrites numbers is refused before anything changes."""
    model = quantised()
    for call in (
        lambda: blocks.Block.units(model, slice(0, 4)),
        lambda: era.expand(model, units=2),
        lambda: ablate(route(model, RoutingPlan(2, mlp=MLPSites(forward=SEEN)))),
    ):
        with expect(
            TypeError, "got a weight of Int8Tensor, expected ordinary tensors: do this before quantising"
        ):
            call()


def test_a_block_of_weights_that_were_quantised_since():
    model = llama()
    block = blocks.Block.units(model, slice(0, 4))
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    with expect(
        TypeError, "got a Int8Tensor of torch.float32, expected an ordinary tensor of floating point"
    ):
        era.ablate(model, block)


class EightBits(nn.Linear):
    """As bitsandbytes stores weights: packed numbers in an ordinary parameter, which only the layer can read."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        packed = (linear.weight.detach() * 64).to(torch.int8)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) / 64)


def eight_bits():
    model = llama()
    for layer in model.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(layer.mlp, name, EightBits(getattr(layer.mlp, name)))
    return model


def test_layers_that_store_packed_numbers():
    """They are called where activations are masked, and what would overwrite their numbers is refused."""
    x, model = tokens(), eight_bits()
    ids, plan = mixed_ids(x), RoutingPlan(2, mlp=MLPSites(hidden=HIDDEN, output=OUTPUT))
    expected = backward(with_idiom(model, ids, plan), x)
    assert_gradients_close(backward(route(model, plan), x, route_ids=ids), expected)
    with expect(
        TypeError, "got a weight of dtype torch.int8, expected floating point: do this before quantising"
    ):
        ablate(route(eight_bits(), RoutingPlan(2, mlp=MLPSites(forward=SEEN))))
    with expect(
        TypeError, "got a weight of dtype torch.int8, expected floating point: do this before quantising"
    ):
        era.expand(eight_bits(), units=2)
    with expect(TypeError, "expected none: it is frozen, or its own class forms its gradient"):
        route(eight_bits(), RoutingPlan(2, mlp=MLPSites(update=HIDDEN)))


def test_layers_that_do_not_say_their_width():
    """Some quantised layers are linear in all but their attributes' names."""
    model = llama()
    model.model.layers[0].mlp.down_proj = nn.Identity()
    with expect(
        TypeError, "nn.modules.linear.Identity, expected a linear layer with in_features and out_features"
    ):
        route(model, HIDDEN_ALONE)


# Adapters around quantised layers (QLoRA).


def adapted(model):
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=names, init_lora_weights=False, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config)


def dequantised(model):
    """The same model with ordinary weights of the same numbers."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if type(module) is nn.Linear and not is_plain(module.weight):
            module.weight = nn.Parameter(module.weight.dequantize(), requires_grad=False)
    return model


UPDATES = RoutingPlan(
    2,
    mlp=MLPSites(hidden=HIDDEN, update=HIDDEN, output=OUTPUT),
    attention=AttentionSites(heads=BY_HEAD, update_q=BY_HEAD),
)

# get_peft_model reads what transformers 5.23 calls by another name; without TorchAoConfig, PEFT cannot merge.
peft_warnings = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:TorchaoLoraLinear was instantiated without:UserWarning",
)


@pytest.mark.setup("PEFT", "LoRA around quantised weights")
@peft_warnings
def test_adapters_around_quantised_weights():
    """Update masks concern the adapters: the base is frozen. As with a base of the same numbers in ordinary tensors."""
    plain, x = quantised(), tokens()
    ids = mixed_ids(x)
    expected = backward(route(adapted(dequantised(plain)), UPDATES), x, route_ids=ids)
    got = backward(route(adapted(plain), UPDATES), x, route_ids=ids)
    assert any("lora_A" in name for name in got)
    assert_gradients_close(got, expected, 1e-5)


@pytest.fixture
def saved(tmp_path):
    llama().save_pretrained(tmp_path)
    return tmp_path


def loaded(path, configuration):
    """As users load a quantised model."""
    model = transformers.LlamaForCausalLM.from_pretrained(
        path, quantization_config=configuration, device_map="cpu", dtype=torch.float32
    )
    model.model.embed_tokens.weight.requires_grad_(True)
    return model


LOADED = {
    "torchao": lambda: transformers.TorchAoConfig(quantization.Int8WeightOnlyConfig()),
    "4 bits": lambda: transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32
    ),
    "8 bits": lambda: transformers.BitsAndBytesConfig(load_in_8bit=True),
}
AROUND = RoutingPlan(2, mlp=MLPSites(hidden=HIDDEN, output=OUTPUT), attention=AttentionSites(heads=BY_HEAD))


@pytest.mark.setup("bitsandbytes", "4 and 8 bit models, masks of activations")
@pytest.mark.slow
@pytest.mark.parametrize("name", LOADED)
def test_models_loaded_quantised(name, saved):
    """transformers' own way, and bitsandbytes' layers: masks of activations equal the detach idiom."""
    model, x = loaded(saved, LOADED[name]()), tokens()
    ids = mixed_ids(x)
    expected = backward(with_idiom(model, ids, AROUND), x)
    assert_gradients_close(backward(route(model, AROUND), x, route_ids=ids), expected, 1e-5)


@pytest.mark.setup("bitsandbytes", "LoRA around 4 and 8 bit layers (QLoRA)")
@pytest.mark.slow
@peft_warnings
@pytest.mark.parametrize("name", LOADED)
def test_adapters_around_layers_loaded_quantised(name, saved):
    """Rows of the batch whose tokens may update nothing add nothing to the adapters' gradients.

    So the gradients are those of the loss of the other rows alone.
    """
    may = torch.tensor([[1.0], [0.0]])
    plan = RoutingPlan(2, mlp=MLPSites(update=may), attention=AttentionSites(update=may, update_kv=may))
    model, x = adapted(loaded(saved, LOADED[name]())), tokens()
    model.base_model.model.model.embed_tokens.weight.requires_grad_(False)
    labels = x.clone()
    labels[2:] = -100
    model(input_ids=x, labels=labels).loss.backward()
    expected = {name: gradient / 2 for name, gradient in tiny.gradients(model).items()}
    ids = torch.tensor([0, 0, 1, 1])[:, None].expand_as(x)
    assert_gradients_close(backward(route(model, plan), x, route_ids=ids), expected, 1e-5)


@pytest.mark.slow
def test_compiled_models_of_quantised_weights():
    """Dynamo decides as eager code does, and traces the subclass."""
    model, x = quantised(), tokens()
    ids = mixed_ids(x)
    expected = backward(with_idiom(model, ids), x)
    compiled = torch.compile(route(model, PLAN), fullgraph=True, backend="aot_eager")
    got = {
        name.removeprefix("_orig_mod."): gradient
        for name, gradient in backward(compiled, x, route_ids=ids).items()
    }
    assert_gradients_close(got, expected, 1e-5)
