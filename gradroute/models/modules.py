"""Questions about any module of an existing model, routed or not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..routes import Routes
from ..sites import Sites

# Modules of existing models have classes that only their library knows, such as transformers or PEFT.
AnyModule = Any
# Arguments and results of such a module's forward, which a routed module passes on.
Argument = Any

# DTensors exist only where torch.distributed does.
_DTensor: type | tuple[()] = ()
if torch.distributed.is_available():
    from torch.distributed.tensor import DTensor as _DTensor


def full_name(module: nn.Module) -> str:
    """A module's class, with the Python module that defines it."""
    return f"{type(module).__module__}.{type(module).__name__}"


def is_watched(module: nn.Module) -> bool:
    """Whether calling a module does more than its class says: hooks, or another forward."""
    return "forward" in vars(module) or bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def is_dtensor(tensor: object) -> bool:
    """Whether a parameter is distributed."""
    return isinstance(tensor, _DTensor)


def refuse_dtensor(module: nn.Module) -> None:
    """Raises where a module's parameters are distributed: the ops take local tensors."""
    for name, parameter in module._parameters.items():
        if is_dtensor(parameter) and is_dtensor(getattr(module, name)):  # a shard reads as a local tensor
            raise TypeError(
                f"{full_name(module)}.{name}: got a DTensor, expected a local tensor; use "
                "gradroute.models.tensor_parallel, which hands the ops local tensors and rank-sliced tables"
            )


def call(module: nn.Module, x: Tensor, routes: Routes, sites: Sites | None) -> Tensor:
    """A submodule's output; it takes the routes where something of it is routed."""
    return module(x) if sites is None else module(x, routes=routes)
