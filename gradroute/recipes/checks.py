"""What no key of a config says alone: names that refer to others, settings that go together, files that exist."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any

from .files import matched
from .reading import ConfigError, leaves, nearest

if TYPE_CHECKING:
    from .config import Config
    from .sections import Labels, Source

_NAME = re.compile(r"[A-Za-z0-9_-]+")

# Which key of `labels` belongs to which way of labelling.
_OF_WAY = {"words": "words", "patterns": "regex"}


def check(config: Config) -> None:
    """Raises ConfigError where parts of a config contradict each other, or a path is not there."""
    check_paths(config)
    _check_routes(config)
    for name, source in config.data.sources.items():
        _check_source(f"data.sources.{name}", name, source)
    _check_labels(config)
    for key, names in (
        ("labels.sources", config.labels.sources),
        ("coherence.sources", config.coherence.sources if config.coherence.steps else ()),
        ("relearning.sources", config.relearning.sources if config.relearning.steps else ()),
        ("baselines.retain", config.baselines.retain),
        ("baselines.forget", config.baselines.forget),
    ):
        _check_known(key, names, config.data.sources, "a name of data.sources")


def check_paths(section: Any, key: str = "") -> None:
    """Raises ConfigError where a path option below a section names no file."""
    for own, value, metadata in leaves(section, key):
        if metadata.get("path") and value is not None:
            try:
                found = matched(value)
            except FileNotFoundError as error:
                raise ConfigError.of(own, value, f"a path that exists; {error}") from None
            if not found:
                raise ConfigError.of(own, value, "a path that exists")


def _check_routes(config: Config) -> None:
    routes = config.routes
    if len(routes) < 2 or len(set(routes)) < len(routes):
        raise ConfigError.of("routes", list(routes), "at least two different names")
    for index, name in enumerate(routes):
        if not _NAME.fullmatch(name):
            raise ConfigError.of(f"routes[{index}]", name, "letters, digits, - and _")


def _check_source(key: str, name: str, source: Source) -> None:
    if not _NAME.fullmatch(name):
        raise ConfigError.of("data.sources", name, "names of letters, digits, - and _")
    if source.format not in ("text", "auto") and source.split != "file":
        raise ConfigError.of(f"{key}.split", source.split, f"file, because the format is {source.format}")
    if source.split not in ("characters", "paragraphs") and source.characters != type(source).characters:
        expected = "nothing, unless split is characters or paragraphs"
        raise ConfigError.of(f"{key}.characters", source.characters, expected)


def _check_labels(config: Config) -> None:
    labels, routes = config.labels, config.routes
    named: Iterable[tuple[str, str]] = [
        *((f"labels.routes.{name}", route) for name, route in labels.routes.items()),
        *(("labels.words", route) for route in labels.words),
        *(("labels.patterns", route) for route in labels.patterns),
        *([("labels.unlabelled", labels.unlabelled)] if labels.unlabelled is not None else []),
        *([("labels.frequency.route", labels.frequency.route)] if labels.frequency.route is not None else []),
        *([("labels.errors.route", labels.errors.route)] if labels.errors.route is not None else []),
    ]
    for key, route in named:
        _check_known(key, [route], routes, "a name of routes")
    _check_way(labels)
    for key, soft in (("errors", labels.errors.route), ("frequency", labels.frequency.route)):
        if soft == routes[0]:
            raise ConfigError.of(f"labels.{key}.route", soft, "another route than the base route")
    if labels.share == 1 and labels.unlabelled is not None:
        raise ConfigError.of("labels.unlabelled", labels.unlabelled, "null, because labels.share is 1")
    rates = (labels.errors.false_negative, labels.errors.false_positive)
    if labels.by in ("words", "regex") and any(rates) and labels.errors.of == "documents":
        raise ConfigError.of("labels.errors.of", "documents", f"tokens, because labels.by is {labels.by}")
    if labels.by == "source":
        _check_known("labels.routes", labels.routes, [*config.data.sources, "*"], "a name of data.sources")
        for name in config.data.sources:
            if name not in labels.routes and name not in routes and "*" not in labels.routes:
                raise ConfigError.of(
                    "labels.routes",
                    dict(labels.routes),
                    f"a route for the source {name}, or for * (all others)",
                )
    if labels.by == "column":
        for name, source in config.data.sources.items():
            if source.label is None:
                raise ConfigError.of(
                    f"data.sources.{name}.label", None, "a column, because labels.by is column"
                )
    if labels.by == "frequency":
        _check_frequency(config)
    for route, words in labels.words.items():
        if not words or not all(word.strip() for word in words):
            raise ConfigError.of(f"labels.words.{route}", list(words), "at least one word, and no empty one")
    for route, pattern in labels.patterns.items():
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError.of(
                f"labels.patterns.{route}", pattern, f"a regular expression ({error})"
            ) from None


def _check_way(labels: Labels) -> None:
    """Keys of ways of labelling that were not chosen would be ignored; so they are refused."""
    for key, way in _OF_WAY.items():
        given = getattr(labels, key)
        if labels.by == way and not given:
            raise ConfigError.of(f"labels.{key}", given, f"at least one route, because labels.by is {way}")
        if labels.by != way and given:
            raise ConfigError.of(f"labels.{key}", given, f"nothing, because labels.by is {labels.by}")
    if labels.by not in ("source", "column") and labels.routes:
        raise ConfigError.of("labels.routes", labels.routes, f"nothing, because labels.by is {labels.by}")
    if labels.by not in ("words", "regex") and labels.sources:
        raise ConfigError.of("labels.sources", labels.sources, f"nothing, because labels.by is {labels.by}")
    if labels.by != "frequency" and labels.frequency != type(labels.frequency)():
        raise ConfigError(f"labels.frequency: got settings, expected none, because labels.by is {labels.by}")


def _check_frequency(config: Config) -> None:
    frequency = config.labels.frequency
    for name in ("forget", "retain"):
        _check_known(
            f"labels.frequency.{name}",
            [getattr(frequency, name)],
            config.data.sources,
            "a name of data.sources",
        )
    if frequency.forget == frequency.retain:
        raise ConfigError.of("labels.frequency.retain", frequency.retain, "another source than forget's")
    smoothing = frequency.smoothing
    if len(smoothing) not in (1, 2) or min(smoothing) < 0:
        raise ConfigError.of(
            "labels.frequency.smoothing", list(smoothing), "one or two numbers of at least 0"
        )


def _check_known(key: str, names: Iterable[str], known: Collection[str], what: str) -> None:
    for name in names:
        if name not in known:
            raise ConfigError.of(key, name, f"{what}: {', '.join(known)}{nearest(name, list(known))}")
