"""The suite `model`: one training step of a whole Llama, routed in every layer, beside unrouted, detached and Liger."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from . import memory, model_check, progress
from .cases import STEP, Case, Findings, Limit, Plan, Step, Variant, attempt
from .model_cases import (
    BY_HAND,
    DTYPES,
    SHAPES,
    Batch,
    Shape,
    Training,
    make_batch,
    make_model,
    make_optimizer,
    trainings,
    warm_step_on_cpu,
)

BASE = "unrouted"
RIVALS = (BASE, "detach, hidden units", "detach, SGTM", "Liger")
SEEDS = (0, 1)  # seeds of the batches that the rounds take in turn

#: Targets on CUDA. On the CPU the demo's model has targets, see end_to_end.py.
LIMITS = (
    Limit("routed, hidden units", BASE, 1.0, mode=STEP),
    Limit("routed, hidden units", BASE, 1.01, "memory", STEP),
    Limit("routed, hidden units", "detach, hidden units", 1 / 1.15, mode=STEP),
    Limit("routed, SGTM", "detach, SGTM", 1 / 1.15, mode=STEP),
)


def plans(device: torch.device) -> list[Plan]:
    """The one case of a device; none where there is no transformers."""
    shape = SHAPES[device.type]
    dtype = str(DTYPES[device.type]).removeprefix("torch.")
    name = f"training step of a Llama of {shape.layers} layers"
    axes = shape._asdict() | {"dtype": dtype, "tokens": shape.tokens}
    limits = LIMITS if device.type == "cuda" else ()
    return [Plan("model", name, "Llama", axes, partial(case, shape, device, limits))]


def why_missing() -> str | None:
    """Why there is no such suite on this machine."""
    return None if importlib.util.find_spec("transformers") else "transformers is not installed"


def case(shape: Shape, device: torch.device, limits: tuple[Limit, ...] = ()) -> Case:
    model = make_model(shape, device)
    batches = [make_batch(shape, device, seed) for seed in SEEDS]
    made, absent = trainings(model, shape)
    optimizer = make_optimizer(model)
    return Case(
        variants={
            name: Variant(
                steps=partial(steps, one, batches, optimizer),
                saved_bytes=partial(saved_bytes, one, model, batches[0]),
                memory_bytes=partial(memory_bytes, device, shape, name),
                is_rival=one.is_rival,
            )
            for name, one in made.items()
        },
        rivals=RIVALS,
        examine=partial(examine, made, model, shape, batches),
        checked=model_check.HOW,
        modes=(STEP,),
        limits=limits,
        missing=absent,
        tokens=shape.tokens,
        held_bytes=held_bytes(model, optimizer),
        facts={"parameters": sum(weight.numel() for weight in model.parameters())},
    )


def steps(
    training: Training, batches: list[Batch], optimizer: torch.optim.Optimizer, mode: str
) -> list[Step]:
    return [training.step(batch, optimizer) for batch in batches]


def saved_bytes(training: Training, model: nn.Module, batch: Batch) -> int:
    """Bytes that autograd keeps between forward and backward."""
    return memory.saved(partial(training.loss, batch), model.parameters())


def memory_bytes(device: torch.device, shape: Shape, name: str, mode: str, step: Step) -> int | None:
    """The peak of a step's memory beyond what is there between steps; on the CPU it is measured in another process."""
    if device.type == "cuda":
        return memory.on_device(step)
    return memory.on_cpu(partial(warm_step_on_cpu, shape, name))


def held_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes that are there between steps: parameters, and the optimizer's state."""
    state = [value for entry in optimizer.state.values() for value in entry.values()]
    return sum(tensor.nbytes for tensor in (*model.parameters(), *state))


def examine(
    made: Mapping[str, Training],
    model: nn.Module,
    shape: Shape,
    batches: list[Batch],
    variants: Mapping[str, Any],
) -> Findings:
    """Finds the share of its budget that the error of each variant takes, the largest of all batches, or its fault."""
    found: Findings = {name: {} for name in variants}
    for batch in batches:
        unrouted = model_check.numbers(model, made[BASE].loss, batch)
        for meaning in BY_HAND:
            progress.step(f"computing {meaning} in a wider dtype")
            by_hand = made[BASE if meaning == BASE else f"detach, {meaning}"]
            want = model_check.expected(model, shape, meaning, by_hand.loss, batch, unrouted)
            for name in variants:
                if made[name].meaning == meaning and not {"error", "wrong"} & found[name].keys():
                    progress.step(f"checking {name}")
                    one = attempt(partial(model_check.examine, made[name], model, batch, want, unrouted.loss))
                    if one.get("budget_share", 0) >= found[name].get("budget_share", 0):
                        found[name] = one
            del want  # frees the gradients of a whole model before the next meaning makes others
    return found
