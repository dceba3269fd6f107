"""Parameters that accelerate has offloaded: they are on the meta device, and their values in memory or on the disk."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Any, NamedTuple

from torch import Tensor, nn


class Offloaded(NamedTuple):
    """Where accelerate keeps the values of a parameter or a buffer.

    Attributes:
        weights: the map of values that the module's hook reads.
        key: the key in it.
        is_tied: whether it is one of several names of the same values, of which the map may have a copy each.
    """

    weights: Any
    key: str
    is_tied: bool

    def read(self) -> Tensor:
        """The values: those in memory, or a copy of those on the disk."""
        values: Tensor = self.weights[self.key]
        return values.detach()

    def write(self, values: Tensor) -> None:
        """Puts values in the place of the old ones; `why_fixed` was asked before."""
        weights, key = self._holder()
        if isinstance(weights, MutableMapping):
            weights[key] = values
        elif key in weights.state_dict:
            weights.state_dict[key] = values
        else:
            from accelerate.utils.offload import offload_weight, save_offload_index

            offload_weight(values, key, weights.save_folder, index=weights.index)
            save_offload_index({key: weights.index[key]}, weights.save_folder)

    def why_fixed(self) -> str | None:
        """Why the values cannot be changed, and what to do; None: they can be."""
        if self.is_tied:
            return "tied and offloaded, expected one of them in memory: load it with a device_map that offloads neither"
        weights, key = self._holder()
        if isinstance(weights, MutableMapping) or key in getattr(weights, "state_dict", ()):
            return None
        if getattr(weights, "save_folder", None) is not None:
            return None
        return (
            f"offloaded to a {type(weights).__name__} that cannot be written to, expected one with a folder of its "
            "own: give from_pretrained or dispatch_model an offload_folder (offload_dir), or offload to the CPU"
        )

    def _holder(self) -> tuple[Any, str]:
        """The map that has the values itself, behind those that put a prefix before its keys; and the key there."""
        weights, key = self.weights, self.key
        while hasattr(weights, "dataset") and hasattr(weights, "prefix"):
            weights, key = weights.dataset, f"{weights.prefix}{key}"
        return weights, key


def offloaded(model: nn.Module) -> dict[tuple[int, str], Offloaded]:
    """Where the values of what accelerate has offloaded are, by the id of its module and its name there."""
    found = {}
    declared = _declared_ties(model)
    for module in model.modules():
        for hook in _hooks(module):
            for name in _names(module, hook):
                place = _place(module, name)
                tied = place in declared or name in (getattr(hook, "tied_params_names", None) or ())
                found[place] = Offloaded(hook.weights_map, name, tied)
    return found


def _declared_ties(model: nn.Module) -> set[tuple[int, str]]:
    """The parameters that a model of transformers ties: offloaded, they are no longer one tensor."""
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    return {_place(model, name) for pair in ties.items() for name in pair}


def _place(module: nn.Module, name: str) -> tuple[int, str]:
    """The id of the module that holds a tensor of this name, and its name there."""
    path, _, attribute = name.rpartition(".")
    return id(module.get_submodule(path)), attribute


def _hooks(module: nn.Module) -> Iterator[Any]:
    """The hooks of accelerate on a module that load offloaded values before its forward."""
    hook = vars(module).get("_hf_hook")
    for one in getattr(hook, "hooks", (hook,)):
        if getattr(one, "offload", False) and getattr(one, "weights_map", None) is not None:
            yield one


def _names(module: nn.Module, hook: Any) -> Iterator[str]:
    """The names in a module of what a hook loads."""
    tensors = [module.named_parameters(recurse=hook.place_submodules)]
    if hook.offload_buffers:
        tensors.append(module.named_buffers(recurse=hook.place_submodules))  # type: ignore[arg-type]
    for named in tensors:
        yield from (name for name, tensor in named if tensor.is_meta)
