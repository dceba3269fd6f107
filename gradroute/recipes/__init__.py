"""Recipes: from a pretrained model and texts to a report, in stages that are skipped when done and resumed when killed.

    python -m gradroute.recipes unlearn --config unlearn.yaml --out runs/first

`unlearn` takes out what some texts teach (Expand, Route, Ablate, or SGTM), `localize` confines it to a dimension or a
block of units, `adapters` gives each route its own LoRA. From Python, `run` does the same; `plan` says what memory a
config takes. Needs the extra `recipes`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .names import RECIPES

__all__ = ["RECIPES", "plan", "run"]


def run(
    name: str,
    config: str | Path | Mapping[str, Any] | None,
    out: str | Path,
    *,
    settings: Iterable[str] = (),
    only: str | None = None,
    until: str | None = None,
) -> dict[str, Any]:
    """Runs a recipe, and what of it is not done yet.

    Args:
        name: unlearn, localize or adapters.
        config: a YAML or JSON file, or a mapping; see docs/recipes.md. None: `settings` alone.
        out: the run's folder; a second run there skips what is done with the same config and inputs.
        settings: `key.sub=value` each, on top of the config.
        only: the one stage that is run; those that it stands on must be done.
        until: the last stage that is run.

    Returns:
        Stage → its figures, of all stages that are done now.

    Raises:
        ConfigError: (a ValueError) the config is wrong; nothing was loaded or changed.
        ValueError: an unknown recipe or stage; `only` where an earlier stage is not done; a folder of another recipe.
        RunInUse: (a RuntimeError) another process runs in this folder.
    """
    from .running import run as run_stages

    return run_stages(name, config, Path(out), settings=settings, only=only, until=until)


def plan(config: str | Path | Mapping[str, Any] | None, settings: Iterable[str] = ()) -> dict[str, Any]:
    """The memory that a config's training takes: a step is simulated with tensors that have none; nothing is loaded.

    Args:
        config: a YAML or JSON file, or a mapping: a recipe's config, or the sections `model`, `routes`, `expand`,
            `route`, `adapters`, `train` and `memory` alone. None: `settings` alone.
        settings: `key.sub=value` each, on top of the config.

    Returns:
        Plain values, in bytes: `model`, `settings`, `static` (what is held at every moment), `lengths` (for each
        length of rows its batches, with activations, logits, what routing adds, and the peak on so many GPUs),
        `gpu` and `assumptions`.

    Raises:
        ConfigError: (a ValueError) a key or value that cannot be meant, an unknown model, or a plan that it cannot
            take.
    """
    from .planning import plan as of_config

    return of_config(config, settings)
