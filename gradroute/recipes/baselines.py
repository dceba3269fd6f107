"""What unlearning by routing is compared with: filtering, gradient ascent, RMU."""

from __future__ import annotations

import dataclasses
import functools
import os
from typing import Any

from .batches import PairedBatches, Rows
from .sharding import refuse_shards
from .training import Model, collator, count_of, train, training_arguments
from .training_sections import RMU, GradientAscent, Train

#: Why RMU is not trained under FSDP2, a clause of an error.
WHY_NO_SHARDS = "rmu puts frozen weights into the model for a forward, which FSDP2 would overwrite"


def filtering(
    model: Model,
    retain: Rows,
    settings: Train,
    folder: str | os.PathLike[str],
    *,
    seed: int = 0,
    save_to: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """The same training without the documents to forget: what data filtering does for a pretrained model.

    Args and returns: see `gradroute.recipes.training.train`.
    """
    return train(model, retain, settings, folder, seed=seed, save_to=save_to)


def gradient_ascent(
    model: Model,
    forget: Rows,
    retain: Rows,
    settings: Train,
    options: GradientAscent,
    folder: str | os.PathLike[str],
    *,
    seed: int = 0,
    save_to: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Gradient ascent on what is forgotten, beside descent on what is retained (Maini et al. 2024, arXiv 2401.06121).

    The loss is retain_weight times the retain loss, minus the forget loss, both means of a batch of half the tokens
    each. Ascent has no end by itself: a batch whose forget loss is beyond `options.most` adds no forget gradient.

    Args:
        model: an ordinary model, changed in place.
        forget: documents with `input_ids`.
        retain: documents with `input_ids`.
        settings: how it is trained.
        options: the method's own settings.
        folder: for checkpoints, see `gradroute.recipes.training.train`.
        seed: the seed of the order of documents.
        save_to: a folder to save the model in.

    Returns:
        What `train` does; the curve's loss is the difference.
    """
    from .unlearning_trainers import GradientAscentTrainer

    settings = with_own(settings, options)
    return train(
        model,
        None,
        settings,
        folder,
        seed=seed,
        save_to=save_to,
        make=functools.partial(GradientAscentTrainer, options=options),
        batches=_paired(model, forget, retain, settings, folder, seed),
    )


def rmu(
    model: Model,
    forget: Rows,
    retain: Rows,
    settings: Train,
    options: RMU,
    folder: str | os.PathLike[str],
    *,
    seed: int = 0,
    save_to: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Representation misdirection for unlearning (RMU; Li et al. 2024, arXiv 2403.03218, section 4).

    At the output h of a layer, forget tokens are steered to one random direction c u, and retain tokens stay where the
    frozen model has them: the loss is mean |h - c u|² over forget tokens and α mean |h - h_frozen|² over retain
    tokens. Only the output weights of the MLPs of that layer and the two before are trained, as in the authors' code;
    copies of these alone stand for the frozen model, so that there are never two models.

    Args:
        model: an ordinary model of an architecture that `gradroute.models.route` takes, changed in place.
        forget: documents with `input_ids`.
        retain: documents with `input_ids`.
        settings: how it is trained.
        options: the method's own settings.
        folder: for checkpoints, see `gradroute.recipes.training.train`.
        seed: the seed of the order of documents, and of the direction.
        save_to: a folder to save the model in.

    Returns:
        What `train` does, and "layer" and "coefficient".

    Raises:
        ConfigError: `settings.arguments` ask for FSDP.
        ValueError: the model has no such layer.
    """
    from .unlearning_trainers import Misdirection, RMUTrainer

    refuse_shards(settings.arguments, "baselines.names", ["rmu"], WHY_NO_SHARDS)
    settings = with_own(settings, options)
    batches = _paired(model, forget, retain, settings, folder, seed)
    frozen = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    first = dataclasses.replace(collator(model, settings, False), routed=True)([batches[0]])
    misdirection = Misdirection.of(model, options, seed, first)
    try:
        result = train(
            model,
            None,
            settings,
            folder,
            seed=seed,
            save_to=save_to,
            make=functools.partial(RMUTrainer, misdirection=misdirection),
            batches=batches,
        )
    finally:
        misdirection.remove()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(frozen[name])
    return {**result, "layer": misdirection.layer, "coefficient": misdirection.coefficient}


def with_own(settings: Train, options: GradientAscent | RMU) -> Train:
    """The settings of a training, with the steps and the learning rate that a baseline has of its own."""
    own = {name: getattr(options, name) for name in ("steps", "learning_rate")}
    return dataclasses.replace(settings, **{name: value for name, value in own.items() if value is not None})


def _paired(
    model: Model, forget: Rows, retain: Rows, settings: Train, folder: str | os.PathLike[str], seed: int
) -> PairedBatches:
    processes = training_arguments(settings, folder, model, seed).world_size
    return PairedBatches(
        forget,
        retain,
        tokens=settings.batch_tokens,
        count=count_of(settings, processes),
        seed=seed,
        packed=settings.packed,
    )
