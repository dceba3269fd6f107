"""The place of a token among the unembedding's directions, and the effect of adding to the residual stream."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from unlearning.corpus import NO_LABEL, Batch

BUDGET = 0.1  # nats of the other tokens' loss that steering may cost


def cosines(unembedding: Tensor) -> Tensor:
    """[V, d_model] → the same shape: of each token's direction with each dimension's."""
    return unembedding / unembedding.norm(dim=1, keepdim=True)


def ranks(values: Tensor, token: int) -> Tensor:
    """[V, d_model] → [d_model]: the token's rank in each dimension, from 1, in the direction in which it is higher.

    A residual dimension has no sign of its own, so each one gets the better of two chances.
    """
    above = (values > values[token]).sum(0)
    below = (values < values[token]).sum(0)
    return torch.minimum(above, below) + 1


def directions(values: Tensor, token: int) -> Tensor:
    """[V, d_model] → [d_model] of 1 or -1: the direction of each dimension in which the token's rank is higher."""
    above, below = (values > values[token]).sum(0), (values < values[token]).sum(0)
    return torch.where(above <= below, 1, -1)


def direction(values: Tensor, token: int) -> int:
    """[V] → 1 or -1: the direction of one dimension in which the token's rank is higher."""
    return int(directions(values[:, None], token)[0])


def ranks_beside(values: Tensor, token: int, others: Sequence[int]) -> Tensor:
    """[V, d_model] → [others, d_model]: the ranks of other tokens, from 1, in the direction in which `token` leads."""
    values = values * directions(values, token)
    return torch.stack([(values > values[other]).sum(0) + 1 for other in others])


def leaders(values: Tensor, token: int, count: int) -> list[int]:
    """[V] → the tokens that lead one dimension, in the direction of `token`."""
    return (values * direction(values, token)).topk(count).indices.tolist()


@contextmanager
def added(layer: nn.Module, dim: int | slice, amount: float | Tensor) -> Iterator[None]:
    """Adds to dimensions of the residual stream [B, S, d_model] at the output of a decoder layer."""

    def add(module: nn.Module, inputs: Any, x: Tensor) -> Tensor:
        x = x.clone()
        x[..., dim] += amount
        return x

    handle = layer.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


class Effect(NamedTuple):
    """Measures on held-out text: the target's mean probability everywhere, and mean losses in nats."""

    probability: float
    target_loss: float  # where the target comes next
    other_loss: float  # where another token does


@torch.no_grad()
def effect(model: LlamaForCausalLM, batch: Batch, target: int) -> Effect:
    logits = model(batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits[:, :-1]
    labels = batch.labels[:, 1:]
    predicts = labels != NO_LABEL
    log_p, labels = logits[predicts].log_softmax(-1), labels[predicts]  # [N, V], [N]
    loss = -log_p.gather(1, labels[:, None])[:, 0]
    is_target = labels == target
    return Effect(
        log_p[:, target].exp().mean().item(), loss[is_target].mean().item(), loss[~is_target].mean().item()
    )


@torch.no_grad()
def outputs(model: LlamaForCausalLM, layer: nn.Module, batch: Batch) -> Tensor:
    """[B, S, d_model]: the residual stream at the output of a layer; the head is not run."""
    seen: list[Tensor] = []
    handle = layer.register_forward_hook(lambda module, inputs, x: seen.append(x))
    try:
        model.base_model(batch.input_ids, position_ids=batch.position_ids, use_cache=False)
    finally:
        handle.remove()
    return seen[0]


def residual_size(model: LlamaForCausalLM, layer: nn.Module, batch: Batch) -> float:
    """The root mean square of the residual stream at the output of a layer: what amounts are multiples of."""
    return outputs(model, layer, batch).square().mean().sqrt().item()


def typical_size(x: Tensor) -> float:
    """[B, S, d_model] → the median of the positions' root mean squares.

    In pretrained models some positions, such as a document's first, are many times larger than all others: they would
    decide the root mean square of all.
    """
    return x.square().mean(-1).sqrt().median().item()


def mean_difference(x: Tensor, batch: Batch, target: int) -> Tensor:
    """[B, S, d_model] → [d_model], of length 1: the mean where the target comes next, less that where others do.

    The first positions of documents and of rows are left out: see `typical_size`.
    """
    following = batch.labels[:, 2:]
    counts = (following != NO_LABEL) & (batch.position_ids[:, 1:-1] > 0)
    x, is_target = x[:, 1:-1], following == target
    difference = x[counts & is_target].mean(0) - x[counts & ~is_target].mean(0)
    return difference / difference.norm()


def points(effects: Sequence[Mapping[str, float]]) -> list[tuple[float, float]]:
    """What each amount costs the other tokens in nats, and its factor on the target's mean probability.

    Args:
        effects: those of amounts that grow from 0, by the names of `Effect`.
    """
    base = effects[0]
    return [(e["other_loss"] - base["other_loss"], e["probability"] / base["probability"]) for e in effects]


def gain(effects: Sequence[Mapping[str, float]]) -> float:
    """The largest factor on the target's probability that costs the other tokens BUDGET at most; 1 by no steering.

    Between two amounts both are interpolated: which amounts were tried should not decide.
    """
    best = 1.0
    for (cost, factor), (next_cost, next_factor) in itertools.pairwise(points(effects)):
        if next_cost > BUDGET:
            reached = (BUDGET - cost) / (next_cost - cost)
            return max(best, factor + reached * (next_factor - factor))
        best = max(best, next_factor)
    return best
