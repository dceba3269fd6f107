"""The checks of every public function, autocast and flattening."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .arguments import shown
from .routes import Routes
from .sites import Sites

AnySites = TypeVar("AnySites", bound=Sites)


def unrouted(routes: object, sites: object, kind: type) -> bool:
    """Whether the call asks for the ordinary op; raises TypeError where an argument is not what it should be."""
    if routes is not None and not isinstance(routes, Routes):
        raise TypeError(
            f"routes: got a {type(routes).__name__}, expected gradroute.Routes or None; "
            "gradroute.Routes.of(ids, num_routes) makes them of ids"
        )
    if sites is not None and not isinstance(sites, kind):
        raise TypeError(f"sites: got a {type(sites).__name__}, expected gradroute.{kind.__name__} or None")
    return routes is None or sites is None


def check_tensor(name: str, tensor: object) -> None:
    """Raises TypeError unless `tensor` is one: nothing else is converted."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: got {shown(tensor)}, expected a torch.Tensor")


def check_shape(name: str, tensor: Any, *expected: int) -> None:
    """Raises unless `tensor` is one of the shape `expected`; -1 accepts any extent."""
    if not isinstance(tensor, Tensor):
        check_tensor(name, tensor)
    shape = tensor.shape
    if shape == expected:
        return
    if len(shape) == len(expected):
        for got, want in zip(shape, expected, strict=True):  # all() of a generator took 0.3 µs longer
            if want not in (-1, got):
                break
        else:
            return
    wanted = ", ".join("any" if extent == -1 else str(extent) for extent in expected)
    raise ValueError(f"{name}: got shape {list(shape)}, expected [{wanted}]")


def check_kind(name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    """Raises ValueError unless `tensor` is of this dtype, on this device."""
    if tensor.dtype != dtype or tensor.device != device:
        raise ValueError(f"{name}: got {tensor.dtype} on {tensor.device}, expected {dtype} on {device}")


def is_plain(tensor: object) -> bool:
    """Whether a tensor is its numbers: not of a class that computes otherwise with them, such as a quantised weight.

    Such a class says itself what a linear layer of it is, forward and backward, and its numbers, if there are any, are
    not what it stands for. torch's own classes for tracing are plain: they stand for ordinary tensors.
    """
    kind = type(tensor)
    return kind is torch.nn.Parameter or kind is Tensor or _computes_as_tensor(kind)


def _computes_as_tensor(kind: type) -> bool:
    if not issubclass(kind, Tensor):
        return False
    if kind.__module__.startswith("torch._subclasses."):
        return True
    function = getattr(kind.__torch_function__, "__func__", kind.__torch_function__)
    ordinary = (Tensor.__torch_function__.__func__, torch.nn.Parameter.__torch_function__)  # type: ignore[attr-defined]
    return kind.__torch_dispatch__ is Tensor.__torch_dispatch__ and function in ordinary


def check_dtype(name: str, x: Tensor, weight: Tensor) -> None:
    """Raises TypeError, of operands that differ in dtype, where no autocast makes them alike."""
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        raise TypeError(
            f"{name}: got dtype {x.dtype} beside a weight of {weight.dtype}, expected one dtype for both, or autocast"
        )


def check_parameter(name: str, tensor: Any, *expected: int) -> None:
    """As `check_shape`; raises TypeError where a parameter is not plain, because ops read its numbers."""
    kind = type(tensor)
    if not (kind is torch.nn.Parameter or kind is Tensor or is_plain(tensor)):
        check_tensor(name, tensor)
        raise TypeError(
            f"{name}: got a {type(tensor).__name__}, expected an ordinary tensor, whose numbers are read: call the "
            "layer of this one, and mask around it with gradroute.route_grad; of a DTensor pass to_local()"
        )
    if tensor.shape != expected:
        check_shape(name, tensor, *expected)


def check_matrix(name: str, tensor: Any, columns: int = -1) -> tuple[int, int]:
    """As `check_parameter` of any number of rows; the shape.

    Most calls of an op pass here, where each comparison of extents one by one is felt: it was 1 of the 20 µs of a small
    MLP's call.
    """
    kind = type(tensor)
    if kind is torch.nn.Parameter or kind is Tensor:
        shape = tensor.shape
        if len(shape) == 2 and (columns == -1 or shape[1] == columns):
            return shape
    check_parameter(name, tensor, -1, columns)
    return tensor.shape


def check_features(name: str, x: Any, features: int, origin: str, weight: Tensor) -> None:
    """Raises ValueError unless the last dimension of `x` is `features`, which `origin` explains, and both have memory.

    PyTorch refuses a weight on another device by itself, but computes with one on meta as if its numbers were there.
    """
    if not isinstance(x, Tensor):
        check_tensor(name, x)
    if x.dim() == 0 or x.shape[-1] != features:
        raise ValueError(f"{name}: got shape {list(x.shape)}, expected [*tokens, {features}] ({origin})")
    if weight.is_meta and not x.is_meta:
        raise ValueError(
            f"{name}: got a tensor on {x.device} for a weight on meta, expected both on one device"
        )


def autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """The tensors as an ordinary linear layer takes them: cast to autocast's dtype where it is enabled.

    The casts stand outside the autograd.Functions, so that gradients reach parameters in their own dtype.
    """
    if not (torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled()):
        return tensors
    first = tensors[0]
    assert first is not None
    device = first.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )


def flat(x: Tensor) -> Tensor:
    """`[*tokens, F]` as `[T, F]`: itself where it is that, a view wherever the strides allow one."""
    if x.dim() == 2:
        return x
    return x.reshape(-1, x.shape[-1]) if x.shape[-1] else x.reshape(x.shape[:-1].numel(), 0)


def check_optimizer(optimizer: torch.optim.Optimizer | None, model: nn.Module) -> None:
    """Raises unless an optimizer is one that has parameters of the model, or None."""
    if optimizer is None:
        return
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer: got {shown(optimizer)}, expected a torch.optim.Optimizer")
    parameters = set(model.parameters())
    if parameters.isdisjoint(parameter for group in optimizer.param_groups for parameter in group["params"]):
        raise ValueError(
            f"optimizer: got {type(optimizer).__name__} of none of the parameters of the {type(model).__name__}, "
            "expected the one that trains it, whose state belongs to them"
        )
