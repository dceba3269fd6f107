"""RoutedAdamW as recipes train with it: its groups of parameters, and what its moments are stored in."""

from __future__ import annotations

import functools
import warnings
from typing import Any, Literal

import torch
from torch import nn

from .. import BackendError
from ..optim import RoutedAdamW, routed_param_groups
from .training_sections import Train

#: `train.states` → the option `state_dtype` of RoutedAdamW.
STATE_DTYPES: dict[str, torch.dtype | Literal["8bit"] | None] = {
    "same": None,
    "bfloat16": torch.bfloat16,
    "8bit": "8bit",
}


def routed_adamw(model: nn.Module, settings: Train) -> RoutedAdamW:
    """RoutedAdamW of a routed model; warns where no kernel takes its steps."""
    make = functools.partial(
        RoutedAdamW,
        routed_groups(model, settings.weight_decay),
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        state_dtype=STATE_DTYPES[settings.states],
    )
    try:
        return make(fused=True)
    except BackendError as error:  # no kernel for this device and dtype
        warnings.warn(
            f"RoutedAdamW updates every parameter by a dozen operations instead of one kernel: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return make()


def routed_groups(model: nn.Module, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """A routed model's groups of parameters; embeddings that every token trains are one block, as under AdamW."""
    return _with_whole_embeddings(model, routed_param_groups(model, weight_decay=weight_decay))


def _with_whole_embeddings(model: nn.Module, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups, with the token embedding in one of its own unless a plan routes it or the head.

    In rows, tokens that a batch lacks would wait, moments and all, and train the worse for it (docs/optimizer.md).
    """
    plan = _plan_of(model)
    if plan is None or plan.embedding is not None or plan.lm_head is not None:
        return groups
    embeddings = {
        id(weight)
        for module in (bare_model(model).get_input_embeddings(), bare_model(model).get_output_embeddings())
        if (weight := getattr(module, "weight", None)) is not None
    }
    result = []
    for group in groups:
        apart = [parameter for parameter in group["params"] if id(parameter) in embeddings]
        rest = [parameter for parameter in group["params"] if id(parameter) not in embeddings]
        if rest:
            result.append({**group, "params": rest})
        if apart:
            result.append({**group, "params": apart, "block_dim": None})
    return result


def bare_model(model: Any) -> Any:
    """The model of transformers inside PEFT's, or inside what was put around either."""
    while hasattr(model, "module"):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _plan_of(model: nn.Module) -> Any:
    return getattr(bare_model(model), "routing_plan", None)
