"""The hidden activations of an MLP in one pass, with the bits of eager PyTorch: act(a) * up, and the forward mask.

The exponential, the error function and the hyperbolic tangent are those of CUDA, which PyTorch's kernels call: Triton's
own are approximations. Sums and products are rounded one by one: the compiler fuses none of them (enable_fp_fusion in
kernels/configs.py), and what PyTorch's kernels fuse is fused here by name. Triton has CUDA's functions flush subnormal
numbers, of which nothing is left once 1 is added to their results. The interpreter has numpy's functions, whose bits
are nobody's.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from ..primitives import shared
from ..primitives.fused_forward import (
    FORWARD_SCHEMA,
    ForwardArguments,
    fused_forward,
    has_eager_bits,
    is_worthwhile,
)
from ..primitives.registration import kernel_op
from ..routes import Routes
from ..tables import Table
from ..tracing import constant_when_traced
from .launch import config_of, launch, recording
from .masks import Routing, Weights, load_tokens, masked
from .matrices import Matrix, load_tile
from .rounding import INTERPRETED, rounded
from .route_grad import masked_product


@triton.jit
def exponential(x):
    if INTERPRETED:
        return tl.exp(x)
    return libdevice.exp(x)


@triton.jit
def error_function(x):
    if INTERPRETED:
        return tl.erf(x)
    return libdevice.erf(x)


@triton.jit
def hyperbolic_tangent(x):
    if INTERPRETED:
        return 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x))
    return libdevice.tanh(x)


@triton.jit
def nearest(x, dtype: tl.constexpr):
    """fp32 x rounded to dtype, as fp32."""
    return rounded(x, dtype).to(tl.float32)


@triton.jit
def half_of_one_plus_tanh(a, u, dtype: tl.constexpr):
    """0.5 a (1 + tanh(u)), each operation rounded to dtype."""
    one_plus = nearest(1.0 + nearest(hyperbolic_tangent(u), dtype), dtype)
    return nearest(nearest(0.5 * a, dtype) * one_plus, dtype)


@triton.jit
def forward_value(a, ACTIVATION: tl.constexpr, dtype: tl.constexpr):
    """act(a) of a tile, fp32, in eager PyTorch's rounding: of gelu_new, gelu_fast and relu2 that of each operation.

    gelu_fast has ten digits of sqrt(2 / pi), which in fp32 is the same number.
    """
    if ACTIVATION == "silu":
        value = tl.div_rn(a, 1.0 + exponential(-a))
    elif ACTIVATION == "gelu":
        value = (a * 0.5) * (1.0 + error_function(a * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        inner = 0.7978845608028654 * tl.fma((a * a) * a, tl.zeros_like(a) + 0.044715, a)
        value = (0.5 * a) * (1.0 + hyperbolic_tangent(inner))
    elif ACTIVATION == "gelu_new":
        cube = nearest(nearest(a * a, dtype) * a, dtype)
        inner = nearest(a + nearest(0.044715 * cube, dtype), dtype)
        value = half_of_one_plus_tanh(a, nearest(0.7978845608028654 * inner, dtype), dtype)
    elif ACTIVATION == "gelu_fast":
        square = nearest(nearest(0.044715 * a, dtype) * a, dtype)
        factor = nearest(1.0 + square, dtype)
        value = half_of_one_plus_tanh(
            a, nearest(nearest(a * 0.7978845608028654, dtype) * factor, dtype), dtype
        )
    else:
        tl.static_assert(ACTIVATION == "relu" or ACTIVATION == "relu2")
        value = tl.where(a == a, tl.maximum(a, 0.0), a)
        if ACTIVATION == "relu2":
            value = value * value
    return nearest(value, dtype)


@triton.jit
def activation_fwd_kernel(
    a,  # Matrix [T, F]
    up,  # Matrix [T, F] or None
    z,  # [T, F]
    routing,  # Routing of [T]
    weights,  # Weights [R, F] or [R, 1], or None
    num_tokens,
    num_features,
    ACTIVATION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """z = m ⊙ (act(a) * up), every operation rounded to z's dtype."""
    dtype = z.dtype.element_ty
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    features = tl.program_id(1).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    present, inside = rows < num_tokens, features < num_features
    valid = present[:, None] & inside[None, :]
    a_tile = load_tile(a, rows, features, valid).to(tl.float32)
    if up is not None:
        up_tile = load_tile(up, rows, features, valid).to(tl.float32)
    tile = forward_value(a_tile, ACTIVATION, dtype)
    if up is not None:
        tile = nearest(tile * up_tile, dtype)
    if weights is not None:
        tokens = load_tokens(routing, rows, present)
        tile = masked(tile, weights, routing, tokens, features, inside)
    tl.store(z + rows[:, None] * num_features + features[None, :], rounded(tile, dtype), mask=valid)


def activation_forward(
    a: Tensor, up: Tensor | None, routes: Routes, table: Table | None, activation: str
) -> Tensor:
    """See `gradroute.primitives.protocol.Primitives`."""
    fuses = is_worthwhile(a, up, table, activation) and _has_eager_bits(activation, a.dtype, a.device)
    if fuses or recording():
        return fused_forward(activation_forward_op, a, up, routes, table, activation)
    return shared.activation_forward(a, up, routes, table, activation, masked_product)


@constant_when_traced
def _has_eager_bits(activation: str, dtype: torch.dtype, device: torch.device) -> bool:
    return has_eager_bits("triton", activation_forward_op, activation, dtype, device)


@kernel_op(f"activation_forward({FORWARD_SCHEMA}) -> Tensor")
def activation_forward_op(
    a: Tensor,
    up: Tensor | None,
    *rest: Any,  # the fields of ForwardArguments
) -> Tensor:
    """z `[T, F]`."""
    ids, strength, weights, activation = ForwardArguments(*rest)
    tokens, features = a.shape
    z = a.new_empty(tokens, features)
    config = config_of(activation_fwd_kernel, a.device)
    launch(
        activation_fwd_kernel,
        (triton.cdiv(tokens, config["BLOCK_T"]), triton.cdiv(features, config["BLOCK_F"])),
        config,
        a=Matrix.of(a),
        up=Matrix.of(up),
        z=z,
        routing=Routing.of(ids, strength),
        weights=Weights.of(weights),
        num_tokens=tokens,
        num_features=features,
        ACTIVATION=activation,
    )
    return z
