"""The stage `report`: the figures of all stages on one page."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from ...version import __version__
from ..config import to_yaml
from ..stages import Context, Made, Stage
from .page import PARTS, write


def run(context: Context) -> Mapping[str, Any]:
    """Writes report.html and report.json into the run's folder."""
    results = collected(context)
    for folder in (context.folder, context.out):
        write(folder, results)
    return {"files": ["report.html", "report.json"]}


def collected(context: Context) -> dict[str, Any]:
    """The parts of a report that a run's stages have made."""
    made = context.inputs
    evaluated = made["evaluate"].figures if "evaluate" in made else {}
    results: dict[str, Any] = {name: value for name, value in evaluated.items() if name in PARTS}
    curves: dict[str, Any] = {}
    if "train" in made:
        curves["train"] = made["train"].figures.get("curve") or []
    if "relearning" in made:
        curves["relearning"] = made["relearning"].figures.get("curves") or {}
    if "steer" in made:
        results["steering"] = dict(made["steer"].figures)
    settings = context.config.evaluate
    how = (
        f"Tokens are drawn, seed {context.config.seed}."
        if settings.sample
        else "The likeliest token is taken."
    )
    results |= {
        "recipe": context.recipe,
        "title": context.config.report.title,
        "config": to_yaml(context.config),
        "command": " ".join(["python -m gradroute.recipes", *sys.argv[1:]]),
        "versions": _versions(),
        "stages": [_stage(name, one) for name, one in made.items()],
        "curves": curves,
        "generation_settings": how,
        "missing": _missing(context),
    }
    return results


def _stage(name: str, made: Made) -> dict[str, Any]:
    seconds, skipped = getattr(made, "seconds", None), getattr(made, "skipped", False)
    return {"name": name, "seconds": seconds, "skipped": skipped, "figures": dict(made.figures)}


def _missing(context: Context) -> dict[str, str]:
    missing = {}
    if "evaluate" not in context.inputs:
        missing["losses, generations, differences"] = "the stage evaluate has not run"
    if "relearning" not in context.inputs:
        missing["relearning"] = "relearning.steps is 0, or the recipe has no attack"
    if not context.config.evaluate.tasks:
        missing["tasks of lm-evaluation-harness"] = "evaluate.tasks names none"
    return missing


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "gradroute": __version__}
    for name in ("torch", "transformers"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


STAGE = Stage(
    "report",
    run,
    reads=("model", "routes", "evaluate", "report"),
    after=("*",),
)
