"""The packages that recipes need beside gradroute's own: refused before anything is loaded where one is missing."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Any

from .reading import ConfigError

#: Module → the extra or project that brings it.
RECIPES = dict.fromkeys(("yaml", "tqdm", "datasets", "transformers", "accelerate"), "gradroute[recipes]")

#: What `report_to` of TrainingArguments names → the module that it needs, and the project with that module.
_TRACKERS = {"tensorboard": ("tensorboard", "tensorboard"), "wandb": ("wandb", "wandb")}


def missing(modules: Iterable[str]) -> list[str]:
    """Those of some top-level modules that are not installed; nothing is imported."""
    return [name for name in modules if importlib.util.find_spec(name) is None]


def check_recipes() -> None:
    """Raises ConfigError where a package that every recipe needs is not installed."""
    if names := missing(RECIPES):
        raise ConfigError(
            f"gradroute.recipes: got an environment without {', '.join(names)}, "
            "expected the extra recipes: pip install 'gradroute[recipes]'"
        )


def check_module(key: str, value: Any, module: str, project: str) -> None:
    """Raises ConfigError where what a key asks for needs a module that is not installed."""
    if missing([module]):
        raise ConfigError.of(key, value, f"{module} to be installed, which it needs: pip install '{project}'")


def check_trackers(key: str, value: Any) -> None:
    """Raises ConfigError where a `report_to` of TrainingArguments names a tracker that is not installed."""
    for name in [value] if isinstance(value, str) else value if isinstance(value, (list, tuple)) else []:
        if name in _TRACKERS:
            check_module(key, name, *_TRACKERS[name])
