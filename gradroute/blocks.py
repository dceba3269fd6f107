"""Blocks: a part of a model's parameters by name, such as the hidden units and heads that one route's tokens train."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from .arguments import check_indices, check_int, check_is, is_int, ordinary_tensors, shown
from .models.architectures import Architecture
from .models.expert_blocks import expert_pieces, find_experts
from .models.inspection import Piece, Stored, Units, Width, find_widths, inner_model, stored
from .tables import indices_of

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Block", "Part", "Piece", "Units", "Which", "check_disjoint"]

#: How many units, heads or indices, counted from the last; or which.
Which = int | slice | Sequence[int] | Tensor


@dataclass(frozen=True, eq=False)
class Part:
    """A block's share of one module.

    Attributes:
        module: the module's path.
        what: "units" or "heads": whole ones, which can be taken out; "experts": whole ones, which can be gated and
            ablated; "parameters": anything else.
        index: int64 `[n]`, which units, heads or experts, ascending; empty for parameters.
        pieces: the rows and columns of the module's parameters that belong to the block.
        size: how many units, heads or experts the module has.
        group: how many query heads share a key and value head; 1 for units.
    """

    module: str
    what: str
    index: Tensor
    pieces: tuple[Piece, ...]
    size: int = 0
    group: int = 1

    @property
    def key(self) -> tuple[str, str, tuple[str, ...]]:
        """The key that all parts of the same units, heads or parameters of one module share."""
        return self.module, self.what, tuple(p.parameter for p in self.pieces if p.role == "output")


class Block:
    """Rows and columns of a model's parameters, such as those of hidden units or heads.

    A block holds names and indices, no tensors of the model: the same one serves copies of the model, routed or not,
    until `gradroute.era` changes their shape. Blocks that do not overlap are joined by `|`.

    Attributes:
        parts: the block's share of each module, which is one part even where blocks were joined.

    Raises:
        ValueError: parts that overlap, or that have one group of heads in common.
    """

    def __init__(self, parts: Iterable[Part]) -> None:
        groups: dict[tuple[str, str, tuple[str, ...]], list[Part]] = {}
        check_is("parts", parts, Iterable, "parts of a Block")
        for part in parts:
            check_is("parts, an entry", part, Part, "a gradroute.blocks.Part")
            groups.setdefault(part.key, []).append(part)
        if not groups:
            raise ValueError("parts: got none, expected at least one")
        _refuse_overlaps([piece for group in groups.values() for part in group for piece in part.pieces])
        self.parts = tuple(map(_joined, groups.values()))

    @classmethod
    def units(
        cls,
        model: nn.Module,
        units: Which,
        *,
        layers: Collection[int] | None = None,
        between: Units | Sequence[Units] | None = None,
        architecture: Architecture | None = None,
    ) -> Self:
        """Hidden units of MLPs: their rows of the layers before them, with the biases, and columns of the layer after.

        Args:
            model: a model of transformers that `gradroute.models.route` takes, routed or not, or a module with
                RoutedMLP or RoutedGatedMLP layers, or any other with `between`.
            units: how many, counted from the last; or which (slice or indices).
            layers: the indices of the decoder layers, or of the module's MLPs in their order; default: all.
            between: where the units are in a module that gradroute does not know.
            architecture: see `gradroute.models.route`.

        Raises:
            TypeError: linear layers with adapters, or sharded ones; no such architecture.
            ValueError: no such units or layers, or none chosen.
        """
        return cls(_parts(find_widths(model, "units", between, architecture), "units", units, layers))

    @classmethod
    def heads(
        cls,
        model: nn.Module,
        heads: Which,
        *,
        layers: Collection[int] | None = None,
        architecture: Architecture | None = None,
    ) -> Self:
        """Query heads of attention: their rows of q, and columns of the output projection.

        Rows of k and v belong to the block where all query heads that share them belong to it.

        Args:
            model: see `units`, with RoutedAttention layers.
            heads: how many, counted from the last; or which (slice or indices).
            layers: the indices of the layers; default: all.
            architecture: see `gradroute.models.route`.

        Raises:
            TypeError: linear layers with adapters, or sharded ones; no such architecture.
            ValueError: no such heads or layers, or none chosen.
        """
        return cls(_parts(find_widths(model, "heads", None, architecture), "heads", heads, layers))

    @classmethod
    def experts(
        cls,
        model: nn.Module,
        experts: Which,
        *,
        layers: Collection[int] | None = None,
        architecture: Architecture | None = None,
    ) -> Self:
        """Experts of mixtures: all of their parameters. The router's rows of them are not the block's.

        Such a block is gated and ablated like one of units: an ablated expert adds nothing, and takes its place among
        the chosen as before. The number of experts does not change: `era.contract` refuses it. Blocks of other experts
        in other layers are joined by `|`.

        Args:
            model: a model of transformers with mixtures of experts that `gradroute.models.route` takes, routed or not.
            experts: how many of each mixture, counted from the last; or which (slice or indices).
            layers: the indices of the decoder layers; default: all that have experts.
            architecture: see `gradroute.models.route`.

        Raises:
            TypeError: experts of another form, or sharded ones; no such architecture.
            ValueError: no such experts or layers, layers without experts, or none chosen.
        """
        parts = []
        for path, module, count in find_experts(model, architecture, layers):
            index = _indices("experts", experts, count)
            parts.append(Part(path, "experts", index, expert_pieces(path, module, index), count))
        return cls(parts)

    @classmethod
    def of(cls, model: nn.Module, pieces: Mapping[str, tuple[int, Which]]) -> Self:
        """Rows or columns of any parameters, given by name → (dim, which), as in `{"fc.weight": (0, slice(0, 8))}`.

        Raises:
            ValueError: no such parameter or dimension, an index out of range, or nothing chosen.
        """
        parameters = _named(model)
        chosen = []
        check_is("pieces", pieces, Mapping, "a dict {name: (dim, which)}")
        for name, piece in pieces.items():
            if not isinstance(piece, (tuple, list)) or len(piece) != 2:
                raise TypeError(f"pieces[{name!r}]: got {shown(piece)}, expected (dim, which)")
            dim, which = piece
            if name not in parameters:
                raise ValueError(f"pieces: got {name!r}, expected the name of one of the model's parameters")
            if not is_int(dim):
                raise TypeError(f"pieces[{name!r}]: got dimension {shown(dim)}, expected an int")
            if not 0 <= dim < parameters[name].dim():
                raise ValueError(
                    f"pieces[{name!r}]: got dimension {dim}, expected one of a parameter of shape "
                    f"{list(parameters[name].shape)}, from 0 on"
                )
            index = _indices(f"pieces[{name!r}]", which, parameters[name].shape[dim])
            chosen.append(Piece(name, dim, index, parameters[name].shape[dim]))
        if not chosen:
            raise ValueError("pieces: got none, expected at least one")
        return cls([Part("", "parameters", torch.empty(0, dtype=torch.int64, device="cpu"), tuple(chosen))])

    @property
    def is_whole(self) -> bool:
        """Whether it consists of whole units, heads and experts, which can be gated."""
        return all(part.what != "parameters" for part in self.parts)

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The pieces of all parts."""
        return tuple(piece for part in self.parts for piece in part.pieces)

    def __or__(self, other: Block) -> Block:
        if not isinstance(other, Block):
            return NotImplemented
        return Block(self.parts + other.parts)

    @property
    def keys(self) -> list[str]:
        """The keys of the block's state_dict: a piece's number and its parameter's name."""
        return [f"{i}.{piece.parameter}" for i, piece in enumerate(self.pieces)]

    def parameters(self, model: nn.Module) -> list[tuple[Piece, nn.Parameter]]:
        """Every piece with its parameter.

        Raises:
            ValueError: the model is not of the shape that the block was made for.
        """
        return [(piece, home.parameter) for piece, home in stored_pieces(self, model)]

    def tensors(self, model: nn.Module) -> list[Tensor]:
        """Copies of the pieces, detached, in the order of `pieces`; of a sharded model whole ones on every rank."""
        return [piece.of(home.values()) for piece, home in stored_pieces(self, model)]

    def masks(self, model: nn.Module) -> dict[str, Tensor]:
        """Parameter's name → a mask of its shape and on its device, True where an element is the block's."""
        masks: dict[str, Tensor] = {}
        for piece, parameter in self.parameters(model):
            mask = masks.setdefault(
                piece.parameter, torch.zeros(parameter.shape, dtype=torch.bool, device=parameter.device)
            )
            mask.index_fill_(piece.dim, piece.index.to(parameter.device), True)
        return masks

    def state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """Copies of the block's parameters, by "number.parameter": `load_state_dict` puts them back."""
        return dict(zip(self.keys, self.tensors(model), strict=True))

    def load_state_dict(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Writes into the model what `state_dict` read, from this model or another one of its shape.

        Raises:
            ValueError: keys or shapes are not the block's. Nothing has changed then.
        """
        pieces = stored_pieces(self, model)
        check_state(state, self.keys)
        for key, (piece, home) in zip(self.keys, pieces, strict=True):
            given, shape = state[key], [*home.parameter.shape]
            shape[piece.dim] = len(piece.index)
            if not isinstance(given, Tensor) or list(given.shape) != shape:
                got = (
                    f"shape {list(given.shape)}" if isinstance(given, Tensor) else f"a {type(given).__name__}"
                )
                raise ValueError(f"state[{key!r}]: got {got}, expected a tensor of shape {shape}")
            why = home.why_fixed(shape=False)
            if why is not None:
                raise TypeError(f"{piece.parameter}: got a parameter that is {why}")
        for key, (piece, home) in zip(self.keys, pieces, strict=True):
            home.write(piece, state[key])

    def has_influence(self, model: nn.Module) -> bool:
        """Whether the block changes what the model computes: it does not where all that reads its units is 0.

        Raises:
            ValueError: a block of parameters, or on the meta device, whose influence cannot be known.
        """
        if not self.is_whole:
            raise ValueError(
                "block: got one of parameters, expected one of units or heads (Block.units, Block.heads)"
            )
        outputs = [pair for pair in stored_pieces(self, model) if pair[0].role == "output"]
        for piece, home in outputs:
            if home.is_empty:
                raise ValueError(
                    f"model: got {piece.parameter} on the meta device, expected a parameter with values"
                )
        return any(bool(piece.of(home.values()).any()) for piece, home in outputs)

    def __repr__(self) -> str:
        counts: dict[str, int] = {}
        for part in self.parts:
            counts[part.what] = counts.get(part.what, 0) + len(part.index)
        parts = ", ".join(f"{count} {what}" if count else what for what, count in counts.items())
        return f"Block({parts} of {len({part.module for part in self.parts})} modules)"


def stored_pieces(block: Block, model: nn.Module) -> list[tuple[Piece, Stored]]:
    """Every piece of a block with its parameter, whose values may be in shards or offloaded.

    Raises:
        ValueError: the model is not of the shape that the block was made for.
    """
    named = stored(inner_model(model))
    found = []
    for piece in block.pieces:
        parameter = named[piece.parameter].parameter if piece.parameter in named else None
        size = -1 if parameter is None or piece.dim >= parameter.dim() else parameter.shape[piece.dim]
        if parameter is None or size != piece.size:
            shape = "none" if parameter is None else f"one of shape {list(parameter.shape)}"
            raise ValueError(
                f"block: got one of a model whose {piece.parameter} has {piece.size} in dimension {piece.dim}, and "
                f"the model has {shape}; expected a block of it: make it again after a change of shape"
            )
        found.append((piece, named[piece.parameter]))
    return found


def check_state(state: object, keys: Collection[str]) -> None:
    """Raises unless a state is a dict of a block's keys."""
    if not isinstance(state, Mapping):
        raise TypeError(f"state: got {shown(state)}, expected what the block's state_dict returned")
    strange = sorted(map(str, state.keys() ^ set(keys)))
    if strange:
        raise ValueError(f"state: got keys that differ in {strange[:4]}, expected those of the block")


def check_disjoint(blocks: Mapping[str, Block], model: nn.Module) -> None:
    """Raises ValueError where two of the named blocks have an element of a parameter in common."""
    check_is("blocks", blocks, Mapping, "a dict {name: Block}")
    for name, block in blocks.items():
        check_is(f"blocks[{name!r}]", block, Block, "a gradroute.blocks.Block")
    named = _named(model)
    owners: dict[int, list[tuple[str, Tensor]]] = {}  # tied parameters are one
    for name, block in blocks.items():
        for parameter, mask in block.masks(model).items():
            for other, taken in owners.setdefault(id(named[parameter]), []):
                common = int((mask & taken).sum())
                if common:
                    raise ValueError(
                        f"blocks: got {other!r} and {name!r}, which overlap in {common} elements of {parameter}; "
                        "expected disjoint ones"
                    )
            owners[id(named[parameter])].append((name, mask))


def _parts(widths: list[Width], what: str, which: Which, layers: Collection[int] | None) -> list[Part]:
    """The shares of some layers in a block of units or heads."""
    chosen = range(len(widths)) if layers is None else check_indices("layers", layers, len(widths))
    if not chosen:
        raise ValueError(f"model: got one without {what}, expected some")
    parts = []
    for i in chosen:
        index = _indices(what, which, widths[i].size)
        selected = torch.zeros(widths[i].size, dtype=torch.bool, device="cpu").index_fill_(0, index, True)
        pieces = widths[i].pieces(selected)
        parts.append(Part(widths[i].path, what, index, pieces, widths[i].size, widths[i].group))
    return parts


def _indices(name: str, which: Any, size: int) -> Tensor:  # [n], ascending
    """The indices that `which` chooses of `size`: how many, counted from the last, or which."""
    if isinstance(which, (Tensor, np.ndarray)) and which.ndim == 0:
        which = which.item()  # a number of NumPy or torch is a number
    if is_int(which):
        count = check_int(name, which, 1, size)
        indices = list(range(size - count, size))
    elif isinstance(which, (bool, str, float)):
        raise TypeError(f"{name}: got {which!r}, expected a number, a slice or indices")
    else:
        indices = sorted(set(indices_of(which, size, name)))
    if not indices:
        raise ValueError(f"{name}: got {shown(which)}, which chooses none of {size}, expected at least one")
    with ordinary_tensors():
        return torch.tensor(indices, dtype=torch.int64, device="cpu")


def _refuse_overlaps(pieces: Sequence[Piece]) -> None:
    """Raises where two pieces have an element in common: rows and columns of one matrix always cross."""
    by_parameter: dict[str, list[Piece]] = {}
    for piece in pieces:
        for other in by_parameter.setdefault(piece.parameter, []):
            if piece.dim != other.dim or bool(torch.isin(piece.index, other.index).any()):
                raise ValueError(f"blocks: got two that overlap in {piece.parameter}, expected disjoint ones")
        by_parameter[piece.parameter].append(piece)


def _joined(parts: Sequence[Part]) -> Part:
    """Several parts of one module as one part."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if len({part.size for part in parts}) > 1:
        raise ValueError(
            f"blocks: got two of {first.module} when it had {[part.size for part in parts]} {first.what}, expected "
            "blocks of one shape"
        )
    groups = torch.cat([(part.index // first.group).unique() for part in parts])
    if first.group > 1 and len(groups.unique()) < len(groups):  # k and v would belong to neither block
        raise ValueError(
            f"blocks: got heads of {first.module} that share a key and value head in two blocks, expected them in one: "
            "Block.heads(model, [...])"
        )
    pieces: dict[tuple[str, int, str], list[Piece]] = {}
    for part in parts:
        for piece in part.pieces:
            pieces.setdefault((piece.parameter, piece.dim, piece.role), []).append(piece)
    joined = tuple(replace(same[0], index=_merged(piece.index for piece in same)) for same in pieces.values())
    return replace(first, index=_merged(part.index for part in parts), pieces=joined)


def _merged(indices: Iterable[Tensor]) -> Tensor:
    return torch.cat(list(indices)).unique()  # also sorts


def _named(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of the model inside PEFT's, tied ones under each of their names."""
    return dict(inner_model(model).named_parameters(remove_duplicate=False))
