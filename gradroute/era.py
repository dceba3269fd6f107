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
        optimizer: one that has the parameters: it gets the new ones in their place, its state zeros for what is new
            (beside an old step count, which makes their first updates some times larger). Its groups stay: make a
            RoutedAdamW after `route`, or the plan's columns are not its blocks. Default: none; make it afterwards.
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
    _check_std(std)
    for _, width, count in growths:
        if count % width.group:
            raise ValueError(
                f"heads: got {count}, expected a multiple of the {width.group} that share a key and value head"
            )
    block = Block([_added_part(*growth) for growth in growths])
    _check_parameters(block, inner)
    _check_change(inner, block, 1, optimizer)
    drawn = _drawn(inner, block.pieces, std, not zero_output, None)
    for piece in block.pieces:
        _insert(inner, piece, optimizer)
    _write(inner, drawn)
    _resize(inner, block.parts, 1)
    return block


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
        how: "zero": all of the block's parameters are 0; those of hidden units, where act(0) = 0, have gradients of 0
            from then on, so that training the model as a whole does not bring them back. "resample": they are drawn
            anew, from a normal distribution with the standard deviation of the rest of each parameter, biases are 0;
            the block has an influence that nothing has taught. "slice": as `contract`, influence or not; unroute the
            model before.
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
    _check_optimizer(optimizer)
    _check_parameters(block, inner)
    if block.is_whole and not block.has_influence(inner):
        raise ValueError(
            f"block: got {block}, which has no influence on the model: its output weights are 0, as it was ablated "
            "before, or expanded and never trained"
        )
    if how == "slice":
        _take_out(_ordinary(model), block, optimizer)
        return
    pieces = block.parameters(inner)
    drawn = _drawn(inner, block.pieces, None, True, generator) if how == "resample" else []
    for piece, parameter in pieces:
        piece.write(parameter, 0.0)
        if parameter.grad is not None:  # it would bring the block back in the next step
            piece.write(parameter.grad, 0.0)
        _zero_state(parameter, piece, optimizer)
    _write(inner, drawn)


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
    _check_parameters(block, inner)
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
    _check_parameters(block, inner)
    _check_fits(inner, block, state)
    _check_change(inner, block, 1, optimizer)
    for piece in block.pieces:
        _insert(inner, piece, optimizer)
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
    _check_parameters(block, inner_model(model))
    return Gate(model, block, scale)


class Gate:
    """A block's scale, see `gate`."""

    def __init__(self, model: nn.Module, block: Block, scale: float) -> None:
        self._model = model
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
        scaled = [values if scale == 1 else values * scale for values in self._original]
        for (piece, _), values in zip(self._outputs, scaled, strict=True):
            if scale != 1 and not torch.isfinite(values).all():
                raise ValueError(
                    f"scale: got {scale}, by which {piece.parameter} is not finite in {values.dtype}, expected a "
                    "smaller one"
                )
        self._written = scaled
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
        named = dict(inner_model(self._model).named_parameters(remove_duplicate=False))
        for (piece, parameter), values in zip(self._outputs, self._written, strict=True):
            if named.get(piece.parameter) is not parameter or not torch.equal(piece.of(parameter), values):
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
    state = model.state_dict()
    torch.save({k: v.detach().cpu().clone() if isinstance(v, Tensor) else v for k, v in state.items()}, path)


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


def _check_change(inner: nn.Module, block: Block, sign: int, optimizer: torch.optim.Optimizer | None) -> None:
    """Raises where parameters of another shape would not fit what else knows of them."""
    for part in block.parts:
        module = inner.get_submodule(part.module)
        if isinstance(module, RoutedModule) and module.sites is not None:
            raise ValueError(
                f"model: got {part.module or type(module).__name__} with sites, whose tables have its width; expected "
                "sites = None, to be set again afterwards"
            )
    config = _config(inner)
    if config is not None:
        if not all(part.module for part in block.parts):
            raise ValueError(
                f"between: got layers of a {type(inner).__name__}, whose configuration could not say their new width; "
                "expected a module without a configuration"
            )
        _new_numbers(config, _changes(block.parts, sign))
    names: dict[int, list[str]] = {}
    for name, parameter in inner.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    named = dict(inner.named_parameters(remove_duplicate=False))
    for piece in block.pieces:
        tied = names[id(named[piece.parameter])]
        if len(tied) > 1:
            raise ValueError(f"model: got {' and '.join(tied)} tied, expected parameters of their own")
    _check_optimizer(optimizer)
    if optimizer is not None:
        _check_states(optimizer, {piece.parameter: named[piece.parameter] for piece in block.pieces})


def _check_optimizer(optimizer: Any) -> None:
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer: got a {type(optimizer).__name__}, expected a torch.optim.Optimizer")


def _check_states(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> None:
    """Raises where an optimizer's state is not laid out like its parameters."""
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if not isinstance(value, Tensor) or value.dim() == 0 or key == "step":
                continue
            if value.shape != parameter.shape or not value.is_floating_point():
                raise TypeError(
                    f"optimizer: got state {key!r} of shape {list(value.shape)} and {value.dtype} for {name} of shape "
                    f"{list(parameter.shape)}, expected floating point of its shape; make the optimizer anew"
                )


def _check_std(std: Any) -> None:
    if std is not None and not (isinstance(std, (int, float)) and 0 <= std < math.inf):
        raise ValueError(f"std: got {std!r}, expected a finite number, 0 or more")


def _check_parameters(block: Block, model: nn.Module) -> None:
    """Raises unless all parameters of a block that are there are whole and have values."""
    named = dict(model.named_parameters(remove_duplicate=False))
    for piece in block.pieces:
        parameter = named.get(piece.parameter)
        if is_dtensor(parameter):
            raise TypeError(
                f"{piece.parameter}: got a sharded parameter, expected a whole one: do this before sharding"
            )
        if parameter is not None and parameter.is_meta:
            raise ValueError(
                f"{piece.parameter}: got a parameter on the meta device, expected one with values"
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
    if state.keys() != set(keys):
        raise ValueError(
            f"state: got keys that differ from the block's in {sorted(state.keys() ^ set(keys))[:4]}"
        )
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


def _insert(model: nn.Module, piece: Piece, optimizer: torch.optim.Optimizer | None) -> None:
    """Makes room for a piece: zeros at its indices, everything else in its order around them."""
    kept = _others(piece)

    def grown(old: Tensor) -> Tensor:
        shape = [*old.shape]
        shape[piece.dim] = piece.size
        return old.new_zeros(shape).index_copy_(piece.dim, kept.to(old.device), old)

    _replace(model, piece, grown, optimizer)


def _take_out(model: nn.Module, block: Block, optimizer: torch.optim.Optimizer | None) -> None:
    _check_removed(block, model)
    block.parameters(model)  # raises where the model is not of its shape
    _check_change(model, block, -1, optimizer)
    for piece in block.pieces:
        _remove(model, piece, optimizer)
    _resize(model, block.parts, -1)


def _remove(model: nn.Module, piece: Piece, optimizer: torch.optim.Optimizer | None) -> None:
    """Takes a piece out of its parameter."""
    kept = _others(piece)
    _replace(model, piece, lambda old: old.index_select(piece.dim, kept.to(old.device)), optimizer)


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
        key: change(value) if _runs_along(key, value, old, dim) else value for key, value in state.items()
    }


def _runs_along(key: str, value: Any, parameter: Tensor, dim: int) -> bool:
    """Whether state has an element for each index of a parameter along a dimension."""
    if not isinstance(value, Tensor) or value.dim() != parameter.dim():
        return False
    if key == "step" and parameter.dim() > 1:  # [n, 1] or [1, m]
        return value.numel() == value.shape[dim] == parameter.shape[dim] > 1
    return value.shape == parameter.shape


def _zero_state(parameter: nn.Parameter, piece: Piece, optimizer: torch.optim.Optimizer | None) -> None:
    if optimizer is None:
        return
    for key, value in optimizer.state.get(parameter, {}).items():
        if _runs_along(key, value, parameter, piece.dim):
            piece.write(value, 0.0)


def _drawn(
    model: nn.Module,
    pieces: Sequence[Piece],
    std: float | None,
    with_outputs: bool,
    generator: torch.Generator | None,
) -> list[tuple[Piece, Tensor]]:
    """New values of pieces of weights: normal, with the standard deviation of the rest of each; of the others none."""
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
    """What of a parameter is not the piece's, or all of it where the piece has yet to be added."""
    if parameter.shape[piece.dim] < piece.size:
        return parameter
    if len(piece.index) == piece.size:
        raise ValueError(
            f"block: got all of {piece.parameter}, expected a rest whose standard deviation new values could have"
        )
    return parameter.index_select(piece.dim, _others(piece).to(parameter.device))


def _write(model: nn.Module, drawn: Sequence[tuple[Piece, Tensor]]) -> None:
    named = dict(model.named_parameters(remove_duplicate=False))
    for piece, values in drawn:
        piece.write(named[piece.parameter], values)


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
    except Exception as error:  # of which class differs between versions of transformers
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
            named = {"heads": 1, "kv_heads": part.group, "num_key_value_heads": part.group}
        else:
            named = {"intermediate_size": 1} if part.module else {}
        for name, group in named.items():
            if isinstance(getattr(module, name, None), int):
                setattr(module, name, getattr(module, name) + sign * len(part.index) // group)
    config = _config(model)
    if config is not None:
        for name, value in _new_numbers(config, _changes(parts, sign)).items():
            setattr(config, name, value)
