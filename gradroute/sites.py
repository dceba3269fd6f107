"""What every op's sites share: conversion to tables, defaults, and the check against a call."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, ClassVar, TypeVar

from .routes import Routes
from .tables import Table

AnySites = TypeVar("AnySites", bound="Sites")


class Sites:
    """Base of the frozen dataclasses whose fields are an op's sites: a table, or None for no mask there.

    Plain tensors and arrays are converted to tables on the spot.

    Attributes:
        tables: the sites that have a table, by name.
        effective: the same sites as kernels want them: `defaults` filled in, and None where a table is all ones.
    """

    defaults: ClassVar[dict[str, str]] = {}  # a site → the site whose table it takes when it has none
    tables: dict[str, Table]
    effective: Any

    def __new__(cls: type[AnySites], *args: Any, **kwargs: Any) -> AnySites:
        names = [field.name for field in fields(cls)]  # type: ignore[arg-type]
        for name in kwargs:
            if name not in names:
                raise TypeError(
                    f"{cls.__name__}: got an unknown site {name!r}, expected one of {', '.join(names)}"
                )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        given: dict[str, Table | None] = {}
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            given[field.name] = (
                None if value is None else Table.of(value, f"{type(self).__name__}.{field.name}")
            )
            object.__setattr__(self, field.name, given[field.name])
        object.__setattr__(
            self, "tables", {name: table for name, table in given.items() if table is not None}
        )
        effective = object.__new__(type(self))
        for name, table in given.items():
            if table is None and name in self.defaults:
                table = given[self.defaults[name]]
            object.__setattr__(effective, name, None if table is None or table.kind == "ones" else table)
        object.__setattr__(self, "effective", effective)

    def check(self, routes: Routes, **expected: int | str) -> None:
        """Raises unless every table fits the call.

        Args:
            routes: the batch's routes.
            **expected: for each site its number of features, or the reason why this call cannot honour it.
        """
        for name, table in self.tables.items():
            check_table(table, routes, expected[name], f"{type(self).__name__}.{name}")

    def __repr__(self) -> str:
        given = ", ".join(f"{name}={table}" for name, table in self.tables.items())
        return f"{type(self).__name__}({given})"


def check_table(table: Table, routes: Routes, features: int | str, name: str) -> None:
    """Raises unless `table` has a row per route and a column per feature; a str is the reason to refuse it."""
    if isinstance(features, str):
        raise ValueError(f"{name}: got {table}, expected None: {features}")
    if table.num_routes != routes.num_routes:
        raise ValueError(
            f"{name}: got a table of {table.num_routes} routes, expected routes.num_routes = {routes.num_routes}"
        )
    if table.features not in (1, features):
        raise ValueError(f"{name}: got a table of {table.features} features, expected {features} or 1")
