"""Forwards that others put on a module's instance: accelerate's hooks and mixed precision, torch.compile, any other.

An attribute `forward` of the instance hides the class's, which a class swap changes. What is done about it:

- accelerate's hooks (`device_map`, `cpu_offload`) call the forward that they found, `_old_forward`: it is renewed.
- A forward that is the class's own, bound, says nothing new (accelerate's unwrap_model leaves one): it goes.
- A wrapper around the forward of this very swapped class (mixed precision of a model that was routed, unrouted and is
  routed again) calls what it should: it stays.
- Any other is refused: the routed forward would never be called.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

from .modules import AnyModule

# How many wrappers are looked through.
_DEPTH = 100

# As the one who put it there calls it: a bound method, a partial, a closure, or any other callable.
Forward = Callable[..., Any]


def check_forward(module: nn.Module, swapped: type) -> None:
    """Raises where the forward of `swapped` would not be called if it became the module's class.

    Raises:
        TypeError: something replaced the module's forward.
    """
    found = _found_forward(module)
    if found is None or _is_own(module, found) or swapped_class_of(found) is swapped:
        return
    raise TypeError(
        f"model: got a {type(module).__name__} whose forward was replaced by {_name(found)}, expected that of its "
        "class: route the model before accelerator.prepare, Trainer.train, torch.compile or whatever replaced it "
        "(accelerator.unwrap_model(model, keep_fp32_wrapper=False) takes accelerate's away)"
    )


def refuse_forward_without_routes(module: nn.Module) -> None:
    """Raises where a forward that was put on a routed module takes no routes; wrappers of any arguments pass them on.

    Raises:
        RuntimeError: there are routes, and the module's forward has no use for them.
    """
    if not hides_forward(module):
        return
    found = vars(module)["forward"]
    parameters = inspect.signature(found).parameters
    if "routes" not in parameters and all(one.kind is not one.VAR_KEYWORD for one in parameters.values()):
        raise RuntimeError(
            f"{type(module).__name__}: got routes for a module whose forward was replaced by {_name(found)} since it "
            "was routed, which takes none; expected unroute(), the replacement, and route() then"
        )


def hides_forward(module: nn.Module) -> bool:
    """Whether a module has a forward of its own that does not tell whether it calls that of a swapped class."""
    found = vars(module).get("forward")
    return callable(found) and not _is_hooked(module) and swapped_class_of(found) is None


def adopt_forward(module: AnyModule) -> None:
    """Lets what replaces a module's forward call that of the class which the module has now."""
    found = _found_forward(module)
    if found is None or not _is_own(module, found):
        return
    own = MethodType(type(module).forward, module)
    if _is_hooked(module):
        module._old_forward = own
        hook = vars(module)["forward"].func  # made again, because Trainer chooses columns by its signature
        module.forward = functools.update_wrapper(functools.partial(hook, module), own)
    else:
        del module.forward


def swapped_class_of(forward: Forward) -> type | None:
    """The swapped class whose forward a callable calls in the end, as far as its wrappers tell."""
    for _ in range(_DEPTH):
        if isinstance(forward, MethodType):
            forward = forward.__func__
        elif hasattr(forward, "swapped"):  # functools.wraps copies it to wrappers
            return forward.swapped
        elif isinstance(forward, functools.partial):
            forward = forward.func
        elif hasattr(forward, "__wrapped__"):
            forward = forward.__wrapped__
        else:
            break
    return None


def _found_forward(module: nn.Module) -> Forward | None:
    """The forward that accelerate's hook calls, else the instance's own; None: it has that of its class."""
    return vars(module)["_old_forward"] if _is_hooked(module) else vars(module).get("forward")


def _is_hooked(module: nn.Module) -> bool:
    return "_hf_hook" in vars(module) and "_old_forward" in vars(module)


def _is_own(module: nn.Module, forward: Forward) -> bool:
    """Whether a callable is the forward of the module's class, or of what it was swapped from or to, bound to it."""
    if not isinstance(forward, MethodType) or forward.__self__ is not module:
        return False
    function = forward.__func__
    swapped = getattr(function, "swapped", None)
    mine = type(module)
    return function in (mine.forward, getattr(mine, "original", mine).forward) or (
        swapped is not None and mine in (swapped, swapped.original)
    )


def _name(forward: Forward) -> str:
    named = getattr(forward, "__func__", forward)
    if not hasattr(named, "__qualname__"):
        named = type(named)
    return f"{named.__module__}.{named.__qualname__}"
