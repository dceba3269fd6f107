"""Stages that recipes have in common: base, coherence, baselines, relearning."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import baselines, checkpoints, models, selection
from .evaluation.stage import checkpoints as all_checkpoints
from .reading import ConfigError
from .relearning import held_out_losses, relearn, settings_of
from .sharding import check_run, refuse_shards
from .stages import Context, Stage
from .training import train
from .training_sections import Train

if TYPE_CHECKING:
    from .config import Config

Figures = Mapping[str, Any]

_CHECKPOINTS = "checkpoints"


def rows(context: Context, split: str) -> Any:
    """The labelled documents of a split, "train" or "heldout"."""
    import datasets

    return datasets.load_from_disk(str(context.inputs["labels"].folder / split))


def trained(
    context: Context, fit: Callable[..., dict[str, Any]], *arguments: Any, **options: Any
) -> dict[str, Any]:
    """Calls a function that trains with the stage's folders, and puts the tokenizer beside the stage's model.

    The options are the function's; `save_to` is by default the stage's model.
    """
    scratch = context.folder / _CHECKPOINTS
    options = {"seed": context.config.seed, "save_to": checkpoints.target(context), **options}
    figures = fit(*arguments, scratch, **options)
    checkpoints.add_tokenizer(context)
    if context.is_first:
        shutil.rmtree(scratch, ignore_errors=True)
    return figures


def parameters(model: Any) -> int:
    """How many parameters a model has; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _base(context: Context) -> Figures:
    settings = context.config.model
    model = models.of(settings)
    models.save(model, models.tokenizer_of(settings), checkpoints.target(context))
    return {"parameters": parameters(model)}


def _coherence(context: Context) -> Figures:
    config, settings = context.config, context.config.coherence
    model = checkpoints.load(context, context.inputs["ablate"].folder / "model")
    retain = selection.retained(rows(context, "train"), settings.sources, "coherence.sources")
    rate = settings.learning_rate or config.train.learning_rate
    how = dataclasses.replace(config.train, steps=settings.steps, learning_rate=rate)
    return trained(context, train, model, retain, how)


def _baseline(name: str) -> Callable[[Context], Figures]:
    def run(context: Context) -> Figures:
        settings = context.config.baselines
        model = checkpoints.load(context, checkpoints.base(context))
        all_rows = rows(context, "train")
        retain = selection.retained(all_rows, settings.retain, "baselines.retain")
        how: Train = context.config.train
        if name == "filtering":
            return trained(context, baselines.filtering, model, retain, how)
        forget = selection.forgotten(all_rows, settings.forget, "baselines.forget")
        fit = baselines.gradient_ascent if name == "gradient_ascent" else baselines.rmu
        return trained(context, fit, model, forget, retain, how, getattr(settings, name))

    return run


def _relearning(context: Context) -> Figures:
    """The curve of every checkpoint that unlearnt; one that is there already is kept."""
    attack, seed = context.config.relearning, context.config.seed
    attacked = {
        name: folder for name, folder in all_checkpoints(context).items() if name not in ("base", "trained")
    }
    if "coherent" in attacked:
        del attacked["unlearnt"]
    forget = selection.forgotten(rows(context, "train"), attack.sources, "relearning.sources")
    chosen = selection.drawn(forget, attack.documents, seed)
    how = settings_of(context.config.train, attack)
    measure = held_out_losses(
        selection.most_of_each(rows(context, "heldout"), attack.heldout), how.batch_tokens
    )
    curves: dict[str, Any] = {}
    for name, folder in attacked.items():
        kept = context.folder / f"{name}.json"
        if not kept.exists():
            model = checkpoints.load(context, folder)
            scratch = context.folder / _CHECKPOINTS
            curve = relearn(model, chosen, how, scratch, measure=measure, every=attack.every, seed=seed)
            del model
            _write(context, kept, curve)
        curves[name] = json.loads(kept.read_text()) if context.is_first else None
    return {"curves": curves, "documents": len(chosen)}


def _write(context: Context, path: Path, value: Any) -> None:
    """Writes JSON at once or not at all, by the first process."""
    if context.is_first:
        shutil.rmtree(context.folder / _CHECKPOINTS, ignore_errors=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(value))
        part.replace(path)


BASE = Stage("base", _base, reads=("model",), wanted=checkpoints.is_converted)

COHERENCE = Stage(
    "coherence",
    _coherence,
    reads=("model", "train", "coherence", "seed"),
    after=("base", "labels", "ablate"),
    resumable=True,
    everywhere=True,
    wanted=lambda config: config.coherence.steps > 0,
    fits=check_run,
)


def _wants(name: str) -> Callable[[Config], bool]:
    return lambda config: name in config.baselines.names


def _check_rmu(config: Config) -> None:
    refuse_shards(
        config.train.arguments, "baselines.names", list(config.baselines.names), baselines.WHY_NO_SHARDS
    )


BASELINES = tuple(
    Stage(
        name,
        _baseline(name),
        reads=("model", "train", "baselines", "seed"),
        after=("base", "labels"),
        resumable=True,
        everywhere=True,
        wanted=_wants(name),
        check=_check_rmu if name == "rmu" else lambda config: None,
        fits=check_run,
    )
    for name in ("filtering", "gradient_ascent", "rmu")
)

RELEARNING = Stage(
    "relearning",
    _relearning,
    reads=("model", "train", "relearning", "seed"),
    after=("base", "labels", "ablate", "coherence", "filtering", "gradient_ascent", "rmu"),
    resumable=True,
    everywhere=True,
    wanted=lambda config: config.relearning.steps > 0,
    fits=check_run,
)

#: The sections that only some recipes read.
_OF_SOME = ("expand", "route", "adapters", "ablate", "steer", "coherence", "baselines", "relearning")


def refuse_unread(config: Config, recipe: str, read: tuple[str, ...]) -> None:
    """Raises ConfigError where a section is set that a recipe does not read."""
    for name in _OF_SOME:
        section = getattr(config, name)
        if name not in read and section != type(section)():
            raise ConfigError(f"{name}: got settings, expected none, because {recipe} does not read them")
