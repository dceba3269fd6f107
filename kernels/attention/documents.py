"""The documents of a packed sequence: where that of each position begins and ends, found once a batch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...primitives.registration import kernel_op
from ...routes import Routes
from ..launch import config_of, launch


@triton.jit
def attention_documents_kernel(
    bounds,  # [2, S] int32
    cu_seqlens,  # [documents + 1] int32
    num_documents,
    num_positions,
    BLOCK: tl.constexpr,
):
    """bounds: where each position's document begins, and where it ends. What lies behind the last one is another."""
    position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    present = position < num_positions
    low = position * 0
    high = low + num_documents
    while (
        tl.max(high - low, axis=0) > 0
    ):  # how many documents end at a position or before it: between low and high
        middle = (low + high) // 2
        ends = tl.load(cu_seqlens + 1 + middle, mask=low < high, other=0) <= position
        high = tl.where(ends, high, middle)
        low = tl.where(ends & (low < high), middle + 1, low)
    begin = tl.load(cu_seqlens + low)
    end = tl.load(cu_seqlens + 1 + low, mask=low < num_documents, other=num_positions)
    tl.store(bounds + position, begin, mask=present)
    tl.store(bounds + num_positions + position, end, mask=present)


def document_bounds(routes: Routes | None, cu_seqlens: Tensor | None, length: int) -> Tensor | None:
    """Where the document of each of `length` positions begins, and where it ends: `[2, S]` int32, or None without any.

    The layers of a batch share them, by `Routes.derived_from`.
    """
    if cu_seqlens is None:
        return None
    if routes is None:
        return attention_documents_op(cu_seqlens, length)
    bounds: Tensor = routes.derived_from(
        ("document bounds", length), (cu_seqlens,), lambda: attention_documents_op(cu_seqlens, length)
    )
    return bounds


@kernel_op("attention_documents(Tensor cu_seqlens, SymInt length) -> Tensor")
def attention_documents_op(cu_seqlens: Tensor, length: int) -> Tensor:
    """The bounds `[2, S]` int32."""
    bounds = cu_seqlens.new_empty(2, length)
    config = config_of(attention_documents_kernel, cu_seqlens.device)
    launch(
        attention_documents_kernel,
        (triton.cdiv(length, config["BLOCK"]),),
        config,
        bounds=bounds,
        cu_seqlens=cu_seqlens.contiguous(),
        num_documents=cu_seqlens.shape[0] - 1,
        num_positions=length,
    )
    return bounds
