"""One training step under a FakeTensorMode, and what it holds, moment by moment."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ...optim.quantised import is_quantised
from ...optim.state import new_moments, new_steps
from ...sites import Sites
from ..optimizers import STATE_DTYPES, routed_groups
from .fake_models import fake_model
from .sections import PlanConfig
from .tracking import Tracker


@dataclasses.dataclass(frozen=True)
class Static:
    """What a model holds at every moment, in bytes.

    Attributes:
        count: parameters, tied ones once.
        trainable: those that are trained.
        parameters: of all.
        buffers: such as the frequencies of rotary embeddings.
        gradients: of the trainable ones.
        moments: the optimizer's.
        counts: the optimizer's step counts.
        step: what its step holds for a while: both moments of one parameter in fp32, where they are codes.
        tables: routing tables on the device.
        largest_layer: the parameters of the largest decoder layer.
        outside: the parameters outside of decoder layers, such as embeddings.
        largest_gradient: of the largest trainable parameter.
    """

    count: int
    trainable: int
    parameters: int
    buffers: int
    gradients: int
    moments: int
    counts: int
    step: int
    tables: int
    largest_layer: int
    outside: int
    largest_gradient: int


@dataclasses.dataclass(frozen=True)
class Timeline:
    """What a step holds beside that, an entry a moment.

    Attributes:
        kept: int64 `[n]`, activations, logits and temporaries, in bytes.
        gradients: int64 `[n]`, gradients, in bytes.
        logits: int64 `[n]`, of `kept`, what is as wide as the vocabulary.
        forward: how many of the moments are the forward's.
    """

    kept: np.ndarray[Any, Any]
    gradients: np.ndarray[Any, Any]
    logits: np.ndarray[Any, Any]
    forward: int

    @property
    def held(self) -> int:
        """Activations that the end of the forward keeps for the backward, without logits."""
        return int(self.kept[self.forward - 1] - self.logits[self.forward - 1])

    def peak(self, shards: int = 1) -> int:
        """The most that is held at once, where gradients are cut into shards."""
        return int((self.kept + self.gradients / shards).max())

    def at(self, other: Timeline, rows: int, other_rows: int, wanted: int) -> Timeline | None:
        """The timeline of another number of rows, on the line through two of them; None where they do not align."""
        if len(self.kept) != len(other.kept) or self.forward != other.forward:
            return None
        share = (wanted - rows) / (other_rows - rows)
        kept, gradients, logits = (
            a + (b - a) * share
            for a, b in (
                (self.kept, other.kept),
                (self.gradients, other.gradients),
                (self.logits, other.logits),
            )
        )
        return Timeline(kept, gradients, logits, self.forward)


class Simulation:
    """A config's model under a FakeTensorMode of its own, whose steps are simulated.

    Args:
        config: the config.
        routed: whether the model is routed.
    """

    def __init__(self, config: PlanConfig, *, routed: bool) -> None:
        self.config, self.routed = config, routed
        self.mode = FakeTensorMode()
        with self.mode:
            self.model: Any = fake_model(config, routed=routed)
            self.static = _static(self.model, config, routed)

    def step(self, rows: int, length: int) -> Timeline:
        """The timeline of one forward and backward of `rows` times `length` tokens."""
        config = self.config
        with self.mode:
            ids = torch.zeros(rows, length, dtype=torch.long, device="cpu")
            inputs = {"input_ids": ids, "labels": ids, "use_cache": False}
            if self.routed:
                inputs["route_ids"] = torch.zeros(rows, length, dtype=torch.long, device="cpu")
            known = [*self.model.parameters(), *self.model.buffers()]
            with _one_document_a_row():
                return run(self.model, inputs, known, config)


@contextlib.contextmanager
def _one_document_a_row() -> Iterator[None]:
    """Tells transformers that rows are not packed: it reads that off positions, and fake ones have no values.

    Without it, it takes the way for packed rows: a mask for all pairs of tokens, and keys repeated for every head.
    """
    from transformers import masking_utils

    name = "find_packed_sequence_indices"
    original = getattr(masking_utils, name, None)
    if original is not None:
        setattr(masking_utils, name, lambda position_ids: None)
    try:
        yield
    finally:
        if original is not None:
            setattr(masking_utils, name, original)


def run(model: Any, inputs: dict[str, Any], known: list[Tensor], config: PlanConfig) -> Timeline:
    """The timeline of one forward and backward, of tensors with memory or without."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    for parameter in model.parameters():
        parameter.grad = None
    with Tracker(known, vocabulary) as tracker:
        handles = tracker.gradients_of(model)
        with autocast(config):
            loss = model(**inputs).loss  # as Trainer does, which lets go of the logits
        tracker.moments.append(tracker.now)
        forward = len(tracker.moments)
        loss.backward()
        del loss
        tracker.moments.append(tracker.now)
    for handle in handles:
        handle.remove()
    for parameter in model.parameters():
        parameter.grad = None
    kept, gradients, logits_bytes = np.array(tracker.moments, dtype=np.int64).T
    return Timeline(kept, gradients, logits_bytes, forward)


def autocast(config: PlanConfig) -> Any:
    """The autocast that Trainer makes of the config's precision; none where the parameters are of it already."""
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    dtype = dtypes.get(config.train.precision)
    return contextlib.nullcontext() if dtype is None else torch.autocast("cpu", dtype)


def _static(model: Any, config: PlanConfig, routed: bool) -> Static:
    parameters = list(model.parameters())
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    blocks = max(
        (module for module in model.modules() if isinstance(module, nn.ModuleList)),
        key=lambda module: sum(p.numel() for p in module.parameters()),
    )
    layers = [_bytes(layer.parameters()) for layer in blocks]
    optimizer = _optimizer(model, trainable, config, routed)
    return Static(
        count=sum(parameter.numel() for parameter in parameters),
        trainable=sum(parameter.numel() for parameter in trainable),
        parameters=_bytes(parameters),
        buffers=_bytes(model.buffers()),
        gradients=_bytes(trainable),
        **optimizer,
        tables=_bytes(_tables(model)) if routed else 0,
        largest_layer=max(layers),
        outside=_bytes(parameters) - sum(layers),
        largest_gradient=max((_bytes([parameter]) for parameter in trainable), default=0),
    )


def _bytes(tensors: Any) -> int:
    return sum({id(tensor): tensor.numel() * tensor.element_size() for tensor in tensors}.values())


def _optimizer(model: nn.Module, trainable: list[Tensor], config: PlanConfig, routed: bool) -> dict[str, int]:
    """The parts of `Static` that are AdamW's.

    RoutedAdamW counts steps in every block, and may store moments in fewer bytes; else a parameter has one count.
    """
    if not routed or config.train.optimizer != "routed_adamw":
        return {"moments": 2 * _bytes(trainable), "counts": 4 * len(trainable), "step": 0}
    moments = counts = step = 0
    for group in routed_groups(model):
        block_dim = group.get("block_dim", 0)
        options = {"block_dim": block_dim, "state_dtype": STATE_DTYPES[config.train.states], "amsgrad": False}
        for parameter in group["params"]:
            state = new_moments(parameter, options)
            moments += _bytes(state.values())
            counts += _bytes([new_steps(parameter, block_dim)])
            if is_quantised(state):
                step = max(step, 2 * 4 * parameter.numel())
    return {"moments": moments, "counts": counts, "step": step}


def _tables(model: nn.Module) -> list[Tensor]:
    """The weights of all tables that a routed model's sites hold, each once."""
    inner: Any = model
    if hasattr(inner, "get_base_model"):  # of peft
        inner = inner.get_base_model()
    entries = (getattr(inner.routing_plan, field.name) for field in dataclasses.fields(inner.routing_plan))
    found: dict[int, Tensor] = {}
    for sites in itertools.chain.from_iterable(map(_sites_in, entries)):
        found |= {id(table): table.weights for table in sites.tables.values()}
    return list(found.values())


def _sites_in(entry: Any) -> list[Sites]:
    """The sites of one entry of a resolved plan."""
    each = (
        entry.values() if isinstance(entry, dict) else entry if isinstance(entry, (list, tuple)) else [entry]
    )
    return [sites for sites in each if isinstance(sites, Sites)]
