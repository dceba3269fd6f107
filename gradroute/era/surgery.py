"""Parameters of another shape in the place of the old ones, in a model and in its optimizer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..blocks import Piece
from .optimizer_state import hand_over


def insert(model: nn.Module, piece: Piece, optimizer: torch.optim.Optimizer | None) -> None:
    """Makes room for a piece in its parameter: zeros at the piece's indices, and the old values around them."""
    kept = others(piece)

    def grown(old: Tensor) -> Tensor:
        shape = [*old.shape]
        shape[piece.dim] = piece.size
        return old.new_zeros(shape).index_copy_(piece.dim, kept.to(old.device), old)

    _replace(model, piece, grown, optimizer)


def remove(model: nn.Module, piece: Piece, optimizer: torch.optim.Optimizer | None) -> None:
    """Takes a piece out of its parameter."""
    kept = others(piece)
    _replace(model, piece, lambda old: old.index_select(piece.dim, kept.to(old.device)), optimizer)


def others(piece: Piece) -> Tensor:
    """The indices along a piece's dimension that are not the piece's."""
    mine = torch.zeros(piece.size, dtype=torch.bool, device="cpu").index_fill_(0, piece.index, True)
    return (~mine).nonzero().flatten()


def _replace(
    model: nn.Module,
    piece: Piece,
    change: Callable[[Tensor], Tensor],
    optimizer: torch.optim.Optimizer | None,
) -> None:
    """Puts a changed parameter in the place of a piece's, in its module and in the optimizer."""
    path, _, name = piece.parameter.rpartition(".")
    module = model.get_submodule(path)
    old = getattr(module, name)
    new = nn.Parameter(change(old.detach()).contiguous(), old.requires_grad)
    setattr(module, name, new)
    if name == "weight":
        _update_widths(module)
    if optimizer is not None:
        hand_over(optimizer, old, new, piece.dim, change)


def _update_widths(linear: nn.Module) -> None:
    """Updates a linear layer's recorded widths."""
    shape = linear.get_parameter("weight").shape
    # transformers' Conv1D stores its weight transposed, and calls its widths otherwise.
    for names in (("out_features", "in_features"), ("nx", "nf")):
        for name, width in zip(names, shape, strict=True):
            if hasattr(linear, name):
                setattr(linear, name, width)
