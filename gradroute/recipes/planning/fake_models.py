"""The model of a config as its training has it, made of tensors without memory."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from ... import models
from .. import models as files
from ..plans import adapter_plan, plan_of, settled
from ..reading import ConfigError
from ..training_sections import Adapters
from .sections import PlanConfig

# Configurations of transformers, of any class.
Configuration = Any


def configuration(config: PlanConfig) -> Configuration:
    """The model's configuration of transformers.

    Raises:
        ConfigError: transformers knows no such model, or refuses the configuration.
    """
    from transformers import AutoConfig

    model = config.model
    if model.config is None:
        try:
            return AutoConfig.from_pretrained(**files.resolve(str(model.path)).arguments)
        except (OSError, ValueError) as error:
            raise ConfigError(f"model.path: got {model.path!r}, expected a model ({error})") from None
    values = dict(model.config)
    kind = values.pop("model_type")
    try:
        return AutoConfig.for_model(kind, **values)
    except (TypeError, ValueError, KeyError) as error:
        raise ConfigError(
            f"model.config: got {kind!r} with the keys {', '.join(values)}, expected a configuration of transformers "
            f"({str(error)[:200]})"
        ) from None


def fake_model(config: PlanConfig, *, routed: bool) -> nn.Module:
    """The model, expanded, with adapters, routed; to be called under a FakeTensorMode.

    Raises:
        ConfigError: no such model, or the plan does not fit it.
    """
    from transformers import AutoModelForCausalLM

    made = _expanded(configuration(config), config)
    dtype = config.model.dtype
    wanted = getattr(made, "dtype", None) or torch.float32 if dtype == "auto" else getattr(torch, dtype)
    if getattr(made, "num_experts", 0) and wanted == torch.float32:
        raise ConfigError.of(
            "model.dtype", dtype, "bfloat16 for experts, whose grouped products fake tensors know in it alone"
        )
    options = {} if config.model.attention is None else {"attn_implementation": config.model.attention}
    with unset_fake_temporarily(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(made, dtype=wanted, **options).train()
        if config.memory.recipe == "adapters":
            model = _with_adapters(model, config.adapters)
    _materialise(model)
    if config.train.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if routed:
        _route(model, config)
    return model


def _expanded(made: Configuration, config: PlanConfig) -> Configuration:
    """The configuration with what the stage expand adds, as `gradroute.era.expand` leaves it."""
    units, heads = config.expand.units, config.expand.heads
    if config.memory.recipe == "adapters":
        return made
    text = made.get_text_config()
    shape = models.Shape.of(made)
    if units and len(shape.expert_layers) == shape.layers:
        raise ConfigError.of(
            "expand.units", units, "0 for a model of mixtures of experts, to which expand adds nothing"
        )
    if units:
        name = "n_inner" if hasattr(text, "n_inner") else "intermediate_size"
        setattr(text, name, shape.d_ff + units)
    if heads:
        group = shape.heads // shape.kv_heads
        if not hasattr(text, "head_dim") or heads % group:
            raise ConfigError.of(
                "expand.heads", heads, f"0, or a multiple of {group} for a configuration that has head_dim"
            )
        text.head_dim = shape.head_dim
        text.num_attention_heads = shape.heads + heads
        text.num_key_value_heads = shape.kv_heads + heads // group
    return made


def _materialise(model: nn.Module) -> None:
    """Gives every parameter and buffer, tied ones once, a fake tensor on the CPU in the place of that on meta."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for place in (module._parameters, module._buffers):
            for name, tensor in place.items():
                if tensor is None:
                    continue
                if id(tensor) not in made:
                    fake: Any = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                    if isinstance(tensor, nn.Parameter):
                        fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
                    made[id(tensor)] = tensor, fake
                place[name] = made[id(tensor)][1]


def _with_adapters(model: nn.Module, adapters: Adapters) -> nn.Module:
    import peft

    settings = peft.LoraConfig(
        r=adapters.rank,
        lora_alpha=adapters.alpha,
        lora_dropout=adapters.dropout,
        target_modules="all-linear" if adapters.targets is None else list(adapters.targets),
        task_type="CAUSAL_LM",
    )
    first, *others = adapters.adapters
    result: Any = peft.get_peft_model(model, settings, adapter_name=first)
    for name in others:
        result.add_adapter(name, settings)
    result.base_model.set_adapter(list(adapters.adapters))
    return result


def _route(model: nn.Module, config: PlanConfig) -> None:
    """Routes the model as the recipe does.

    Raises:
        ConfigError: unknown routes, or a plan that the model cannot take.
    """
    recipe, adapters = config.memory.recipe, config.adapters.adapters
    named = {f"adapters.adapters.{name}": of for name, of in adapters.items()}
    if recipe != "adapters":
        route = settled(config.route, config.expand, recipe)
        wanted = {"forget": route.forget}
        if route.preset in ("sgtm", "localize_experts"):
            wanted |= {"retain": route.retain, "unlabelled": route.unlabelled or route.retain}
        named = {f"route.{key}": (name,) for key, name in wanted.items()}
    for key, names in named.items():
        for name in names:
            if name not in config.routes:
                raise ConfigError.of(key, name, f"a name of routes: {', '.join(config.routes)}")
    inner: Any = model
    try:
        plan = (
            adapter_plan(config.adapters, config.routes)
            if recipe == "adapters"
            else plan_of(route, config.routes, inner.config)
        )
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", RuntimeWarning
            )  # of tied parameters and added units: training says it
            models.route(model, plan)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"route: got a plan that the model cannot take: {error}") from None
