"""FSDP2 by Trainer's arguments `fsdp` and `fsdp_config`: what of them can be meant, and what recipes add to them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .reading import ConfigError, nearest

if TYPE_CHECKING:
    import torch

    from .config import Config

_KEY = "train.arguments"

#: Types of devices on which accelerate never shards: it makes whole copies there without saying so.
UNSHARDED = ("cpu",)

# Keys of fsdp_config that Trainer reads for FSDP2: the values that can be meant, and what an error expects; or all.
_OPTIONS: Mapping[str, tuple[tuple[Any, ...], str] | None] = {
    "version": ((2, "2"), "2: the flat parameters of FSDP1 have no rows and columns for RoutedAdamW"),
    "state_dict_type": (
        ("SHARDED_STATE_DICT", "FULL_STATE_DICT"),
        "SHARDED_STATE_DICT or FULL_STATE_DICT",
    ),
    "auto_wrap_policy": (
        ("TRANSFORMER_BASED_WRAP", "NO_WRAP"),
        "TRANSFORMER_BASED_WRAP or NO_WRAP: routed layers read the weights of the modules in them",
    ),
    "transformer_layer_cls_to_wrap": None,
    "reshard_after_forward": None,
    "cpu_offload": None,
    "cpu_ram_efficient_loading": ((False, "false"), "false: every process loads the model by itself"),
    "activation_checkpointing": (
        (),
        "it as train.activation_checkpointing: accelerate's own draws other dropout in the backward",
    ),
}


def wants_shards(arguments: Mapping[str, Any]) -> bool:
    """Whether TrainingArguments ask for FSDP."""
    return bool(arguments.get("fsdp"))


def check_sharding(arguments: Mapping[str, Any]) -> None:
    """Raises ConfigError where `fsdp` and `fsdp_config` of TrainingArguments cannot be meant."""
    options = arguments.get("fsdp_config")
    if options is None:
        return
    if not wants_shards(arguments):
        raise ConfigError.of(
            f"{_KEY}.fsdp_config", options, "fsdp: true beside it, without which it is not read"
        )
    if not isinstance(options, Mapping):
        raise ConfigError.of(
            f"{_KEY}.fsdp_config", options, "a mapping: what a file says is in no stage's key"
        )
    for name, value in options.items():
        key, own = f"{_KEY}.fsdp_config.{name}", name.removeprefix("fsdp_")  # Trainer takes both
        if own not in _OPTIONS:
            raise ConfigError.of(
                key, value, f"one of the keys {', '.join(_OPTIONS)}{nearest(own, list(_OPTIONS))}"
            )
        if (known := _OPTIONS[own]) is not None and value not in known[0]:
            raise ConfigError.of(key, value, known[1])


def check_processes(arguments: Mapping[str, Any], processes: int, device: torch.device) -> None:
    """Raises ConfigError where FSDP is asked for and cannot be: in a single process, or on a CPU."""
    if not wants_shards(arguments):
        return
    key, value = f"{_KEY}.fsdp", arguments["fsdp"]
    if device.type in UNSHARDED:
        raise ConfigError.of(
            key, value, f"nothing here: on a {device.type} accelerate takes DDP instead of FSDP"
        )
    if processes == 1:
        raise ConfigError.of(key, value, "nothing in a single process: torchrun starts several")


def check_run(config: Config, processes: int) -> None:
    """Raises ConfigError where a run's processes and device cannot shard what its config asks to shard.

    Args:
        config: the whole config.
        processes: how many processes torchrun has started.
    """
    if wants_shards(config.train.arguments):
        from .models import choose_device

        check_processes(config.train.arguments, processes, choose_device(config.model.device))


def refuse_shards(arguments: Mapping[str, Any], key: str, value: Any, why: str) -> None:
    """Raises ConfigError where FSDP is asked for beside what cannot be trained in shards.

    Args:
        arguments: TrainingArguments of the section `train`.
        key: the key of what cannot be sharded.
        value: its value.
        why: the reason, a clause.
    """
    if wants_shards(arguments):
        raise ConfigError.of(key, value, f"another beside {_KEY}.fsdp: {why}")


def sharded_arguments(arguments: Mapping[str, Any], *, adapters: bool = False) -> dict[str, Any]:
    """The argument fsdp_config, with what recipes say where a config does not; none without FSDP.

    Args:
        arguments: TrainingArguments of the section `train`.
        adapters: whether PEFT's adapters are trained.

    Raises:
        ConfigError: shards of several adapters are asked for.
    """
    if not wants_shards(arguments):
        return {}
    check_adapters(arguments, adapters)
    given = {
        name.removeprefix("fsdp_"): value for name, value in (arguments.get("fsdp_config") or {}).items()
    }
    own = {
        "version": 2,
        # Every process writes its shards, by torch.distributed.checkpoint; Trainer's default gathers all in the first.
        "state_dict_type": "FULL_STATE_DICT" if adapters else "SHARDED_STATE_DICT",
    }
    return {"fsdp_config": {**own, **given}}  # a copy, because TrainingArguments writes to what it is given


def check_adapters(arguments: Mapping[str, Any], adapters: bool = True) -> None:
    """Raises ConfigError where checkpoints of PEFT's adapters are asked for in shards, which have one of them alone."""
    for name, value in (arguments.get("fsdp_config") or {}).items():
        if adapters and name.removeprefix("fsdp_") == "state_dict_type" and value != "FULL_STATE_DICT":
            expected = "FULL_STATE_DICT for adapters: accelerate's shards have the first of them alone"
            raise ConfigError.of(f"{_KEY}.fsdp_config.{name}", value, expected)


@contextmanager
def as_before(*names: str) -> Iterator[None]:
    """Puts variables of the environment back at the end of a block, or of a function that it decorates.

    accelerate says in the environment that it shards, and a later training of the process would be sharded as well.
    """
    before = {name: os.environ.get(name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
