"""ablate: the influence of a block taken away."""

from __future__ import annotations

import torch
from torch import nn

from ..arguments import check_choice, check_is, ordinary_tensors
from ..blocks import Block
from ..checks import check_optimizer
from ..models.inspection import inner_model, ordinary_model
from .checks import check_block, check_parameters
from .contraction import is_empty, take_out
from .drawing import draw, is_drawn, scale_of_rest
from .optimizer_state import check_zeros, zero_state
from .surgery import homes

#: The ways to ablate a block.
HOW = ("zero", "slice", "resample")


@ordinary_tensors()
def ablate(
    model: nn.Module,
    block: Block,
    how: str = "zero",
    *,
    optimizer: torch.optim.Optimizer | None = None,
    generator: torch.Generator | None = None,
) -> None:
    """Takes a block's influence away, in place.

    Args:
        model: the model, routed or not.
        block: the part of the model that loses its influence.
        how: "zero": all of the block's parameters become 0; those of hidden units have gradients of 0 from then on
            where act(0) = 0, so that training the model as a whole does not bring them back. "resample": the block's
            weights are drawn anew, from a normal distribution with the standard deviation of the rest of each
            parameter, and its biases become 0; the block then has an influence that nothing has taught. "slice": the
            block is taken out as by `contract`, whether it has influence or not; unroute the model before.
        optimizer: the optimizer whose state of the block becomes 0 too. Without it momentum would bring some of the
            block back.
        generator: the random numbers of "resample", on the CPU; default: torch's.

    Raises:
        TypeError: quantised parameters or moments; offloaded parameters that cannot be written to; with "slice" those
            that something else than fully_shard shards.
        ValueError: the block has no influence (it was ablated, or expanded and never trained); another `how`; the model
            is not of the block's shape.
    """
    inner = inner_model(model)
    check_block(block)
    check_choice("how", how, HOW)
    check_optimizer(optimizer, inner)
    if generator is not None:
        check_is("generator", generator, torch.Generator, "a torch.Generator or None")
    check_parameters(block, inner, shape=how == "slice")
    if how == "slice" and block.is_whole and is_empty(block, inner):
        take_out(ordinary_model(model), block, optimizer)
        return
    if block.is_whole and not block.has_influence(inner):
        raise ValueError(
            f"block: got {block}, which has no influence on the model: its output weights are 0, as it was ablated "
            "before, or expanded and never trained"
        )
    if how == "slice":
        take_out(ordinary_model(model), block, optimizer)
        return
    block.parameters(inner)  # raises where the model is not of its shape
    pieces = list(homes(inner, block.pieces))
    check_zeros(optimizer, {piece.parameter: home.parameter for piece, home in pieces})
    scales = [
        scale_of_rest(piece, home) if how == "resample" and is_drawn(piece, home) else None
        for piece, home in pieces
    ]
    for (piece, home), scale in zip(pieces, scales, strict=True):
        home.write(piece, 0.0)
        if scale is not None:
            draw(piece, home, scale, generator)
        parameter = home.parameter
        if parameter.grad is not None:  # it would bring the block back in the next step
            piece.write(parameter.grad, 0.0)
        zero_state(parameter, piece, optimizer)
