"""The config of a recipe: read from YAML, JSON, a mapping and `--set`, checked as a whole before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import sections, training_sections
from .checks import check
from .files import absolute, located
from .needs import check_recipes
from .plain_yaml import dump, parse
from .reading import ConfigError, option, read, rebased, shown, written

__all__ = ["Config", "ConfigError", "load", "to_yaml"]


@dataclass(frozen=True)
class Config:
    """All that a recipe is told, a section a stage.

    `python -m gradroute.recipes keys` lists every key. The index of a route in `routes` is its id; route 0 is the base.
    """

    model: sections.Model = option(meaning="the model that the recipe begins with")
    data: sections.Data = option(meaning="texts to tokenised documents")
    routes: tuple[str, ...] = option(("retain", "forget"), "names of the routes; the first is the base route")
    seed: int = option(0, "of everything that is drawn", at_least=0, at_most=2**32 - 1)
    labels: sections.Labels = option(sections.Labels, "documents to a route for every token")
    expand: training_sections.Expand = option(training_sections.Expand, "units and heads that are added")
    route: training_sections.Route = option(training_sections.Route, "the plan")
    adapters: training_sections.Adapters = option(training_sections.Adapters, "of the recipe adapters")
    train: training_sections.Train = option(training_sections.Train, "training")
    ablate: training_sections.Ablate = option(
        training_sections.Ablate, "taking out what the routed texts have trained"
    )
    steer: training_sections.Steer = option(training_sections.Steer, "of the recipe localize")
    coherence: training_sections.Coherence = option(
        training_sections.Coherence, "fine-tuning on retained texts afterwards"
    )
    baselines: training_sections.Baselines = option(training_sections.Baselines, "what it is compared with")
    relearning: training_sections.Relearning = option(training_sections.Relearning, "the attack")
    evaluate: sections.Evaluate = option(sections.Evaluate, "losses, generations, differences, tasks")
    report: sections.Report = option(sections.Report, "the page")


def load(config: str | Path | Mapping[str, Any] | None, settings: Iterable[str] = ()) -> Config:
    """The config of a file or a mapping, with settings on top, checked as a whole.

    Nothing of the model or the data is read, but every path in the config must exist.

    Args:
        config: a YAML or JSON file, also one in an installed package as `package:NAME/FILE`, or plain values; None:
            settings alone. Relative paths in a file start at its
            folder, those in a mapping and in settings at the current one.
        settings: `key.sub=value` each, the value in YAML; later ones win.

    Raises:
        ConfigError: an unknown or missing key, a value that cannot be meant, a path that is not there.
    """
    if config is not None and not isinstance(config, (str, Path, Mapping)):
        raise ConfigError.of("config", config, "a YAML or JSON file, a mapping, or None")
    check_recipes()
    if config is None or isinstance(config, Mapping):
        values, folder = dict(config or {}), Path.cwd()
    else:
        file = file_of(config)
        values, folder = read_file(file), file.resolve().parent
    values = rebased(Config, values, lambda path: absolute(path, folder))
    for setting in settings:
        values = with_setting(values, setting)
    made = read(Config, values)
    check(made)
    return made


def file_of(config: str | Path) -> Path:
    """The file of a config, which may be in an installed package."""
    try:
        return located(str(config))
    except FileNotFoundError as error:
        raise ConfigError(f"config: got {str(config)!r}, expected a YAML or JSON file ({error})") from None


def read_file(path: Path) -> dict[str, Any]:
    """The plain values of a YAML or JSON file.

    Raises:
        ConfigError: no such file, text that is neither, a key that stands there twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {path}: got no text, expected a YAML or JSON file ({error})") from None
    values = _parsed(text, f"config {path}")
    if not isinstance(values, dict):
        raise ConfigError.of(f"config {path}", values, "a mapping")
    return values


def to_yaml(config: Config) -> str:
    """The whole config in YAML, with every default written out; `load` reads it again."""
    return dump(written(config))


def with_setting(values: dict[str, Any], setting: str) -> dict[str, Any]:
    """Plain values with one more setting, `key.sub=value`."""
    key, equals, text = setting.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise ConfigError(f"--set: got {setting!r}, expected key.sub=value")
    value = _parsed(text, f"--set {key}")
    for name in reversed(names):
        value = {name: value}
    moved = rebased(Config, value, lambda path: absolute(path, Path.cwd()))
    made = target = dict(values)
    for name in names[:-1]:
        inner = target.get(name)
        if inner is not None and not isinstance(inner, Mapping):
            raise ConfigError(
                f"--set {key}: got {setting!r}, expected a key below a mapping; {name} is {inner!r}"
            )
        target[name] = dict(inner or {})
        target, moved = target[name], moved[name]
    target[names[-1]] = moved[names[-1]]
    return made


def _parsed(text: str, where: str) -> Any:
    """YAML or JSON as plain values."""
    try:
        return parse(text)
    except ValueError as error:
        raise ConfigError(f"{where}: got {shown(text)}, expected YAML ({error})") from None
