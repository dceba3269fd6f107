"""Questions about any module of an existing model, routed or not."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from ..checks import is_plain
from ..layers.reading import full_name, is_dtensor, refuse_dtensor
from ..routes import Routes
from ..sites import Sites

# Modules of existing models have classes that only their library knows, such as transformers or PEFT.
AnyModule = Any
# Arguments and results of such a module's forward, which a routed module passes on.
Argument = Any


def refuse_dtensors(module: nn.Module) -> None:
    """Raises where a module's parameters are distributed and read so; those of a shard read as local tensors."""
    for name, parameter in module._parameters.items():
        if is_dtensor(parameter):
            refuse_dtensor(module, name, getattr(module, name))


def special_parameters(module: nn.Module) -> str:
    """Which of a module's parameters are of a class that computes otherwise with them, in words; "" if none is."""
    special = [
        f"a {name} of {type(parameter).__name__}"
        for name in module._parameters
        if (parameter := getattr(module, name, None)) is not None
        and not is_plain(parameter)
        and not is_dtensor(parameter)
    ]
    return " and ".join(special)


def refuse_special(module: nn.Module) -> None:
    """Raises where a module's parameters are not ordinary tensors: who may update them is decided by their class."""
    special = special_parameters(module)
    if special:
        raise TypeError(f"got a {full_name(module)} with {special}, expected ordinary tensors: they are read")


def refuse_replaced(module: nn.Module) -> None:
    """Raises where a module in the place of a routed one takes no routes; what wraps that one passes arguments on."""
    parameters = inspect.signature(module.forward).parameters
    if "routes" in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        return
    raise RuntimeError(
        f"got a {full_name(module)}, which takes no routes, in the place of a module that route() had made routed, "
        "expected that one: something replaced it since; unroute() the model, and route() it when modules are replaced"
    )


def call(module: nn.Module, x: Tensor, routes: Routes, sites: Sites | None) -> Tensor:
    """A submodule's output; it takes the routes where something of it is routed."""
    if sites is None:
        return module(x)
    if not hasattr(module, "_sites"):
        refuse_replaced(module)
    return module(x, routes=routes)
