"""The relearning attack: an unlearnt model is trained on a few documents, and its held-out losses are followed."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

from .batches import Batches, Rows
from .training import Model, batches_of, train, training_arguments
from .training_sections import Relearning, Train

#: The held-out losses of a model, nats a token by name.
Measure = Callable[[Model], Mapping[str, float | None]]


def relearn(
    model: Model,
    rows: Rows,
    settings: Train,
    folder: str | os.PathLike[str],
    *,
    measure: Measure,
    every: int,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Trains an ordinary model on few documents, and measures it before, every so many steps, and at the end.

    Args:
        model: an ordinary model, changed in place.
        rows: the documents, with `input_ids`.
        settings: how it is trained.
        folder: for what Trainer writes.
        measure: the held-out losses of the model by name, such as `held_out_losses` gives.
        every: steps between two measurements.
        seed: the seed of the order of documents.

    Returns:
        The curve: "step", "tokens" (trained on so far) and "loss", what `measure` returned.
    """
    from transformers import TrainerCallback

    processes = training_arguments(settings, folder, model, seed).world_size
    batches = batches_of(rows, settings, seed, processes)
    a_step = settings.accumulation * processes
    curve: list[dict[str, Any]] = []

    def add(step: int) -> None:
        curve.append({"step": step, "tokens": _tokens(batches, step * a_step), "loss": dict(measure(model))})

    class Measuring(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            add(0)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % every == 0 or state.global_step == settings.steps:
                add(state.global_step)

    train(model, None, settings, folder, seed=seed, callbacks=[Measuring()], batches=batches)
    return curve


def _tokens(batches: Batches, count: int) -> int:
    """The tokens of the first batches."""
    return sum(piece.end - piece.start for group in batches.groups[:count] for piece in group)


def held_out_losses(heldout: Rows, batch_tokens: int) -> Measure:
    """A measure: the loss of every source's held-out documents."""
    from .evaluation import losses

    def measure(model: Model) -> dict[str, float | None]:
        return {name: of["loss"] for name, of in losses(model, heldout, batch_tokens=batch_tokens).items()}

    return measure


def settings_of(train_settings: Train, attack: Relearning) -> Train:
    """How the attack trains: as `train` does, with its own steps, learning rate and batches, without checkpoints."""
    own: dict[str, Any] = {"learning_rate": attack.learning_rate, "batch_tokens": attack.batch_tokens}
    return dataclasses.replace(
        train_settings,
        steps=attack.steps,
        save_every=0,
        **{name: value for name, value in own.items() if value is not None},
    )
