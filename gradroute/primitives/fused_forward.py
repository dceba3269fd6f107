"""Fused forwards of the activations, which a device takes only after they showed eager PyTorch's bits there.

A forward that differs from the unrouted one in a bit would break the first promise of routing. Which bits an activation
has depends on the exponential, the division and the fused multiply-adds that PyTorch's own kernels were compiled with,
and so on PyTorch's release and the CUDA toolkit that it was built with. No version can vouch for that, so the device
does: before the first use of each activation and dtype the fused kernel runs beside PyTorch's operations, on all values
of 16 bits or on four million of 32 bits. Where a bit differs the forward stays PyTorch's own, with a warning.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from ..activations import ACTIVATIONS
from ..checks import flat
from ..routes import Routes
from ..tables import Table
from .arguments import tokens_of
from .schema import schema_of

# Activations for which PyTorch has one kernel.
_ONE_KERNEL = ("silu", "gelu", "gelu_tanh", "relu")

# Activations that are several operations of PyTorch, some of which autocast computes in fp32.
_CHANGED_BY_AUTOCAST = ("gelu_new", "gelu_fast")

# Of the values of 32 bits every 1021st is tried, a prime: all exponents, and significands that end in all ways.
_STEP = 1021


class _Key(NamedTuple):
    backend: str
    activation: str
    dtype: torch.dtype
    device: torch.device


_verdicts: dict[_Key, bool] = {}


def is_worthwhile(a: Tensor, up: Tensor | None, table: Table | None, activation: str) -> bool:
    """Whether a kernel may compute the forward, and saves something.

    Not on the CPU, whose arithmetic no kernel has; not where autocast computes a part in fp32; and not where PyTorch
    has one kernel for all there is to do.
    """
    if a.is_cpu or (up is None and table is None and activation in _ONE_KERNEL):
        return False
    device = a.device.type
    return device == "meta" or activation not in _CHANGED_BY_AUTOCAST or not torch.is_autocast_enabled(device)


class ForwardArguments(NamedTuple):
    """The arguments of a fused forward after its matrices.

    Attributes:
        ids: `[T]` int32.
        strength: `[T]`, 0-dim or None.
        weights: those of the mask of the hidden activations, `[R, F]` or `[R, 1]`, or None.
        activation: a name of `gradroute.activations.ACTIVATIONS`.
    """

    ids: Tensor
    strength: Tensor | None
    weights: Tensor | None
    activation: str


FORWARD_SCHEMA = f"Tensor a, Tensor? up, {schema_of(ForwardArguments)}"


def fused_forward(
    op: Callable[..., Tensor],
    a: Tensor,
    up: Tensor | None,
    routes: Routes,
    table: Table | None,
    activation: str,
) -> Tensor:
    """The forward of `a [*tokens, F]` by an op that takes matrices: see `Primitives.activation_forward`."""
    weights = None if table is None else table.on(a.device)
    arguments = ForwardArguments(*tokens_of(routes), weights, activation)
    return op(flat(a), None if up is None else flat(up), *arguments).view(a.shape)


def has_eager_bits(
    backend: str, op: Callable[..., Tensor], activation: str, dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether the backend's kernel has eager PyTorch's bits on the device; asked once, for which the device waits.

    While a CUDA graph is captured nothing can be waited for: what was not asked before is answered with no.

    Args:
        backend: its name, for the warning.
        op: its kernel, which takes a `[T, F]`, up `[T, F]` or None, and ForwardArguments.
        activation: a name of `gradroute.activations.ACTIVATIONS`.
        dtype: fp32, bf16 or fp16.
        device: where; on meta, which has no bits, the answer is yes.
    """
    key = _Key(backend, activation, dtype, device)
    known = _verdicts.get(key)
    if known is not None:
        return known
    if device.type == "meta":
        return True
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return False
    with _disable_current_modes(), torch.no_grad(), torch.autocast(device.type, enabled=False):
        same = _same_bits(op, activation, dtype, device)
    if not same:
        warnings.warn(
            f"the fused forward of {activation} in {dtype} of backend {backend!r} has other bits than PyTorch "
            f"{torch.__version__} on {device}: PyTorch's own operations run instead, in more passes over memory",
            RuntimeWarning,
            stacklevel=2,
        )
    _verdicts[key] = same
    return same


def _same_bits(op: Callable[..., Tensor], activation: str, dtype: torch.dtype, device: torch.device) -> bool:
    a = every_value(dtype, device)
    up = a.flip(1)
    unmasked = ForwardArguments(a.new_zeros(len(a), dtype=torch.int32), None, None, activation)
    value = ACTIVATIONS[activation].value(a)
    same = equal_bits(op(a, None, *unmasked), value) & equal_bits(op(a, up, *unmasked), value * up)
    return bool(same)


def every_value(dtype: torch.dtype, device: torch.device) -> Tensor:
    """All values of a dtype of 16 bits, every 1021st of fp32, infinities and NaN among them: `[rows, 256]`."""
    if dtype.itemsize == 2:
        return torch.arange(-(2**15), 2**15, device=device).to(torch.int16).view(dtype).view(-1, 256)
    patterns = torch.arange(-(2**31), 2**31 - 255 * _STEP, _STEP, device=device).to(torch.int32)
    return patterns[: patterns.numel() // 256 * 256].view(dtype).view(-1, 256)


def equal_bits(one: Tensor, other: Tensor) -> Tensor:
    """Whether all elements have the same bits or are NaN alike: a scalar on the device."""
    bits = torch.int16 if one.dtype.itemsize == 2 else torch.int32
    return ((one.view(bits) == other.view(bits)) | (one.isnan() & other.isnan())).all()
