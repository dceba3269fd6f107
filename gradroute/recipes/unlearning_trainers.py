"""The losses of the baselines, as trainers. This module imports transformers; `baselines` imports it when needed."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..blocks import Block
from ..models import ARCHITECTURES
from .trainer import Argument, RecipeTrainer
from .training_sections import RMU, GradientAscent

_FORGET = 1  # the route of what is forgotten in batches of PairedBatches


class _PairedTrainer(RecipeTrainer):
    """Trains an ordinary model on batches whose routes say which documents are forgotten."""

    def __init__(self, *args: Argument, data_collator: Argument, **kwargs: Argument) -> None:
        super().__init__(*args, data_collator=dataclasses.replace(data_collator, routed=True), **kwargs)
        self.model_accepts_loss_kwargs = False  # losses are means of a batch, to be divided by `accumulation`


class GradientAscentTrainer(_PairedTrainer):
    """Ascends on documents to forget and descends on the others."""

    def __init__(self, *args: Argument, options: GradientAscent, **kwargs: Argument) -> None:
        self.options = options
        super().__init__(*args, **kwargs)

    def compute_loss(
        self, model: nn.Module, inputs: Argument, return_outputs: bool = False, **_: Argument
    ) -> Argument:
        """The difference of both losses."""
        inputs = dict(inputs)
        routes, labels = inputs.pop("route_ids"), inputs.pop("labels")  # [B, S]
        outputs = model(**inputs)
        losses = F.cross_entropy(  # [B, S - 1]
            outputs.logits[:, :-1].float().transpose(1, 2), labels[:, 1:], reduction="none", ignore_index=-100
        )
        counted = labels[:, 1:] != -100
        forget = routes[:, 1:] == _FORGET
        forget_loss = _mean(losses, counted & forget)
        loss = self.options.retain_weight * _mean(losses, counted & ~forget)
        loss = loss - forget_loss.clamp(max=self.options.most)  # beyond it, without a gradient
        return (loss, outputs) if return_outputs else loss


class Misdirection:
    """What RMU compares a model's activations with.

    Attributes:
        layer: the index of the decoder layer whose output is read.
        coefficient: the norm that forget tokens are steered to.
        direction: fp32 `[d_model]`, of norm 1.
    """

    def __init__(self, model: Argument, layer: int, options: RMU, seed: int, batch: Argument) -> None:
        self.layer = layer
        self.options = options
        self._model = model
        generator = torch.Generator().manual_seed(seed)
        direction = torch.rand(
            model.config.get_text_config().hidden_size, generator=generator, dtype=torch.float32, device="cpu"
        )
        self.direction = direction / direction.norm()
        parameters = dict(model.named_parameters())
        names = _output_weights(model, range(max(0, layer - 2), layer + 1))
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in names)
        self._frozen = {name: parameters[name].detach().clone() for name in names}
        self._output: Tensor | None = None
        self._hook = _layers_of(model)[layer].register_forward_hook(self._keep)
        self.coefficient = self._own_norm(batch) if options.coefficient is None else options.coefficient

    @classmethod
    def of(cls, model: Argument, options: RMU, seed: int, batch: Argument) -> Misdirection:
        """Freezes all of a model but the output weights of three MLPs, and listens to a layer.

        Args:
            model: an ordinary model.
            options: the method's settings.
            seed: the seed of the direction.
            batch: one batch of forget and retain documents, by whose norms the coefficient is chosen.

        Raises:
            ValueError: no such layer.
        """
        depth = len(_layers_of(model))
        layer = depth * 7 // 32 if options.layer is None else options.layer
        if layer >= depth:
            raise ValueError(f"layer: got {layer}, expected one of a model of {depth} layers, counted from 0")
        return cls(model, layer, options, seed, batch)

    def remove(self) -> None:
        """Ends the listening."""
        self._hook.remove()

    def _keep(self, module: nn.Module, args: Argument, output: Argument) -> None:
        self._output = output[0] if isinstance(output, tuple) else output

    def of_model(self, forward: Callable[..., Any], inputs: Argument) -> Tensor:  # [B, S, d_model]
        """The layer's output of a forward."""
        forward(**inputs)
        if self._output is None:
            raise RuntimeError(
                "model: got a forward that did not call its decoder layers, expected one that does"
            )
        output, self._output = self._output, None
        return output.float()

    @torch.no_grad()
    def of_frozen(self, inputs: Argument) -> Tensor:  # [B, S, d_model]
        """The layer's output of the model as it was."""

        def forward(**inputs: Argument) -> Any:
            return torch.func.functional_call(self._model, self._frozen, kwargs=inputs)

        return self.of_model(forward, inputs)

    def _own_norm(self, batch: Argument) -> float:
        """`multiple` times the mean norm of the frozen model's activations at forget tokens."""
        inputs = {
            name: value.to(self._model.device) if isinstance(value, Tensor) else value
            for name, value in batch.items()
        }
        forget = inputs.pop("route_ids") == _FORGET
        inputs.pop("labels")
        return self.options.multiple * float(self.of_frozen(inputs).norm(dim=-1)[forget].mean())

    def target(self) -> Tensor:  # fp32 [d_model]
        """What forget tokens are steered to."""
        return self.coefficient * self.direction.to(self._model.device)


class RMUTrainer(_PairedTrainer):
    """Steers a layer's output to one direction where documents are forgotten, and keeps it elsewhere."""

    def __init__(self, *args: Argument, misdirection: Misdirection, **kwargs: Argument) -> None:
        self.misdirection = misdirection
        super().__init__(*args, **kwargs)
        names = inspect.signature(self.model.forward).parameters
        self._without_logits = {"logits_to_keep": 1} if "logits_to_keep" in names else {}

    def compute_loss(
        self, model: nn.Module, inputs: Argument, return_outputs: bool = False, **_: Argument
    ) -> Argument:
        """The distance of forget tokens from the direction, and of the others from the frozen model."""
        inputs = {**inputs, **self._without_logits}
        routes, labels = inputs.pop("route_ids"), inputs.pop("labels")
        forget = routes == _FORGET
        retain = (routes != _FORGET) & _is_token(inputs, labels)
        misdirection = self.misdirection
        frozen = misdirection.of_frozen(inputs)
        output = misdirection.of_model(model, inputs)
        steered = _mean((output - misdirection.target()).square().mean(-1), forget)
        kept = _mean((output - frozen).square().mean(-1), retain)
        loss = steered + misdirection.options.retain_weight * kept
        return (loss, {"loss": loss}) if return_outputs else loss


def _is_token(inputs: Argument, like: Tensor) -> Tensor:  # bool [B, S]
    """Where a batch has tokens and no padding."""
    mask = inputs.get("attention_mask")
    return torch.ones_like(like, dtype=torch.bool) if mask is None else mask.bool()


def _mean(values: Tensor, chosen: Tensor) -> Tensor:
    """The mean of chosen values, both `[B, S]`; 0 where none is."""
    return (values * chosen).sum() / chosen.sum().clamp(min=1)


def _layers_of(model: Argument) -> Argument:
    kind = model.config.model_type
    if kind not in ARCHITECTURES:
        raise ValueError(f"model: got one of type {kind!r}, expected one of {', '.join(ARCHITECTURES)}")
    return model.get_submodule(ARCHITECTURES[kind].layers)


def _output_weights(model: Argument, layers: range) -> set[str]:
    """The names of the output weights of some layers' MLPs."""
    block = Block.units(model, slice(None), layers=list(layers))
    return {piece.parameter for piece in block.pieces if piece.role == "output"}
