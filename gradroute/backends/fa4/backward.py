"""The backward of attention through edges, by one pass of FlashAttention-4's or by two."""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from ...fake_tensors import has_data
from ...primitives.attention_pattern import Pattern
from ...primitives.registration import kernel_op
from ...primitives.schema import Flat, flat, schema_of, unflat
from ...routes import Routes
from ...tables import Table
from ..vendor import machine
from ..vendor.layout import readable, repeated, summed
from .operands import Operands
from .passes import passes


class Arguments(NamedTuple):
    """What the op takes after its tensors.

    Attributes:
        scale: the factor of the scores.
        operands: routes, edges, what a query sees, and the lists of blocks.
    """

    scale: float
    operands: Operands


def attention_backward(
    d_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    routes: Routes | None,
    score_edges: Table | None,
    value_edges: Table | None,
    pattern: Pattern,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of attention through edges, for a call that `why_not` does not refuse.

    P = exp(scale q kᵀ - lse); dv = (E_value ⊙ P)ᵀ do; dS = E_score ⊙ P ⊙ (do vᵀ - rowsum(do ⊙ o)); dq = scale dS k;
    dk = scale dSᵀ q, summed over the heads of a group. A query's gradient that is inf or NaN reaches the keys of its
    block, whatever the edges.

    Args:
        d_o: `[B, H, S, D]`, masked by head.
        q: `[B, H, S, D]`, bf16 or fp16.
        k: `[B, G, S, D]`; H is a multiple of G.
        v: `[B, G, S, D]`.
        o: `[B, H, S, D]`, attention's output, not masked.
        lse: `[B, H, S]` in fp32; finite, whatever it is where a query sees no key.
        routes: the routes of the tokens `[B, S]`; not None.
        score_edges: `[R, R]`, by [query's route, key's route]; None: ones.
        value_edges: `[R, R]`; None: ones.
        pattern: which keys a query sees; no dropout.

    Returns:
        dq, dk, dv in the dtype of q, k, v.
    """
    assert routes is not None
    shape = (q.shape[0], q.shape[2])
    dq = dk = dv = None
    for one in passes(score_edges, value_edges):
        arguments = Arguments(pattern.scale, Operands.of(one, routes, shape, pattern))
        of_pass = backward_op(d_o, q, k, v, o, lse, *flat(arguments))
        if one.gives_scores:
            dq, dk = of_pass[:2]
        if one.gives_values:
            dv = of_pass[2]
    assert dq is not None and dk is not None and dv is not None
    return dq, dk, dv


@kernel_op(
    "attention_fa4_backward(Tensor d_o, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, "
    f"{schema_of(Arguments)}) -> (Tensor, Tensor, Tensor)"
)
def backward_op(
    d_o: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, *fields: Flat
) -> tuple[Tensor, Tensor, Tensor]:
    """One pass; the gradients lie token by token, `[B, S, H, D]` in memory."""
    scale, operands = unflat(Arguments, fields)
    group = q.shape[1] // k.shape[1]
    repeats = group if _mistakes_queries(q, operands) else 1
    k, v = repeated(k, repeats), repeated(v, repeats)
    gradients = [
        torch.empty_like(t.transpose(1, 2), memory_format=torch.contiguous_format) for t in (q, k, v)
    ]
    if has_data(q):
        tensors = [readable(t).transpose(1, 2) for t in (q, k, v, o, d_o)]
        with torch.cuda.device_of(q):
            library().run(*tensors, lse, *gradients, scale, operands)
    dq, dk, dv = (t.transpose(1, 2) for t in gradients)
    return dq, summed(dk, repeats), summed(dv, repeats)


def _mistakes_queries(q: Tensor, operands: Operands) -> bool:
    """Whether the kernel would read the routes of wrong queries for a bias or a factor, as sources of 4.0.0b36 say.

    With grouped heads the backward for sm_90 calls score_mod with a query's number divided by the size of the group, as
    if the heads of a group were packed into one, which its backward never does. So there every head gets its own keys.
    """
    capability = machine.capability(q.device.index)
    has_scores = operands.bias is not None or operands.factor is not None
    return has_scores and capability is not None and capability[0] == 9


def library() -> ModuleType:
    """The kernels and their call; imported when they first run, for that takes seconds."""
    from . import device

    return device
