"""Layers whose parameters are those of linear submodules, which they read where a call would do nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

from torch import nn

from .module import RoutedModule, check_plain

# A module in the place of a torch.nn.Linear may be of any class.
AnyModule = Any
# The features of a submodule that does not say how many it has.
NO_FEATURES = (-1, -1)


class LinearsModule(RoutedModule):
    """A layer of linear submodules, called `names` in the order of the op's weights."""

    names: tuple[str, ...]
    routes_are_second = True

    def _linears(self) -> list[AnyModule]:
        modules = self._modules  # getattr of a submodule takes ten times as long
        return [modules[name] for name in self.names]

    def _take_linears(self, argument: str, module: nn.Module, names: Sequence[str], instead: str) -> None:
        """Shares the submodules `names` of `module`, which may have no other parameters."""
        if len(names) != len(self.names):
            raise ValueError(
                f"names: got {tuple(names)}, expected {len(self.names)} names, such as {self.names}"
            )
        self.names = tuple(names)
        for name in self.names:
            self.add_module(name, _linear_of(argument, module, name, instead))
        _check_no_other_parameters(argument, module, self.names)
        self.training = module.training


def _linear_of(argument: str, module: nn.Module, name: str, instead: str) -> nn.Linear:
    modules = dict(module.named_children())
    if name not in modules:
        raise ValueError(
            f"names: got {name!r}, expected submodules of {type(module).__name__}: "
            f"{', '.join(modules) or 'it has none'}"
        )
    check_plain(f"{argument}.{name}", modules[name], nn.Linear, instead)
    return modules[name]  # type: ignore[return-value]


def _check_no_other_parameters(argument: str, module: nn.Module, names: tuple[str, ...]) -> None:
    """Raises where a module visibly computes with more than its named linear layers."""
    keys = (key for key, _ in chain(module.named_parameters(), module.named_buffers()))
    others = [key for key in keys if key.split(".")[0] not in names]
    if others:
        raise ValueError(
            f"{argument}: got parameters or buffers {', '.join(others)}, expected only those of {names}"
        )


def check_no_dropout(argument: str, module: nn.Module, instead: str) -> None:
    """Raises where a submodule drops anything out; `instead` says where dropout belongs."""
    for name, child in module.named_modules():
        if isinstance(child, nn.Dropout) and child.p > 0:
            raise ValueError(f"{argument}.{name}: got dropout with p = {child.p}, expected none: {instead}")


def features(linear: AnyModule) -> tuple[int, int]:
    """The numbers of outputs and inputs of a linear submodule, or of what stands in its place."""
    try:
        return linear.out_features, linear.in_features
    except AttributeError:
        return NO_FEATURES
