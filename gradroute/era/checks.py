"""Refusals: every check comes before anything has changed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..arguments import check_int, check_is, check_number
from ..blocks import Block, check_state
from ..checks import check_optimizer, is_plain
from ..layers import RoutedModule
from ..models.inspection import is_dtensor, stored
from ..models.plan import Shape
from .configuration import changes_of, config_of, new_numbers
from .optimizer_state import check_states

_WORDS = {"units": "hidden units", "heads": "heads"}


def check_added(units: int, heads: int) -> None:
    """Raises unless numbers of units and heads are not negative, and one is positive."""
    for name, count in (("units", units), ("heads", heads)):
        check_int(name, count)
        if count < 0 or (units == 0 and heads == 0):
            raise ValueError(f"{name}: got {count}, expected a positive number of {_WORDS[name]}")


def check_std(std: float | None) -> None:
    """Raises unless a standard deviation is a finite number of 0 or more, or None."""
    check_number("std", std, 0, optional=True)


def check_block(block: Block) -> None:
    """Raises unless a block is one."""
    check_is("block", block, Block, "a gradroute.blocks.Block")


def check_parameters(block: Block, model: nn.Module, *, shape: bool = False) -> None:
    """Raises unless those of a block's parameters that are in the model are ordinary ones that can be changed.

    Args:
        block: the block.
        model: the model.
        shape: whether their shape changes, and not only their values; then they need have none (meta).
    """
    named = stored(model)
    for piece in block.pieces:
        if piece.parameter not in named:
            continue
        home = named[piece.parameter]
        parameter = home.parameter
        if not (is_plain(parameter) or is_dtensor(parameter)) or not parameter.is_floating_point():
            raise TypeError(
                f"{piece.parameter}: got a {type(parameter).__name__} of {parameter.dtype}, expected an ordinary "
                "tensor of floating point: do this before quantising"
            )
        if home.is_empty and not shape:
            raise ValueError(
                f"{piece.parameter}: got a parameter on the meta device, expected one with values: what is written "
                "now would be lost when they are loaded"
            )
        why = home.why_fixed(shape=shape)
        if why is not None:
            raise TypeError(f"{piece.parameter}: got a parameter that is {why}")


def check_change(inner: nn.Module, block: Block, sign: int, optimizer: torch.optim.Optimizer | None) -> None:
    """Raises where sites, a configuration, ties or an optimizer forbid that a block's parameters change their shape.

    Args:
        inner: the model.
        block: the block that is added or taken out.
        sign: 1: the block is added; -1: it is taken out.
        optimizer: the optimizer whose state would change too.
    """
    for part in block.parts:
        module = inner.get_submodule(part.module)
        if isinstance(module, RoutedModule) and module.sites is not None:
            raise ValueError(
                f"model: got {part.module or type(module).__name__} with sites, whose tables have its width; expected "
                "sites = None, to be set again afterwards"
            )
    config = config_of(inner)
    if config is not None:
        if not all(part.module for part in block.parts):
            raise ValueError(
                f"between: got layers of a {type(inner).__name__}, whose configuration could not say their new width; "
                "expected a module without a configuration"
            )
        new_numbers(config, changes_of(block.parts, sign))
    _check_ties(inner, block)
    check_optimizer(optimizer, inner)
    if optimizer is not None:
        named = stored(inner)
        check_states(optimizer, {piece.parameter: named[piece.parameter].parameter for piece in block.pieces})


def _check_ties(inner: nn.Module, block: Block) -> None:
    """Raises where a parameter of a block also belongs to a module of which the block has not the same part."""
    named = stored(inner)
    pieces = {piece.parameter: piece for piece in block.pieces}
    for piece in block.pieces:
        home = named[piece.parameter]
        mine = {name: pieces[name] for name in home.names if name in pieces}
        same = all(one.dim == piece.dim and torch.equal(one.index, piece.index) for one in mine.values())
        if not same or any(place not in map(home.names.get, mine) for place in home.places):
            raise ValueError(
                f"model: got {' and '.join(home.names)} tied, of which the block has not the same part, expected "
                "parameters of their own"
            )


def check_removed(block: Block, inner: nn.Module) -> None:
    """Raises unless a block is one of whole groups, some stay, and the configuration can say what is left."""
    for part in block.parts:
        if part.what == "parameters":
            raise ValueError(
                "block: got one of parameters, expected one of units or heads (Block.units, Block.heads)"
            )
        if part.what == "experts":
            raise ValueError(
                f"block: got experts of {part.module}, whose router goes on choosing among all of them, expected units "
                "or heads; ablate(model, block) takes away what experts add"
            )
        if len(part.index) == part.size:
            raise ValueError(f"{part.what}: got all {part.size} of {part.module}, expected some to remain")
        groups = part.index // part.group
        if len(groups) != part.group * len(groups.unique()):
            raise ValueError(
                f"heads: got {part.index.tolist()} of {part.module}, expected whole groups of the {part.group} that "
                "share a key and value head"
            )
    config = config_of(inner)
    if config is not None:
        _check_evenly_removed(block, Shape.of(config).layers)


def _check_evenly_removed(block: Block, layers: int) -> None:
    """Raises unless every one of a model's layers loses as many units, and as many heads."""
    for what in ("units", "heads"):
        counts = {part.module: len(part.index) for part in block.parts if part.what == what and part.module}
        if counts and (len(counts) != layers or len(set(counts.values())) > 1):
            raise ValueError(
                f"{what}: got {counts}, expected as many of each of the model's {layers} layers: its configuration "
                "has one number for all"
            )


def check_fits(inner: nn.Module, block: Block, state: Mapping[str, Tensor]) -> None:
    """Raises unless a state is a block's, and the model is what is left without that block."""
    keys = block.keys
    check_state(state, keys)
    for key in keys:
        check_is(f"state[{key!r}]", state[key], Tensor, "a tensor")
    named = stored(inner)
    for key, piece in zip(keys, block.pieces, strict=True):
        got = list(named[piece.parameter].parameter.shape) if piece.parameter in named else None
        expected = list(state[key].shape)
        if len(expected) <= piece.dim or expected[piece.dim] != len(piece.index):
            raise ValueError(
                f"state[{key!r}]: got shape {expected}, expected {len(piece.index)} in dimension {piece.dim}"
            )
        expected[piece.dim] = piece.size - len(piece.index)
        if got != expected:
            raise ValueError(
                f"model: got {piece.parameter} of shape {got}, expected {expected}, what the block leaves of it"
            )
        if named[piece.parameter].is_empty and not state[key].is_meta:
            raise ValueError(
                f"{piece.parameter}: got a parameter on the meta device, expected one with values, or a state on the "
                "meta device too: the state's values would be lost when the model's are loaded"
            )
