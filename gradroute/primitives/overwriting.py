"""Writing in place: where it saves memory that costs page faults, and only where nobody else can have kept the tensor.

What an operation returns is seen by every mode that is active: a policy of selective activation checkpointing, a mode
that counts, fakes or records. Any of them may keep it, and so may a tensor subclass. Dynamo takes the gradient of an
autograd.Function whose forward writes to its own output for zero in torch 2.11. So nothing is written there: each
function here does in place what it can do without.
"""

from __future__ import annotations

import torch
from torch import Tensor

ALL = slice(None)


def is_watched() -> bool:
    """Whether something sees what operations return: a compiler, a mode, a transform of torch.func."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
    )


def may_overwrite(tensor: Tensor) -> bool:
    """Whether a tensor that the caller has just made, and reads no more, may be written to."""
    return type(tensor) is Tensor and not is_watched()


def times(a: Tensor, b: Tensor) -> Tensor:
    """a b element by element, of a's shape and dtype, in a where that may be overwritten."""
    return a.mul_(b) if may_overwrite(a) else (a * b).to(a.dtype)


def plus(total: Tensor, summand: Tensor) -> Tensor:
    """total + summand, of the total's dtype, in the total where that may be overwritten."""
    return total.add_(summand) if may_overwrite(total) else (total + summand).to(total.dtype)


def with_part(whole: Tensor, part: Tensor, rows: slice = ALL, cols: slice = ALL) -> Tensor:
    """`whole` with `part` in these rows, and columns of a matrix, in a new tensor."""
    if cols != ALL:
        part = torch.slice_scatter(whole[rows], part, 1, cols.start, cols.stop)
    return part if rows == ALL else torch.slice_scatter(whole, part, 0, rows.start, rows.stop)
