"""contract and merge: a block taken out of a model, and put back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..arguments import check_int, check_is, ordinary_tensors
from ..blocks import Block, stored_pieces
from ..checks import check_optimizer
from ..models.architectures import Architecture
from ..models.inspection import ordinary_model
from .checks import check_block, check_change, check_fits, check_parameters, check_removed
from .configuration import resize
from .surgery import homes, insert, remove


@ordinary_tensors()
def contract(
    model: nn.Module,
    block: Block | int,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    architecture: Architecture | None = None,
) -> None:
    """Takes a block out, in place, so that an ordinary model of fewer units and heads computes what the larger one did.

    Args:
        model: an ordinary (unrouted) model.
        block: units and heads; or how many hidden units of every MLP, counted from the last. Where the model has a
            configuration, every layer must lose as many.
        optimizer: see `expand`.
        architecture: see `expand`.

    Raises:
        TypeError: linear layers with adapters, or sharded by something else than fully_shard.
        ValueError: the block still has influence (`ablate` it first, or at once with how="slice"); the model is routed;
            the block is not one of units and heads, or not as large in every layer; none would remain.
    """
    inner = ordinary_model(model)
    check_optimizer(optimizer, inner)
    if architecture is not None:
        check_is("architecture", architecture, Architecture, "an Architecture or None")
    if not isinstance(block, Block):
        check_int("block", block, 1)
        block = Block.units(model, block, architecture=architecture)
    check_parameters(block, inner, shape=True)
    check_removed(block, inner)
    if not is_empty(block, inner) and block.has_influence(inner):
        raise ValueError(
            f"block: got {block}, which still has influence on the model: its output weights are not 0; "
            'ablate() it first, or take it out with ablate(model, block, how="slice")'
        )
    take_out(inner, block, optimizer)


@ordinary_tensors()
def merge(
    model: nn.Module,
    block: Block,
    state: Mapping[str, Tensor],
    *,
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Puts a block that was taken out back where it was, in place: undoes `contract`.

    A model can so be published without a block, and the block beside it for those who may have it:

        state = block.state_dict(model)
        era.ablate(model, block, how="slice")
        ...
        era.merge(model, block, state)

    Args:
        model: an ordinary model of the shape that the larger one was contracted to.
        block: the block that was taken out.
        state: what the block's `state_dict` returned before.
        optimizer: see `expand`.

    Raises:
        TypeError: parameters that something else than fully_shard shards, or offloaded ones that cannot be written to.
        ValueError: the model is routed, or has not the shape that the block was taken out of; the state is another
            block's. Nothing has changed then.
    """
    inner = ordinary_model(model)
    check_block(block)
    check_optimizer(optimizer, inner)
    check_parameters(block, inner, shape=True)
    check_fits(inner, block, state)
    check_change(inner, block, 1, optimizer)
    values = dict(zip(block.pieces, (state[key] for key in block.keys), strict=True))
    for piece, home in homes(inner, block.pieces):
        insert(home, piece, optimizer)
        if not home.is_empty:
            home.write(piece, values[piece])
    resize(inner, block.parts, 1)


def take_out(model: nn.Module, block: Block, optimizer: torch.optim.Optimizer | None) -> None:
    """Takes a block out of an ordinary model, whether it has influence or not."""
    check_removed(block, model)
    block.parameters(model)  # raises where the model is not of its shape
    check_parameters(block, model, shape=True)
    check_change(model, block, -1, optimizer)
    for piece, home in homes(model, block.pieces):
        remove(home, piece, optimizer)
    resize(model, block.parts, -1)


def is_empty(block: Block, model: nn.Module) -> bool:
    """Whether some of a block's parameters have no values (meta), so that nothing of its influence is known."""
    return any(home.is_empty for _, home in stored_pieces(block, model))
