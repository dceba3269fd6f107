"""What every op's sites share: conversion to tables, defaults, and the check against a call."""

from __future__ import annotations

from collections.abc import Mapping
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
        groups: what `gradroute.rectangles` derives of the effective sites, once per width.
    """

    defaults: ClassVar[dict[str, str]] = {}  # a site → the site whose table it takes when it has none
    tables: dict[str, Table]
    effective: Any
    groups: dict[Any, Any]

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
        effective = object.__new__(type(self))
        for name, table in given.items():
            if table is None and name in self.defaults:
                table = given[self.defaults[name]]
            object.__setattr__(effective, name, None if table is None or table.kind == "ones" else table)
        for sites in (self, effective):
            tables = {name: getattr(sites, name) for name in given if getattr(sites, name) is not None}
            object.__setattr__(sites, "tables", tables)
            object.__setattr__(sites, "effective", effective)
            object.__setattr__(sites, "groups", {})

    def __getstate__(self) -> dict[str, Any]:
        """Without what is derived again when it is needed."""
        return vars(self) | {"groups": {}}

    def check(self, routes: Routes | None, widths: Mapping[str, int | str]) -> None:
        """Raises unless every table fits a call or a layer.

        Args:
            routes: the batch's routes; None, for a layer: the tables must agree on their number.
            widths: for each site its number of features, or the reason why it cannot be honoured.
        """
        num_routes = None if routes is None else routes.num_routes
        origin = "routes.num_routes"
        for name, table in self.tables.items():
            if num_routes is None:
                num_routes, origin = table.num_routes, f"as in {name}"
            if table.num_routes == num_routes and table.features == widths[name]:
                continue
            check_table(table, num_routes, widths[name], f"{type(self).__name__}.{name}", origin)

    def __repr__(self) -> str:
        given = ", ".join(f"{name}={table}" for name, table in self.tables.items())
        return f"{type(self).__name__}({given})"


def given(kind: type[AnySites], **sites: Any) -> AnySites | None:
    """Sites of a kind, or None where there are none: the ordinary op."""
    return kind(**sites) if any(table is not None for table in sites.values()) else None


def check_table(
    table: Table, num_routes: int, width: int | str, name: str, origin: str = "routes.num_routes"
) -> None:
    """Raises unless `table` has `num_routes` rows and `width` columns; a str is the reason to refuse it."""
    if isinstance(width, str):
        raise ValueError(f"{name}: got {table}, expected None: {width}")
    if table.num_routes != num_routes:
        raise ValueError(
            f"{name}: got a table of {table.num_routes} routes, expected {num_routes} ({origin})"
        )
    if table.features not in (1, width):
        raise ValueError(f"{name}: got a table of {table.features} features, expected {width} or 1")
