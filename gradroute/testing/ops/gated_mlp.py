"""Samples of routed_glu and routed_gated_mlp."""

from __future__ import annotations

from torch import Tensor

from ..activations import ACTIVATION_VARIANTS, PLAIN_ACTIVATIONS
from ..draw import Draw
from ..marks import Marks
from ..op import Op
from .mlp import activation_sites, hidden, mlp_input, mlp_output, mlp_sites, pre


def _glu_inputs(draw: Draw) -> dict[str, Tensor | None]:
    return {"gate": draw.activation(draw.sizes.d_ff), "up": draw.activation(draw.sizes.d_ff)}


def _glu(marks: Marks, gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    return hidden(marks, PLAIN_ACTIVATIONS[activation](pre(marks, gate)) * pre(marks, up))


def _gated_mlp_inputs(draw: Draw) -> dict[str, Tensor | None]:
    d_model, d_ff = draw.sizes.d_model, draw.sizes.d_ff
    return {
        "x": draw.activation(d_model),
        "w_gate": draw.weight(d_ff, d_model),
        "w_up": draw.weight(d_ff, d_model),
        "w_down": draw.weight(d_model, d_ff),
        "b_gate": draw.bias(d_ff),
        "b_up": draw.bias(d_ff),
        "b_down": draw.bias(d_model),
    }


def _gated_mlp(
    marks: Marks,
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    b_gate: Tensor | None,
    b_up: Tensor | None,
    b_down: Tensor | None,
    activation: str = "silu",
) -> Tensor:
    gate, up = mlp_input(marks, x, w_gate, b_gate), mlp_input(marks, x, w_up, b_up)
    return mlp_output(marks, _glu(marks, gate, up, activation), w_down, b_down)


OPS = {
    "routed_glu": Op(
        _glu_inputs,
        activation_sites,
        _glu,
        "ActivationSites",
        activations=("gate", "up"),
        variants=ACTIVATION_VARIANTS,
    ),
    "routed_gated_mlp": Op(
        _gated_mlp_inputs, mlp_sites, _gated_mlp, "MLPSites", variants=ACTIVATION_VARIANTS
    ),
}
