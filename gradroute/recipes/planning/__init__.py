"""The memory that training takes, from a config alone: `python -m gradroute.recipes plan --config FILE`.

A step is run under a FakeTensorMode, where tensors have shapes and no memory, and what every operation allocates and
frees is added up. Nothing is loaded, and no weight has a value.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .sections import Memory, PlanConfig, load

__all__ = ["Memory", "PlanConfig", "load", "plan"]


def plan(config: str | Path | Mapping[str, Any] | None, settings: Iterable[str] = ()) -> dict[str, Any]:
    """See `gradroute.recipes.plan`."""
    from .estimate import estimate

    return estimate(load(config, settings))
