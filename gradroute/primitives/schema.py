"""Tuples of typed arguments as torch.library takes them: flat, by a schema that follows from their fields."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from torch import Tensor

#: One argument of an op.
Flat = Tensor | list[Tensor] | bool | int | float | str | None

Arguments = TypeVar("Arguments", bound=tuple[Any, ...])

# An int may be symbolic while a program is traced: then its value does not become part of the program.
_TYPES = {Tensor: "Tensor", list[Tensor]: "Tensor[]", bool: "bool", int: "SymInt", float: "float", str: "str"}


@functools.cache
def _fields(arguments: type[tuple[Any, ...]]) -> tuple[tuple[str, str | type[tuple[Any, ...]]], ...]:
    """Each field's name, and its type in a schema, or the NamedTuple that it is."""
    hints = get_type_hints(arguments).items()
    return tuple((name, _schema_type(arguments, name, hint)) for name, hint in hints)


def _schema_type(arguments: type, name: str, hint: Any) -> str | type[tuple[Any, ...]]:
    if isinstance(hint, type) and get_origin(hint) is None and issubclass(hint, tuple):
        return hint
    is_optional = get_origin(hint) in (Union, types.UnionType)
    kinds = [kind for kind in get_args(hint) if kind is not type(None)] if is_optional else [hint]
    if len(kinds) != 1 or kinds[0] not in _TYPES:
        raise TypeError(f"{arguments.__name__}.{name}: got the type {hint}, which no schema has")
    return _TYPES[kinds[0]] + "?" * is_optional


def schema_of(arguments: type[tuple[Any, ...]], prefix: str = "") -> str:
    """The fields of a NamedTuple as the parameters of an op, `Tensor ids, Tensor? strength, bool causal`.

    A field that is a NamedTuple stands as its fields, their names behind its own: `bool pattern_causal` of `pattern`.

    Raises:
        TypeError: a field is of a type that no schema has.
    """
    return ", ".join(
        f"{type_} {prefix}{name}" if isinstance(type_, str) else schema_of(type_, f"{prefix}{name}_")
        for name, type_ in _fields(arguments)
    )


def flat(arguments: tuple[Any, ...]) -> list[Flat]:
    """The values of a NamedTuple in the order of its schema."""
    values: list[Flat] = []
    for value in arguments:
        if isinstance(value, tuple):
            values.extend(flat(value))
        else:
            values.append(value)
    return values


def unflat(arguments: type[Arguments], values: Sequence[Flat]) -> Arguments:
    """The NamedTuple with these values, which are in the order of its schema, as torch.library has checked."""
    return cast(Arguments, _made(arguments, iter(values)))


def _made(arguments: type[tuple[Any, ...]], rest: Iterator[Flat]) -> tuple[Any, ...]:
    values = [next(rest) if inner is None else _made(inner, rest) for inner in _inner(arguments)]
    return arguments(*values)  # type: ignore[arg-type]


@functools.cache
def _inner(arguments: type[tuple[Any, ...]]) -> tuple[type[tuple[Any, ...]] | None, ...]:
    """The NamedTuple that each field is; None for a single value."""
    return tuple(None if isinstance(type_, str) else type_ for _, type_ in _fields(arguments))
