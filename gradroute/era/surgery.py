"""Parameters of another shape in the place of the old ones, in a model and in its optimizer, one at a time.

Beside the model there is never more than one parameter, old and new: the old one is freed before the next one changes,
and before the optimizer's state of it does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from ..blocks import Piece
from ..models.inspection import Stored, is_dtensor, sharded_like, stored, whole
from .optimizer_state import change_state, hand_over


def insert(home: Stored, piece: Piece, optimizer: torch.optim.Optimizer | None) -> None:
    """Makes room for a piece in its parameter: zeros at the piece's indices, and the old values around them."""
    kept = others(piece)

    def grown(old: Tensor) -> Tensor:
        shape = [*old.shape]
        shape[piece.dim] = piece.size
        return old.new_zeros(shape).index_copy_(piece.dim, kept.to(old.device), old)

    _replace(home, piece, grown, optimizer)


def remove(home: Stored, piece: Piece, optimizer: torch.optim.Optimizer | None) -> None:
    """Takes a piece out of its parameter."""
    kept = others(piece)
    _replace(home, piece, lambda old: old.index_select(piece.dim, kept.to(old.device)), optimizer)


def others(piece: Piece) -> Tensor:
    """The indices along a piece's dimension that are not the piece's."""
    mine = torch.zeros(piece.size, dtype=torch.bool, device="cpu").index_fill_(0, piece.index, True)
    return (~mine).nonzero().flatten()


def homes(model: nn.Module, pieces: tuple[Piece, ...]) -> Iterator[tuple[Piece, Stored]]:
    """The pieces with their parameters; one that is tied comes once, by the first of its names."""
    named: Mapping[str, Stored] = stored(model)
    done: set[tuple[int, int, tuple[int, ...]]] = set()
    for piece in pieces:
        key = id(named[piece.parameter]), piece.dim, tuple(piece.index.tolist())
        if key not in done:
            done.add(key)
            yield piece, named[piece.parameter]


def _replace(
    home: Stored, piece: Piece, change: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer | None
) -> None:
    """Puts a changed parameter in the place of a piece's, in its modules and in the optimizer."""
    old = home.parameter
    new = home.replace(change)
    for module, name in home.places:
        if name == "weight":
            _update_widths(module)
    if optimizer is None:
        return
    state, shape = hand_over(optimizer, old, new), old.shape
    del old  # its memory is free now, if nobody else has it
    change_state(state, shape, piece.dim, lambda value: _changed(value, change))


def _changed(value: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """A state's value with another shape, sharded as it was."""
    changed = change(whole(value))
    return sharded_like(changed, value) if is_dtensor(value) else changed  # type: ignore[arg-type]


def _update_widths(linear: nn.Module) -> None:
    """Updates a linear layer's recorded widths."""
    shape = linear.get_parameter("weight").shape
    # transformers' Conv1D stores its weight transposed, and calls its widths otherwise.
    for names in (("out_features", "in_features"), ("nx", "nf")):
        for name, width in zip(names, shape, strict=True):
            if hasattr(linear, name):
                setattr(linear, name, width)
