"""Registration of primitives with torch.library."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

Launcher = TypeVar("Launcher", bound=Callable[..., Any])

_library = torch.library.Library("gradroute", "DEF")


def kernel_op(schema: str) -> Callable[[Callable[..., Any]], Any]:
    """Registers a launcher with torch.library under `schema`; it is its own fake kernel.

    A launcher allocates its outputs and launches, which does nothing for tensors without data: so shapes and dtypes
    are written once. What the schema says is written to has its version counter moved on, as torch's own operations do.
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
        return getattr(torch.ops.gradroute, name).default

    return register


def _writing(launcher: Launcher, written: tuple[int, ...]) -> Launcher:
    """A launcher that moves on the version counters of the arguments at these positions.

    Here, and not in a kernel for the dispatch key ADInplaceOrView, which is another call from C++ into Python.
    """

    @functools.wraps(launcher)
    def launched(*args: Any) -> Any:
        outputs = launcher(*args)
        increment_version([args[i] for i in written if args[i] is not None])
        return outputs

    return launched  # type: ignore[return-value]


def outside_autocast(launcher: Launcher) -> Launcher:
    """A launcher whose products are in the dtypes it chooses: autocast reaches into an op's own calls."""

    @functools.wraps(launcher)
    def launched(x: Tensor, *rest: Any) -> Any:
        if x.is_meta or not torch.is_autocast_enabled(x.device.type):
            return launcher(x, *rest)
        with torch.autocast(x.device.type, enabled=False):
            return launcher(x, *rest)

    return launched  # type: ignore[return-value]
