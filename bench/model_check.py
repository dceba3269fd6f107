"""The numbers that a variant of the suite `model` must give: those of plain PyTorch with hooks, in a wider dtype.

Rows of a batch have nothing to do with each other, so the exact gradients are summed up row by row, in less memory.
"""

import copy
import math
from types import MethodType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .model_cases import BY_HAND, TIMES_PLAIN, Batch, Loss, Shape, Training

HOW = (
    "every variant, before it is timed, with the weights and the batch that are timed: the loss, and the gradient of "
    "every parameter by its root mean square (RMS) error, against plain PyTorch with hooks in a wider dtype (fp32 for "
    "bf16, fp64 for fp32); errors may be twice (Liger's eight times) those of the hooks at the model's dtype, plus eps "
    "of the values; where there are masks the unrouted model's gradients exceed that. The forward of a routed model "
    "without routes is the unrouted one bit for bit, and so it is with them where only gradients are masked"
)

WIDER = {torch.bfloat16: torch.float32, torch.float32: torch.float64}


class Numbers(NamedTuple):
    """A loss, and the gradient of every parameter by its name."""

    loss: Tensor
    gradients: dict[str, Tensor]

    def named(self) -> dict[str, Tensor]:
        return {"loss": self.loss} | self.gradients


def numbers(model: nn.Module, loss: Loss, batch: Batch) -> Numbers:
    """The value of a loss and its gradients; nothing is left in the parameters' `grad`."""
    names, weights = zip(*model.named_parameters(), strict=True)
    value = loss(batch)
    return Numbers(value.detach(), dict(zip(names, torch.autograd.grad(value, weights), strict=True)))


class Expected(NamedTuple):
    """The numbers that the variants of one meaning must give.

    Attributes:
        exact: the numbers in the wider dtype.
        plain: those of plain PyTorch with hooks, at the model's dtype.
        tells: whether the budget tells the meaning from the unrouted model, whose gradients exceed it.
    """

    exact: Numbers
    plain: Numbers
    tells: bool

    @property
    def plain_error(self) -> float:
        """The relative error of all plain gradients together, on which the budget rests."""
        errors = [size(self.plain.gradients[name] - want) for name, want in self.exact.gradients.items()]
        sizes = [size(want) for want in self.exact.gradients.values()]
        return (size(torch.stack(errors)) / size(torch.stack(sizes))).item()


def expected(
    model: nn.Module, shape: Shape, meaning: str, by_hand: Loss, batch: Batch, unrouted: Numbers
) -> Expected:
    """Computes the numbers; `by_hand` is BY_HAND's loss of a copy of the model that shares its parameters."""
    exact = exact_numbers(model, shape, meaning, batch)
    plain = numbers(model, by_hand, batch)
    tells = meaning == "unrouted" or worst(unrouted, exact, plain, TIMES_PLAIN)[1] > 1
    return Expected(exact, plain, tells)


def exact_numbers(model: nn.Module, shape: Shape, meaning: str, batch: Batch) -> Numbers:
    """The numbers of a meaning in the wider dtype."""
    wide = copy.deepcopy(model).to(WIDER[next(model.parameters()).dtype])
    for module in wide.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = MethodType(norm_in_own_dtype, module)
    loss = BY_HAND[meaning](wide, shape, loss_in_own_dtype)
    total = torch.zeros((), dtype=next(wide.parameters()).dtype, device=batch.input_ids.device)
    for row in batch.rows():
        part = loss(row) / len(batch.input_ids)
        part.backward()
        total += part.detach()
    return Numbers(total, {name: weight.grad for name, weight in wide.named_parameters()})


def norm_in_own_dtype(norm: nn.Module, x: Tensor) -> Tensor:
    """Llama's norm without its casts to fp32."""
    return norm.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon)


def loss_in_own_dtype(model: nn.Module, batch: Batch) -> Tensor:
    """The loss of transformers without its casts to fp32."""
    logits = model(input_ids=batch.input_ids).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), batch.input_ids[:, 1:].flatten())


def examine(
    training: Training, model: nn.Module, batch: Batch, want: Expected, unrouted_loss: Tensor
) -> dict[str, Any]:
    """The largest share of its budget that a variant's error takes, and where; or the fault."""
    if not want.tells:
        return {"wrong": "plain PyTorch is so far off here that the unrouted model would pass for it"}
    for loss in training.same_losses:
        with torch.no_grad():
            got = loss(batch)
        if not torch.equal(got, unrouted_loss):
            return {"wrong": f"loss: got {got.item()!r}, the unrouted model's is {unrouted_loss.item()!r}"}
    got = numbers(model, training.loss, batch)
    where, share = worst(got, want.exact, want.plain, training.times_plain)
    if not share <= 1:  # a NaN fails too
        return {"wrong": f"{where}: the error is {share:.3g} of what is allowed"}
    return {"budget_share": share, "budget_share_of": where}


def worst(actual: Numbers, exact: Numbers, plain: Numbers, times_plain: float) -> tuple[str, float]:
    """The tensor whose error is the largest share of what HOW allows, and that share."""
    eps = torch.finfo(next(iter(plain.gradients.values())).dtype).eps
    others = zip(actual.named().items(), plain.named().values(), exact.named().values(), strict=True)
    shares = {
        name: (size(got - want) / (times_plain * size(rival - want) + eps * size(want))).item()
        for (name, got), rival, want in others
    }
    where = max(shares, key=lambda name: math.inf if math.isnan(shares[name]) else shares[name])
    return where, shares[where]


def size(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.detach())
