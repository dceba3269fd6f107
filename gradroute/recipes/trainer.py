"""RecipeTrainer: transformers' Trainer with RoutedAdamW, batches in their own order, and checkpoints that are whole.

This module imports transformers. Its neighbours import it only when something is trained.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback

from ..models import routed_trainer
from ..models.swapped import Swapped
from .optimizers import bare_model, routed_adamw
from .training_sections import Train

# What transformers hands to callbacks and trainers.
Argument = Any

_WHOLE = "whole"  # this file is in a checkpoint that was written to the end


class RecipeTrainer(Trainer):
    """transformers' Trainer, told by a config's section how to train.

    Args:
        settings: the section.
        routed: whether the model is routed, so that its optimizer may be RoutedAdamW.
    """

    optimizer: Argument

    def __init__(self, *args: Argument, settings: Train, routed: bool, **kwargs: Argument) -> None:
        self.settings = settings
        self.routed = routed
        super().__init__(*args, **kwargs)

    def _get_train_sampler(self, train_dataset: Argument = None) -> Argument:
        """The batches in their own order: it follows from the seed, and a resumed run goes on in it."""
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)

    def create_accelerator_and_postprocess(self) -> None:
        """Trainer's own; where FSDP2 computes in bf16, the loss and sums of gradients stay in fp32, as under autocast.

        accelerate would round both, and a curve of losses in bf16 is one of three digits.
        """
        super().create_accelerator_and_postprocess()
        plugin = _fsdp_plugin(self)
        policy = getattr(plugin, "mixed_precision_policy", None)
        if policy is not None and plugin.fsdp_version == 2:
            changed = dataclasses.replace(policy, reduce_dtype=torch.float32, output_dtype=None)
            plugin.mixed_precision_policy = changed

    def _prepare_for_training(self, *args: Argument, **kwargs: Argument) -> Argument:
        with _one_class_of_layers(self.model) if _fsdp_plugin(self) is not None else nullcontext():
            return super()._prepare_for_training(*args, **kwargs)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """RoutedAdamW for a routed model, unless the section says otherwise."""
        if self.optimizer is None and self.routed and self.settings.optimizer == "routed_adamw":
            self.optimizer = routed_adamw(self.model if model is None else model, self.settings)
        return super().create_optimizer(model)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Argument = None) -> None:
        """Trainer's own, which leaves one of several adapters of PEFT active: all that were are so again."""
        active = _active_adapters(self.model)
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if len(active) > 1:
            self.model.base_model.set_adapter(active)

    def floating_point_ops(self, inputs: Argument) -> int:
        """0: Trainer's estimate knows neither packed batches nor routes."""
        return 0


@contextmanager
def _one_class_of_layers(model: Argument) -> Iterator[None]:
    """Has accelerate find the class of all decoder layers, where a plan routes only some of them, in a block.

    accelerate shards layer by layer what is an instance of the first class with the layers' name. Where that is the
    routed one, a subclass of the same name, ordinary layers would be left to the whole model's own shards, and be
    gathered for all of a step. So the subclass has another name meanwhile.
    """
    layers = set(getattr(bare_model(model), "_no_split_modules", None) or ())
    kinds = {type(module) for module in model.modules() if type(module).__name__ in layers}
    before = {
        kind: kind.__name__
        for kind in kinds
        if issubclass(kind, Swapped) and any(issubclass(kind, other) for other in kinds - {kind})
    }
    try:
        for kind, name in before.items():
            kind.__name__ = f"Routed{name}"
        yield
    finally:
        for kind, name in before.items():
            kind.__name__ = name


def _fsdp_plugin(trainer: Argument) -> Argument:
    """accelerate's settings of FSDP; None: it does not shard."""
    return getattr(trainer.accelerator.state, "fsdp_plugin", None)


def _active_adapters(model: Argument) -> list[str]:
    """The active adapters of PEFT's model; none of any other."""
    return list(model.active_adapters) if hasattr(model, "get_base_model") else []


class WholeCheckpoints(TrainerCallback):
    """Marks a checkpoint once all processes have written it, so that one that a crash cut off is never resumed from."""

    def on_save(self, args: Argument, state: Argument, control: Argument, **kwargs: Argument) -> None:
        """Writes the mark."""
        args.distributed_state.wait_for_everyone()
        if state.is_world_process_zero:
            (Path(args.output_dir) / f"checkpoint-{state.global_step}" / _WHOLE).touch()


def last_checkpoint(folder: Path) -> Path | None:
    """The last checkpoint below a folder that was written to the end; None: there is none."""
    found = {
        int(mark.parent.name.rpartition("-")[2]): mark.parent
        for mark in folder.glob(f"checkpoint-*/{_WHOLE}")
    }
    return found[max(found)] if found else None


def trainer_class(routed: bool, base: Argument = None) -> Argument:
    """The class that trains a routed or an ordinary model."""
    chosen = RecipeTrainer if base is None else base
    return routed_trainer(chosen) if routed else chosen


def curve(log: list[Mapping[str, Any]]) -> list[dict[str, float]]:
    """The points of Trainer's log that have a loss: "step", "loss", "learning_rate", "grad_norm"."""
    names = ("step", "loss", "learning_rate", "grad_norm")
    return [
        {name: _number(entry[name]) for name in names if name in entry} for entry in log if "loss" in entry
    ]


def _number(value: Any) -> float:
    return value.item() if isinstance(value, Tensor) else value


def save_whole(trainer: Argument, folder: Path) -> None:
    """Saves the trained model as a folder of save_pretrained, gathered from all processes where it is sharded."""
    plugin = _fsdp_plugin(trainer)
    if plugin is not None:
        plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(folder))
