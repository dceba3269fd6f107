"""The activation's backward with every mask of an MLP folded in, and the bias gradient on the way."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..primitives.arguments import MIDDLE_SCHEMA, Middle, wanted
from ..primitives.registration import kernel_op
from ..routes import Routes
from .activations import value_and_derivative
from .launch import config_of, launch, route_arguments, strides, table_arguments
from .tiles import load_strength, masked, rounded

TOKENS_PER_PARTIAL = 512  # of a bias gradient's first stage


@triton.jit
def activation_bwd_kernel(
    dz,  # [T, F] or None
    a,  # [T, F]
    da,  # [T, F] or None
    z,  # [T, F] or None
    partial,  # [ceil(T / TOKENS), F] fp32 or None
    ids,  # [T]
    strength,
    strength_stride,
    pre,
    pre_cols: tl.constexpr,
    hidden,
    hidden_cols: tl.constexpr,
    forward,
    forward_cols: tl.constexpr,
    update_out,
    update_out_cols: tl.constexpr,
    update_in,
    update_in_cols: tl.constexpr,
    num_tokens,
    num_features,
    dz_stride_t,
    dz_stride_f,
    a_stride_t,
    a_stride_f,
    ACTIVATION: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """da = m_pre ⊙ m_hidden ⊙ m_forward ⊙ dz ⊙ act'(a).

    On the way z = m_update_out ⊙ m_forward ⊙ act(a), and partial sums of m_update_in ⊙ da over runs of TOKENS tokens.
    """
    features = tl.program_id(1).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = features < num_features
    first = tl.program_id(0).to(tl.int64) * TOKENS
    total = tl.zeros([BLOCK_F], dtype=tl.float32)
    for start in range(0, tl.minimum(TOKENS, num_tokens - first), BLOCK_T):
        rows = first + start + tl.arange(0, BLOCK_T)
        present = rows < num_tokens
        valid = present[:, None] & inside[None, :]
        routes = tl.load(ids + rows, mask=present, other=0)
        s = load_strength(strength, strength_stride, rows, present)
        out = rows[:, None] * num_features + features[None, :]
        a_tile = tl.load(
            a + rows[:, None] * a_stride_t + features[None, :] * a_stride_f, mask=valid, other=0.0
        )
        value, derivative = value_and_derivative(a_tile.to(tl.float32), ACTIVATION)
        if z is not None:
            z_tile = masked(value, forward, forward_cols, strength, s, routes, present, features, inside)
            z_tile = masked(
                z_tile, update_out, update_out_cols, strength, s, routes, present, features, inside
            )
            tl.store(z + out, rounded(z_tile, z.dtype.element_ty), mask=valid)
        if dz is not None:
            g = tl.load(
                dz + rows[:, None] * dz_stride_t + features[None, :] * dz_stride_f, mask=valid, other=0.0
            )
            g = g.to(tl.float32)
            g = masked(g, forward, forward_cols, strength, s, routes, present, features, inside)
            g = masked(g, hidden, hidden_cols, strength, s, routes, present, features, inside)
            g = masked(g * derivative, pre, pre_cols, strength, s, routes, present, features, inside)
            tl.store(da + out, rounded(g, da.dtype.element_ty), mask=valid)
            if partial is not None:
                g = masked(g, update_in, update_in_cols, strength, s, routes, present, features, inside)
                total += tl.sum(g, axis=0)
    if partial is not None:
        tl.store(
            partial + tl.program_id(0).to(tl.int64) * num_features + features,
            total,
            mask=inside,
        )


def activation_backward(
    dz: Tensor | None,
    a: Tensor,
    routes: Routes,
    sites: Any,
    activation: str,
    *,
    want_z: bool,
    want_bias: bool,
    overwrite: bool = False,  # torch's allocator for CUDA has new matrices at no cost
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """See `gradroute.backends.composed.activation_backward`."""
    da, z, db = activation_backward_op(dz, a, *Middle.of(a, routes, sites, activation, want_z, want_bias))
    return wanted((da, dz is not None), (z, want_z), (db, want_bias))


@kernel_op(f"activation_backward(Tensor? dz, Tensor a, {MIDDLE_SCHEMA}) -> (Tensor, Tensor, Tensor)")
def activation_backward_op(
    dz: Tensor | None,
    a: Tensor,
    *rest: Any,  # of Middle
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs that are not wanted have no elements."""
    middle = Middle(*rest)
    want_z, want_bias = middle.want_z, middle.want_bias
    tokens, features = a.shape
    config = config_of(activation_bwd_kernel, a.device)
    want_grad = dz is not None
    da = a.new_empty(tokens if want_grad else 0, features)
    z = a.new_empty(tokens if want_z else 0, features)
    tokens_per_program = TOKENS_PER_PARTIAL if want_bias else config["BLOCK_T"]
    programs = triton.cdiv(tokens, tokens_per_program)
    partial = a.new_empty(programs if want_bias else 0, features, dtype=torch.float32)
    launch(
        activation_bwd_kernel,
        (programs, triton.cdiv(features, config["BLOCK_F"])),
        config,
        dz=dz,
        a=a,
        da=da if want_grad else None,
        z=z if want_z else None,
        partial=partial if want_bias else None,
        **route_arguments(middle.ids, middle.strength),
        **table_arguments(**middle.tables),
        num_tokens=tokens,
        num_features=features,
        **strides("dz", a if dz is None else dz, "tf"),
        **strides("a", a, "tf"),
        ACTIVATION=middle.activation,
        TOKENS=tokens_per_program,
    )
    return da, z, partial.sum(0).to(a.dtype)
