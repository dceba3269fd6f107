"""expand: hidden units and heads added to a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from ..arguments import check_bool, ordinary_tensors
from ..blocks import Block, Part, Units
from ..checks import check_optimizer
from ..models.architectures import Architecture
from ..models.inspection import Width, find_widths, inner_model, ordinary_model
from .checks import check_added, check_change, check_parameters, check_std
from .configuration import resize
from .drawing import draw, is_drawn, scale_of_rest
from .surgery import homes, insert


class _Growth(NamedTuple):
    """How many units or heads one module gains.

    Attributes:
        what: "units" or "heads".
        width: where the module's units or heads are.
        number: how many are added.
    """

    what: str
    width: Width
    number: int

    def part(self) -> Part:
        """The module's share of the block: its last `number` of units or heads, once it has so many more."""
        size = self.width.size + self.number
        added = torch.arange(size, device="cpu") >= self.width.size
        pieces = self.width.pieces(added)
        return Part(self.width.path, self.what, added.nonzero().flatten(), pieces, size, self.width.group)


@ordinary_tensors()
def expand(
    model: nn.Module,
    units: int = 0,
    *,
    heads: int = 0,
    std: float | None = None,
    zero_output: bool = True,
    optimizer: torch.optim.Optimizer | None = None,
    between: Units | Sequence[Units] | None = None,
    architecture: Architecture | None = None,
) -> Block:
    """Adds hidden units to every MLP and heads to every attention, in place, and says which they are.

    New units and heads come last. Their input weights are drawn from a normal distribution and their biases are 0;
    their output weights are 0, so that the model computes what it did (and the input weights have no gradient in the
    first step). The parameters are new ones with the old ones' `requires_grad`, without a gradient. Where the model has
    a configuration, it says the new numbers, so that the model can be saved and loaded.

    Args:
        model: an ordinary (unrouted) model of transformers of the architectures that `gradroute.models.route` takes;
            or a module with RoutedMLP, RoutedGatedMLP or RoutedAttention layers whose sites are None; or any other
            with `between`.
        units: how many hidden units to add to each MLP.
        heads: how many query heads to add to each attention, in whole groups that share a key and value head. Models
            whose head width follows from their number (GPT-2, GPT-Neo, GPT-NeoX) take none.
        std: the standard deviation of the new weights; default: that of the parameter they are added to.
        zero_output: False: output weights are drawn as well, and the model computes something else.
        optimizer: the optimizer of the model's parameters, if there is one. It gets the new parameters in the place of
            the old ones, with zeros in its state for what is new (beside an old step count, which makes the first
            updates of new weights some times larger). Its groups stay: make a RoutedAdamW after `route`, or it divides
            the plan's columns into rows.
        between: where the units are in a module that gradroute does not know.
        architecture: see `gradroute.models.route`.

    Returns:
        The block that was added.

    Raises:
        TypeError: linear layers with adapters, or sharded by something else than fully_shard; heads that the
            architecture cannot have.
        ValueError: the model is routed; a number is negative, no multiple of a group of heads, or nothing is added; or
            transformers refuses the numbers (Llama's d_model must be a multiple of the number of heads). Nothing has
            changed then.
    """
    inner = ordinary_model(model)
    check_added(units, heads)
    check_optimizer(optimizer, inner)
    growths = _growths(model, units, heads, between, architecture)
    check_std(std)
    zero_output = check_bool("zero_output", zero_output)
    block = Block([growth.part() for growth in growths])
    check_parameters(block, inner, shape=True)
    check_change(inner, block, 1, optimizer)
    for piece, home in homes(inner, block.pieces):
        scale = None
        if is_drawn(piece, home) and (piece.role != "output" or not zero_output):
            scale = scale_of_rest(piece, home) if std is None else std
        insert(home, piece, optimizer)
        if scale is not None:
            draw(piece, home, scale)
    resize(inner, block.parts, 1)
    return block


def _growths(
    model: nn.Module,
    units: int,
    heads: int,
    between: Units | Sequence[Units] | None,
    architecture: Architecture | None,
) -> list[_Growth]:
    """The growth of every module; raises where heads do not fit into whole groups."""
    growths = []
    if units:
        widths = find_widths(model, "units", between, architecture)
        growths += [_Growth("units", width, units) for width in widths]
    if heads:
        growths += [_Growth("heads", width, heads) for width in _free_heads(model, architecture)]
    for _, width, count in growths:
        if count % width.group:
            raise ValueError(
                f"heads: got {count}, expected a multiple of the {width.group} that share a key and value head"
            )
    return growths


def _free_heads(model: nn.Module, architecture: Architecture | None) -> list[Width]:
    """Where the model's heads are; raises TypeError where none can be added."""
    widths = find_widths(model, "heads", None, architecture)
    if not all(width.is_free for width in widths):
        raise TypeError(
            f"heads: got a {type(inner_model(model)).__name__}, in which the width of a head is d_model over their "
            "number; expected an architecture whose configuration has a head_dim, such as Llama"
        )
    return widths
