"""The config of `plan`: the sections of a recipe that memory depends on, and what is asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from ..config import Config, file_of, read_file, with_setting
from ..files import absolute
from ..needs import check_recipes
from ..reading import ConfigError, option, read, rebased
from ..training_sections import Adapters, Expand, Route, Train


@dataclasses.dataclass(frozen=True)
class PlannedModel:
    """The model, by its configuration: no weights are read."""

    path: str | None = option(None, "a folder with a config.json, or a GGUF file", path=True)
    config: Mapping[str, Any] | None = option(
        None, "the configuration itself: model_type, and the keys of transformers' config.json"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option("float32", "of the parameters")
    tokenizer: str | None = option(None, "not read here")
    device: str | None = option(None, "not read here")
    attention: str | None = option(None, "transformers' attn_implementation; default: its own choice")

    def __post_init__(self) -> None:
        if (self.path is None) == (self.config is None):
            raise ConfigError.of("path", self.path, "either path or config")
        if self.config is not None and not isinstance(self.config.get("model_type"), str):
            raise ConfigError.of("config.model_type", self.config.get("model_type"), "a name, such as llama")


@dataclasses.dataclass(frozen=True)
class Memory:
    """What is asked of a plan."""

    recipe: Literal["unlearn", "localize", "adapters"] = option(
        "unlearn", "the recipe; of adapters the model's own weights are frozen"
    )
    routed: bool = option(True, "whether the model is routed; its unrouted twin is estimated beside it")
    gpus: tuple[int, ...] = option(
        (1,), "numbers of GPUs; more than one share the model by FSDP2", at_least=1
    )
    gpu_gb: float = option(80.0, "memory of one, in 10^9 bytes", above=0)
    reserve: float = option(
        0.1,
        "the share of it kept for the driver, kernels, fragments and the network",
        at_least=0,
        at_most=0.9,
    )
    lengths: tuple[int, ...] | None = option(
        None, "tokens of a row; default: train.batch_tokens, which is one packed row", at_least=1
    )
    batches: tuple[int, ...] = option((1, 2, 4, 8), "rows on one GPU", at_least=1)


@dataclasses.dataclass(frozen=True)
class PlanConfig:
    """All that a plan reads of a recipe's config; its other sections may stand in the file."""

    model: PlannedModel = option(meaning="the model")
    routes: tuple[str, ...] = option(("retain", "forget"), "names of the routes")
    expand: Expand = option(Expand, "units and heads that are added")
    route: Route = option(Route, "the plan")
    adapters: Adapters = option(Adapters, "LoRA adapters, of the recipe adapters")
    train: Train = option(Train, "training")
    memory: Memory = option(Memory, "what is asked")

    def __post_init__(self) -> None:
        for name in ("gpus", "lengths", "batches"):
            if getattr(self.memory, name) == ():
                raise ConfigError.of(f"memory.{name}", [], "at least one number")
        for index, count in enumerate(
            (*self.memory.gpus, *(self.memory.lengths or ()), *self.memory.batches)
        ):
            if count < 1:
                raise ConfigError.of("memory", count, f"numbers of at least 1 (entry {index})")


def load(config: str | Path | Mapping[str, Any] | None, settings: Iterable[str] = ()) -> PlanConfig:
    """The config of a file or a mapping, with settings on top, checked as a whole.

    Raises:
        ConfigError: an unknown or missing key, or a value that cannot be meant.
    """
    if config is not None and not isinstance(config, (str, Path, Mapping)):
        raise ConfigError.of("config", config, "a YAML or JSON file, a mapping, or None")
    check_recipes()
    if config is None or isinstance(config, Mapping):
        values, folder = dict(config or {}), Path.cwd()
    else:
        file = file_of(config)
        values, folder = read_file(file), file.resolve().parent
    own = {field.name for field in dataclasses.fields(PlanConfig)}
    others = {field.name for field in dataclasses.fields(Config)} - own
    values = rebased(PlanConfig, values, lambda path: absolute(path, folder))
    for setting in settings:
        values = with_setting(values, setting)
    values = {key: value for key, value in values.items() if key not in others}
    made = read(PlanConfig, values)
    path = made.model.path
    if path is not None and not path.startswith("package:") and not Path(path).exists():
        raise ConfigError.of("model.path", path, "a path that exists")
    return made
