"""Answers about models for the rest of gradroute: where layers, hidden units and heads are, and what is routed.

`gradroute.blocks`, `gradroute.era` and `gradroute.telemetry` know models by this module alone; it imports none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import check_is, shown
from ..layers import RoutedAttention, RoutedGatedMLP, RoutedMLP
from ..layers.reading import is_dtensor
from .architectures import ARCHITECTURES, Architecture, architecture_of, inner_model, submodule
from .attention import Attention, head_features
from .dtensors import on_all_ranks, sharded_like, whole, write
from .fsdp import reshard
from .linear import is_transposed, matrix
from .lora import refuse_unreadable
from .mlp import MLP
from .modules import AnyModule
from .offloaded import offloaded
from .stored import Stored, stored
from .swapped import Swapped

__all__ = [
    "Piece",
    "Stored",
    "Units",
    "Width",
    "added_units",
    "decoder_layers",
    "find_widths",
    "inner_model",
    "is_dtensor",
    "offloaded",
    "on_all_ranks",
    "ordinary_model",
    "record_added_units",
    "reshard",
    "sharded_like",
    "stored",
    "whole",
]


@dataclass(frozen=True)
class Units:
    """Hidden units between linear layers of a module that gradroute does not know, by the submodules' paths.

    Attributes:
        inputs: the layers that make the units: their outputs are the units, one for one.
        outputs: the layers that read them: their inputs are the units.
    """

    inputs: Sequence[str]
    outputs: Sequence[str]

    def __post_init__(self) -> None:
        for name in ("inputs", "outputs"):
            paths = getattr(self, name)
            if isinstance(paths, str) or not paths:
                raise ValueError(f"{name}: got {paths!r}, expected a list of paths")
            if not isinstance(paths, Sequence):
                raise TypeError(f"{name}: got {shown(paths)}, expected a list of paths")


@dataclass(frozen=True, eq=False)
class Piece:
    """Rows or columns of one parameter.

    Attributes:
        parameter: its name in `model.named_parameters()`.
        dim: along which dimension of the parameter `index` counts.
        index: int64 `[n]`, ascending, on the CPU.
        size: the parameter's size along the dimension.
        role: "input" for what makes a block's units (rows of the layers before them, and their biases), "output" for
            what reads them (columns of the layer after them; the block has no influence where they are 0), "other" for
            anything else.
    """

    parameter: str
    dim: int
    index: Tensor
    size: int
    role: str = "other"

    def of(self, parameter: Tensor) -> Tensor:
        """A copy of the piece, detached; of a DTensor on every rank, and all of them must call this."""
        parameter = whole(parameter)
        return parameter.index_select(self.dim, self.index.to(parameter.device))

    def write(self, parameter: Tensor, values: Tensor | float) -> None:
        """Overwrites the piece, in place; of a DTensor every rank its share, of values that every rank has."""
        index = self.index.to(parameter.device)
        with torch.no_grad():
            if is_dtensor(parameter):
                write(parameter, self.dim, index, values)  # type: ignore[arg-type]
            elif isinstance(values, Tensor):
                parameter.index_copy_(self.dim, index, values.to(parameter))
            else:
                parameter.index_fill_(self.dim, index, values)


@dataclass(frozen=True)
class Width:
    """Where a module's units or heads are in its linear layers.

    Attributes:
        path: the module's path.
        module: the module itself.
        size: how many units or heads the module has.
        inputs: the paths of the layers that make the units or heads.
        outputs: the paths of the layers that read them.
        features: chosen units or heads, bool `[n]` of n in all → the rows of each of the inputs and the columns of the
            outputs; n need not be `size`.
        group: how many query heads share a key and value head; 1 for units.
        is_free: whether their number can change without any other: heads are not free where their width is d_model
            over their number.
    """

    path: str
    module: AnyModule
    size: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    features: Callable[[Tensor], tuple[list[Tensor], Tensor]]
    group: int = 1
    is_free: bool = True

    def linears(self, paths: Sequence[str]) -> list[tuple[str, AnyModule]]:
        """The module's linear layers at some paths, each with its full path."""
        return [(_join(self.path, path), self.module.get_submodule(path)) for path in paths]

    def pieces(self, chosen: Tensor) -> tuple[Piece, ...]:
        """The rows and columns of parameters that chosen units or heads own; `chosen` is as for `features`."""
        rows, columns = self.features(chosen)
        all_rows, all_columns = self.features(torch.ones_like(chosen))
        pieces = []
        for (path, linear), index, every in zip(self.linears(self.inputs), rows, all_rows, strict=True):
            if not len(index):
                continue  # k and v stay where one of their query heads stays
            pieces.append(Piece(f"{path}.weight", int(is_transposed(linear)), index, len(every), "input"))
            if linear.bias is not None:
                pieces.append(Piece(f"{path}.bias", 0, index, len(every), "input"))
        for path, linear in self.linears(self.outputs):
            dim = 1 - int(is_transposed(linear))
            pieces.append(Piece(f"{path}.weight", dim, columns, len(all_columns), "output"))
        return tuple(pieces)


def ordinary_model(model: nn.Module) -> nn.Module:
    """The model inside PEFT's, or the model itself.

    Raises:
        ValueError: the model is routed, so that its tables have the widths which it has now.
    """
    inner = inner_model(model)
    if isinstance(inner, Swapped):
        raise ValueError("model: got a routed model, expected an ordinary one; unroute() it first")
    return inner


#: Where a model says how many of its hidden units were added: in its configuration, which is saved with it.
_ADDED_UNITS = "added_hidden_units"


def added_units(model: nn.Module) -> int:
    """How many of the hidden units of each MLP `gradroute.era.expand` added to a model inside PEFT's."""
    return int(getattr(_says_widths(model), _ADDED_UNITS, 0))


def record_added_units(model: nn.Module, change: int) -> None:
    """Adds to the number that `added_units` tells, or takes from it."""
    holder, number = _says_widths(model), added_units(model) + change
    if number > 0:
        setattr(holder, _ADDED_UNITS, number)
    elif hasattr(holder, _ADDED_UNITS):
        delattr(holder, _ADDED_UNITS)


def _says_widths(model: nn.Module) -> Any:
    """The configuration that says how wide a model is, or else the model."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "num_attention_heads"):
        return model
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def decoder_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The decoder layers of a model of transformers as "layers.0", "layers.1", ...; of other modules none."""
    inner = inner_model(model)
    architecture = ARCHITECTURES.get(getattr(getattr(inner, "config", None), "model_type", None) or "")
    layers = None if architecture is None else submodule(inner, architecture.layers)
    return {f"layers.{i}": layer for i, layer in enumerate(layers or ())}


def find_widths(
    model: nn.Module,
    what: str,
    between: Units | Sequence[Units] | None = None,
    architecture: Architecture | None = None,
) -> list[Width]:
    """Where a model's hidden units ("units") or heads ("heads") are, layer by layer.

    Args:
        model: a model of transformers, routed or not, or a module with gradroute's layers, or any other with `between`.
        what: "units" or "heads".
        between: where the units are in a module that gradroute does not know.
        architecture: where the decoder layers are; default: by the model's `config.model_type`.

    Raises:
        TypeError: linear layers with adapters, or sharded ones; no such architecture.
        ValueError: nothing of the kind in the model, or layers of `between` that do not fit together.
    """
    inner = inner_model(model)
    if architecture is not None:
        check_is("architecture", architecture, Architecture, "an Architecture or None")
    if between is not None:
        listed = [between] if isinstance(between, Units) else between
        if not isinstance(listed, Sequence) or not all(isinstance(units, Units) for units in listed):
            raise TypeError(f"between: got {shown(between)}, expected Units or a list of them")
        chosen = [between] if isinstance(between, Units) else between
        widths = [_width_between(inner, units) for units in chosen]
    elif architecture is not None:
        widths = _decoder_widths(inner, what, architecture)
    else:
        widths = _own_layers(inner, what) or _decoder_widths(inner, what, architecture_of(inner))
    for width in widths:
        for path, linear in width.linears((*width.inputs, *width.outputs)):
            _check_readable(path, linear)
    return widths


def _own_layers(model: nn.Module, what: str) -> list[Width]:
    """The widths of gradroute's own layers, in the module's order."""
    if what == "units":
        mlps = (RoutedMLP, RoutedGatedMLP)
        return [_mlp_width(path, mlp) for path, mlp in model.named_modules() if isinstance(mlp, mlps)]
    return [
        _attention_width(path, module)
        for path, module in model.named_modules()
        if isinstance(module, RoutedAttention)
    ]


def _mlp_width(path: str, mlp: RoutedMLP | RoutedGatedMLP) -> Width:
    *inputs, output = mlp.names
    size = matrix(mlp.get_submodule(output)).shape[1]
    return Width(path, mlp, size, tuple(inputs), (output,), partial(_one_for_one, len(inputs)))


def _attention_width(path: str, attention: RoutedAttention) -> Width:
    *inputs, output = attention.names
    group = attention.heads // attention.kv_heads
    features = partial(_separate_heads, group, attention.head_dim)
    return Width(path, attention, attention.heads, tuple(inputs), (output,), features, group)


def _decoder_widths(model: nn.Module, what: str, architecture: Architecture) -> list[Width]:
    """The widths of a model's decoder layers, one a layer."""
    layer = architecture.layer
    mixin: type[MLP | Attention] = layer.mlp_mixin if what == "units" else layer.attention_mixin
    paths = {module: path for path, module in model.named_modules()}
    is_free = what == "units" or layer.attention_mixin.has_free_heads
    widths = []
    for i, decoder in enumerate(submodule(model, architecture.layers)):
        if what == "units" and layer.has_experts(decoder):
            raise TypeError(
                f"model: got a {type(model).__name__} with a mixture of experts in layer {i}, whose hidden units are "
                "in three-dimensional weights, expected layers with an MLP alone; Block.experts is for whole experts"
            )
        module = getattr(decoder, layer.mlp_name) if what == "units" else layer.attention_of(decoder)
        mixin.check_module(module)
        *inputs, output = mixin.names
        size, group = mixin.size_of(module)
        features = partial(mixin.features_of, module)
        widths.append(Width(paths[module], module, size, tuple(inputs), (output,), features, group, is_free))
    return widths


def _width_between(model: nn.Module, units: Units) -> Width:
    """The width that the paths of `units` say."""
    sizes = {}
    for paths, dim in ((units.inputs, 0), (units.outputs, 1)):
        for path in paths:
            try:
                linear = model.get_submodule(path)
            except AttributeError:
                raise ValueError(f"between: got {path!r}, expected the path of a submodule") from None
            _check_readable(path, linear)
            sizes[path] = matrix(linear).shape[dim]
    if len(set(sizes.values())) > 1:
        raise ValueError(f"between: got layers of different numbers of units, {sizes}, expected one number")
    size = next(iter(sizes.values()))
    features = partial(_one_for_one, len(units.inputs))
    return Width("", model, size, tuple(units.inputs), tuple(units.outputs), features)


def _one_for_one(inputs: int, chosen: Tensor) -> tuple[list[Tensor], Tensor]:
    """Features where every unit is one row of each input and one column of the output."""
    index = chosen.nonzero().flatten()
    return [index] * inputs, index


def _separate_heads(group: int, head_dim: int, chosen: Tensor) -> tuple[list[Tensor], Tensor]:
    """Features of heads whose q, k and v are layers of their own."""
    q, kv = (of_heads.nonzero().flatten() for of_heads in head_features(chosen, group, head_dim))
    return [q, kv, kv], q


def _check_readable(path: str, linear: AnyModule) -> None:
    """Raises unless a layer is linear, and its own parameters, whole and floating point, are all of it."""
    refuse_unreadable(path, linear)
    if not isinstance(linear, nn.Linear) and not is_transposed(linear):
        raise TypeError(f"{path}: got a {type(linear).__name__}, expected a torch.nn.Linear")


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
