"""The activations' values and derivatives in fp32."""

import triton
import triton.language as tl


@triton.jit
def sigmoid(a):
    """1 / (1 + exp(-a)), without overflow."""
    e = tl.exp(-tl.abs(a))
    return tl.where(a >= 0.0, 1.0, e) / (1.0 + e)


@triton.jit
def value_and_derivative(a, ACTIVATION: tl.constexpr):
    """act(a) and act'(a) of a tile, fp32; relu and relu2 have derivative 0 at 0, as in PyTorch."""
    if ACTIVATION == "silu":
        s = sigmoid(a)
        value = a * s
        derivative = s * (1.0 + a * (1.0 - s))
    elif ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(a * 0.7071067811865476))
        value = a * cdf
        derivative = cdf + a * tl.exp(-0.5 * a * a) * 0.3989422804014327
    elif ACTIVATION == "gelu_tanh" or ACTIVATION == "gelu_fast":  # in fp32 they are one function
        inner = 0.7978845608028654 * (a + 0.044715 * a * a * a)
        t = 2.0 * sigmoid(2.0 * inner) - 1.0
        value = 0.5 * a * (1.0 + t)
        slope = 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * a * a)
        derivative = 0.5 * (1.0 + t) + 0.5 * a * (1.0 - t * t) * slope
    elif ACTIVATION == "relu":
        value = tl.maximum(a, 0.0)
        derivative = tl.where(a > 0.0, 1.0, 0.0)
    else:
        tl.static_assert(ACTIVATION == "relu2")
        positive = tl.maximum(a, 0.0)
        value = positive * positive
        derivative = 2.0 * positive
    return value, derivative
