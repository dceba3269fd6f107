"""The place of a token among the unembedding's directions, and the effect of adding to a residual dimension."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from unlearning.corpus import NO_LABEL, Batch


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


def direction(values: Tensor, token: int) -> int:
    """[V] → 1 or -1: the direction of one dimension in which the token's rank is higher."""
    above, below = (values > values[token]).sum(), (values < values[token]).sum()
    return 1 if above <= below else -1


@contextmanager
def added(layer: nn.Module, dim: int, amount: float) -> Iterator[None]:
    """Adds to one dimension of the residual stream [B, S, d_model] at the output of a decoder layer."""

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
def residual_size(model: LlamaForCausalLM, layer: nn.Module, batch: Batch) -> float:
    """The root mean square of the residual stream at the output of a layer: what amounts are multiples of."""
    seen = []
    handle = layer.register_forward_hook(
        lambda module, inputs, x: seen.append(x.square().mean().sqrt().item())
    )
    try:
        model(batch.input_ids, position_ids=batch.position_ids, use_cache=False)
    finally:
        handle.remove()
    return seen[0]
