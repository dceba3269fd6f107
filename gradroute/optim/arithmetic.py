"""Products, powers and averages that round where torch's own AdamW does, and keep every bit of what is not touched."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from ..fake_tensors import has_data

#: The integer dtype whose elements have so many bytes.
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def power(base: float | Tensor, exponent: Tensor, exact: bool) -> Tensor:
    """base ** exponent in fp64; if `exact`, with the bits that Python's floats have, as torch's bias corrections do.

    torch's vectorised power is off by a bit now and then, and so is a square root, which is a power of 0.5 there. Where
    elements do not lie side by side, torch takes the C library's power, as Python does, at 40 ns each instead of 7. For
    fp32 that is not needed: for 11 values of β₁ and β₂ from 0.5 to 0.99999 and all steps up to 2²² the factors were the
    same after rounding.
    """
    if exact:
        exponent = exponent.new_empty((*exponent.shape, 2))[..., 0].copy_(exponent)
    return torch.pow(base, exponent)


def quotient(lr: float | Tensor, divisor: Tensor) -> Tensor:
    """lr / divisor, rounded once; torch computes a number over a tensor as a product with the reciprocal."""
    if isinstance(lr, Tensor):
        return lr / divisor.to(lr.dtype)
    return torch.full_like(divisor, lr).div_(divisor)


def where_touched(touched: Tensor, value: float | Tensor, dtype: torch.dtype) -> Tensor:
    """`value` where a block is touched, else 1; rounded to `dtype` once."""
    return torch.ones_like(touched, dtype=dtype).masked_fill_(touched, value)


def bias_corrections(
    counts: Tensor, betas: tuple[float | Tensor, float | Tensor], lr: float | Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """lr / (1 - β₁^t) and √(1 - β₂^t) for every count t of steps `[blocks]`, rounded to `dtype` once.

    On the CPU each t that occurs is computed with once: blocks mostly have taken equally many steps, and two powers for
    each of the 270,000 rows of a language model were a tenth of its step.
    """
    if counts.numel() > 0 and is_on_the_host(counts):
        lowest, highest = (int(count) for count in counts.aminmax())
        if lowest == highest > 0 and not any(isinstance(value, Tensor) for value in (*betas, lr)):
            # By Python's floats themselves: so few numbers take torch 0.1 ms, whatever they are for.
            first, second = (1 - beta**lowest for beta in betas)
            of_all = counts.new_tensor([lr / first, second**0.5], dtype=torch.float64).to(dtype)
            return of_all[0].expand(len(counts)), of_all[1].expand(len(counts))
        if highest - lowest < counts.numel():
            steps = torch.arange(lowest, highest + 1, dtype=torch.float64, device=counts.device)
            of_steps = _bias_corrections(steps, betas, lr, dtype, exact=True)
            if lowest == highest:
                return of_steps[0].expand(len(counts)), of_steps[1].expand(len(counts))
            places = (counts - lowest).long()
            return of_steps[0][places], of_steps[1][places]
    return _bias_corrections(counts.double(), betas, lr, dtype, exact=dtype == torch.float64)


def is_on_the_host(tensor: Tensor) -> bool:
    """Whether to read a tensor's values waits for nothing."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and has_data(tensor)


def _bias_corrections(
    steps: Tensor,
    betas: tuple[float | Tensor, float | Tensor],
    lr: float | Tensor,
    dtype: torch.dtype,
    exact: bool,
) -> tuple[Tensor, Tensor]:
    first, second = (1 - power(beta, steps, exact) for beta in betas)
    root = power(second, torch.full_like(second, 0.5), exact)
    return quotient(lr, first).to(dtype), root.to(dtype)


def factor_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype in which torch computes the product of a tensor and a Python number."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def average_touched(average: Tensor, gradient: Tensor, weight: float, mask: Tensor) -> Tensor:
    """average ← lerp(average, gradient, weight) within the mask; returns memory of that size that is free again.

    There are two ways with the same bits, which round where torch does. The first takes a tenth off the time of a step.
    """
    if weight < 0.5 and average.itemsize > 2:
        # torch.lerp computes a + w (g - a) for weights below a half. Subtracting +0 keeps every bit, also of -0.
        difference = average - gradient
        bits(difference).bitwise_and_(mask)
        average.sub_(difference, alpha=weight)
        return difference
    new = torch.lerp(average, gradient, weight)
    write_touched(new, average, mask)
    return new


def write_touched(new: Tensor, old: Tensor, mask: Tensor) -> None:
    """Writes the bits of `new` that are in the mask over those of `old`; `new` is spent.

    On the CPU torch.where is slow: for 2¹⁸ elements in cache it took 0.17 ms, and each of these three operations 0.02
    to 0.03, as a product does (fp32, AVX-512).
    """
    bits(old).bitwise_xor_(bits(new).bitwise_xor_(bits(old)).bitwise_and_(mask))


def bits(tensor: Tensor) -> Tensor:
    """The memory of a tensor as integers."""
    return tensor.view(INTEGERS[tensor.itemsize])


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """All elements of some tensors, one after the other."""
    return _flatten_dense_tensors(tensors)


def adjacent(tensors: Sequence[Tensor]) -> Tensor | None:
    """All elements of some tensors in their own memory, if they lie there one after the other; else None.

    To join and to part the counts of 272 parameters took 2 of the 85 ms of a step.
    """
    if torch.compiler.is_compiling() or not has_data(tensors[0]):
        return None
    storage, address = tensors[0].untyped_storage().data_ptr(), tensors[0].data_ptr()
    first, total = address, 0
    for tensor in tensors:
        if tensor.data_ptr() != first + total * tensor.itemsize or not tensor.is_contiguous():
            return None
        if tensor.untyped_storage().data_ptr() != storage:
            return None
        total += tensor.numel()
    return tensors[0].as_strided((total,), (1,))


def split(flat: Tensor, like: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The parts of a flat tensor, in the shapes of `like`."""
    return _unflatten_dense_tensors(flat, like)
