"""The base of every op's sites: conversion to tables, defaults, and the check against a call."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from .routes import Routes
from .tables import Table, TableLike

AnySites = TypeVar("AnySites", bound="Sites")


class Site:
    """The annotation of a site: it takes a TableLike or None, and holds a Table or None.

    Type checkers read it as a descriptor; at run time a site is an ordinary attribute.
    """

    if TYPE_CHECKING:

        def __get__(self, sites: object, owner: type | None = None) -> Table | None:
            """Reading it gives the table or None."""

        def __set__(self, sites: object, table: TableLike | None) -> None:
            """Its table, of any kind that a Table is made of, or None."""


def site(width: str, *, default: str | None = None, masks: tuple[str, ...] = ()) -> Any:
    """Declares a site of a dataclass of Sites; its default is None.

    Args:
        width: the name by which `Sites.check` is told its number of features.
        default: the site whose table it takes when it has none.
        masks: the fields of `gradroute.primitives.arguments.ActivationMasks` that its table belongs to.
    """
    return dataclasses.field(default=None, metadata={"width": width, "default": default, "masks": masks})


class Sites:
    """Base of the frozen dataclasses whose fields are an op's sites: a table, or None for no mask there.

    Plain tensors and arrays are converted to tables on the spot. Each site is declared once, by `site`.

    Attributes:
        tables: the sites that have a table, by name.
        effective: the same sites as backends want them: defaults filled in, and None where a table is all ones.
        groups: what `gradroute.skipping` derives of the effective sites, once per width.
    """

    #: Each site's `width`, `default` and `masks`, by name.
    declared: ClassVar[dict[str, Mapping[str, Any]]] = {}
    tables: dict[str, Table]
    groups: dict[Any, Any]

    if TYPE_CHECKING:

        @property
        def effective(self: AnySites) -> AnySites:
            """The same sites as backends want them."""

    def __init_subclass__(cls) -> None:
        declared = dict(cls.declared)
        for name, annotation in cls.__annotations__.items():
            if isinstance(vars(cls).get(name), dataclasses.Field):
                declared[name] = vars(cls)[name].metadata
            elif not str(annotation).startswith("ClassVar"):
                raise TypeError(
                    f"{cls.__name__}.{name}: got the default {vars(cls).get(name)}, expected site(…)"
                )
        cls.declared = declared

    def __new__(cls: type[AnySites], *args: Any, **kwargs: Any) -> AnySites:
        for name in kwargs:
            if name not in cls.declared:
                expected = ", ".join(cls.declared)
                raise TypeError(f"{cls.__name__}: got an unknown site {name!r}, expected one of {expected}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        given: dict[str, Table | None] = {}
        for name in self.declared:
            value = getattr(self, name)
            given[name] = None if value is None else Table.of(value, f"{type(self).__name__}.{name}")
            object.__setattr__(self, name, given[name])
        object.__setattr__(
            self, "tables", {name: table for name, table in given.items() if table is not None}
        )
        effective = object.__new__(type(self))
        for name in given:
            table = self.table(name)
            object.__setattr__(effective, name, None if table is None or table.kind == "ones" else table)
        for sites in (self, effective):
            tables = {name: getattr(sites, name) for name in given if getattr(sites, name) is not None}
            object.__setattr__(sites, "tables", tables)
            object.__setattr__(sites, "effective", effective)
            object.__setattr__(sites, "groups", {})

    def __getstate__(self) -> dict[str, Any]:
        """Drops `groups`, which are derived again on demand."""
        return vars(self) | {"groups": {}}

    def table(self, name: str) -> Table | None:
        """The table of a site, or else of the site that is its default."""
        default = self.declared[name]["default"]
        found = self.tables.get(name)
        return self.tables.get(default) if found is None and default is not None else found

    def check(self, routes: Routes | None, widths: Mapping[str, int | str]) -> None:
        """Raises unless every table fits a call or a layer.

        Args:
            routes: the batch's routes; None, for a layer: the tables must agree on their number.
            widths: the number of features, or the reason why it cannot be honoured, of every `width` of the sites;
                what stands under a site's own name goes before.
        """
        num_routes = None if routes is None else routes.num_routes
        origin = "routes.num_routes"
        for name, table in self.tables.items():
            if num_routes is None:
                num_routes, origin = table.num_routes, f"as in {name}"
            width = widths[name] if name in widths else widths[self.declared[name]["width"]]
            if table.weights.shape != (num_routes, width):
                check_table(table, num_routes, width, f"{type(self).__name__}.{name}", origin)

    def __repr__(self) -> str:
        given = ", ".join(f"{name}={table}" for name, table in self.tables.items())
        return f"{type(self).__name__}({given})"


def given(sites: type[AnySites], **tables: TableLike | None) -> AnySites | None:
    """The sites with these tables, or None where there are none: the ordinary op."""
    return sites(**tables) if any(table is not None for table in tables.values()) else None


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
