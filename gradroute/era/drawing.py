"""New random values for the weights of a block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..blocks import Piece
from .surgery import others


def draw(
    model: nn.Module,
    pieces: Sequence[Piece],
    std: float | None = None,
    *,
    with_outputs: bool = True,
    generator: torch.Generator | None = None,
) -> list[tuple[Piece, Tensor]]:
    """New normal values for those pieces that are of weights; biases and norms get none.

    Args:
        model: the model whose parameters the pieces are of.
        pieces: the pieces of a block, which may be in the parameters or yet to be added.
        std: the standard deviation; default: that of the rest of each parameter.
        with_outputs: whether pieces that read the block's units get values.
        generator: the random numbers, on the CPU; default: torch's.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    drawn = []
    for piece in pieces:
        parameter = named[piece.parameter].detach()
        if parameter.dim() < 2 or (piece.role == "output" and not with_outputs):
            continue
        scale = float(_rest(piece, parameter).float().std(correction=0)) if std is None else std
        shape = [*parameter.shape]
        shape[piece.dim] = len(piece.index)
        values = torch.empty(shape, dtype=torch.float32, device="cpu").normal_(std=scale, generator=generator)
        drawn.append((piece, values))
    return drawn


def _rest(piece: Piece, parameter: Tensor) -> Tensor:
    """The elements of a parameter outside of a piece: all of them where the piece has yet to be added."""
    if parameter.shape[piece.dim] < piece.size:
        return parameter
    if len(piece.index) == piece.size:
        raise ValueError(
            f"block: got all of {piece.parameter}, expected a rest whose standard deviation new values could have"
        )
    return parameter.index_select(piece.dim, others(piece).to(parameter.device))


def write(model: nn.Module, drawn: Sequence[tuple[Piece, Tensor]]) -> None:
    """Writes what `draw` returned into the model's parameters."""
    named = dict(model.named_parameters(remove_duplicate=False))
    for piece, values in drawn:
        piece.write(named[piece.parameter], values)
