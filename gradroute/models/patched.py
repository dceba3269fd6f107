"""Liger's kernels in routed models, recognised by the names of its modules: liger-kernel need not be imported for that.

`apply_liger_kernel_to_llama()` and its siblings replace classes and the forwards of classes, which a class swap builds
on like any other. With `model=`, as `Trainer(use_liger_kernel=True)` calls them, they bind Liger's forwards to the
modules of one model instead: attributes of instances, which hide the forwards of classes. Such a forward is made that
of a class derived from the module's own, on which the swap builds; `restore` binds it to the module again.

So the forward without routes stays Liger's, and the fused loss is kept in both. With routes, an MLP keeps Liger's
kernel between its linear layers, with masks around it, and forward has the same bits; norms that the plan routes run on
gradroute's op, because who may update a weight is decided where its gradient is formed.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

from ..layers.module import names_of
from .modules import AnyModule

# As the one who binds it to a module calls it, the module first.
Patch = Callable[..., Any]

# The activation of Liger's MLPs, as ops name it, by their forward, which has no submodule for it.
_ACTIVATIONS = {
    "LigerSwiGLUMLP.forward": "silu",
    "LigerPhi3SwiGLUMLP.forward": "silu",
    "LigerGEGLUMLP.forward": "gelu_tanh",
}


def _is_ligers(thing: object) -> bool:
    return str(getattr(thing, "__module__", "")).startswith("liger_kernel.")


def mlp_patch(original: type[nn.Module]) -> Patch | None:
    """The forward of a class if it is that of one of Liger's MLPs: linear layers around a kernel."""
    forward: Patch = original.forward
    return forward if _is_ligers(forward) and forward.__qualname__ in _ACTIVATIONS else None


def patched_activation(original: type[nn.Module]) -> str | None:
    """The activation that one of Liger's MLPs computes between its linear layers; None: a class is none."""
    patch = mlp_patch(original)
    return None if patch is None else _ACTIVATIONS[patch.__qualname__]


def patch_of(module: nn.Module) -> Patch | None:
    """The forward of Liger's that is bound to a module; None: there is none."""
    found = vars(module).get("forward")
    if isinstance(found, MethodType) and found.__self__ is module and _is_ligers(found.__func__):
        return found.__func__
    return None


_CLASSES: dict[tuple[type[nn.Module], Patch], Any] = {}


def patched_class(original: type[nn.Module], patch: Patch) -> Any:
    """The subclass of a module's class with a forward of Liger's. It keeps the name."""
    original = getattr(original, "unpatched", original)
    if (original, patch) not in _CLASSES:
        _CLASSES[original, patch] = _make_class(original, patch)
    return _CLASSES[original, patch]


def _make_class(original: type[nn.Module], patch: Patch) -> type:
    members = {"forward": patch, "patch": staticmethod(patch), "unpatched": original}
    return type(original.__name__, (original,), names_of(original) | members)


def absorb(module: AnyModule) -> None:
    """Makes a forward of Liger's that is bound to an ordinary module the forward of its class."""
    patch = patch_of(module)
    if patch is not None:
        module.__class__ = patched_class(type(module), patch)
        del module.forward


def restore(module: AnyModule) -> None:
    """Binds a forward of Liger's to the module again, whose class is what it was."""
    if "unpatched" in type(module).__dict__:
        patch = type(module).patch
        module.__class__ = type(module).unpatched
        if "forward" not in vars(module):
            module.__dict__["forward"] = MethodType(patch, module)
