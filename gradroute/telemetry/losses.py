"""The losses of tokens, and the routes to which they belong."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .batches import BatchRoutes
from .sums import IGNORED_LABEL, wide


class TokenLosses(NamedTuple):
    """The losses of a batch's tokens.

    Attributes:
        losses: `[*tokens]`, each token's loss.
        counted: bool `[*tokens]`, False for tokens that have none.
        belongs: bool `[R, *tokens]`, whether a token belongs to a route.
    """

    losses: Tensor
    counted: Tensor
    belongs: Tensor


def cross_entropies(
    logits: Tensor, labels: Tensor, batch: BatchRoutes, *, shift: bool, align: str
) -> TokenLosses:
    """The cross-entropy of each token.

    Args:
        logits: `[*tokens, V]`.
        labels: integers `[*tokens]`; IGNORED_LABEL: no loss.
        batch: the route ids of the tokens.
        shift: whether position t predicts the label at t + 1.
        align: whose loss the shifted one is: "position", the route's at t, or "next_token", that at t + 1.
    """
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels: got shape {list(labels.shape)}, expected the logits' {list(logits.shape[:-1])}"
        )
    labels = labels.to(logits.device)
    belongs = batch.belongs(labels.shape, logits.device, "logits")
    if shift:
        belongs = belongs[..., 1:] if align == "next_token" else belongs[..., :-1]
        logits, labels = logits[..., :-1, :], labels[..., 1:]
    return TokenLosses(_cross_entropy(logits, labels), labels != IGNORED_LABEL, belongs)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Each token's loss, computed a row of the batch at a time: all in fp32 would be the step's largest tensor."""
    if logits.dim() > 2 and len(logits) > 1:
        return torch.stack([_cross_entropy(*row) for row in zip(logits, labels, strict=True)])
    flat = logits.flatten(0, -2).to(wide(logits))
    losses = nn.functional.cross_entropy(flat, labels.flatten(), ignore_index=IGNORED_LABEL, reduction="none")
    return losses.view(labels.shape)


def check_counted(counted: Tensor, losses: Tensor) -> None:
    """Raises unless `counted` is a bool for each of some losses."""
    if not isinstance(counted, Tensor) or counted.dtype != torch.bool:
        got = f"dtype {counted.dtype}" if isinstance(counted, Tensor) else f"a {type(counted).__name__}"
        raise TypeError(f"counted: got {got}, expected a tensor of dtype torch.bool")
    if counted.shape != losses.shape:
        raise ValueError(
            f"counted: got shape {list(counted.shape)}, expected that of losses, {list(losses.shape)}"
        )
