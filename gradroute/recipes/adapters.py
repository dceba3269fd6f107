"""The recipe adapters: each route trains a LoRA adapter of its own, in one run of mixed batches.

The published model has the adapters that `adapters.keep` names merged into its weights, and the others not.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import models as routed
from . import checkpoints, data, labels
from .common import BASE, BASELINES, COHERENCE, RELEARNING, Figures, parameters, refuse_unread, rows, trained
from .evaluation.stage import STAGE as EVALUATE
from .needs import check_module
from .plans import adapter_plan, checker
from .report.stage import STAGE as REPORT
from .sharding import check_adapters, check_run
from .stages import Context, Stage
from .training import Model, check_arguments, train
from .training_sections import Adapters

if TYPE_CHECKING:
    from .config import Config


def add(model: Model, settings: Adapters, *, seed: int = 0) -> Model:
    """PEFT's model around a model, with an adapter for every entry of the section, all of them active and trained.

    Args:
        model: an ordinary model of transformers, whose own weights are frozen.
        settings: the adapters.
        seed: the seed of their weights.

    Raises:
        ValueError: no linear layer has a name that ends as one of `settings.targets`.
    """
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    names = list(settings.adapters)

    def configuration() -> Any:
        return LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules="all-linear" if settings.targets is None else list(settings.targets),
            task_type="CAUSAL_LM",
        )

    made = get_peft_model(model, configuration(), adapter_name=names[0])
    for name in names[1:]:
        made.add_adapter(name, configuration())
    made.base_model.set_adapter(names)
    return made


def route(model: Model, settings: Adapters, names: Sequence[str]) -> Model:
    """Routes what `add` returned, in place: each adapter learns from its own routes; `names` are all routes'."""
    return routed.route(model, adapter_plan(settings, names))


def merged(model: Model, folder: str | os.PathLike[str], names: Sequence[str]) -> Model:
    """The model with some of the adapters of a folder merged into its weights; an ordinary model again.

    Args:
        model: the ordinary model that the adapters were trained on, changed in place.
        folder: where `save_pretrained` of what `add` returned has left an adapter of every name.
        names: which of them; none: the model as it is.
    """
    from peft import PeftModel

    if not names:
        return model
    first, *others = names
    made = PeftModel.from_pretrained(model, str(Path(folder) / first), adapter_name=first)
    for name in others:
        made.load_adapter(str(Path(folder) / name), name)
    return made.merge_and_unload(adapter_names=list(names))


def _check(config: Config) -> None:
    refuse_unread(config, "adapters", ("adapters", "coherence", "baselines", "relearning"))
    check_module("adapters.adapters", list(config.adapters.adapters), "peft", "peft")
    checker("adapters")(config)
    check_arguments(config.train)
    check_adapters(config.train.arguments)


def _route(context: Context) -> Figures:
    """Adds and routes adapters without the model's weights, so that what does not fit is found before the training."""
    from transformers import AutoConfig, AutoModelForCausalLM

    configuration = AutoConfig.from_pretrained(checkpoints.base(context), local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(configuration)
        model = add(model, context.config.adapters)
    route(model, context.config.adapters, context.config.routes)
    trained_ones = sum(one.numel() for one in model.parameters() if one.requires_grad)
    return {"adapters": list(context.config.adapters.adapters), "trained parameters": trained_ones}


def _train(context: Context) -> Figures:
    config = context.config
    model = add(checkpoints.load(context, checkpoints.base(context)), config.adapters, seed=config.seed)
    route(model, config.adapters, config.routes)
    adapters = context.folder / "adapters"
    figures = trained(context, train, model, rows(context, "train"), config.train, save_to=adapters)
    del model
    if context.is_first:
        _save_merged(context, adapters, list(config.adapters.adapters))
    return figures


def _ablate(context: Context) -> Figures:
    adapters = context.inputs["train"].folder / "adapters"
    return _save_merged(context, adapters, list(context.config.adapters.keep))


def _save_merged(context: Context, folder: Path, names: Sequence[str]) -> Mapping[str, Any]:
    model = merged(checkpoints.load(context, checkpoints.base(context)), folder, names)
    checkpoints.save(context, model)
    return {"merged": list(names), "parameters": parameters(model)}


STAGES = (
    data.STAGE,
    labels.STAGE,
    BASE,
    Stage("route", _route, reads=("model", "adapters", "routes"), after=("base",), check=_check),
    Stage(
        "train",
        _train,
        reads=("model", "adapters", "routes", "train", "seed"),
        after=("base", "labels", "route"),
        resumable=True,
        everywhere=True,
        fits=check_run,
    ),
    Stage("ablate", _ablate, reads=("model", "adapters"), after=("base", "train")),
    COHERENCE,
    *BASELINES,
    RELEARNING,
    EVALUATE,
    REPORT,
)
