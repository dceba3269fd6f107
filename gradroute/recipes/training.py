"""train: one training of a routed or an ordinary model by transformers' Trainer."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..models.routing import routed_model
from .batches import Batches, GroupCollator, Rows
from .needs import check_module, check_trackers
from .reading import ConfigError
from .sharding import as_before, check_processes, check_sharding, sharded_arguments, wants_shards
from .training_sections import Train

# Models and trainers of transformers, and their callbacks.
Model = Any
Trainer = Any
Callback = Any


@as_before("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING")
def train(
    model: Model,
    rows: Rows,
    settings: Train,
    folder: str | os.PathLike[str],
    *,
    seed: int = 0,
    save_to: str | os.PathLike[str] | None = None,
    callbacks: Sequence[Callback] = (),
    make: Callable[..., Trainer] | None = None,
    batches: Any = None,
) -> dict[str, Any]:
    """Trains a model in place: a routed one with the documents' routes, an ordinary one as usual.

    Same model, documents and settings give the same weights on the CPU, also where a run was stopped and goes on from
    one of its checkpoints, which it does by itself. Under FSDP2 (`settings.arguments` has `fsdp`) the model stays in
    shards afterwards; all processes of torchrun call alike, and `save_to` has it whole.

    Args:
        model: a model of transformers, or PEFT's around one; `gradroute.models.route` before makes its training routed.
        rows: documents with `input_ids` and, for a routed model, `route_ids` (of the document or its tokens).
        settings: how it is trained.
        seed: the seed of the order of documents, and of dropout.
        folder: for checkpoints. Those of an earlier call, of the same arguments, are gone on from.
        save_to: a folder to save the trained model in, as an ordinary one; None: it is not saved.
        callbacks: transformers' TrainerCallbacks.
        make: a subclass of RecipeTrainer, instead of that class.
        batches: what it trains on instead of `rows`.

    Returns:
        "curve": the loss by step; "steps", "tokens": how many it was trained on.

    Raises:
        ConfigError: one of `settings.arguments` is none of TrainingArguments; `fsdp` in a single process, or where
            accelerate cannot shard, as on CPUs.
        ValueError: no documents of two tokens or more.
    """
    from . import trainer as trainers

    routed = is_routed(model)
    arguments = training_arguments(settings, folder, model, seed)
    check_processes(settings.arguments, arguments.world_size, arguments.device)
    if batches is None:
        batches = batches_of(rows, settings, seed, arguments.world_size)
    made = trainers.trainer_class(routed, make)(
        model,
        arguments,
        train_dataset=batches,
        data_collator=collator(model, settings, routed),
        callbacks=[trainers.WholeCheckpoints(), *callbacks],
        settings=settings,
        routed=routed,
    )
    _refuse_other_shards(made, settings)
    checkpoint = trainers.last_checkpoint(Path(folder))
    made.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if save_to is not None:
        trainers.save_whole(made, Path(save_to))
    return {
        "curve": trainers.curve(made.state.log_history),
        "steps": made.state.global_step,
        "tokens": batches.tokens,
    }


def _refuse_other_shards(trainer: Trainer, settings: Train) -> None:
    """Raises ConfigError where accelerate would shard a model that is not to be sharded, or the other way round."""
    kind, given = trainer.accelerator.distributed_type.value, settings.arguments.get("fsdp")
    if wants_shards(settings.arguments) and kind != "FSDP":
        raise ConfigError.of(
            "train.arguments.fsdp",
            given,
            f"nothing here: on these devices accelerate takes {kind} instead of FSDP",
        )
    if kind == "FSDP" and not wants_shards(settings.arguments):
        raise ConfigError.of(
            "train.arguments.fsdp",
            given,
            "true, because ACCELERATE_USE_FSDP in the environment asks for FSDP",
        )


def is_routed(model: Model) -> bool:
    """Whether `gradroute.models.route` has routed a model."""
    try:
        routed_model(model)
    except ValueError:
        return False
    return True


def count_of(settings: Train, processes: int) -> int:
    """How many batches a training takes, of all processes together."""
    return settings.steps * settings.accumulation * processes


def batches_of(rows: Rows, settings: Train, seed: int, processes: int) -> Batches:
    """The batches of a training, of all processes together."""
    count = count_of(settings, processes)
    return Batches(rows, tokens=settings.batch_tokens, count=count, seed=seed, packed=settings.packed)


def collator(model: Model, settings: Train, routed: bool) -> GroupCollator:
    """The collator of a training's batches."""
    pad = getattr(model.config, "pad_token_id", None)
    return GroupCollator(
        pad_token_id=pad if isinstance(pad, int) and pad >= 0 else 0,  # padding is masked: any token will do
        packed=settings.packed,
        align=settings.align,
        routed=routed,
    )


def training_arguments(settings: Train, folder: str | os.PathLike[str], model: Model, seed: int = 0) -> Any:
    """transformers' TrainingArguments.

    Raises:
        ConfigError: `settings.arguments` has a name that is none of them, or a value that they refuse.
    """
    from transformers import TrainingArguments

    check_arguments(settings)
    try:
        return TrainingArguments(
            **{
                **_arguments(settings, folder, next(model.parameters()).device),
                "seed": seed,
                **settings.arguments,
                **sharded_arguments(settings.arguments, adapters=hasattr(model, "get_base_model")),
            }
        )
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"train.arguments: got {dict(settings.arguments)}, expected others: {error}"
        ) from error


def check_arguments(settings: Train) -> None:
    """Raises ConfigError where `arguments` have a name that is none of transformers.TrainingArguments.

    So it does where a package is missing that `states` or `report_to` need.
    """
    from transformers import TrainingArguments

    known = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    for name, value in settings.arguments.items():
        if name not in known:
            raise ConfigError.of(f"train.arguments.{name}", value, "a name of transformers.TrainingArguments")
    check_sharding(settings.arguments)
    check_trackers("train.arguments.report_to", settings.arguments.get("report_to"))
    if settings.states == "8bit":
        check_module("train.states", settings.states, "torchao", "gradroute[torchao]")


def _arguments(settings: Train, folder: str | os.PathLike[str], device: torch.device) -> Mapping[str, Any]:
    """What the section's own keys say, by TrainingArguments' names."""
    keeps = settings.save_every > 0
    return {
        "output_dir": os.fspath(folder),
        "max_steps": settings.steps,
        "per_device_train_batch_size": 1,  # one group of documents, see Batches
        "gradient_accumulation_steps": settings.accumulation,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.schedule if settings.schedule != "constant" else "constant_with_warmup",
        # The first step of a warm-up has the rate 0: a training of one step would do nothing.
        "warmup_steps": math.ceil(settings.steps * settings.warmup) if settings.steps > 1 else 0,
        "adam_beta1": settings.beta1,
        "adam_beta2": settings.beta2,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "optim": "adamw_torch",
        "bf16": settings.precision == "bf16",
        "fp16": settings.precision == "fp16",
        **(_checkpointing() if settings.activation_checkpointing else {}),
        "save_strategy": "steps" if keeps else "no",
        "save_steps": settings.save_every if keeps else 1,
        "save_total_limit": 2,  # the older one is whole while the newer is being written
        "logging_steps": min(settings.log_every, settings.steps),
        "use_cpu": device.type == "cpu",
        "dataloader_pin_memory": device.type == "cuda",
        "remove_unused_columns": False,
        "report_to": "none",
    }


def _checkpointing() -> dict[str, Any]:
    """The arguments for which layers are computed again in the backward, under this transformers' name."""
    from transformers import TrainingArguments

    known = any(field.name == "activation_checkpointing" for field in dataclasses.fields(TrainingArguments))
    name = "activation_checkpointing" if known else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}
