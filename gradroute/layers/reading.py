"""Modules that may be read instead of being called: without hooks, and with parameters that are ordinary tensors.

A fused op reads the weights of several modules and calls none of them. That is right only where a call would do nothing
else. Layers ask `is_readable`, and so do routed models (`gradroute.models.linear`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules import module as every_module

from ..checks import is_plain

# torch's own, or None where somebody had replaced it before.
_FORWARD = nn.Linear.forward if nn.Linear.forward.__module__ == "torch.nn.modules.linear" else None


def full_name(module: nn.Module) -> str:
    """A module's class, with the Python module that defines it."""
    return f"{type(module).__module__}.{type(module).__name__}"


def is_watched(module: nn.Module) -> bool:
    """Whether calling a module does more than its class says: hooks, also those of every module, or another forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or every_module._global_forward_hooks
        or every_module._global_forward_pre_hooks
        or every_module._global_backward_hooks
        or every_module._global_backward_pre_hooks
    )


def is_patched() -> bool:
    """Whether somebody gave torch.nn.Linear itself another forward."""
    return nn.Linear.forward is not _FORWARD


def is_readable(module: nn.Module) -> bool:
    """Whether the parameters of a torch.nn.Linear may be read instead of calling it: a call does nothing else.

    A parametrized weight is computed whenever it is read, so reading it once is what a call does. A weight that a hook
    computes, as those of `torch.nn.utils.prune` and of the old `weight_norm` and `spectral_norm` are, is that of the
    last call; a quantised or a distributed one is not what a linear layer multiplies with.
    """
    kind = type(module)
    if kind is not nn.Linear and not _computes_as_linear(kind):
        return False
    if is_watched(module) or is_patched():
        return False
    weight = module._parameters.get("weight")
    return weight is None or type(weight) is nn.Parameter or is_plain(weight)


def _computes_as_linear(kind: type[nn.Module]) -> bool:
    """Whether a class is torch.nn.Linear but for what its attributes are, as torch.nn.utils.parametrize makes them."""
    return (
        issubclass(kind, nn.Linear)
        and kind.forward is nn.Linear.forward
        and kind.__call__ is nn.Module.__call__
    )


def is_dtensor(tensor: object) -> bool:
    """Whether a parameter is distributed."""
    if not isinstance(tensor, Tensor) or is_plain(tensor):
        return False
    if not torch.distributed.is_available():
        return False
    # Here, because importing it takes longer than all of gradroute.
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def refuse_dtensor(module: nn.Module, name: str, parameter: object) -> None:
    """Raises where a parameter that a module reads is distributed: the ops take local tensors."""
    if is_dtensor(parameter):
        raise TypeError(
            f"{full_name(module)}.{name}: got a DTensor, expected a local tensor; models are sharded by "
            "gradroute.models.tensor_parallel, which hands the ops local tensors and rank-sliced tables"
        )
