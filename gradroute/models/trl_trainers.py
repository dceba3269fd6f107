"""Routed trainers of TRL do this besides: datasets that are tokenized and packed, pairs, and rollouts."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from types import MethodType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .attention import Attention
from .base_model import BaseModel
from .mlp import MLP
from .rollouts import rollout_routes
from .route_columns import ROUTE_COLUMNS, checked_column
from .routing import routed_model
from .transformers_trainer import Argument, Batch, RoutedTrainer


class WithRoutes:
    """A model whose every call has the same routes besides: a policy, as against its reference."""

    def __init__(self, model: Argument, routes: Mapping[str, Tensor]) -> None:
        self._model = model
        self._routes = dict(routes)

    def __call__(self, *args: Argument, **kwargs: Argument) -> Argument:
        return self._model(*args, **kwargs, **self._routes)

    def __getattr__(self, name: str) -> Argument:
        return getattr(self._model, name)


class RoutedTRLTrainer(RoutedTrainer):
    """The three trainers of TRL: their loss is of log-probabilities, which a fused head computes."""

    def __init__(self, *args: Argument, **kwargs: Argument) -> None:
        super().__init__(*args, **kwargs)
        top = routed_model(self.model)
        if any(isinstance(module, BaseModel) and module.is_part for module in top.modules()):
            head = HeadOfLogits(top.forward, getattr(self, "temperature", 1.0))
            top.forward = MethodType(head.forward_of, top)


class HeadOfLogits:
    """The output of TRL's fused head, computed of all logits: the head itself is called, and so it can be routed.

    Args:
        forward: the forward that TRL put on the model; without `fused_lm_head` it is the routed one.
        temperature: what logits are divided by.
    """

    def __init__(self, forward: Callable[..., Argument], temperature: float) -> None:
        self._forward = forward
        self._temperature = temperature

    def forward_of(
        self, model: nn.Module, *args: Argument, fused_lm_head: bool = False, **kwargs: Argument
    ) -> Argument:
        """The model's forward, with TRL's keyword: log-probabilities of the labels in the place of logits."""
        if not fused_lm_head:
            return self._forward(*args, **kwargs)
        labels = kwargs.pop("labels", None)
        shifted = kwargs.pop("shift_labels", None)
        items = kwargs.pop("num_items_in_batch", None)
        logits = self._forward(*args, **kwargs).logits
        if shifted is None:
            logits, shifted = logits[:, :-1], labels[:, 1:]
        return self._scored(logits, shifted, items)

    def _scored(self, logits: Tensor, labels: Tensor, items: Tensor | int | None) -> Argument:
        """TRL's output of logits `[B, S, V]` and of the labels `[B, S]` that they predict; -100: none."""
        mask = labels != -100
        logits = logits.float() / self._temperature
        every = logits.log_softmax(-1)
        chosen = every.gather(-1, labels.clamp(min=0)[..., None])[..., 0].masked_fill(~mask, 0)
        count = mask.sum().clamp(min=1) if items is None else items
        entropy = -(every.exp() * every).sum(-1)
        with torch.no_grad():
            alone = {
                "log_sum_sq_probs": (2 * every).logsumexp(-1),
                "mean_logits": logits.mean(-1),
                "is_top1": logits.argmax(-1) == labels,
            }
        scores = {name: score.masked_fill(~mask, 0) for name, score in {"entropy": entropy, **alone}.items()}
        made = sys.modules["trl.trainer.utils"].FusedCausalLMOutput
        return made(loss=-chosen.sum() / count, log_probs=chosen, label_mask=mask, **scores)


class RoutedSFTTrainer(RoutedTRLTrainer):
    """Supervised fine-tuning: the dataset is tokenized, truncated and packed with its routes."""

    def _prepare_dataset(
        self,
        dataset: Argument,
        processing_class: Argument,
        args: Argument,
        packing: bool,
        formatting_func: Argument,
        dataset_name: str,
    ) -> Argument:
        """The trainer's own preparation, which truncates and packs only the columns that it knows.

        So it tokenizes first, without both; then every token has its route, and both are done with these.
        """
        prepare = super()._prepare_dataset
        columns = [name for name in ROUTE_COLUMNS if name in _columns_of(dataset)]
        if "route_ids" not in columns:  # a dataset of evaluation: the constructor has looked at the other
            return prepare(dataset, processing_class, args, packing, formatting_func, dataset_name)
        whole = copy.copy(args)
        whole.max_length, whole.shuffle_dataset = None, False
        dataset = prepare(dataset, processing_class, whole, False, formatting_func, dataset_name)
        dataset = dataset.map(_one_a_token, with_indices=True, fn_kwargs={"columns": columns})
        if packing:
            return _packed(dataset, args, ["input_ids", "labels", *columns])
        if args.max_length is not None:
            kept = {"keep_start": (None, args.max_length), "keep_end": (-args.max_length, None)}
            bounds = kept.get(args.truncation_mode, (None, None))  # TRL refuses any other
            dataset = dataset.map(_truncated, fn_kwargs={"columns": columns, "bounds": bounds})
        return prepare(dataset, processing_class, args, False, None, dataset_name)


def _columns_of(dataset: Argument) -> list[str]:
    names: list[str] | None = dataset.column_names
    return list(next(iter(dataset))) if names is None else names


def _one_a_token(example: Mapping[str, Any], index: int, columns: list[str]) -> dict[str, list[float]]:
    """The routing columns of an example, with a number for each of its tokens."""
    n = len(example["input_ids"])
    return {name: checked_column(f"dataset[{index}]", name, example[name], n).tolist() for name in columns}


def _truncated(
    example: Mapping[str, Any], columns: list[str], bounds: tuple[int | None, int | None]
) -> dict[str, Any]:
    return {name: example[name][slice(*bounds)] for name in columns}


def _packed(dataset: Argument, args: Argument, columns: list[str]) -> Argument:
    """A dataset packed by TRL's own function, which packs all columns alike, shuffled as its trainer does."""
    if args.max_length is None:
        raise ValueError("max_length: got None beside packing, expected the length of a row")
    dataset = dataset.select_columns(columns)
    if args.shuffle_dataset:
        dataset = dataset.shuffle(seed=args.seed)
    dataset = sys.modules["trl"].pack_dataset(dataset, args.max_length, args.packing_strategy)
    return dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset


class RoutedDPOTrainer(RoutedTRLTrainer):
    """Preferences: the policy's forward over chosen and rejected completions is routed, the reference's is not."""

    pairs: ClassVar[bool] = True

    def _with_given(self, model: Argument, inputs: Batch, routes: Batch) -> tuple[Argument, Batch]:
        return WithRoutes(model, routes) if routes else model, inputs


class RoutedGRPOTrainer(RoutedDPOTrainer):
    """Rollouts: those that were generated get their routes before they are split into batches."""

    pairs: ClassVar[bool] = False

    def __init__(
        self, *args: Argument, route_fn: Callable[..., Argument] | None = None, **kwargs: Argument
    ) -> None:
        if route_fn is not None and not callable(route_fn):
            raise TypeError(f"route_fn: got a {type(route_fn).__name__}, expected a function or None")
        self._route_fn = route_fn
        super().__init__(*args, **kwargs)

    def _check_columns(self, dataset: Argument) -> None:
        if self._route_fn is None:
            super()._check_columns(dataset)

    def _with_routes(self, collator: Callable[..., Batch], is_training: bool) -> Callable[..., Batch]:
        return collator  # which makes no batch: that is made of the rollouts

    def _calculate_rewards(
        self, inputs: list[Any], prompts: list[Any], completions: list[Any], completion_ids: Sequence[Any]
    ) -> Tensor:
        rewards: Tensor = super()._calculate_rewards(inputs, prompts, completions, completion_ids)
        first = self.accelerator.process_index * len(prompts)  # rewards are of all processes
        self._rollouts = {
            "prompts": prompts,
            "completions": completions,
            "completion_ids": completion_ids,
            "rewards": rewards[first : first + len(prompts)],
            "inputs": inputs,
        }
        return rewards

    def _generate_and_score_completions(self, inputs: list[Any]) -> Batch:
        batch = super()._generate_and_score_completions(inputs)
        if not self.model.training:
            return batch
        rollouts, self._rollouts = self._rollouts, {}
        batch.update(rollout_routes(self._route_fn, rollouts, batch, self._route_align))
        if batch.get("old_per_token_logps") is not None and self._masks_in_forward():
            batch["old_per_token_logps"] = self._old_log_probabilities(batch)
        return batch

    def _masks_in_forward(self) -> bool:
        return any(
            isinstance(module, (MLP, Attention)) and module.forward_table() is not None
            for module in routed_model(self.model).modules()
        )

    @torch.no_grad()
    def _old_log_probabilities(self, batch: Batch) -> Tensor:
        """The rollouts' log-probabilities `[B, C]` by the forward that is trained, which hides what a route hides."""
        input_ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        attention_mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        size = self.args.per_device_train_batch_size
        parts = []
        for start in range(0, len(input_ids), size):
            rows = slice(start, start + size)
            routes = {name: batch[name][rows] for name in ROUTE_COLUMNS if name in batch}
            logps, *_ = self._get_per_token_logps_and_entropies(
                WithRoutes(self.model, routes),
                input_ids[rows],
                attention_mask[rows],
                batch["completion_ids"].shape[1],
            )
            parts.append(logps)
        return torch.cat(parts)
