"""What kernels share: the weights of a tile of tokens, the masked product, and rounding."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def load_strength(
    strength,  # [T], or one value with stride 0, or None
    strength_stride,
    rows,  # [BLOCK_T] int64, the tokens
    present,  # [BLOCK_T], which of them exist
):
    """s of a tile of tokens, [BLOCK_T, 1] fp32; anything where there is no strength: `load_weights` ignores it."""
    s = present.to(tl.float32)
    if strength is not None:
        s = tl.load(strength + rows * strength_stride, mask=present, other=0.0).to(tl.float32)
    return s[:, None]


@triton.jit
def load_weights(
    weights,  # [R, cols] fp32
    cols: tl.constexpr,  # 1 (broadcast) or the number of features
    strength,  # None or not
    s,  # from load_strength
    routes,  # [BLOCK_T]
    present,  # [BLOCK_T]
    features,  # [BLOCK_F] int64
    inside,  # [BLOCK_F], which of them exist
):
    """m of a tile, [BLOCK_T, BLOCK_F] fp32: weights[route, feature], interpolated from row 0 by the strength."""
    columns = features if cols > 1 else features * 0
    m = tl.load(
        weights + routes.to(tl.int64)[:, None] * cols + columns[None, :],
        mask=present[:, None] & inside[None, :],
        other=0.0,
    )
    if strength is not None:
        base = tl.load(weights + columns, mask=inside, other=0.0)[None, :]
        # As torch.lerp does, so that a strength of one is exactly no strength.
        m = tl.where(tl.abs(s) < 0.5, base + s * (m - base), m - (m - base) * (1.0 - s))
    return m


@triton.jit
def masked(
    g,  # [BLOCK_T, BLOCK_F] fp32
    weights,
    cols: tl.constexpr,
    strength,
    s,
    routes,
    present,
    features,
    inside,
):
    """m ⊙ g, exactly 0 where m is 0 whatever g is; g itself where there is no table (weights is None)."""
    if weights is not None:
        m = load_weights(weights, cols, strength, s, routes, present, features, inside)
        g = m * tl.where(m == 0.0, 0.0, g)
    return g


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """fp32 x rounded to the nearest even value of dtype. The interpreter truncates to bf16: there, by bits."""
    if INTERPRETED:
        if dtype == tl.bfloat16:
            bits = x.to(tl.int32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
            x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def dot(a, b, accumulator, PRECISION: tl.constexpr):
    """accumulator + a b. The interpreter multiplies bf16 bit patterns, so operands are upcast there."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision=PRECISION)
