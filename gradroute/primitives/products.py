"""Products of matrices in a backward: torch's own, or oneDNN's where the library behind torch's is the slower one.

torch multiplies fp32 matrices on x86 by MKL, which leaves out its AVX-512 code on processors that are not Intel's.
torch has oneDNN too, which does not: on an AMD EPYC of 2 cores with AVX-512 it took 0.44 times as long (1024 × 256 by
256 × 1024). Forwards keep torch's own product, whose bits they must have.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..machine.identity import first_match
from .overwriting import is_watched, may_overwrite, plus

HALVES = (torch.float16, torch.bfloat16)

# Products of fewer multiplications than this, for which oneDNN takes longer to begin, are torch's own.
MIN_MULTIPLICATIONS = 1 << 23

# So many rows of an operand are copied at once; with fewer threads meet more often (see RUN in skipping/rule.py).
COPIED = 2048


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b for a `[M, K]` and b `[K, N]` of one dtype, in a new tensor `[M, N]`."""
    if not by_onednn(a, b):
        return a @ b
    if a.is_contiguous() or not a.T.is_contiguous():
        return _onednn(a, b)
    # oneDNN copies a first operand that lies by columns: so that is the smaller one, and some rows of it at once.
    if a.shape[0] <= b.shape[1]:
        return _in_chunks(a, b)
    return _in_chunks(b.T, a.T).T.contiguous()


def _in_chunks(a: Tensor, b: Tensor) -> Tensor:
    """a b as the sum of products of some columns of a and the same rows of b."""
    total: Tensor | None = None
    for start in range(0, a.shape[1], COPIED):
        inner = slice(start, start + COPIED)
        chunk = _onednn(a[:, inner], b[inner])
        total = chunk if total is None else total.add_(chunk)
    assert total is not None
    return total


def _onednn(a: Tensor, b: Tensor) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise.default(dense(a), dense(b).T, None, "none", [], "")
    return found


def dense(matrix: Tensor) -> Tensor:
    """The matrix with its numbers one beside the other, by rows or by columns; a copy of a part of a larger one.

    oneDNN has no fast code for a part as second operand: 1024 × 512 by 512 of 2048 columns took 3 s instead of 2 ms.
    """
    return matrix if matrix.is_contiguous() or matrix.T.is_contiguous() else matrix.contiguous()


def plus_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """total + a b, in the total where that may be overwritten; the product alone where there is no total yet."""
    if total is None:
        return product(a, b)
    if by_onednn(a, b):
        return total.add_(product(a, b)) if may_overwrite(total) else total + product(a, b)
    return total.addmm_(a, b) if may_overwrite(total) else torch.addmm(total, a, b)


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a b in fp32 at least, to be added to others: of halves it is rounded once to bf16 on the CPU, else not before.

    fp16 could overflow before the sum. bf16 has the range of fp32; made in fp32, products take 4.4 times as long (512
    tokens of 256 × 1024, 2 cores). Tensor cores take halves as they are, and sum up in fp32.
    """
    if a.dtype not in HALVES:
        return product(a, b)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    if a.dtype == torch.float16:
        return product(a.to(torch.float32), b.to(torch.float32))
    return (a @ b).to(torch.float32)


def plus_wide_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """total + a b in fp32 at least, in the total where that may be overwritten; see `wide_product`."""
    if a.dtype not in HALVES:
        return plus_product(total, a, b)
    if total is None:
        return wide_product(a, b)
    if a.is_cuda and may_overwrite(total):  # compilers do not take this form of addmm
        return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    return plus(total, wide_product(a, b))


def by_onednn(a: Tensor, b: Tensor) -> bool:
    """Whether `product` is oneDNN's: of large matrices in fp32 on the CPU, where it is faster and nobody looks on."""
    return (
        not torch.compiler.is_compiling()  # first: traced code must not depend on a size
        and a.shape[0] * a.shape[1] * b.shape[1] >= MIN_MULTIPLICATIONS
        and a.dtype is torch.float32
        and a.device.type == "cpu"
        and onednn_is_faster()
        and torch._C._get_mkldnn_enabled()  # what torch.backends.mkldnn.flags sets
        and type(a) in _PLAIN
        and type(b) in _PLAIN
        and not is_watched()
    )


_PLAIN = (Tensor, torch.nn.Parameter)


@functools.cache
def onednn_is_faster() -> bool:
    """Whether this torch multiplies by MKL, on a processor for which MKL has no AVX-512 code and oneDNN has."""
    return (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and first_match("/proc/cpuinfo", r"vendor_id\s*: (.+)") not in (None, "GenuineIntel")
    )
