"""The numbers of units and heads, where a model says them: in its configuration and on its modules."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..blocks import Part
from ..models.inspection import record_added_units
from ..models.plan import Shape


def config_of(model: nn.Module) -> Any:
    """The configuration that says how wide a model is; None: the model has none."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "num_attention_heads"):
        return None
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def new_numbers(config: Any, changes: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """The entries of a configuration after a change of its numbers of units and heads.

    Args:
        config: the configuration, which stays as it is.
        changes: "units" or "heads" → by how many the number changes, and in groups of how many.

    Raises:
        ValueError: transformers would refuse to save the changed configuration.
    """
    shape = Shape.of(config)
    numbers = {}
    if "units" in changes:
        numbers["n_inner" if hasattr(config, "n_inner") else "intermediate_size"] = (
            shape.d_ff + changes["units"][0]
        )
    if "heads" in changes:
        change, group = changes["heads"]
        numbers |= {
            "head_dim": shape.head_dim,  # without this entry it would follow from the number of heads
            "num_attention_heads": shape.heads + change,
            "num_key_value_heads": shape.kv_heads + change // group,
        }
    changed = copy.deepcopy(config)
    for name, value in numbers.items():
        setattr(changed, name, value)
    try:
        getattr(changed, "validate", lambda: None)()
    except Exception as error:  # its class differs between versions of transformers
        raise ValueError(
            f"{', '.join(changes)}: got numbers that {type(config).__name__} refuses, expected others: "
            f"{error.__cause__ or error}"
        ) from error
    return numbers


def changes_of(parts: Sequence[Part], sign: int) -> dict[str, tuple[int, int]]:
    """By "units" and "heads": by how many a configuration's number changes, and in groups of how many."""
    return {
        part.what: (sign * len(part.index), part.group)
        for part in parts
        if part.module  # the configuration does not know layers that gradroute does not know
    }


def resize(model: nn.Module, parts: Sequence[Part], sign: int) -> None:
    """Updates the recorded numbers of units and heads, in a model's configuration and on its modules."""
    for part in parts:
        module = model.get_submodule(part.module)
        if part.what == "heads":
            named = {"heads": 1, "kv_heads": part.group, "num_key_value_heads": part.group}
        else:
            named = {"intermediate_size": 1} if part.module else {}
        for name, group in named.items():
            if isinstance(getattr(module, name, None), int):
                setattr(module, name, getattr(module, name) + sign * len(part.index) // group)
    units = [len(part.index) for part in parts if part.what == "units" and part.module]
    if units:
        record_added_units(model, sign * units[0])
    if config_of(model) is None:
        return
    _copy_config(model)
    config = config_of(model)
    for name, value in new_numbers(config, changes_of(parts, sign)).items():
        setattr(config, name, value)


def _copy_config(model: nn.Module) -> None:
    """Gives a model a configuration of its own: others that were made of the same one stay as wide as they are."""
    copies: dict[int, Any] = {}
    copy.deepcopy(model.config, copies)
    for module in model.modules():
        config = vars(module).get("config")
        if id(config) in copies:
            module.config = copies[id(config)]
