"""Samples of routed_activation and routed_mlp."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..activations import ACTIVATION_VARIANTS, PLAIN_ACTIVATIONS
from ..draw import Draw, Sizes
from ..marks import Marks
from ..op import Op


def _activation_inputs(draw: Draw) -> dict[str, Tensor | None]:
    return {"a": draw.activation(draw.sizes.d_ff)}


def activation_sites(sizes: Sizes, num_routes: int, bias: bool) -> dict[str, int]:
    """The widths of the sites of an activation, gated or not."""
    return dict.fromkeys(("pre", "hidden", "forward"), sizes.d_ff)


def _activation(marks: Marks, a: Tensor, activation: str) -> Tensor:
    return hidden(marks, PLAIN_ACTIVATIONS[activation](pre(marks, a)))


def pre(marks: Marks, a: Tensor) -> Tensor:
    """The pre-activations of a branch, their site marked."""
    return marks.gradient("pre", a)


def hidden(marks: Marks, h: Tensor) -> Tensor:
    """The hidden activations, their sites marked."""
    return marks.forward("forward", marks.gradient("hidden", h))


def _activation_keywords(draw: Draw, keywords: dict[str, Any]) -> dict[str, Any]:
    return {"activation": "gelu"} | keywords


def _mlp_inputs(draw: Draw) -> dict[str, Tensor | None]:
    d_model, d_ff = draw.sizes.d_model, draw.sizes.d_ff
    return {
        "x": draw.activation(d_model),
        "w_in": draw.weight(d_ff, d_model),
        "b_in": draw.bias(d_ff),
        "w_out": draw.weight(d_model, d_ff),
        "b_out": draw.bias(d_model),
    }


def mlp_sites(sizes: Sizes, num_routes: int, bias: bool) -> dict[str, int]:
    """The widths of the sites of an MLP, gated or not."""
    names = ("pre", "hidden", "forward", "update", "update_in", "update_out")
    widths = dict.fromkeys(names, sizes.d_ff) | {"output": sizes.d_model}
    return widths | ({"update_output_bias": sizes.d_model} if bias else {})


def _mlp(
    marks: Marks,
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    activation: str = "gelu",
) -> Tensor:
    return mlp_output(marks, _activation(marks, mlp_input(marks, x, w_in, b_in), activation), w_out, b_out)


def mlp_input(marks: Marks, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """An input layer of an MLP, its site marked."""
    update_in = marks.table("update_in", "update")
    return marks.linear(x, weight, bias, rows=update_in, bias_rows=update_in)


def mlp_output(marks: Marks, z: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The output layer of an MLP, its sites marked."""
    update_out, update_bias = marks.table("update_out", "update"), marks.table("update_output_bias")
    return marks.gradient("output", marks.linear(z, weight, bias, cols=update_out, bias_rows=update_bias))


OPS = {
    "routed_activation": Op(
        _activation_inputs,
        activation_sites,
        _activation,
        "ActivationSites",
        activations=("a",),
        variants=ACTIVATION_VARIANTS,
        keywords=_activation_keywords,
    ),
    "routed_mlp": Op(_mlp_inputs, mlp_sites, _mlp, "MLPSites", variants=ACTIVATION_VARIANTS),
}
