"""What FlashAttention-4's backward is compiled with, in the CuTe DSL, and its call.

A mask says which scores exist; the change of a score adds the bias, and the change of its gradient multiplies by the
factor. Each is called for one element, with its position, and unpacks what `auxiliary` packs. Positions are those of
existing tokens: beyond the last one the library takes them modulo the length, and masks the element itself.
"""

from __future__ import annotations

import cutlass
import cutlass.cute as cute
from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
from flash_attn.cute.interface import _flash_attn_bwd
from flash_attn.cute.utils import scalar_to_ssa

from .blocks import BLOCK


@cute.jit
def causal(batch, head, query, key, lengths, operands):
    return key <= query


@cute.jit
def causal_with_edges(batch, head, query, key, lengths, operands):
    return (key <= query) & has_edge(batch, query, key, operands)


@cute.jit
def in_span(batch, head, query, key, lengths, operands):
    _, _, _, first, stop, _, _ = operands
    after = key >= scalar_to_ssa(first[query[0]], cutlass.Int32)
    return after & (key < scalar_to_ssa(stop[query[0]], cutlass.Int32))


@cute.jit
def in_span_with_edges(batch, head, query, key, lengths, operands):
    seen = in_span(batch, head, query, key, lengths, operands)
    return seen & has_edge(batch, query, key, operands)


@cute.jit
def has_edge(batch, query, key, operands):
    _, key_routes, bits, _, _, _, _ = operands
    bit = (bits[batch[0], query[0]] >> key_routes[batch[0], key[0]]) & 1
    return scalar_to_ssa(cutlass.Int32(bit), cutlass.Int32) != scalar_to_ssa(0, cutlass.Int32)


# The library passes these by keyword.


@cute.jit
def unbiased(score, batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
    return score


@cute.jit
def biased(score, batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
    query_routes, key_routes, _, _, _, bias, _ = aux_tensors
    added = bias[query_routes[batch[0], q_idx[0]], key_routes[batch[0], kv_idx[0]]]
    return score + scalar_to_ssa(added, cutlass.Float32)


@cute.jit
def same_gradient(grad, score, batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
    return grad


@cute.jit
def gradient_by_factor(grad, score, batch, head, q_idx, kv_idx, seqlen_info, aux_tensors):
    query_routes, key_routes, _, _, _, _, factor = aux_tensors
    weight = factor[query_routes[batch[0], q_idx[0]], key_routes[batch[0], kv_idx[0]]]
    weight = scalar_to_ssa(weight, cutlass.Float32)
    nothing = cute.full_like(grad, 0.0)
    return cute.where(weight != nothing, grad * weight, nothing)


MASKS = {
    (True, False): causal,
    (True, True): causal_with_edges,
    (False, False): in_span,
    (False, True): in_span_with_edges,
}


def auxiliary(operands):
    """The tensors that the functions above unpack; those that a pass has not are never read."""
    *tensors, _ = operands
    return [operands.query_routes if tensor is None else tensor for tensor in tensors]


def run(q, k, v, o, d_o, lse, dq, dk, dv, scale, operands):
    """Writes dq, dk and dv of a pass.

    Args:
        q: `[B, S, H, D]` in bf16 or fp16; 16-byte aligned.
        k: `[B, S, G, D]`.
        v: `[B, S, G, D]`.
        o: `[B, S, H, D]`, attention's output.
        d_o: `[B, S, H, D]`, its gradient.
        lse: `[B, H, S]` in fp32, natural; any number where a query sees no key.
        dq: written to, like q.
        dk: written to, like k.
        dv: written to, like v.
        scale: the factor of the scores.
        operands: see `Operands`.
    """
    score_mod = score_mod_bwd = None
    if operands.bias is not None or operands.factor is not None:
        score_mod = unbiased if operands.bias is None else biased
        score_mod_bwd = same_gradient if operands.factor is None else gradient_by_factor
    _flash_attn_bwd(
        q,
        k,
        v,
        o,
        d_o,
        lse,
        softmax_scale=scale,
        dq=dq,
        dk=dk,
        dv=dv,
        mask_mod=MASKS[operands.first is None, operands.bits is not None],
        score_mod=score_mod,
        score_mod_bwd=score_mod_bwd,
        aux_tensors=auxiliary(operands),
        block_sparse_tensors=BlockSparseTensorsTorch(
            mask_block_cnt=operands.blocks.partial_count,
            mask_block_idx=operands.blocks.partial_index,
            full_block_cnt=operands.blocks.full_count,
            full_block_idx=operands.blocks.full_index,
            block_size=(BLOCK, BLOCK),
        ),
    )
