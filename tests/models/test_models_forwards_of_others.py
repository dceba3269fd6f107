"""Whoever else replaces a forward: accelerate, Trainer, torch.compile; before, between and after route and unroute."""

import copy
import functools
import gc

import pytest
import tiny_models as tiny
import torch
from accelerate import Accelerator, cpu_offload
from accelerate.hooks import AlignDevicesHook, ModelHook, add_hook_to_module, remove_hook_from_module
from accelerate.utils import convert_outputs_to_fp32
from model_zoo import HIDDEN, backward, fresh, gradients, logits_of, loss_of
from routed_models import all_sites, batch, check, expect, route, routed, table

from gradroute import MLPSites, models
from gradroute.models import RoutingPlan

PARTS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head")


def plan():
    return RoutingPlan(2, **all_sites("llama"))


@pytest.fixture
def case():
    torch.manual_seed(0)
    words, targets, ids = batch()
    given = plan()
    expected = backward(routed("llama", given), words, targets, route_ids=ids)
    return given, words, targets, ids, expected


def spread(model, second="cpu:0"):
    """As device_map does: "cpu:0" plays the second device, for its tensors are on the CPU, but it is another name."""
    for name in PARTS:
        device = second if name == "model.layers.1" else "cpu"
        hook = AlignDevicesHook(execution_device=device, io_same_device=False, place_submodules=True)
        add_hook_to_module(model.get_submodule(name), hook)
    for parameter in model.parameters():  # moving to "cpu:0" makes leaves of no gradient
        parameter.requires_grad_()
    return model


@pytest.mark.setup(
    "device_map", "layers on several devices, route before or after; unroute and removal of the hooks"
)
@pytest.mark.parametrize("order", ["route first", "spread first"])
def test_layers_on_several_devices(case, order):
    """Routes follow the tokens from device to device; unroute and the hooks' removal leave a model that works."""
    given, words, targets, ids, expected = case
    model = fresh("llama")
    bare = backward(fresh("llama"), words, targets)
    model = (
        spread(models.route(model, given)) if order == "route first" else models.route(spread(model), given)
    )
    check(backward(model, words, targets, route_ids=ids), expected, 0.0)
    models.unroute(model)
    check(backward(model, words, targets), bare, 0.0)
    models.route(model, given)
    check(backward(model, words, targets, route_ids=ids), expected, 0.0)
    remove_hook_from_module(model, recurse=True)
    check(backward(model, words, targets, route_ids=ids), expected, 0.0)
    models.unroute(model)
    assert not any("forward" in vars(module) for module in model.model.layers)
    check(backward(model, words, targets), bare, 0.0)


@pytest.mark.setup("Accelerate", "cpu_offload, forward alone")
@pytest.mark.parametrize("order", ["route first", "offload first"])
def test_weights_that_come_for_a_call_alone(case, order):
    """cpu_offload keeps weights elsewhere between calls: layers are called, and not read. It trains nothing."""
    given, words, _, ids, _ = case
    model = fresh("llama")
    want = logits_of(models.route(copy.deepcopy(model), given), words, route_ids=ids)
    if order == "route first":
        models.route(model, given)
    cpu_offload(model, execution_device="cpu")
    if order == "offload first":
        models.route(model, given)
    with torch.no_grad():
        assert torch.equal(logits_of(model, words, route_ids=ids), want)
    models.unroute(model)
    with torch.no_grad():
        assert torch.equal(logits_of(model, words), logits_of(fresh("llama"), words))


def prepared(model):
    """As accelerate's prepare_model does under bf16 mixed precision."""
    model._original_forward = model.forward
    function = model.forward.__func__ if hasattr(model.forward, "__func__") else model.forward
    autocast = torch.autocast("cpu", torch.bfloat16)(function)
    model.forward = convert_outputs_to_fp32(autocast).__get__(model)
    return model


@pytest.mark.setup("Accelerate", "bf16 mixed precision, then unroute, route again, unwrap_model")
@pytest.mark.setup("Trainer", "bf16=True, then unroute")
def test_mixed_precision_of_a_model_that_is_unrouted_since(case):
    """The wrapper outlives unroute and route: each time it calls the forward that the model has then."""
    given, words, targets, ids, _ = case
    model = prepared(models.route(fresh("llama"), given))
    want = backward(model, words, targets, route_ids=ids)
    models.unroute(model)
    with torch.autocast("cpu", torch.bfloat16):
        bare = logits_of(fresh("llama"), words).float()
    assert torch.equal(logits_of(model, words), bare)
    assert model.generate(words[:, :3], max_new_tokens=2, pad_token_id=0).shape == (2, 5)
    models.route(model, given)
    check(backward(model, words, targets, route_ids=ids), want, 0.0)
    Accelerator().unwrap_model(model, keep_fp32_wrapper=False)
    check(
        backward(model, words, targets, route_ids=ids),
        backward(routed("llama", given), words, targets, route_ids=ids),
        0.0,
    )
    models.unroute(model)
    assert "forward" not in vars(model)


@pytest.mark.setup(
    "Accelerate",
    "route after prepare with mixed precision",
    refused="accelerate's forward would go on calling the ordinary one; unwrap_model first",
)
def test_mixed_precision_before_route_is_refused_with_the_way_out(case):
    """The wrapper would go on calling the ordinary forward; unwrapped, the model can be routed."""
    given, words, targets, ids, expected = case
    model = prepared(fresh("llama"))
    with expect(
        TypeError, "whose forward was replaced by accelerate.utils.operations.convert_outputs_to_fp32"
    ):
        models.route(model, given)
    model = Accelerator().unwrap_model(model, keep_fp32_wrapper=False)
    vars(model).pop("forward")  # accelerate's own leaves one without transformers' decorators
    models.route(model, given)
    check(backward(model, words, targets, route_ids=ids), expected, 0.0)


@pytest.mark.setup(
    "Modules and hooks",
    "route after a forward was replaced on an instance",
    refused="the routed forward would not be called",
)
@pytest.mark.setup(
    "torch.compile", "route after torch.compile of a forward", refused="what was compiled would not be routed"
)
@pytest.mark.parametrize(
    "part", ["model.layers.0", "model.layers.0.mlp", "model.layers.0.self_attn", "model.norm", ""]
)
def test_any_other_forward_is_refused(case, part):
    """By name, and nothing has changed: neither a lambda nor a wrapper of the class's own forward would route."""
    given, words, targets, _, _ = case
    model = fresh("llama")
    module = model.get_submodule(part)
    own = module.forward
    for forward in (lambda *args, **kwargs: own(*args, **kwargs), functools.partial(own), torch.compile(own)):
        module.forward = forward
        with expect(TypeError, "whose forward was replaced by"):
            models.route(model, given)
        assert not any("gradroute" in type(each).__mro__[1].__module__ for each in model.modules())
    del module.forward
    check(backward(model, words, targets), backward(fresh("llama"), words, targets), 0.0)


@pytest.mark.setup("Modules and hooks", "a wrapper put around a routed module's forward, also after unroute")
@pytest.mark.parametrize("part", ["model.layers.0", "model.layers.0.mlp", "model.norm", "lm_head"])
def test_wrappers_that_came_after_route(case, part):
    """They call the routed forward, and once the model is unrouted the ordinary one."""
    given, words, targets, ids, expected = case
    model = routed("llama", given)
    module = model.get_submodule(part)
    wrapped, calls = module.forward, []

    def forward(*args, **kwargs):
        calls.append(part)
        return wrapped(*args, **kwargs)

    module.forward = forward
    check(backward(model, words, targets, route_ids=ids), expected, 0.0)
    models.unroute(model)
    check(backward(model, words, targets), backward(fresh("llama"), words, targets), 0.0)
    assert len(calls) == 2


class Doubling(ModelHook):
    def post_forward(self, module, output):
        return output * 1


def test_a_hook_around_a_hook(case):
    given, words, targets, ids, expected = case
    model = fresh("llama")
    for _ in range(2):
        add_hook_to_module(model.model.norm, Doubling(), append=True)
    models.route(model, given)
    check(backward(model, words, targets, route_ids=ids), expected, 0.0)
    models.unroute(model)
    check(backward(model, words, targets), backward(fresh("llama"), words, targets), 0.0)


@pytest.mark.setup(
    "Checkpointing",
    "unroute between a forward and its backward",
    refused="the forward would run again without its routes",
)
@pytest.mark.parametrize("again", [None, "other plan"])
@pytest.mark.parametrize("name", ["llama", "gpt_neo"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_unroute_between_a_checkpointed_forward_and_its_backward(name, reentrant, again):
    """That backward is refused; the steps after it are ordinary, and nothing is left on the modules."""
    words, targets, ids = batch()
    model = routed(name, RoutingPlan(2, **all_sites(name)))
    tiny.checkpoint_layers(model, reentrant)
    model.enable_input_require_grads()
    loss = loss_of(logits_of(model, words, route_ids=ids), targets)
    models.unroute(model)
    if again:
        route(name, model, RoutingPlan(2, mlp=MLPSites(hidden=table(HIDDEN))))
    with expect(RuntimeError, "got a recomputation in backward of a forward that was routed"):
        loss.backward()
    del loss
    gc.collect()
    expected = backward(model, words, targets)
    check(backward(model, words, targets), expected, 0.0)
    assert not any(
        module._forward_pre_hooks for module in model.modules() if "Layer" in type(module).__name__
    )


def test_unroute_after_backward_leaves_nothing(case):
    """Also where the loss is still there, which keeps the graph's nodes alive but no saved tensors."""
    given, words, targets, ids, expected = case
    model = routed("llama", given)
    loss = loss_of(logits_of(model, words, route_ids=ids), targets)
    models.unroute(model)
    loss.backward()  # nothing runs again here: the graph has all that it needs
    check(gradients(model), expected, 0.0)
    check(backward(model, words, targets), backward(fresh("llama"), words, targets), 0.0)


@pytest.mark.setup("torch.compile", "layer.compile() before or after route, and unroute")
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # Dynamo looks at that of a layer's input
@pytest.mark.parametrize("order", ["route first", "compile first"])
def test_modules_that_were_compiled_in_place(case, order):
    """`layer.compile()` keeps the class: what it compiled follows the class swap, in both directions."""
    given, words, targets, ids, expected = case
    model = fresh("llama")
    bare = backward(fresh("llama"), words, targets)
    if order == "route first":
        models.route(model, given)
    for layer in model.model.layers:
        layer.compile(backend="aot_eager")
    if order == "compile first":
        check(backward(model, words, targets), bare, 1e-5)
        models.route(model, given)
    check(backward(model, words, targets, route_ids=ids), expected, 1e-5)
    models.unroute(model)
    check(backward(model, words, targets), bare, 1e-5)
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.setup("torch.compile", "a compiled model that is unrouted, and routed again")
def test_a_compiled_model_that_is_unrouted_since(case):
    """What torch.compile returns holds the method of the class that the model had: it calls that of its class now."""
    given, words, targets, ids, expected = case
    model = routed("llama", given)
    compiled = torch.compile(model, backend="eager")
    check(backward(compiled, words, targets, route_ids=ids), renamed(expected), 1e-6)
    models.unroute(compiled)
    bare = backward(model, words, targets)
    check(backward(compiled, words, targets), renamed(bare), 1e-6)
    models.route(model, given)
    check(backward(compiled, words, targets, route_ids=ids), renamed(expected), 1e-6)


def renamed(of_parameters):
    """By the names that a compiled module gives its parameters."""
    return {f"_orig_mod.{name}": gradient for name, gradient in of_parameters.items()}


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # Dynamo looks at that of a layer's input
def test_a_method_that_was_compiled(case):
    """`module.forward = torch.compile(module.forward)` of one module, which leaves no marks of what was reached."""
    given, words, targets, ids, expected = case
    model = routed("llama", given)
    mlp = model.model.layers[0].mlp
    mlp.forward = torch.compile(mlp.forward, backend="eager")
    check(backward(model, words, targets, route_ids=ids), expected, 1e-6)
    models.unroute(model)
    bare = backward(model, words, targets)
    del mlp.forward
    check(bare, backward(model, words, targets), 1e-6)
