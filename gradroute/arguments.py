"""Checks that public functions share: every message names the argument, what came and what was expected."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Within it new tensors are ordinary ones, whatever surrounds the call.

    Constants outlive the call that makes them. Made as they are under torch.inference_mode, a FakeTensorMode or a
    transform of torch.func, they could not be saved for a backward, would have no values, or belong to a level that is
    gone.
    """
    with ExitStack() as stack:
        if torch._C._functorch.peek_interpreter_stack() is not None:
            from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

            stack.enter_context(temporarily_clear_interpreter_stack())
        stack.enter_context(_disable_current_modes())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        yield


def as_tensor(values: object, expected: str) -> Tensor:
    """A tensor as it is, detached; numbers of any other kind as a tensor on the CPU.

    Python's floats stay fp64, whatever the default dtype is.

    Raises:
        TypeError: `values` are not numbers; the message says what was `expected`.
        ValueError: likewise, where they are not of one shape.
    """
    if isinstance(values, Tensor):
        if not torch.compiler.is_compiling():
            _refuse_other_layouts(values, expected)
            values = _unwrapped(values)
        # A tensor that vmap makes has no values: check_values refuses it, and detach fails where vmap is left already.
        return values if torch._C._functorch.is_batchedtensor(values) else values.detach()
    if torch.compiler.is_compiling():  # numbers alone: strengths of Routes made in compiled code
        dtype = torch.float64 if isinstance(values, float) else None
        return torch.as_tensor(values, dtype=dtype, device="cpu")
    try:
        array = _array(values)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        kind = ValueError if isinstance(error, ValueError) else TypeError
        raise kind(f"got {reprlib.repr(values)}, expected {expected}: {error}") from None
    if array.dtype.kind not in "biufc":
        raise TypeError(f"got {reprlib.repr(values)}, expected {expected}")
    if array.size == 0 and not hasattr(values, "dtype"):
        array = array.astype(np.int64)  # an empty list has no dtype
    if array.dtype.itemsize > (16 if array.dtype.kind == "c" else 8):
        array = array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)
    with ordinary_tensors():
        return torch.from_numpy(array)


def _refuse_other_layouts(tensor: Tensor, expected: str) -> None:
    """Raises TypeError for tensors whose numbers do not lie one beside the other."""
    if tensor.is_quantized:
        kind = f"quantised tensor of {tensor.dtype}"
    elif tensor.is_nested or tensor.layout is not torch.strided:
        kind = "nested tensor" if tensor.is_nested else f"tensor of layout {tensor.layout}"
    else:
        return
    raise TypeError(f"got a {kind}, expected {expected}, in an ordinary dense tensor")


def _unwrapped(tensor: Tensor) -> Tensor:
    """The tensor inside the wrappers of torch.func.grad, which have its values; vmap's stand for many."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor) and functorch.is_gradtrackingtensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return tensor


def _array(values: object) -> np.ndarray:
    """Numbers as an array of their own memory, in the machine's byte order."""
    try:
        array = np.array(values, order="C")
    except (TypeError, RuntimeError):  # lists of tensors that numpy cannot read: bf16, or with a gradient
        array = np.array(_listed(values), order="C")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _listed(values: object) -> object:
    if isinstance(values, Tensor):
        return values.detach().tolist()
    return [_listed(value) for value in values] if isinstance(values, (list, tuple)) else values


def check_values(tensor: Tensor, what: str) -> None:
    """Raises ValueError where a tensor has no values that the host could read; `what` says what it holds."""
    if tensor.is_meta:
        reason = f"{what} on the meta device, which have no values"
    elif isinstance(tensor, torch._subclasses.FakeTensor):
        reason = f"{what} of a FakeTensorMode, which have no values"
    elif torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        reason = f"{what} inside a transform of torch.func, which have no values of their own"
    elif hasattr(tensor, "__tensor_flatten__"):
        reason = f"{what} in a {type(tensor).__name__}, which are not read"
    else:
        return
    raise ValueError(f"got {reason}; expected values in an ordinary tensor")


def shown(value: object) -> str:
    """The words for what came, in a message: numbers, names and lists themselves, of anything else its type."""
    plain = value is None or isinstance(
        value, (bool, int, float, complex, str, list, tuple, slice, np.generic)
    )
    return reprlib.repr(value) if plain else f"a {type(value).__name__}"


def check_int(
    name: str, value: Any, least: int | None = None, most: int | None = None, *, optional: bool = False
) -> Any:
    """`value` as an int of Python; raises unless it is an integer, of Python or NumPy, in its bounds.

    Args:
        name: the argument's name.
        value: what was given for it.
        least: the smallest that may be given.
        most: the largest one.
        optional: whether None may be given too, which is returned.
    """
    if optional and value is None:
        return None
    expected = "an int" + _bounds(least, most) + (" or None" if optional else "")
    if not is_int(value):
        raise TypeError(f"{name}: got {shown(value)}, expected {expected}")
    if (least is not None and value < least) or (most is not None and value > most):
        raise ValueError(f"{name}: got {value}, expected {expected}")
    return int(value)


def check_number(
    name: str, value: Any, least: float | None = None, most: float | None = None, *, optional: bool = False
) -> Any:
    """`value` as a float of Python; raises unless it is a finite real number, of Python or NumPy, in its bounds."""
    if optional and value is None:
        return None
    expected = "a finite number" + _bounds(least, most) + (" or None" if optional else "")
    if not is_number(value):
        raise TypeError(f"{name}: got {shown(value)}, expected {expected}")
    if (
        not -math.inf
        < value
        < math.inf  # math.isfinite cannot be traced, where the number has become a symbol
        or (least is not None and value < least)
        or (most is not None and value > most)
    ):
        raise ValueError(f"{name}: got {value}, expected {expected}")
    return float(value)


def _bounds(least: float | None, most: float | None) -> str:
    if least is None:
        return ""
    return f" of {least} or more" if most is None else f" from {least} to {most}"


def is_int(value: object) -> bool:
    """Whether a value is an integer of Python or NumPy."""
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether a value is a real number of Python or NumPy."""
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def check_bool(name: str, value: object) -> bool:
    """`value` as a bool of Python; raises TypeError unless it is one, of Python or NumPy."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: got {shown(value)}, expected True or False")
    return bool(value)


def check_choice(name: str, value: object, choices: Iterable[Any]) -> None:
    """Raises unless `value` is one of the names; TypeError where it is not even a name."""
    listed = tuple(choices)
    kind: type[Exception] = ValueError if isinstance(value, str) else TypeError
    if not isinstance(value, str) or value not in listed:
        expected = ", ".join(map(repr, listed))
        raise kind(f"{name}: got {shown(value)}, expected one of {expected}")


def as_device(name: str, device: object) -> torch.device:
    """A device, or the name of one, as a torch.device.

    Raises:
        TypeError: it is neither.
        ValueError: there is no such type of device.
    """
    if isinstance(device, torch.device):
        return device
    if not isinstance(device, (str, int)) or isinstance(device, bool):
        raise TypeError(f"{name}: got {shown(device)}, expected a torch.device or the name of one")
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"{name}: got {device!r}, expected the name of a device: {error}") from None


def check_is(name: str, value: object, kind: type | tuple[type, ...], expected: str) -> None:
    """Raises TypeError unless `value` is an instance of `kind`, which `expected` describes."""
    if not isinstance(value, kind):
        raise TypeError(f"{name}: got a {type(value).__name__}, expected {expected}")


def check_indices(name: str, indices: Any, count: int | None = None) -> tuple[int, ...]:
    """Different integers from 0, below `count` where that is known, in ascending order.

    Raises:
        TypeError: they are no collection of integers.
        ValueError: there are none, or one is out of range.
    """
    expected = "indices of 0 or more" if count is None else f"indices from 0 to {count - 1}"
    if isinstance(indices, (Tensor, np.ndarray)):
        if indices.ndim != 1:
            raise ValueError(f"{name}: got shape {list(indices.shape)}, expected a list of {expected}")
        indices = indices.tolist()
    if isinstance(indices, (str, bytes, dict)) or not isinstance(indices, Collection):
        raise TypeError(f"{name}: got {shown(indices)}, expected a list of {expected}")
    for index in indices:
        if not is_int(index):
            raise TypeError(f"{name}: got {shown(index)}, expected {expected}")
    wrong = [int(index) for index in indices if index < 0 or (count is not None and index >= count)]
    if wrong or not len(indices):
        raise ValueError(f"{name}: got {wrong or 'none'}, expected {expected}")
    return tuple(sorted({int(index) for index in indices}))
