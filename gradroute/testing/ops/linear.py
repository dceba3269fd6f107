"""Samples of routed_linear."""

from __future__ import annotations

from torch import Tensor

from ..draw import Draw, Sizes
from ..marks import Marks
from ..op import Op


def _inputs(draw: Draw) -> dict[str, Tensor | None]:
    inputs, outputs = draw.sizes.d_model, draw.sizes.d_ff
    return {"x": draw.activation(inputs), "weight": draw.weight(outputs, inputs), "bias": draw.bias(outputs)}


def _site_features(sizes: Sizes, num_routes: int, bias: bool) -> dict[str, int]:
    inputs, outputs = sizes.d_model, sizes.d_ff
    widths = {"output": outputs, "input": inputs, "update_rows": outputs, "update_cols": inputs}
    return widths | ({"update_bias": outputs} if bias else {})


def _formula(marks: Marks, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = marks.linear(
        marks.gradient("input", x),
        weight,
        bias,
        rows=marks.table("update_rows"),
        cols=marks.table("update_cols"),
        bias_rows=marks.table("update_bias", "update_rows"),
    )
    return marks.gradient("output", y)


OPS = {"routed_linear": Op(_inputs, _site_features, _formula, "LinearSites")}
