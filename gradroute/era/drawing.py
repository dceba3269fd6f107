"""New random values for the weights of a block."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ..blocks import Piece
from ..models.inspection import Stored, on_all_ranks
from .surgery import others

#: How many elements are read at once where a standard deviation needs a copy of them.
_AT_ONCE = 1 << 22


def is_drawn(piece: Piece, home: Stored) -> bool:
    """Whether a piece gets random values: it is of weights, not of biases or norms, and there is memory for them."""
    return home.parameter.dim() >= 2 and not home.is_empty


def scale_of_rest(piece: Piece, home: Stored) -> float:
    """The standard deviation of a parameter's elements outside of a piece, which may have yet to be added.

    Raises:
        ValueError: there are none.
    """
    if len(piece.index) == home.parameter.shape[piece.dim] == piece.size:
        raise ValueError(
            f"block: got all of {piece.parameter}, expected a rest whose standard deviation new values could have"
        )
    return _std(_rest(piece, home.values()))


def draw(piece: Piece, home: Stored, std: float, generator: torch.Generator | None = None) -> None:
    """Writes normal values into a piece; every rank that has a share of it gets those of the first rank."""
    shape = [*home.parameter.shape]
    shape[piece.dim] = 1
    for index in piece.index.split(max(1, _AT_ONCE // math.prod(shape))):
        shape[piece.dim] = len(index)
        values = torch.empty(shape, dtype=torch.float32, device="cpu").normal_(std=std, generator=generator)
        home.write(replace(piece, index=index), on_all_ranks(values, home.parameter))


def _rest(piece: Piece, values: Tensor) -> Iterator[Tensor]:
    """A parameter's elements outside of a piece, in fp32 and a part at a time: a copy of each part is made."""
    most = max(1, _AT_ONCE * values.shape[piece.dim] // values.numel())
    if values.shape[piece.dim] == piece.size:
        for index in others(piece).split(most):
            yield values.index_select(piece.dim, index.to(values.device)).float()
    elif values.dtype == torch.float32:
        yield values
    else:
        for part in values.split(most, piece.dim):
            yield part.float()


def _std(parts: Iterator[Tensor]) -> float:
    """The standard deviation of all elements of some parts together (Chan, Golub and LeVeque 1979)."""
    count, mean, squares = 0, 0.0, 0.0
    for part in parts:
        variance, its_mean = (float(one) for one in torch.var_mean(part, correction=0))
        n, apart = part.numel(), its_mean - mean
        squares += variance * n + apart**2 * count * n / (count + n)
        mean += apart * n / (count + n)
        count += n
    return math.sqrt(squares / count)
