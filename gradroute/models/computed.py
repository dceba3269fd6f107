"""Whether a routed module may compute what its ordinary class does: is the forward of that class the one we know?

With routes, decoder layers, attention, MLPs, norms, embeddings and linear layers do not call the ordinary forward, they
compute the same by gradroute's ops. That is wrong where somebody gave the class another forward (a patch of
`LlamaMLP.forward`, a subclass that overrides it, a class of one's own with the same submodules): it would be dropped
without a word. Liger's forwards are known: `gradroute.models.patched`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

# Packages whose modules the mixins are written for, and whose forwards they keep.
_KNOWN = frozenset({"transformers", "torch", "peft", "liger_kernel"})

# How many wrappers are looked through.
_DEPTH = 100


def unknown_forward(kind: type[nn.Module]) -> str | None:
    """The name of a class's forward if somebody else than the class's package defined it; None: it is the class's own.

    Also of one that overrides the forward of a class of transformers or torch. It is asked in every routed forward.
    """
    asked: tuple[Any, ...] = (kind, kind.forward)  # mypy does not know that a class is hashable
    return _unknown(*asked)


def foreign_forward(kind: type[nn.Module], model: type[nn.Module]) -> str | None:
    """The name of a class's forward if it is neither of a known package nor of that of the whole model."""
    owner = _owners(kind)[0]
    home = _KNOWN | {_package(model.__module__)}
    return None if _package(owner.__module__) in home else f"{owner.__module__}.{owner.__qualname__}.forward"


@functools.lru_cache(maxsize=1024)
def is_known(function: Callable[..., Any], package: str) -> bool:
    """Whether a function, and all that it wraps, stands in a known package or in this one."""
    while isinstance(function, functools.partial):
        function = function.func
    return all(_defined_in(one) in (_KNOWN | {"gradroute", package}) for one in _chain(function))


@functools.lru_cache(maxsize=1024)
def _unknown(kind: type[nn.Module], forward: Callable[..., Any]) -> str | None:
    owner, *overridden = _owners(kind)
    package = _package(owner.__module__)
    allowed = {package, "liger_kernel"} | (_KNOWN if package in _KNOWN else set())
    others = {_package(other.__module__) for other in overridden}
    if others & _KNOWN and package not in _KNOWN:
        return _full_name(forward)
    return next((_full_name(one) for one in _chain(forward) if _defined_in(one) not in allowed), None)


def _owners(kind: type[nn.Module]) -> list[type]:
    """The classes that define a class's forward, the one that counts first; not torch.nn.Module, which has none."""
    return [one for one in kind.__mro__ if "forward" in vars(one) and one is not nn.Module]


def _chain(forward: Callable[..., Any]) -> list[Callable[..., Any]]:
    """A function and what it wraps."""
    chain = [forward]
    while hasattr(chain[-1], "__wrapped__") and len(chain) < _DEPTH:
        chain.append(chain[-1].__wrapped__)
    return chain


def _defined_in(function: Callable[..., Any]) -> str:
    """The package in whose source a function stands, whatever functools.wraps made of its name."""
    names = getattr(function, "__globals__", None)
    return _package(type(function).__module__ if names is None else names.get("__name__", ""))


def _package(name: str) -> str:
    return name.partition(".")[0]


def _full_name(function: Callable[..., Any]) -> str:
    """Where a function stands, by its code, whose name functools.wraps leaves alone."""
    names = getattr(function, "__globals__", {})
    code = getattr(function, "__code__", None)
    named = getattr(code, "co_qualname", getattr(code, "co_name", type(function).__qualname__))
    return f"{names.get('__name__', type(function).__module__)}.{named.rpartition('<locals>.')[2]}"
