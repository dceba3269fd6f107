"""Configs as frozen dataclasses: read from plain values, checked key by key, and written out again.

A section is a dataclass whose fields are made by `option`. `read` makes one of a mapping and refuses, by its dotted
key, whatever is unknown, missing, of another type or out of bounds; `written` is the way back.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, TypeVar, Union

Section = TypeVar("Section")

_UNIONS = (Union, types.UnionType)


class ConfigError(ValueError):
    """A config is wrong: the message says which key, what came and what was expected."""

    @classmethod
    def of(cls, key: str, got: object, expected: str) -> ConfigError:
        """The error of one key."""
        return cls(f"{key}: got {shown(got)}, expected {expected}")


def option(
    default: Any = dataclasses.MISSING,
    meaning: str = "",
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    path: bool = False,
) -> Any:
    """A field of a section.

    Args:
        default: its value where the config has none; without one the key is required. A mapping is copied.
        meaning: what the key means, for `python -m gradroute.recipes keys`.
        at_least: the least number, or the least number of items.
        above: numbers are larger than it.
        at_most: the largest number.
        path: whether it names files. Paths are made absolute when a config is read, must exist, and the key of a stage
            has the contents of the files and not their names; see `files`.
    """
    metadata = {
        "meaning": meaning,
        "at_least": at_least,
        "above": above,
        "at_most": at_most,
        "path": path,
    }
    if isinstance(default, dict):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def shown(value: object, most: int = 80) -> str:
    """A value as an error writes it."""
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def read(section: type[Section], values: object, key: str = "") -> Section:
    """A section from plain values, such as YAML's.

    Args:
        section: a dataclass whose fields `option` made.
        values: a mapping from the section's keys.
        key: the dotted key of the section itself; empty for the whole config.

    Raises:
        ConfigError: an unknown or missing key, a value of another type or out of bounds.
    """
    where = key or "config"
    if not isinstance(values, Mapping):
        raise ConfigError.of(where, values, f"a mapping with the keys {', '.join(_names(section))}")
    hints = typing.get_type_hints(section)
    for name in values:
        if name not in hints:
            known = _names(section)
            raise ConfigError.of(
                _join(key, name), values[name], f"one of the keys {', '.join(known)}{nearest(name, known)}"
            )
    read_values = {}
    for field in dataclasses.fields(section):  # type: ignore[arg-type]
        own = _join(key, field.name)
        if field.name in values:
            read_values[field.name] = _value(hints[field.name], values[field.name], own, field.metadata)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ConfigError(f"{own}: got nothing, expected {described(hints[field.name], field.metadata)}")
    try:
        return section(**read_values)
    except ConfigError as error:  # a section's own check names its keys from the section on
        raise ConfigError(_join(key, str(error))) from None


def written(section: Any) -> Any:
    """A section as plain values: mappings, lists, strings, numbers, bools and None, which `read` reads again."""
    if dataclasses.is_dataclass(section):
        return {field.name: written(getattr(section, field.name)) for field in dataclasses.fields(section)}
    if isinstance(section, Mapping):
        return {name: written(value) for name, value in section.items()}
    if isinstance(section, (tuple, list)):
        return [written(value) for value in section]
    return section


def rebased(section: Any, values: object, move: Callable[[str], str]) -> Any:
    """Plain values with every path of a section moved. What `read` will refuse is left as it is."""
    if not isinstance(values, Mapping):
        return values
    hints = typing.get_type_hints(section)
    paths = {one.name for one in dataclasses.fields(section) if one.metadata.get("path")}
    moved: dict[Any, Any] = {}
    for name, value in values.items():
        inner, is_mapping = _section_in(hints.get(name))
        if name in paths and isinstance(value, str):
            moved[name] = move(value)
        elif inner is not None and is_mapping and isinstance(value, Mapping):
            moved[name] = {key: rebased(inner, entry, move) for key, entry in value.items()}
        else:
            moved[name] = value if inner is None else rebased(inner, value, move)
    return moved


def _section_in(hint: Any) -> tuple[Any, bool]:
    """The section that a field is, or has many of in a mapping, and whether it has many; None for other fields."""
    arguments = typing.get_args(hint)
    for one in (hint, *arguments):
        if dataclasses.is_dataclass(one):
            return one, one is not hint and typing.get_origin(hint) not in _UNIONS
    return None, False


def leaves(section: Any, key: str = "") -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """Every value below a section: its dotted key, the plain value, and the metadata of its field."""
    yield from _leaves(section, key, {})


def _leaves(
    value: Any, key: str, metadata: Mapping[str, Any]
) -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _leaves(getattr(value, field.name), _join(key, field.name), field.metadata)
    elif isinstance(value, Mapping) and value:
        for name, entry in value.items():
            yield from _leaves(entry, _join(key, name), metadata)
    else:
        yield key, written(value), metadata


def described(hint: Any, metadata: Mapping[str, Any]) -> str:
    """What a value of a field may be, in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in _UNIONS:
        return " or ".join(described(one, metadata) for one in arguments)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if hint is type(None):
        return "null"
    if origin is tuple:
        return f"a list, each item {described(arguments[0], metadata)}"
    if origin is not None and issubclass(origin, Mapping):
        return (
            "a mapping"
            if arguments[1] is Any
            else f"a mapping of names, each {described(arguments[1], metadata)}"
        )
    if dataclasses.is_dataclass(hint):
        return "a mapping"
    if metadata.get("path"):
        return "a path"
    words = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "a string",
        Any: "any value",
    }
    return words[hint] + (_bounds(metadata) if hint in (int, float) else "")


def _bounds(metadata: Mapping[str, Any]) -> str:
    bounds = [
        f" {words} {metadata[name]}"
        for name, words in (("at_least", "of at least"), ("above", "above"), ("at_most", "of at most"))
        if metadata.get(name) is not None
    ]
    return " and".join(bounds)


def _value(hint: Any, value: object, key: str, metadata: Mapping[str, Any]) -> Any:
    """A value of a field's type, checked."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in _UNIONS:
        return _one_of(arguments, value, key, metadata)
    if origin is Literal:
        if not any(value == choice and type(value) is type(choice) for choice in arguments):
            near = nearest(value, [str(choice) for choice in arguments])
            raise ConfigError.of(key, value, described(hint, metadata) + near)
        return value
    if origin is tuple:
        return _items(arguments[0], value, key, metadata)
    if origin is not None and issubclass(origin, Mapping):
        return _entries(arguments[1], value, key, metadata)
    if dataclasses.is_dataclass(hint):
        return read(hint, value, key)  # type: ignore[arg-type]
    return _plain(hint, value, key, metadata)


def _one_of(hints: tuple[Any, ...], value: object, key: str, metadata: Mapping[str, Any]) -> Any:
    """A value of a union: the sole member that is not None says what is wrong with it."""
    if value is None and type(None) in hints:
        return None
    others = [hint for hint in hints if hint is not type(None)]
    for hint in others[:-1]:
        try:
            return _value(hint, value, key, metadata)
        except ConfigError:
            continue
    if len(others) == 1:
        return _value(others[0], value, key, metadata)
    try:
        return _value(others[-1], value, key, metadata)
    except ConfigError:
        raise ConfigError.of(key, value, " or ".join(described(one, metadata) for one in hints)) from None


def _items(hint: Any, value: object, key: str, metadata: Mapping[str, Any]) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise ConfigError.of(key, value, described(tuple[hint, ...], metadata))
    _check_count(key, value, metadata, hint)
    return tuple(_value(hint, item, f"{key}[{index}]", metadata) for index, item in enumerate(value))


def _entries(hint: Any, value: object, key: str, metadata: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError.of(key, value, described(dict[str, hint], metadata))
    _check_count(key, value, metadata, hint)
    for name in value:
        if not isinstance(name, str) or not name:
            raise ConfigError.of(key, name, "names that are strings")
    return {name: _value(hint, entry, _join(key, name), metadata) for name, entry in value.items()}


def _check_count(key: str, items: Any, metadata: Mapping[str, Any], hint: Any) -> None:
    """Of lists and mappings of others than numbers, `at_least` is the least number of items."""
    least = metadata.get("at_least")
    if least is not None and hint not in (int, float) and len(items) < least:
        raise ConfigError.of(key, items, f"at least {least:g} of them")


def _plain(hint: type, value: object, key: str, metadata: Mapping[str, Any]) -> Any:
    """A bool, int, float or str; a whole number is a number, and nothing else is converted."""
    number = float(value) if hint is float and type(value) is int else value
    if type(number) is not hint or (isinstance(number, float) and not math.isfinite(number)):
        raise ConfigError.of(key, value, described(hint, metadata))
    if isinstance(number, (int, float)) and not isinstance(number, bool):
        least, above, most = (metadata.get(name) for name in ("at_least", "above", "at_most"))
        fits = (
            (least is None or number >= least)
            and (above is None or number > above)
            and (most is None or number <= most)
        )
        if not fits:
            raise ConfigError.of(key, value, described(hint, metadata))
    return number


def _names(section: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(section)]


def _join(key: str, name: object) -> str:
    return f"{key}.{name}" if key else str(name)


def nearest(name: object, known: list[str]) -> str:
    """The known name that was probably meant, if one is like it."""
    near = difflib.get_close_matches(str(name), known, n=1)
    return f" (did you mean {near[0]}?)" if near else ""
