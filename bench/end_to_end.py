"""The suite `end-to-end`: the training step of `make demo`, optimizer and all, beside the same model trained otherwise.

The demo's model (examples/unlearning) is routed by SGTM without forget heads, on real text packed into mixed rows.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from gradroute import MLPSites
from gradroute.models import RoutingPlan, route

from . import memory, progress
from .cases import STEP, Case, Findings, Limit, Plan, Step, Variant, attempt
from .model import held_bytes
from .model_cases import Confined, detach_confined, with_shared_weights

EXAMPLES = Path(__file__).parent.parent / "examples"
BASE = "unrouted"
RIVALS = (BASE, "detach", "detach, hidden units")
LEARNING_RATE = 1e-7  # so small that the model that is timed is still the one that was checked
ROWS, LENGTH, FORGET_SHARE = 4, 256, 0.4  # the demo's
SETS = 2  # batches that the rounds take in turn
TOLERANCE = 1e-4  # share of a gradient's largest entry: fp32 sums over a thousand tokens in another order

CHECKED = (
    "every variant, before it is timed, with the weights and the batches that are timed: the gradient of every "
    f"parameter by its largest error, at most {TOLERANCE:g} of the largest entry, against the detach idiom in fp64"
)


class DemoBatch(Protocol):
    """A `Batch` of the example, which is imported by name: its fields are `[B, S]`."""

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    route_ids: Tensor


class DemoShape(Protocol):
    """A `Shape` of the example: only what is read here."""

    forget_units: int


#: Forward and backward of a batch → its loss; afterwards every parameter has its gradient in `grad`.
Accumulate = Callable[[DemoBatch], Tensor]


class Training(NamedTuple):
    """One way to train the demo's model.

    Attributes:
        meaning: "unrouted", "SGTM" or "hidden units".
        accumulate: forward and backward.
        is_rival: whether it is others' way.
        loss: the forward alone, where there is one.
    """

    meaning: str
    accumulate: Accumulate
    is_rival: bool
    loss: Callable[[DemoBatch], Tensor] | None = None


def plans(device: torch.device) -> list[Plan]:
    """The one case of this suite."""
    limits = (Limit("routed", BASE, 1.02, mode=STEP), Limit("routed", "detach", 0.85, mode=STEP))
    axes = {"tokens": ROWS * LENGTH, "dtype": "float32", "share": FORGET_SHARE}
    make = partial(case, device, limits if device.type == "cpu" else ())
    return [Plan("end-to-end", "training step of the demo", "Llama", axes, make)]


def why_missing() -> str | None:
    """Why there is no such suite on this machine."""
    missing = [name for name in ("transformers", "tokenizers") if not importlib.util.find_spec(name)]
    return f"{' and '.join(missing)} not installed" if missing else None


@cache
def unlearning(module: str) -> ModuleType:
    """A module of the example examples/unlearning."""
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    return importlib.import_module(f"unlearning.{module}")


@cache
def batches(number: int) -> tuple[DemoBatch, ...]:
    """The batches on which the demo trains first."""
    corpus = unlearning("corpus")
    progress.stage("reading the demo's texts")
    texts = corpus.load_corpus(0)
    progress.stage("training their tokenizer")
    tokenizer = corpus.train_tokenizer(texts, unlearning("model").Shape().vocabulary)
    documents = [corpus.encode(tokenizer, of_route) for of_route in texts.train]
    packed = corpus.pack(corpus.mixture(documents, FORGET_SHARE, 0), number * ROWS, LENGTH)
    return tuple(packed.rows(ROWS * step, ROWS) for step in range(number))


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return unlearning("model").build(unlearning("model").Shape())


def case(device: torch.device, limits: tuple[Limit, ...]) -> Case:
    model = make_model().to(device)
    the_batches = list(batches(SETS))  # on the host, as in training, where routes are counted
    made = trainings(model)
    optimizer = make_optimizer(model)
    return Case(
        variants={
            name: Variant(
                steps=partial(steps, one, model, the_batches, optimizer),
                saved_bytes=None
                if one.loss is None
                else partial(saved_bytes, one.loss, model, the_batches[0]),
                memory_bytes=partial(memory_bytes, device, name, the_batches[0]),
                is_rival=one.is_rival,
            )
            for name, one in made.items()
        },
        rivals=RIVALS,
        examine=partial(examine, made, model, the_batches),
        checked=CHECKED,
        modes=(STEP,),
        limits=limits,
        tokens=the_batches[0].input_ids.numel(),
        held_bytes=held_bytes(model, optimizer),
        facts={"parameters": sum(weight.numel() for weight in model.parameters())},
    )


def trainings(model: nn.Module) -> dict[str, Training]:
    """The ways to train by name, all around the same parameters."""
    example, cost = unlearning("model"), unlearning("cost")
    shape = example.Shape()
    plan = example.routing_plan(model, shape)
    routed = route(with_shared_weights(model), plan)
    sites = cost.hidden_units_only(routed)
    hidden = route(with_shared_weights(model), RoutingPlan(plan.num_routes, mlp=sites))
    forwards = {
        "unrouted": ("unrouted", partial(example.loss_of, model, routed=False), True),
        "routed": ("SGTM", partial(example.loss_of, routed, routed=True), False),
        "detach": ("SGTM", detach_sgtm(with_shared_weights(model), shape), True),
        "routed, hidden units": ("hidden units", partial(example.loss_of, hidden, routed=True), False),
        "detach, hidden units": ("hidden units", detach_hidden(with_shared_weights(model), sites), True),
    }
    made = {
        name: Training(meaning, partial(backward, loss), is_rival, loss)
        for name, (meaning, loss, is_rival) in forwards.items()
    }
    homogeneous = Homogeneous(with_shared_weights(model), shape)
    return made | {"homogeneous steps": Training("SGTM", homogeneous, is_rival=True)}


def backward(loss: Callable[[DemoBatch], Tensor], batch: DemoBatch) -> Tensor:
    value = loss(batch)
    value.backward()
    return value


def unrouted_loss(model: nn.Module, batch: DemoBatch) -> Tensor:
    return unlearning("model").loss_of(model, batch, routed=False)


def sgtm_parts(shape: DemoShape) -> Confined:
    """The parts that the demo's plan confines: forget tokens train the last hidden units, embedding and norms."""
    units = shape.forget_units
    rows = dict.fromkeys(("q_proj", "k_proj", "v_proj", "lm_head"), 0)
    return Confined(
        rows | {"gate_proj": units, "up_proj": units},
        columns={"o_proj": 0, "down_proj": units},
        unseen={"down_proj": units},
    )


def detach_sgtm(model: nn.Module, shape: DemoShape) -> Callable[[DemoBatch], Tensor]:
    return detach_confined(model, sgtm_parts(shape), unrouted_loss)


def detach_hidden(model: nn.Module, sites: MLPSites) -> Callable[[DemoBatch], Tensor]:
    """`m*h + (1-m)*h.detach()` at the hidden units; the dense masks of a batch are made when it first comes."""
    tables = [table.weights for table in (sites.forward, sites.hidden) if table is not None]
    of_batch: dict[int, list[Tensor]] = {}
    current: list[Tensor] = []

    def masked(module: nn.Module, arguments: tuple[Tensor]) -> Tensor:
        visible, m = current
        h = arguments[0] * visible  # [B, S, d_ff]
        return m * h + (1 - m) * h.detach()

    for name, module in model.named_modules():
        if name.endswith("down_proj"):
            module.register_forward_pre_hook(masked)

    def loss(batch: DemoBatch) -> Tensor:
        ids = batch.route_ids
        if id(ids) not in of_batch:
            of_batch[id(ids)] = [table.to(model.dtype)[ids].to(model.device) for table in tables]
        current[:] = of_batch[id(ids)]
        return unrouted_loss(model, batch)

    return loss


class Homogeneous:
    """The way that SGTM's code trains: one label a step, gradients masked as a whole; here their sum is one step.

    Every label's part of a batch is made when it first comes: its documents end to end, in one row.
    """

    def __init__(self, model: nn.Module, shape: DemoShape) -> None:
        self.model, self.parts = model, sgtm_parts(shape)
        self.batches: dict[int, tuple[DemoBatch, DemoBatch, int]] = {}
        self.seen: Tensor | None = None
        for name, module in model.named_modules():
            if name.rpartition(".")[2] in self.parts.unseen:
                module.register_forward_pre_hook(self._hide)

    def __call__(self, batch: DemoBatch) -> Tensor:
        if id(batch.route_ids) not in self.batches:
            parts = (part.to(self.model.device) for part in by_label(batch))
            self.batches[id(batch.route_ids)] = (*parts, predicted(batch))
        retain, forget, total = self.batches[id(batch.route_ids)]
        value = torch.zeros((), device=self.model.device)
        if forget.input_ids.numel():
            value = value + self._backward(forget, total)
            self._confine()
        features, last = self.model.config.intermediate_size, self.parts.unseen["down_proj"]
        self.seen = (torch.arange(features, device=self.model.device) < features - last).to(self.model.dtype)
        if retain.input_ids.numel():
            value = value + self._backward(retain, total)
        self.seen = None
        return value

    def _hide(self, module: nn.Module, arguments: tuple[Tensor]) -> Tensor | None:
        return None if self.seen is None else arguments[0] * self.seen

    def _backward(self, batch: DemoBatch, total: int) -> Tensor:
        loss = self.model(
            batch.input_ids,
            labels=batch.labels,
            position_ids=batch.position_ids,
            use_cache=False,
            num_items_in_batch=total,
        ).loss
        loss.backward()
        return loss.detach()

    def _confine(self) -> None:
        """Zeroes the gradients of parameters that forget tokens may not update."""
        for full_name, weight in self.model.named_parameters():
            name = full_name.split(".")[-2]
            if name in self.parts.rows:
                weight.grad[: len(weight) - self.parts.rows[name]].zero_()
            if name in self.parts.columns:
                weight.grad[:, : weight.shape[1] - self.parts.columns[name]].zero_()


def predicted(batch: DemoBatch) -> int:
    return int((batch.labels[:, 1:] != unlearning("corpus").NO_LABEL).sum())


def by_label(batch: DemoBatch) -> list[DemoBatch]:
    """The batch's documents of each label end to end in one row; the first token of a row stays unpredicted."""
    labels, positions = batch.labels.clone(), batch.position_ids.clone()
    labels[:, 0] = unlearning("corpus").NO_LABEL
    # A document that went on in the next row began anew there; RoPE is relative, so its positions may count from 0.
    starts = (positions == 0) | (torch.arange(positions.shape[1], device=positions.device) == 0)
    index = torch.arange(positions.numel(), device=positions.device).view_as(positions)
    positions = index - (index * starts).flatten().cummax(0)[0].view_as(index)
    fields = batch._replace(labels=labels, position_ids=positions)
    return [
        type(batch)(*(field[batch.route_ids == label].unsqueeze(0) for field in fields)) for label in range(2)
    ]


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """The demo's optimizer with its state, at a rate so small that the model hardly changes."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    return optimizer


def steps(
    training: Training, model: nn.Module, of: list[DemoBatch], optimizer: torch.optim.Optimizer, mode: str
) -> list[Step]:
    """A whole step of the demo on every batch."""

    def step(batch: DemoBatch) -> None:
        optimizer.zero_grad()
        training.accumulate(batch)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return [partial(step, batch) for batch in of]


def saved_bytes(loss: Callable[[DemoBatch], Tensor], model: nn.Module, batch: DemoBatch) -> int:
    """Bytes that autograd keeps between forward and backward."""
    return memory.saved(partial(loss, batch), model.parameters())


def memory_bytes(device: torch.device, name: str, batch: DemoBatch, mode: str, step: Step) -> int | None:
    """The peak of a step's memory beyond what is there between steps; on the CPU it is measured in another process."""
    if device.type == "cuda":
        return memory.on_device(step)
    return memory.on_cpu(partial(warm_step_on_cpu, name, tuple(batch)))


def warm_step_on_cpu(name: str, fields: tuple[Tensor, ...]) -> Step:
    """A step after one on a row of the batch, so that what is loaded once is not counted."""
    batch = unlearning("corpus").Batch(*fields)
    model = make_model()
    training, optimizer = trainings(model)[name], make_optimizer(model)
    short, whole = steps(training, model, [batch.rows(0, 1), batch], optimizer, STEP)
    short()
    return whole


def examine(
    made: Mapping[str, Training], model: nn.Module, of: list[DemoBatch], variants: Mapping[str, Any]
) -> Findings:
    """Checks the gradients of every variant on every batch; see CHECKED."""
    found: Findings = {name: {} for name in variants}
    for batch in of:
        exact = {}
        for meaning in dict.fromkeys(one.meaning for one in made.values()):
            progress.step(f"computing the gradients of {meaning} in fp64")
            exact[meaning] = exact_gradients(model, meaning, batch)
        for name in variants:
            if not found[name]:
                progress.step(f"checking {name}")
                found[name] = attempt(partial(_examine, made[name], model, batch, exact[made[name].meaning]))
    model.zero_grad()
    return found


def exact_gradients(model: nn.Module, meaning: str, batch: DemoBatch) -> dict[str, Tensor]:
    """The gradients by the detach idiom in fp64, but for norms and the loss, which transformers computes in fp32."""
    wide = copy.deepcopy(model).double()
    shape = unlearning("model").Shape()
    if meaning == "SGTM":
        loss = detach_sgtm(wide, shape)
    elif meaning == "hidden units":
        plan = unlearning("model").routing_plan(model, shape)
        sites = unlearning("cost").hidden_units_only(route(with_shared_weights(model), plan))
        loss = detach_hidden(wide, sites)
    else:
        loss = partial(unrouted_loss, wide)
    return gradients(wide, partial(backward, loss), batch)


def gradients(model: nn.Module, accumulate: Accumulate, batch: DemoBatch) -> dict[str, Tensor]:
    model.zero_grad()
    accumulate(batch)
    return {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def _examine(
    training: Training, model: nn.Module, batch: DemoBatch, exact: dict[str, Tensor]
) -> dict[str, Any]:
    got = gradients(model, training.accumulate, batch)
    shares = {name: float((got[name] - want).abs().max() / want.abs().max()) for name, want in exact.items()}
    where = max(shares, key=lambda name: math.inf if math.isnan(shares[name]) else shares[name])
    if not shares[where] <= TOLERANCE:
        return {
            "wrong": f"{where}: the error is {shares[where]:.3g} of the largest entry, expected {TOLERANCE:g}"
        }
    return {"largest_error": shares[where]}
