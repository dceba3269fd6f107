"""The key of a stage: a hash of everything that its result depends on, and the parts of it by name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..version import __version__
from . import files
from .config import Config
from .reading import leaves, shown
from .stages import Stage


@dataclass(frozen=True)
class Key:
    """What a stage's result depends on.

    Attributes:
        parts: name → plain value: `recipe`, `gradroute` (the version), every key of the config that the stage reads,
            `stage NAME` (the key of a stage that it stands on). Of a path, the value is a hash of what is there.
    """

    parts: Mapping[str, Any]

    @property
    def hash(self) -> str:
        """The SHA-256 of the parts, in hexadecimal."""
        return hashlib.sha256(json.dumps(self.parts, sort_keys=True).encode()).hexdigest()

    def changes(self, before: Mapping[str, Any]) -> list[str]:
        """What is different from other parts, in words."""
        names = [*before, *(name for name in self.parts if name not in before)]
        return [
            _change(name, before, self.parts)
            for name in names
            if before.get(name, names) != self.parts.get(name, names)
        ]


def keys_of(recipe: str, stages: Iterable[Stage], config: Config) -> dict[str, Key]:
    """The key of every stage, in their order. The files that the config names are read."""
    digests: dict[str, str] = {}
    keys: dict[str, Key] = {}
    for stage in stages:
        parts: dict[str, Any] = {"recipe": recipe, "stage": stage.name, "gradroute": __version__}
        for name in stage.reads:
            for key, value, metadata in _leaves_of(config, name):
                if metadata.get("path") and value is not None:
                    if value not in digests:
                        digests[value] = files.digest(value)
                    value = f"contents {digests[value]}"
                parts[key] = value
        for name in stage.after:
            parts[f"stage {name}"] = keys[name].hash
        keys[stage.name] = Key(parts)
    return keys


def _leaves_of(config: Config, name: str) -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """The values of a section, or one value, by its dotted key, with the metadata of their fields."""
    top = name.partition(".")[0]
    for key, value, metadata in leaves(getattr(config, top), top):
        if key == name or key.startswith(f"{name}."):
            yield key, value, metadata


def _change(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """One difference in words: the values of settings, but of contents and stages only that they changed."""
    values = [parts[name] for parts in (before, now) if name in parts]
    if name.startswith("stage ") or any(str(value).startswith("contents ") for value in values):
        return f"{name} changed"
    old, new = (shown(parts[name], 30) if name in parts else "nothing" for parts in (before, now))
    return f"{name}: {old} → {new}"
