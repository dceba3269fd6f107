"""From simulated steps to what a config takes on a number of GPUs, and the largest batch that fits."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any

from ..training_sections import Expand
from .sections import PlanConfig
from .simulation import Simulation, Static, Timeline

# Two numbers of rows through which a timeline's line is drawn: with one row, some operations take another way.
ROWS = (2, 3)
MOST_ROWS = 1 << 14

ASSUMPTIONS = (
    "gradients are freed between steps, as Trainer does, so they overlap activations in the backward alone; the "
    "optimizer is fused and has no temporaries of a parameter's size, but for states of 8bit: both moments of one "
    "parameter in fp32",
    "attention is a fused kernel, which keeps no matrix of scores; kernels' own scratch memory is not seen, and is in "
    "the reserve with the driver, fragments and the network's buffers",
    "several GPUs share parameters, gradients and optimizer state by FSDP2, a decoder layer a group: two layers are "
    "gathered at once, with their whole gradients, and what is outside of layers stays gathered; rows are per GPU",
    "with bf16 under FSDP2, gathered parameters are bf16; on one GPU autocast keeps a bf16 copy of every weight",
)


@dataclasses.dataclass(frozen=True)
class Steps:
    """A model's steps of one length, for any number of rows.

    Attributes:
        static: what the model holds at every moment.
        two: the timeline of ROWS[0] rows.
        three: that of ROWS[1].
        simulate: makes the timeline of other numbers of rows, where those two do not align.
    """

    static: Static
    two: Timeline
    three: Timeline
    simulate: Callable[[int], Timeline]

    @classmethod
    def of(cls, simulation: Simulation, length: int) -> Steps:
        """Both timelines of a simulated model."""
        two, three = (simulation.step(rows, length) for rows in ROWS)
        return cls(simulation.static, two, three, lambda rows: simulation.step(rows, length))

    def timeline(self, rows: int) -> Timeline:
        """The timeline of a number of rows."""
        found = self.two.at(self.three, *ROWS, rows)
        return self.simulate(rows) if found is None else found

    def peak(self, rows: int, gpus: int) -> int:
        """The peak on each of so many GPUs, in bytes.

        Args:
            rows: rows on one GPU.
            gpus: how many share the model.
        """
        static, timeline = self.static, self.timeline(rows)
        state = (static.parameters + static.moments + static.counts) / gpus + static.buffers + static.tables
        step = (static.gradients + static.step) / gpus
        # Whole parameters and whole gradients of what is gathered.
        gathered = 2 * (static.outside + 2 * static.largest_layer) if gpus > 1 else 0
        return round(state + max(timeline.peak(gpus) + gathered, step))


def estimate(config: PlanConfig) -> dict[str, Any]:
    """The memory of a config, in bytes, as plain values.

    Raises:
        gradroute.recipes.config.ConfigError: transformers knows no such model, or the plan does not fit it.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        return _estimate(config)


def _estimate(config: PlanConfig) -> dict[str, Any]:
    memory = config.memory
    lengths = memory.lengths or (config.train.batch_tokens,)
    model = Simulation(config, routed=memory.routed)
    unexpanded = Expand(units=0) if memory.routed else config.expand
    plain = Simulation(dataclasses.replace(config, expand=unexpanded), routed=False)
    cast = _cast(config)
    shared = model if cast is None or max(memory.gpus) == 1 else Simulation(cast, routed=memory.routed)
    inner = model.model.get_base_model() if hasattr(model.model, "get_base_model") else model.model
    return {
        "model": {
            "class": type(inner).__name__.removeprefix("Routed"),
            "parameters": model.static.count,
            "trainable": model.static.trainable,
        },
        "settings": _settings(config),
        "static": dataclasses.asdict(model.static),
        "lengths": [_of_length(config, length, model, plain, shared) for length in lengths],
        "gpu": {"bytes": round(memory.gpu_gb * 1e9), "reserve": memory.reserve},
        "assumptions": list(ASSUMPTIONS),
    }


def _cast(config: PlanConfig) -> PlanConfig | None:
    """The config whose model FSDP2 gathers: in the dtype of products, where that is narrower than the parameters."""
    if config.model.dtype != "float32" or config.train.precision == "fp32":
        return None
    dtype = {"bf16": "bfloat16", "fp16": "float16"}[config.train.precision]
    return dataclasses.replace(config, model=dataclasses.replace(config.model, dtype=dtype))  # type: ignore[arg-type]


def _settings(config: PlanConfig) -> dict[str, Any]:
    return {
        "dtype": config.model.dtype,
        "precision": config.train.precision,
        "optimizer": config.train.optimizer if config.memory.routed else "adamw",
        "states": config.train.states if config.memory.routed else "same",
        "activation_checkpointing": config.train.activation_checkpointing,
        "routed": config.memory.routed,
    }


def _of_length(
    config: PlanConfig, length: int, model: Simulation, plain: Simulation, shared: Simulation
) -> dict[str, Any]:
    """Every batch of rows of one length, on every number of GPUs."""
    memory = config.memory
    steps, unrouted = Steps.of(model, length), Steps.of(plain, length)
    sharded = steps if shared is model else Steps.of(shared, length)
    if shared is not model:  # the state is that of the fp32 parameters, which FSDP2 keeps
        sharded = dataclasses.replace(
            sharded,
            static=dataclasses.replace(
                steps.static, outside=sharded.static.outside, largest_layer=sharded.static.largest_layer
            ),
        )
    usable = memory.gpu_gb * 1e9 * (1 - memory.reserve)

    def peak(rows: int, gpus: int) -> int:
        return (steps if gpus == 1 else sharded).peak(rows, gpus)

    def fits(rows: int, gpus: int) -> bool:
        return peak(rows, gpus) <= usable

    def batch(rows: int) -> dict[str, Any]:
        timeline = steps.timeline(rows)
        return {
            "rows": rows,
            "activations": timeline.held,
            "logits": int(timeline.logits.max()),
            "peak_of_step": timeline.peak(),
            "routing_adds": steps.peak(rows, 1) - unrouted.peak(rows, 1),
            "gpus": [{"gpus": n, "peak": peak(rows, n), "fits": fits(rows, n)} for n in memory.gpus],
        }

    return {
        "length": length,
        "batches": [batch(rows) for rows in memory.batches],
        "largest": [{"gpus": n, "rows": largest(functools.partial(fits, gpus=n))} for n in memory.gpus],
    }


def largest(fits: Callable[[int], bool]) -> int:
    """The largest number of rows that fits; 0: not even one does."""
    low, high = 0, 1
    while high <= MOST_ROWS and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
