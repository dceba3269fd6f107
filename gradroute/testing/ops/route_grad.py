"""Samples of route_grad."""

from __future__ import annotations

from torch import Tensor

from ..draw import Draw, Sizes
from ..marks import Marks
from ..op import Op


def _inputs(draw: Draw) -> dict[str, Tensor | None]:
    return {"x": draw.activation(draw.sizes.d_model)}


def _site_features(sizes: Sizes, num_routes: int, bias: bool) -> dict[str, int]:
    return {"table": sizes.d_model}


def _formula(marks: Marks, x: Tensor) -> Tensor:
    return marks.gradient("table", x)


OPS = {"route_grad": Op(_inputs, _site_features, _formula, None)}
