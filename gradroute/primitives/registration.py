"""Registration of primitives with torch.library."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from .overwriting import is_watched

Launcher = TypeVar("Launcher", bound=Callable[..., Any])

_library = torch.library.Library("gradroute", "DEF")


def kernel_op(schema: str) -> Callable[[Callable[..., Any]], Any]:
    """Registers a launcher with torch.library under `schema`; it is its own fake kernel.

    A launcher allocates its outputs and launches, which does nothing for tensors without data: so shapes and dtypes
    are written once. What the schema says is written to has its version counter moved on, as torch's own operations do.

    Returns:
        The op as a function. It calls the launcher itself where nobody could tell the difference: torch.library's way
        from Python through C++ back into Python is 4 of the 11 µs of a small masked product.
    """
    written = tuple(
        i for i, parameter in enumerate(schema.partition("->")[0].split(", ")) if "!" in parameter
    )

    def register(launcher: Callable[..., Any]) -> Any:
        name = schema.split("(")[0]
        if written:
            launcher = _writing(launcher, written)
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, launcher, "CompositeExplicitAutograd")
        torch.library.register_fake(f"gradroute::{name}", launcher, lib=_library)
        op = getattr(torch.ops.gradroute, name).default

        @functools.wraps(launcher)
        def call(*args: Any) -> Any:
            return launcher(*args) if _is_unseen(args) else op(*args)

        return call

    return register


#: Classes of arguments that torch.library hands to a launcher as they are, where they hold no tensors.
_PLAIN = frozenset({type(None), bool, int, float, str})
_TENSORS = frozenset({Tensor, torch.nn.Parameter})


def _is_unseen(args: Iterable[Any]) -> bool:
    """Whether a call of an op is seen by nobody: no compiler, tracer, mode, transform, profiler or class of tensors."""
    if is_watched() or torch._C._autograd._profiler_enabled() or torch._C._get_tracing_state() is not None:
        return False
    return all(map(_is_ordinary, args))


def _is_ordinary(argument: Any) -> bool:
    """Whether torch.library would hand an argument to a launcher as it is.

    It makes a tensor of its own of what is no more than a sign before another one's memory (the imaginary part of a
    conjugate, for instance), and of zeros without memory.
    """
    kind = type(argument)
    if kind in _TENSORS:
        return not (argument.is_neg() or argument._is_zerotensor())
    if kind is not list:
        return kind in _PLAIN
    if _TENSORS.issuperset(map(type, argument)):  # of an optimizer, thousands
        return not (any(map(Tensor.is_neg, argument)) or any(map(Tensor._is_zerotensor, argument)))
    return _PLAIN.issuperset(map(type, argument)) or all(map(_is_ordinary, argument))


def _writing(launcher: Launcher, written: tuple[int, ...]) -> Launcher:
    """A launcher that moves on the version counters of the arguments at these positions.

    Here, and not in a kernel for the dispatch key ADInplaceOrView, which is another call from C++ into Python.
    """

    @functools.wraps(launcher)
    def launched(*args: Any) -> Any:
        outputs = launcher(*args)
        increment_version([tensor for i in written for tensor in _tensors(args[i])])
        return outputs

    return launched  # type: ignore[return-value]


def _tensors(argument: Tensor | Sequence[Tensor] | None) -> Sequence[Tensor]:
    if argument is None:
        return ()
    return (argument,) if isinstance(argument, Tensor) else argument


def outside_autocast(launcher: Launcher) -> Launcher:
    """A launcher whose products are in the dtypes it chooses: autocast reaches into an op's own calls."""

    @functools.wraps(launcher)
    def launched(x: Tensor, *rest: Any) -> Any:
        if x.is_meta or not torch.is_autocast_enabled(x.device.type):
            return launcher(x, *rest)
        with torch.autocast(x.device.type, enabled=False):
            return launcher(x, *rest)

    return launched  # type: ignore[return-value]
