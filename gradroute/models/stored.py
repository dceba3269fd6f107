"""A model's parameters, wherever their values are: in the model, in shards of several processes, or offloaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..layers.reading import is_dtensor
from .dtensors import whole
from .fsdp import is_managed, replace_managed, reshard
from .offloaded import Offloaded, offloaded

if TYPE_CHECKING:
    from .inspection import Piece


class Stored:
    """One parameter of a model, wherever its values are; it holds none of them.

    Attributes:
        names: the parameter's names in the model, several where it is tied or its module is in several places; each
            with the module that holds it and its name there.
    """

    def __init__(self, model: nn.Module, offload: Offloaded | None) -> None:
        self.names: dict[str, tuple[nn.Module, str]] = {}
        self._model = model
        self._offload = offload

    @property
    def places(self) -> list[tuple[nn.Module, str]]:
        """The modules that hold it, each with its name there; more than one where it is tied."""
        return list(dict.fromkeys(self.names.values()))

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter that is in the model now."""
        module, name = self.places[0]
        parameter = module._parameters[name]  # a tensor-parallel layer's attribute is this rank's part of it
        assert parameter is not None
        return parameter

    @property
    def is_empty(self) -> bool:
        """Whether it has no values: it is on the meta device, and nothing has offloaded it."""
        return self._offload is None and self.parameter.is_meta

    @property
    def is_offloaded(self) -> bool:
        """Whether accelerate keeps its values outside of the model."""
        return self._offload is not None

    def values(self) -> Tensor:
        """All values, detached: the parameter's own memory, or else a copy of shards or of what is on the disk.

        Of shards all ranks must call this.
        """
        return whole(self.parameter) if self._offload is None else self._offload.read()

    def write(self, piece: Piece, values: Tensor | float) -> None:
        """Overwrites a piece, in place."""
        if self._offload is None:
            piece.write(self.parameter, values)
            return
        changed = self._offload.read()
        piece.write(changed, values)
        self._offload.write(changed)

    def replace(self, change: Callable[[Tensor], Tensor]) -> nn.Parameter:
        """Puts a parameter of changed values, which may be of another shape, in the place of this one.

        Args:
            change: all old values, detached → the new ones, in memory of their own.

        Returns:
            The new parameter, under all names of the old one.
        """
        old = self.parameter
        values = change(self.values()).contiguous()
        if is_dtensor(old):
            return replace_managed(self._model, old, values)
        if self._offload is not None:
            self._offload.write(values)
            values = torch.empty_like(values, device="meta")
        new = nn.Parameter(values, old.requires_grad)
        for module, name in self.places:
            setattr(module, name, new)
        return new

    def why_fixed(self, *, shape: bool) -> str | None:
        """Why its values, or even its shape, cannot be changed, and what to do; None: they can be."""
        if self._offload is not None:
            return self._offload.why_fixed()
        if shape and is_dtensor(self.parameter) and not is_managed(self._model, self.parameter):
            return (
                "sharded by something else than fully_shard, such as tensor parallelism, expected whole parameters or "
                "those of fully_shard alone: change shapes before sharding, or export() the model and change what is "
                "loaded"
            )
        return None


def stored(model: nn.Module) -> dict[str, Stored]:
    """The parameters of a model by all of their names. Those of FSDP2 are shards afterwards."""
    reshard(model)
    outside = offloaded(model)
    by_name: dict[str, Stored] = {}
    known: dict[nn.Parameter, Stored] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for attribute, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            name = f"{path}.{attribute}" if path else attribute
            if parameter not in known:
                known[parameter] = Stored(model, outside.get((id(module), attribute)))
            known[parameter].names[name] = module, attribute
            by_name[name] = known[parameter]
    return by_name
