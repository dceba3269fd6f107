"""Products of groups of rows with matrices of their own, with the groups' sizes on the device alone.

On CUDA they are torch's grouped product; on the CPU, where the sizes can be read without waiting, one product a group.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..fake_tensors import has_data
from ..primitives.products import HALVES, by_onednn, product, wide_product
from ..primitives.registration import kernel_op, outside_autocast


@kernel_op("grouped_rows(Tensor a, Tensor b, Tensor ends, bool wide) -> Tensor")
@outside_autocast
def grouped_rows(a: Tensor, b: Tensor, ends: Tensor, wide: bool) -> Tensor:
    """Each group's rows times the group's matrix.

    Args:
        a: `[E, K]`, sorted by group.
        b: `[groups, K, N]`, of a's dtype.
        ends: `[groups]` int32, up to which row each group goes.
        wide: the result is in fp32 where a is in fp16, because it will be added to others: rounded to fp16 it could
            overflow before the sum.

    Returns:
        `[E, N]`; rows after the last group's are not written.
    """
    wide = wide and a.dtype == torch.float16
    if a.is_cuda and has_data(a):
        rows = F.grouped_mm(_aligned(a), _aligned(b), offs=ends)
        return rows.to(torch.float32) if wide else rows
    out = a.new_empty(a.shape[0], b.shape[2], dtype=torch.float32 if wide else a.dtype)
    for group, span in _groups(ends):
        _multiply(a[span], b[group], out[span])
    return out


@kernel_op("grouped_sums(Tensor a, Tensor b, Tensor ends, bool wide) -> Tensor")
@outside_autocast
def grouped_sums(a: Tensor, b: Tensor, ends: Tensor, wide: bool) -> Tensor:
    """The product of each group's rows, summed over them.

    Args:
        a: `[E, M]`, sorted by group.
        b: `[E, N]`, likewise, of a's dtype.
        ends: `[groups]` int32, up to which row each group goes.
        wide: the result is in fp32 where a is in half precision, because it will be added to others. Sums of bf16 are
            rounded once to bf16, which is all that torch's grouped product on CUDA returns; those of fp16 could
            overflow, and are made in fp32.

    Returns:
        `[groups, M, N]`; zeros where a group is empty.
    """
    wide = wide and a.dtype in HALVES
    if a.is_cuda and has_data(a):
        sums = F.grouped_mm(_aligned(a.T), _aligned(b), offs=ends)
        # On sm_100 torch leaves something else in groups without rows (pytorch/pytorch issue 172439).
        is_empty = ends.diff(prepend=ends.new_zeros(1)) == 0
        sums.masked_fill_(is_empty[:, None, None], 0)
        return sums.to(torch.float32) if wide else sums
    dtype = torch.float32 if wide else a.dtype
    out = a.new_empty(ends.shape[0], a.shape[1], b.shape[1], dtype=dtype)
    for group, rows in _groups(ends):
        _multiply(a[rows].T, b[rows], out[group])
    return out


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Leaves a b in `out`, which may be of a wider dtype."""
    if out.dtype != a.dtype or by_onednn(a, b):
        out.copy_(product(a, b) if out.dtype == a.dtype else wide_product(a, b))
    else:
        torch.mm(a, b, out=out)


def _groups(ends: Tensor) -> Iterator[tuple[int, slice]]:
    """Each group with its rows, from ends that are on the host; none where they have no values."""
    if not has_data(ends):
        return
    start = 0
    for group, end in enumerate(ends.tolist()):
        yield group, slice(start, end)
        start = end


def _aligned(matrices: Tensor) -> Tensor:
    """`matrices [..., M, N]` as torch's grouped product on CUDA takes them, whose rows or columns begin at 16 bytes.

    A weight may be a part of a larger buffer, as in FSDP, and begin anywhere.
    """
    step, strides = 16 // matrices.element_size(), matrices.stride()
    is_dense = 1 in strides[-2:] and all(stride == 1 or stride % step == 0 for stride in strides)
    if is_dense and matrices.data_ptr() % 16 == 0:
        return matrices
    return matrices.clone(memory_format=torch.contiguous_format)
