"""The base of every routed layer: its sites, and how it shares the parameters of an existing layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ..checks import is_plain, unrouted
from ..sites import Sites
from ..skipping.rule import groups_products
from ..skipping.tiling import tables_in
from .lora_sites import sites_around

if TYPE_CHECKING:
    from typing_extensions import Self

Device = torch.device | str | int | None
Layer = TypeVar("Layer", bound="RoutedModule")


class RoutedModule(nn.Module):
    """Base of the routed layers: checks its sites once, shows them, and copies their tables to its device."""

    sites_type: ClassVar[type[Sites]]
    backend: str | None = None
    #: Whether the second positional argument of a call is the routes.
    routes_are_second: ClassVar[bool] = False
    _sites: Any = None  # a sites_type, or None
    _op_sites: tuple[Any, ...] = ()  # one Sites or None an op

    def _widths(self) -> Mapping[str, int | str]:
        """The layer's numbers of features, or why it cannot honour a site, by the names that `Sites.check` takes."""
        raise NotImplementedError

    @property
    def sites(self) -> Any:
        """Where the layer masks, or None. Assigning checks the tables against the layer's widths."""
        return self._sites

    @sites.setter
    def sites(self, sites: Sites | None) -> None:
        unrouted(None, sites, self.sites_type)  # raises where sites are not this layer's
        self._op_sites = () if sites is None else self._sites_of_ops(sites)
        self._sites = sites
        self._copy_tables()

    def _sites_of_ops(self, sites: Any) -> tuple[Any, ...]:
        """The sites that each op of the layer is given; raises where a table does not fit."""
        sites.check(None, self._widths())
        return (sites,)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 2 and self.routes_are_second and "routes" not in kwargs:
            return super().__call__(args[0], routes=args[1], **kwargs)
        return super().__call__(*args, **kwargs)

    def _copy_tables(self) -> None:
        """Fills the tables' caches for the parameters' devices: traced code cannot, and would copy in every call."""
        devices = {parameter.device for parameter in self.parameters() if not parameter.is_meta}
        for sites in filter(None, self._op_sites):
            for one in (sites, *filter(None, sites_around(sites))):
                of_groups = tuple(tables_in(getattr(one, "tilings", None)))
                for device in devices:
                    for table in (*one.effective.tables.values(), *of_groups * groups_products(device)):
                        table.on(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        module = super()._apply(fn, recurse)
        self._copy_tables()
        return module

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._copy_tables()

    def extra_repr(self) -> str:
        backend = "" if self.backend is None else f"backend={self.backend!r}"
        return ", ".join(filter(None, (super().extra_repr(), f"sites={self.sites}", backend)))


def name_routes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call's arguments with the second one as `routes`: hooks that return another input drop positional ones."""
    if len(args) < 2 or "routes" in kwargs:
        return args, kwargs
    return (args[0], *args[2:]), {**kwargs, "routes": args[1]}


def names_of(original: type) -> dict[str, Any]:
    """The members by which a class that is made at run time has the name of the one in whose place it stands."""
    return {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}


def check_plain(name: str, module: nn.Module, expected: type[nn.Module], instead: str) -> None:
    """Raises unless `module` computes what its type says: routed layers read parameters and call no forward."""
    got = None
    if type(module) is not expected:
        got = f"a {type(module).__name__}"
    elif "forward" in vars(module) or "weight" not in module._parameters:
        got = f"a {expected.__name__} whose forward or weight was replaced"
    else:
        special = [
            f"{key} is a {type(one).__name__}" for key, one in module.named_parameters() if not is_plain(one)
        ]
        got = f"a {expected.__name__} whose {special[0]}" if special else None
    if got is not None:
        raise TypeError(
            f"{name}: got {got}, expected a torch.nn.{expected.__name__} itself, because its parameters are read and "
            f"its forward is not called; {instead}"
        )


def share(layer: Layer, source: nn.Module, sites: Sites | None) -> Layer:
    """`layer`, with the Parameters of `source` in the place of its own, its training mode, and the sites."""
    for name in layer._parameters:
        setattr(layer, name, getattr(source, name))
    layer.training = source.training
    layer.sites = sites
    return layer
