"""The error budget, and the comparison of results with it and bit by bit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

# Roundings to the dtype: five masked products on the longest path to a gradient (output, forward, hidden, pre, update),
# and the gradient's own.
ROUNDINGS = 6


# Roundings to fp32 inside a kernel: the derivative of tanh-GELU (twenty operations), the interpolation of five masks
# (three each).
INNER_ROUNDINGS = 35


class Result(NamedTuple):
    """The result of one run: the output, and the gradient of every floating-point input (None where it was frozen)."""

    output: Tensor
    gradients: dict[str, Tensor | None]


def excess(actual: Tensor, exact: Tensor, plain: Tensor, cancelling: float = 0.0) -> str | None:
    """Says in words by what `actual` exceeds the error budget; None where it is within.

    The error against fp64 may be twice that of plain PyTorch at the same dtype on the same inputs, plus a floor.
    Twice: a fused backward rounds as often as eager PyTorch, at other places. Errors are measured by their maximum and
    by their root mean square (RMS); both must hold.

    The floor is a share of the exact values' own maximum, or RMS, for where plain PyTorch happens to be exact: few
    tokens, few elements that a mask leaves, exact sums. A routed gradient is still rounded, each time by at most half
    an eps of its value: ROUNDINGS times to the dtype and INNER_ROUNDINGS times to fp32. Where every exact value is 0,
    every actual value must be 0, unless terms cancel there: then the floor is a share of those terms.

    For fp64 nothing wider is at hand: `exact` has errors of the same size, and cancelling sums make them many eps of
    the result. There the floor is 2⁻⁴⁰, 4096 eps: far above rounding, far below any wrong mask.

    Args:
        actual: the tensor that is tested, at dtype.
        exact: the same values in fp64.
        plain: the same values as plain PyTorch computes them, at dtype.
        cancelling: the size of the terms whose sum is exactly 0, where every exact value is 0 for that reason.
    """
    if actual.shape != exact.shape:
        return f"got shape {list(actual.shape)}, expected {list(exact.shape)}"
    if actual.dtype != plain.dtype:
        return f"got {actual.dtype}, expected {plain.dtype}"
    if actual.numel() == 0:
        return None
    floor = _floor(actual.dtype)
    for name, size in {"maximum": _maximum, "RMS": _rms}.items():
        error, plain_error, scale = size(actual.double() - exact), size(plain.double() - exact), size(exact)
        scale = max(scale, cancelling)
        if not error <= 2 * plain_error + floor * scale:  # a NaN fails too
            return (
                f"{name} error {error:.3e} exceeds 2 × {plain_error:.3e} of plain PyTorch + {floor:.1e} × "
                f"{scale:.3e} scale, in {actual.dtype}"
            )
    return None


def _floor(dtype: torch.dtype) -> float:
    if dtype == torch.float64:
        return 2.0**-40
    return (ROUNDINGS * torch.finfo(dtype).eps + INNER_ROUNDINGS * torch.finfo(torch.float32).eps) / 2


def _maximum(x: Tensor) -> float:
    return float(x.abs().max())


def _rms(x: Tensor) -> float:
    return math.sqrt(float(x.square().mean()))


def assert_result_within_budget(
    actual: Result, exact: Result, plain: Result, name: str, cancelling: Mapping[str, float] | None = None
) -> None:
    """Raises AssertionError, naming the tensor, unless the output and every gradient keep the budget (`excess`)."""
    excesses = {"output": excess(actual.output, exact.output, plain.output)}
    for argument, gradient in actual.gradients.items():
        expected, plain_gradient = exact.gradients[argument], plain.gradients[argument]
        if gradient is None or expected is None or plain_gradient is None:
            excesses[f"d{argument}"] = "the gradient is None"
        else:
            terms = (cancelling or {}).get(argument, 0.0)
            excesses[f"d{argument}"] = excess(gradient, expected, plain_gradient, terms)
    wrong = [f"{part}: {why}" for part, why in excesses.items() if why is not None]
    if wrong:
        raise AssertionError(f"{name}: " + "; ".join(wrong))


def assert_same_bits(actual: Result, expected: Result, name: str) -> None:
    """Raises AssertionError, naming the tensor, unless two results agree in every bit (0 and -0 are equal)."""
    pairs = {"output": (actual.output, expected.output)}
    for argument, gradient in actual.gradients.items():
        other = expected.gradients[argument]
        if gradient is None or other is None:
            assert gradient is other, f"{name}: d{argument}: got {gradient}, expected {other}"
            continue
        pairs[f"d{argument}"] = (gradient, other)
    for part, (got, want) in pairs.items():
        different = int((got != want).sum()) if got.shape == want.shape else -1
        assert different == 0, f"{name}: {part}: {different} of {want.numel()} elements differ"
