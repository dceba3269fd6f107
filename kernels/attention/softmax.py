"""The softmax, computed in base 2: exp2 is one instruction, and log2(e) is folded into the scores' scale."""

import triton
import triton.language as tl

from ..rounding import dot, rounded

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def add_values(
    o,  # [queries, D] fp32, the sum so far
    total,  # [queries] fp32, the weights' sum so far
    top,  # [queries] fp32, the highest score so far
    s,  # [queries, keys] fp32 in base 2, -inf where a key is not seen
    v_tile,  # [keys, D]
    PRECISION: tl.constexpr,
):
    """One more tile of keys of a running softmax: the new o, total and top."""
    new_top = tl.maximum(top, tl.max(s, axis=1))
    shift = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.exp2(s - shift[:, None])
    shrink = tl.exp2(top - shift)
    o = dot(rounded(p, v_tile.dtype), v_tile, o * shrink[:, None], PRECISION)
    return o, total * shrink + tl.sum(p, axis=1), new_top
