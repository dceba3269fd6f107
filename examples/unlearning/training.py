"""Training with and without routes, held-out losses, and the stages that the demo compares."""

import math
import tempfile
from collections.abc import Callable

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaForCausalLM, PreTrainedModel

from gradroute.models import ablate, route, unroute

from .corpus import NO_LABEL, RETAIN, ROUTE_NAMES, Batch
from .model import Shape, build, loss_of, routing_plan
from .report import ROUTES_UNKNOWN

ROWS = 4
WARMUP_STEPS = 20
LEARNING_RATE = 2e-3
BETAS = (0.9, 0.95)
FINE_TUNE_STEPS = 40
FINE_TUNE_LEARNING_RATE = 2e-4

# The held-out losses in nats per token, by the name of the set.
Losses = dict[str, float]

# What a training makes smaller, of a model, a batch, and whether it is given its routes.
Objective = Callable[[PreTrainedModel, Batch, bool], Tensor]


def choose_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def run_stages(
    name: str,
    shape: Shape,
    train: Batch,
    retain: Batch,
    held_out: list[Batch],
    seed: int,
    device: torch.device,
) -> dict[str, Losses]:
    """Trains, ablates what retain tokens do not see, saves, loads and fine-tunes on retain text.

    Models of different names ("routed", "control") start from the same weights and see the same batches. The control's
    forward is never given the routes, so that it trains as the ordinary model.
    """
    routed = name == "routed"
    torch.manual_seed(seed)
    model = build(shape).to(device)
    route(model, routing_plan(model, shape))
    fit(model, train, LEARNING_RATE, routed, f"{name}: training")
    stages = {"before ablation": evaluate(model, held_out, routed)}
    if routed:
        stages[ROUTES_UNKNOWN] = evaluate(model, held_out, routed=False)
    ablate(model, RETAIN)
    model = saved_and_loaded(unroute(model)).to(device)
    stages["after ablation"] = evaluate(model, held_out, routed=False)
    fit(model, retain, FINE_TUNE_LEARNING_RATE, False, f"{name}: fine-tuning")
    stages["after fine-tuning"] = evaluate(model, held_out, routed=False)
    return stages


def fit(
    model: PreTrainedModel,
    data: Batch,
    learning_rate: float,
    routed: bool,
    description: str,
    optimizer: torch.optim.Optimizer | None = None,
    after_step: Callable[[int], None] | None = None,
    objective: Objective = loss_of,
) -> None:
    """One pass over data [N, S], ROWS rows a step; `after_step` is told how many steps were made."""
    steps = len(data.input_ids) // ROWS
    optimizer = optimizer or adamw(model, learning_rate)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, steps))
    progress = tqdm(range(steps), desc=f"{description:<20}", unit="step", mininterval=0.5)
    for step in progress:
        loss = objective(model, data.rows(step * ROWS, ROWS), routed)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if after_step is not None:
            after_step(step + 1)
        if step % 20 == 0 or step == steps - 1:
            progress.set_postfix(loss=f"{loss.item():.2f}")


def adamw(model: PreTrainedModel, learning_rate: float) -> torch.optim.AdamW:
    # AdamW's decay would move masked-off weights too, and cannot be switched off for some rows of a weight: none at
    # all, then. Its momentum moves them in every step, but only by what routed gradients have put into it.
    return torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=BETAS, weight_decay=0.0)


def warmup_cosine(step: int, steps: int) -> float:
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    return warmup * (0.55 + 0.45 * math.cos(math.pi * step / steps))


def saved_and_loaded(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """The model as a user gets it who knows nothing of routes."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return LlamaForCausalLM.from_pretrained(folder)


@torch.no_grad()
def evaluate(model: PreTrainedModel, held_out: list[Batch], routed: bool) -> Losses:
    """Held-out loss of each set. Routed, retain tokens do not see the forget block, just as in training."""
    losses = {}
    for name, data in zip(ROUTE_NAMES, held_out, strict=True):
        parts = [data.rows(row, ROWS) for row in range(0, len(data.input_ids), ROWS)]
        total = sum(loss_of(model, part, routed).item() * predicted(part) for part in parts)
        losses[name] = total / predicted(data)
    return losses


def predicted(batch: Batch) -> int:
    """The number of tokens in the mean that is the loss. The first of a row is predicted by none."""
    return int((batch.labels[:, 1:] != NO_LABEL).sum())
