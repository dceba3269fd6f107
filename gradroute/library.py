"""What backends with kernels of their own share: registration with torch.library, and a leaf's flat arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .routes import Routes
from .tables import Table

_library = torch.library.Library("gradroute", "DEF")


def kernel_op(schema: str) -> Callable[[Callable[..., Any]], Any]:
    """Registers a launcher with torch.library under `schema`; it is its own fake kernel.

    A launcher allocates its outputs and launches, which does nothing for tensors without data: so shapes and dtypes
    are written once.
    """

    def register(launcher: Callable[..., Any]) -> Any:
        name = schema.split("(")[0]
        _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _library.impl(name, launcher, "CompositeExplicitAutograd")
        torch.library.register_fake(f"gradroute::{name}", launcher, lib=_library)
        return getattr(torch.ops.gradroute, name).default

    return register


def has_data(tensor: Tensor) -> bool:
    """Whether there is memory to read: not while tracing, nor on the meta device."""
    return not (isinstance(tensor, FakeTensor) or tensor.is_meta)


def weights_on(device: torch.device, *tables: Table | None) -> tuple[Tensor | None, ...]:
    """The tables' device copies."""
    return tuple(None if table is None else table.on(device) for table in tables)


def tokens_of(routes: Routes) -> tuple[Tensor, Tensor | None]:
    """What a launcher passes of the routes: ids `[T]` and strength."""
    return routes.ids, routes.strength


def middle_arguments(
    a: Tensor, routes: Routes, sites: Any, activation: str, want_z: bool, want_bias: bool
) -> tuple[Any, ...]:
    """What the backward of an MLP's middle takes after its matrices: routes, tables, the activation, what is wanted."""
    return (
        *tokens_of(routes),
        *weights_on(a.device, sites.pre, sites.hidden, sites.forward),
        *weights_on(a.device, sites.update_out if want_z else None, sites.update_in if want_bias else None),
        activation,
        want_z,
        want_bias,
    )


#: Its schema.
MIDDLE_SCHEMA = (
    "Tensor ids, Tensor? strength, Tensor? pre, Tensor? hidden, Tensor? forward, Tensor? update_out, "
    "Tensor? update_in, str activation, bool want_z, bool want_bias"
)


def wanted(*outputs: tuple[Tensor, bool]) -> tuple[Any, ...]:
    """The outputs of an op, None in place of those that are not wanted: an op returns empty tensors for them."""
    return tuple(output if is_wanted else None for output, is_wanted in outputs)
