"""Ranks of a word and its kin among the dimensions of a pretrained model, and the effects of steering it."""

from collections.abc import Sequence
from typing import Any

import torch
from steering.measures import (
    BUDGET,
    added,
    cosines,
    direction,
    effect,
    mean_difference,
    outputs,
    points,
    ranks,
    ranks_beside,
    typical_size,
)
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from pretrained.next_word import Data

#: Where the stream is added to: after the layer in the middle, and after the last.
PLACES = ("middle", "last")
WORD, KIN = "word", "kin"
BEFORE, CONTROL, ROUTED = "before", "control", "routed"

Effects = list[dict[str, float]]


def readout(model: LlamaForCausalLM) -> Tensor:
    """[V, d_model]: the head with the final norm's weight in its columns, as logits read the normalised stream."""
    return model.lm_head.weight.detach() * model.model.norm.weight.detach()


def placed(model: LlamaForCausalLM, data: Data) -> dict[str, Tensor]:
    """[d_model] each: the word's rank in every dimension by cosine, and the median of its kin's."""
    values = cosines(readout(model))
    kin = ranks_beside(values, data.target, data.kin)
    return {WORD: ranks(values, data.target), KIN: kin.median(0).values}


def standing(before: Tensor, control: Tensor, routed: Tensor, dim: int) -> dict[str, float]:
    """Ranks [d_model] before and after both trainings → those in one dimension, and what is so in others.

    "as high" is the share of other dimensions in which the routed model's rank is as high as in this one or higher;
    "rises as much" the share of those in which the control's rank is as many times the routed model's, or more.
    """
    rise = control / routed
    others = torch.arange(len(routed)) != dim
    return {
        BEFORE: before[dim].item(),
        CONTROL: control[dim].item(),
        ROUTED: routed[dim].item(),
        "as high": (routed <= routed[dim])[others].float().mean().item(),
        "rises as much": (rise >= rise[dim])[others].float().mean().item(),
    }


def other_dims(model: LlamaForCausalLM, dim: int, count: int) -> list[int]:
    """Dimensions beside one, evenly spaced."""
    others = [other for other in range(model.config.hidden_size) if other != dim]
    return [others[index * len(others) // count] for index in range(count)]


def along_dimension(
    model: LlamaForCausalLM, dim: int, place: str, data: Data, amounts: Sequence[float]
) -> Effects:
    """The effects of adding to a dimension, in the direction in which the word ranks higher."""
    vector = torch.zeros(model.config.hidden_size)
    vector[dim] = direction(cosines(readout(model))[:, dim], data.target)
    return steered(model, place, vector, data, amounts)


def by_addition(model: LlamaForCausalLM, place: str, data: Data, amounts: Sequence[float]) -> Effects:
    """The effects of adding the difference of mean activations in texts that were trained on."""
    stream = outputs(model, layer_at(model, place), data.seen)
    return steered(model, place, mean_difference(stream, data.seen, data.target), data, amounts)


def layer_at(model: LlamaForCausalLM, place: str) -> nn.Module:
    layers = model.model.layers
    return layers[-1] if place == "last" else layers[(len(layers) - 1) // 2]


def steered(
    model: LlamaForCausalLM, place: str, vector: Tensor, data: Data, amounts: Sequence[float]
) -> Effects:
    """The effects of a vector [d_model] of length 1, in amounts that grow from 0 until one costs too much.

    An amount of 1 is as long as the root mean square of the stream at most positions.
    """
    layer = layer_at(model, place)
    unit = vector * typical_size(outputs(model, layer, data.held_out))
    effects: list[dict[str, Any]] = []
    for amount in (0.0, *amounts):
        with added(layer, slice(None), amount * unit):
            effects.append({"amount": amount} | effect(model, data.held_out, data.target)._asdict())
        if points(effects)[-1][0] > BUDGET:
            break
    return effects
