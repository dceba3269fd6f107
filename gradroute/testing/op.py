"""The description of an op, from which samples of it are made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor

import gradroute

from ..sites import Sites
from ..tables import Table
from .draw import Draw, Sizes


class Op(NamedTuple):
    """An op as `sample` knows it.

    Attributes:
        inputs: draw → the public function's tensors by name.
        site_features: (sizes, num_routes, bias) → the width of every site that such a call can honour.
        formula: (marks, **tensors, **keywords) → the op in eager PyTorch, its sites marked.
        sites_name: the name in gradroute of the dataclass of its sites; None: the op takes one table.
        activations: the tensors that have tokens.
        variants: keyword arguments of `sample` that choose another computation, one dict each.
        keywords: (draw, keywords of `sample`) → keywords of the public function.
        exact: the values of keywords that only choose roundings, in a call in fp64 that is to be exact.
        cancelling: (tensors, keywords, upstream) → by argument, the size of the terms of a gradient whose sum is
            exactly 0, see `excess`.
    """

    inputs: Callable[[Draw], dict[str, Tensor | None]]
    site_features: Callable[[Sizes, int, bool], dict[str, int]]
    formula: Callable[..., Tensor]
    sites_name: str | None
    activations: tuple[str, ...] = ("x",)
    variants: tuple[dict[str, Any], ...] = ({},)
    keywords: Callable[[Draw, dict[str, Any]], dict[str, Any]] = lambda _, keywords: keywords
    exact: Mapping[str, Any] = MappingProxyType({})
    cancelling: Callable[[Mapping[str, Tensor | None], Mapping[str, Any], Tensor], dict[str, float]] = (
        lambda *_: {}
    )

    def sites_class(self) -> type[Sites]:
        """The dataclass of its sites."""
        assert self.sites_name is not None
        return getattr(gradroute, self.sites_name)

    def make_sites(self, tables: Mapping[str, Table]) -> Sites | Table | None:
        """The argument for the op's sites, made of their tables by name."""
        return next(iter(tables.values()), None) if self.sites_name is None else self.sites_class()(**tables)
