"""The bounds of packed documents, as attention takes them: checked before a kernel reads them."""

from __future__ import annotations

import reprlib

import torch
from torch import Tensor

from .checks import check_kind, check_shape
from .fake_tensors import has_data
from .routes import Routes


def check_packing(cu_seqlens: Tensor, q: Tensor, k: Tensor) -> None:
    """Raises ValueError unless `cu_seqlens` can be bounds in q `[1, H, S, D]` and k `[1, G, S, D]`; reads no values."""
    check_shape("cu_seqlens", cu_seqlens, -1)
    check_kind("cu_seqlens", cu_seqlens, torch.int32, q.device)
    if cu_seqlens.shape[0] == 0:
        raise ValueError("cu_seqlens: got no elements, expected the first token of each document and the end")
    if q.shape[0] != 1:
        raise ValueError(f"cu_seqlens: got a batch of {q.shape[0]}, expected a batch of one packed sequence")
    if q.shape[2] != k.shape[2]:
        raise ValueError(
            f"cu_seqlens: got {q.shape[2]} queries for {k.shape[2]} keys, expected as many: documents are of both"
        )


def check_documents(cu_seqlens: Tensor, tokens: int, routes: Routes | None) -> None:
    """Raises unless the bounds `[documents + 1]` int32 ascend from 0 to the number of tokens.

    Kernels differ in what they make of other bounds: memory that nobody wrote, or tokens in no document or in two.
    The check is made once a batch, by `Routes.derived_from`, and in every call without routes. On CUDA and in traced
    code it is an assertion that waits for nothing and that a graph captures; FakeTensors have no values to check.

    Raises:
        ValueError: with the bounds, where the host has them.
    """
    if routes is None:
        _check(cu_seqlens, tokens)
    else:
        routes.derived_from(("checked documents", tokens), (cu_seqlens,), lambda: _check(cu_seqlens, tokens))


def _check(cu_seqlens: Tensor, tokens: int) -> None:
    if torch.compiler.is_compiling():
        _assert_later(cu_seqlens, tokens)
    elif not has_data(cu_seqlens) or torch._C._functorch.is_batchedtensor(cu_seqlens):
        return  # ops refuse what vmap makes
    elif cu_seqlens.is_cuda:
        _assert_later(cu_seqlens, tokens)
    else:
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds[-1] != tokens or bounds != sorted(bounds):
            raise ValueError(
                f"cu_seqlens: got {reprlib.repr(bounds)}, expected bounds that ascend from 0 to {tokens}, the number "
                "of tokens: padding at the end is a document too"
            )


def _assert_later(cu_seqlens: Tensor, tokens: int) -> None:
    ascends = (cu_seqlens[1:] >= cu_seqlens[:-1]).all() & (cu_seqlens[0] == 0) & (cu_seqlens[-1] == tokens)
    torch._assert_async(ascends, "cu_seqlens: expected bounds that ascend from 0 to the number of tokens")
