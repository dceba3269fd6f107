"""Expand, Route, Ablate: a model's parts grown, gated, ablated and taken out again (arXiv 2410.04332, section 4.2.2).

`expand` adds hidden units and heads and says which they are, as a `Block`; a plan (`gradroute.models.era`) routes
tokens to them; `ablate` takes the block's influence away, `contract` the block itself. `gate` scales a block instead,
to steer. All of them change parameters in place, and an optimizer's state with them where it is given.

    block = era.expand(model, units=64, optimizer=optimizer)
    route(model, gradroute.models.era(units=64))
    ...                                    # train
    unroute(model)
    era.ablate(model, block)               # or how="slice", how="resample"
    era.contract(model, block)             # as small as it was
    era.export(model, "unlearnt")
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .blocks import Block, Part, Piece, Units, Width, find_widths
from .layers import RoutedAttention, RoutedModule
from .models.architectures import Architecture
from .models.modules import is_dtensor
from .models.plan import Shape
from .models.routing import architecture_of, inner_model
from .models.swapped import Swapped

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Block", "Gate", "Units", "ablate", "contract", "expand", "export", "gate", "merge"]

HOW = ("zero", "slice", "resample")


class _Growth(NamedTuple):
    """So many units or heads for one module."""

    what: str
    width: Width
    number: int


@torch.no_grad()
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

    The new ones come last. Their input weights are drawn from a normal distribution and their biases are 0; their
    output weights are 0, so that the model computes what it did (and the input weights have no gradient in the first
    step). The parameters are new ones, of the old ones' `requires_grad`, without a gradient. Where the model has a
    configuration, it says the new numbers, so that the model can be saved and loaded.

    Args:
        model: an ordinary (unrouted) model of transformers of the architectures that `gradroute.models.route` takes;
            or a module with RoutedMLP, RoutedGatedMLP or RoutedAttention layers whose sites are None; or any other
            with `between`.
        units: how many hidden units to add to each MLP.
        heads: how many query heads to add to each attention, in whole groups that share a key and value head. Models
            whose head width follows from their number (GPT-2, GPT-Neo, GPT-NeoX) take none.
        std: of the new weights; default: that of the parameter they are added to.
        zero_output: False: output weights are drawn as well, and the model computes something else.
        optimizer: one that has the parameters: it gets the new ones in their place, its state zeros for what is new.
            Default: none; make it afterwards.
        between: where the units are in a module that gradroute does not know.
        architecture: see `gradroute.models.route`.

    Returns:
        What was added.

    Raises:
        TypeError: linear layers with adapters, or sharded ones; heads that the architecture cannot have.
        ValueError: the model is routed; a number is negative, no multiple of a group of heads, or nothing is added; or
            transformers refuses the numbers (Llama's d_model must be a multiple of the number of heads). Nothing has
            changed then.
    """
    inner = _ordinary(model)
    _check_added(units, heads)
    growths = []
    if units:
        growths += [
            _Growth("units", width, units) for width in find_widths(model, "units", between, architecture)
        ]
    if heads:
        growths += [_Growth("heads", width, heads) for width in _free_heads(model, architecture)]
    for _, width, count in growths:
        if count % width.group:
            raise ValueError(
                f"heads: got {count}, expected a multiple of the {width.group} that share a key and value head"
            )
        _check_no_sites(width)
    parts = [_added_part(*growth) for growth in growths]
    _check_config(inner, parts, 1)
    for part in parts:
        _insert(inner, part.pieces, optimizer)
        _draw(inner, part.pieces, std, not zero_output, generator=None)
    _resize(inner, parts, 1)
    return Block(parts)


@torch.no_grad()
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
        block: what of it.
        how: "zero": all of the block's parameters are 0; those of hidden units have gradients of 0 from then on, so
            that training the model as a whole does not bring them back. "resample": they are drawn anew, from a normal
            distribution with the standard deviation of the rest of each parameter, biases are 0; the block has an
            influence that nothing has taught. "slice": as `contract`, influence or not; unroute the model before.
        optimizer: whose state of the block becomes 0 too. Without it momentum would bring some of the block back.
        generator: of "resample", on the CPU; default: torch's.

    Raises:
        TypeError: sharded parameters.
        ValueError: the block has no influence (it was ablated, or expanded and never trained); another `how`; the model
            is not of the block's shape.
    """
    if how not in HOW:
        raise ValueError(f"how: got {how!r}, expected one of {', '.join(map(repr, HOW))}")
    inner = inner_model(model)
    _refuse_sharded(block, inner)
    if block.is_whole and not block.has_influence(inner):
        raise ValueError(
            f"block: got {block}, which has no influence on the model: its output weights are 0, as it was ablated "
            "before, or expanded and never trained"
        )
    if how == "slice":
        _take_out(_ordinary(model), block, optimizer)
        return
    if how == "resample":
        _draw(inner, block.pieces, None, True, generator)
    for piece, parameter in block.parameters(inner):
        if how == "zero":
            piece.write(parameter, 0.0)
        _zero_state(parameter, piece, optimizer)


@torch.no_grad()
def contract(
    model: nn.Module,
    block: Block | int,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    architecture: Architecture | None = None,
) -> None:
    """Takes a block out, in place: an ordinary model of fewer units and heads, which computes what it did.

    Args:
        model: an ordinary (unrouted) model.
        block: units and heads; or how many hidden units of every MLP, counted from the last. Of a model with a
            configuration, as many of every layer.
        optimizer: see `expand`.
        architecture: see `expand`.

    Raises:
        TypeError: linear layers with adapters, or sharded ones.
        ValueError: the block still has influence (`ablate` it first, or at once with how="slice"); the model is routed;
            the block is not one of units and heads, or not as large in every layer; none would remain.
    """
    inner = _ordinary(model)
    if not isinstance(block, Block):
        block = Block.units(model, block, architecture=architecture)
    _refuse_sharded(block, inner)
    _check_removed(block, inner)
    if block.has_influence(inner):
        raise ValueError(
            f"block: got {block}, which still has influence on the model: its output weights are not 0; "
            'ablate() it first, or take it out with ablate(model, block, how="slice")'
        )
    _take_out(inner, block, optimizer)


@torch.no_grad()
def merge(
    model: nn.Module,
    block: Block,
    state: Mapping[str, Tensor],
    *,
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Puts a block that was taken out back where it was, in place: undoes `contract`.

    A model can so be published without a block, and the block beside it, for whom it concerns:

        state = block.state_dict(model)
        era.ablate(model, block, how="slice")
        ...
        era.merge(model, block, state)

    Args:
        model: an ordinary model of the shape that the larger one was contracted to.
        block: as it was.
        state: what its `state_dict` said.
        optimizer: see `expand`.

    Raises:
        TypeError: sharded parameters.
        ValueError: the model is routed, or has not the shape that the block was taken out of; the state is another
            block's. Nothing has changed then.
    """
    inner = _ordinary(model)
    _refuse_sharded(block, inner)
    _check_fits(inner, block, state)
    _check_config(inner, block.parts, 1)
    for part in block.parts:
        _insert(inner, part.pieces, optimizer)
    block.load_state_dict(inner, state)
    _resize(inner, block.parts, 1)


def gate(model: nn.Module, block: Block, scale: float) -> Gate:
    """Scales what a block adds to the model, for inference: 0 takes it out, more than 1 steers toward what it learnt.

    The output weights are scaled in place, so that nothing is computed twice and any code that reads the weights sees
    them; the gate keeps the original ones. In a `with` statement they are put back at its end:

        with era.gate(model, block, 3.0):
            model.generate(...)

    Args:
        model: the model, routed or not.
        block: units and heads.
        scale: the factor, any finite number.

    Raises:
        TypeError: sharded parameters.
        ValueError: the block is not one of units and heads; the scale is not finite; the model is not of its shape.
    """
    if not block.is_whole:
        raise ValueError(f"block: got {block}, expected one of units or heads (Block.units, Block.heads)")
    _refuse_sharded(block, inner_model(model))
    return Gate(model, block, scale)


class Gate:
    """A block's scale, see `gate`."""

    def __init__(self, model: nn.Module, block: Block, scale: float) -> None:
        self._outputs = [pair for pair in block.parameters(model) if pair[0].role == "output"]
        self._original = [piece.of(parameter) for piece, parameter in self._outputs]
        self._written = self._original
        self._scale = 1.0
        self.scale = scale

    @property
    def scale(self) -> float:
        """The factor; assigning it changes the model. 1 is the original, bit for bit."""
        return self._scale

    @scale.setter
    def scale(self, scale: float) -> None:
        if not math.isfinite(scale):
            raise ValueError(f"scale: got {scale}, expected a finite number")
        self._check_unchanged()
        self._written = [values if scale == 1 else values * scale for values in self._original]
        for (piece, parameter), values in zip(self._outputs, self._written, strict=True):
            piece.write(parameter, values)
        self._scale = float(scale)

    def remove(self) -> None:
        """Puts the original weights back."""
        self.scale = 1.0

    def merge(self) -> None:
        """Makes the scale permanent: the scaled weights are the original ones from now on."""
        self._check_unchanged()
        self._original, self._scale = self._written, 1.0

    def _check_unchanged(self) -> None:
        for (piece, parameter), values in zip(self._outputs, self._written, strict=True):
            if not torch.equal(piece.of(parameter), values):
                raise RuntimeError(
                    f"scale: {piece.parameter} was changed by something else since, by training or another gate, which "
                    "would be undone; remove gates in reverse order, and merge() one before training"
                )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"Gate({self._scale}, {len(self._outputs)} modules)"


def export(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Saves a model for those who know nothing of routes.

    Args:
        model: a model of transformers, routed or not, which is saved as a folder that `from_pretrained` loads; or any
            other module, whose state_dict is saved as a file of torch.save, on the CPU.
        path: the folder or the file.

    Raises:
        TypeError: adapters, or sharded parameters.
    """
    if inner_model(model) is not model:
        raise TypeError("model: got one with adapters, expected them merged: merge_and_unload() first")
    for name, parameter in model.named_parameters():
        if is_dtensor(parameter):
            raise TypeError(f"model: got {name} sharded, expected whole parameters: gather them first")
    save: Any = getattr(model, "save_pretrained", None)
    if save is not None:
        save(path)
        return
    torch.save({name: value.detach().cpu().clone() for name, value in model.state_dict().items()}, path)


# --------------------------------------------------------------------------------------------------------------------
# Checks.


def _ordinary(model: nn.Module) -> nn.Module:
    """The model inside of PEFT's, which must not be routed: plans have the widths of before."""
    inner = inner_model(model)
    if isinstance(inner, Swapped):
        raise ValueError("model: got a routed model, expected an ordinary one; unroute() it first")
    return inner


def _check_added(units: int, heads: int) -> None:
    for name, count in (("units", units), ("heads", heads)):
        if isinstance(count, bool) or not isinstance(count, int):
            raise TypeError(f"{name}: got {count!r}, expected an int")
        if count < 0 or (units == 0 and heads == 0):
            raise ValueError(f"{name}: got {count}, expected a positive number of {_WORDS[name]}")


_WORDS = {"units": "hidden units", "heads": "heads"}


def _free_heads(model: nn.Module, architecture: Architecture | None) -> list[Width]:
    widths = find_widths(model, "heads", None, architecture)
    if not isinstance(widths[0].module, RoutedAttention):
        chosen = architecture_of(inner_model(model)) if architecture is None else architecture
        if not chosen.layer.attention_kind.has_free_heads:
            raise TypeError(
                f"heads: got a {type(inner_model(model)).__name__}, in which the width of a head is d_model over their "
                "number; expected an architecture whose configuration has a head_dim, such as Llama"
            )
    return widths


def _added_part(what: str, width: Width, number: int) -> Part:
    """The last `number` of a module's units or heads, when it has so many more."""
    size = width.size + number
    added = torch.arange(size, device="cpu") >= width.size
    return Part(width.path, what, added.nonzero().flatten(), width.pieces(added), size, width.group)


def _check_config(inner: nn.Module, parts: Sequence[Part], sign: int) -> None:
    """Raises where the model's configuration cannot say what becomes of it."""
    if _config(inner) is not None:
        _new_numbers(_config(inner), _changes(parts, sign))


def _check_no_sites(width: Width) -> None:
    if isinstance(width.module, RoutedModule) and width.module.sites is not None:
        raise ValueError(
            f"model: got {width.path or type(width.module).__name__} with sites, whose tables have its width; expected "
            "sites = None, to be set again afterwards"
        )


def _refuse_sharded(block: Block, model: nn.Module) -> None:
    named = dict(model.named_parameters())
    for piece in block.pieces:
        if is_dtensor(named.get(piece.parameter)):
            raise TypeError(
                f"{piece.parameter}: got a sharded parameter, expected a whole one: do this before sharding"
            )


def _check_removed(block: Block, inner: nn.Module) -> None:
    """Raises unless whole groups go, some stay, and a configuration can say what is left."""
    for part in block.parts:
        if part.what == "parameters":
            raise ValueError(
                "block: got one of parameters, expected one of units or heads (Block.units, Block.heads)"
            )
        if len(part.index) == part.size:
            raise ValueError(f"{part.what}: got all {part.size} of {part.module}, expected some to remain")
        groups = part.index // part.group
        if len(groups) != part.group * len(groups.unique()):
            raise ValueError(
                f"heads: got {part.index.tolist()} of {part.module}, expected whole groups of the {part.group} that "
                "share a key and value head"
            )
    if _config(inner) is None:
        return
    _check_config(inner, block.parts, -1)
    for what in ("units", "heads"):
        counts = {part.module: len(part.index) for part in block.parts if part.what == what and part.module}
        layers = Shape.of(_config(inner)).layers
        if counts and (len(counts) != layers or len(set(counts.values())) > 1):
            raise ValueError(
                f"{what}: got {counts}, expected as many of each of the model's {layers} layers: its configuration "
                "has one number for all"
            )


def _check_fits(inner: nn.Module, block: Block, state: Mapping[str, Tensor]) -> None:
    """Raises unless the state is the block's, and the model what is left without it."""
    keys = block.keys
    if list(state) != keys:
        raise ValueError(f"state: got keys {list(state)[:2]}..., expected the block's, {keys[:2]}...")
    named = dict(inner.named_parameters())
    for key, piece in zip(keys, block.pieces, strict=True):
        got = list(named[piece.parameter].shape) if piece.parameter in named else None
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


# --------------------------------------------------------------------------------------------------------------------
# Parameters of another size, and an optimizer's state of them.


def _insert(model: nn.Module, pieces: Sequence[Piece], optimizer: torch.optim.Optimizer | None) -> None:
    """Makes room for pieces: zeros at their indices, everything else in its order around them."""
    for piece in pieces:
        kept = _others(piece)

        def grown(old: Tensor, piece: Piece = piece, kept: Tensor = kept) -> Tensor:
            shape = [*old.shape]
            shape[piece.dim] = piece.size
            return old.new_zeros(shape).index_copy_(piece.dim, kept.to(old.device), old)

        _replace(model, piece, grown, optimizer)


def _take_out(model: nn.Module, block: Block, optimizer: torch.optim.Optimizer | None) -> None:
    _check_removed(block, model)
    block.parameters(model)  # raises where the model is not of its shape, before anything changes
    for piece in block.pieces:
        kept = _others(piece)

        def left(old: Tensor, piece: Piece = piece, kept: Tensor = kept) -> Tensor:
            return old.index_select(piece.dim, kept.to(old.device))

        _replace(model, piece, left, optimizer)
    _resize(model, block.parts, -1)


def _others(piece: Piece) -> Tensor:
    """The indices along the dimension that are not the piece's."""
    mine = torch.zeros(piece.size, dtype=torch.bool, device="cpu").index_fill_(0, piece.index, True)
    return (~mine).nonzero().flatten()


def _replace(
    model: nn.Module,
    piece: Piece,
    change: Callable[[Tensor], Tensor],
    optimizer: torch.optim.Optimizer | None,
) -> None:
    """Gives a module a changed parameter in the place of its own, and the optimizer too."""
    path, _, name = piece.parameter.rpartition(".")
    module: Any = model.get_submodule(path)
    old = getattr(module, name)
    new = nn.Parameter(change(old.detach()).contiguous(), old.requires_grad)
    setattr(module, name, new)
    if name == "weight":
        _name_widths(module)
    if optimizer is not None:
        _hand_over(optimizer, old, new, piece.dim, change)


def _name_widths(linear: Any) -> None:
    """Says a linear layer's widths where it says them."""
    if hasattr(linear, "out_features"):
        linear.out_features, linear.in_features = linear.weight.shape
    for name, width in zip(("nx", "nf"), linear.weight.shape, strict=True):
        if hasattr(linear, name):  # transformers' Conv1D
            setattr(linear, name, width)


def _hand_over(
    optimizer: torch.optim.Optimizer,
    old: nn.Parameter,
    new: nn.Parameter,
    dim: int,
    change: Callable[[Tensor], Tensor],
) -> None:
    """Puts a parameter in the place of another one, with its state changed in the same way.

    State is changed where it has the old parameter's size along the dimension: moments, and step counts of rows or
    columns (RoutedAdamW's broadcast against the parameter). Other state, such as a step count, is the same for all.
    """
    for group in optimizer.param_groups:
        group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
    if old not in optimizer.state:
        return
    state = optimizer.state.pop(old)
    optimizer.state[new] = {
        key: change(value) if _runs_along(value, old, dim) else value for key, value in state.items()
    }


def _runs_along(value: Any, parameter: Tensor, dim: int) -> bool:
    return (
        isinstance(value, Tensor)
        and value.dim() == parameter.dim()
        and value.shape[dim] == parameter.shape[dim]
    )


def _zero_state(parameter: nn.Parameter, piece: Piece, optimizer: torch.optim.Optimizer | None) -> None:
    if optimizer is None:
        return
    for value in optimizer.state.get(parameter, {}).values():
        if _runs_along(value, parameter, piece.dim):
            piece.write(value, 0.0)


def _draw(
    model: nn.Module,
    pieces: Sequence[Piece],
    std: float | None,
    with_outputs: bool,
    generator: torch.Generator | None,
) -> None:
    """Draws pieces of weights anew, with the standard deviation of the rest of each; biases become 0."""
    named = dict(model.named_parameters())
    for piece in pieces:
        parameter = named[piece.parameter]
        if parameter.dim() < 2:
            piece.write(parameter, 0.0)
        elif piece.role != "output" or with_outputs:
            rest = parameter.index_select(piece.dim, _others(piece).to(parameter.device))
            scale = float(rest.std()) if std is None else std
            shape = [*parameter.shape]
            shape[piece.dim] = len(piece.index)
            piece.write(parameter, torch.empty(shape).normal_(std=scale, generator=generator))


def _config(model: nn.Module) -> Any:
    """A configuration that says how wide the model is, or None."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "num_attention_heads"):
        return None
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _new_numbers(config: Any, changes: Mapping[str, tuple[int, int]]) -> dict[str, int]:
    """What a configuration says after changes of "units" and "heads": by how many, in groups of how many.

    Raises:
        ValueError: transformers would refuse to save it.
    """
    shape = Shape.of(config)
    numbers = {}
    if "units" in changes:
        numbers["n_inner" if hasattr(config, "n_inner") else "intermediate_size"] = (
            shape.d_ff + changes["units"][0]
        )
    if "heads" in changes:
        change, group = changes["heads"]
        numbers |= {
            "head_dim": shape.head_dim,  # else it would follow from their number
            "num_attention_heads": shape.heads + change,
            "num_key_value_heads": shape.kv_heads + change // group,
        }
    changed = copy.deepcopy(config)
    for name, value in numbers.items():
        setattr(changed, name, value)
    try:
        getattr(changed, "validate", lambda: None)()
    except Exception as error:
        raise ValueError(
            f"{', '.join(changes)}: got numbers that {type(config).__name__} refuses, expected others: "
            f"{error.__cause__ or error}"
        ) from error
    return numbers


def _changes(parts: Sequence[Part], sign: int) -> dict[str, tuple[int, int]]:
    """By how many units and heads, and in groups of how many, a configuration changes."""
    return {
        part.what: (sign * len(part.index), part.group)
        for part in parts
        if part.module  # else of layers that gradroute does not know, and nor does the configuration
    }


def _resize(model: nn.Module, parts: Sequence[Part], sign: int) -> None:
    """Says new numbers of units and heads where the model says them: in its configuration, and on its modules."""
    for part in parts:
        module: Any = model.get_submodule(part.module)
        if part.what == "heads":
            for name, group in (("heads", 1), ("kv_heads", part.group), ("num_key_value_heads", part.group)):
                if isinstance(getattr(module, name, None), int):
                    setattr(module, name, getattr(module, name) + sign * len(part.index) // group)
    config = _config(model)
    if config is not None:
        for name, value in _new_numbers(config, _changes(parts, sign)).items():
            setattr(config, name, value)
