"""The activation's backward with every mask of an MLP folded in, and the bias gradient on the way."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..primitives.arguments import ACTIVATION_SCHEMA, ActivationArguments, wanted
from ..primitives.protocol import ActivationTables
from ..primitives.registration import kernel_op
from ..routes import Routes
from .activations import value_and_derivative
from .launch import config_of, launch
from .linear import TOKENS_PER_PARTIAL
from .masks import Routing, Weights, load_tokens, masked
from .matrices import Matrix, load_tile
from .rounding import rounded


class ActivationMasks(NamedTuple):
    """The masks of an MLP's activations as kernels take them; None where there is no table."""

    pre: Weights | None
    hidden: Weights | None
    forward: Weights | None
    update_out: Weights | None
    update_in: Weights | None

    @staticmethod
    def of(tables: dict[str, Tensor | None]) -> ActivationMasks:
        """The argument for the tables' weights by name."""
        return ActivationMasks(**{name: Weights.of(table) for name, table in tables.items()})


@triton.jit
def activation_bwd_kernel(
    dz,  # Matrix [T, F] or None
    a,  # Matrix [T, F]
    da,  # [T, F] or None
    z,  # [T, F] or None
    partial,  # [ceil(T / TOKENS), F] fp32 or None
    routing,  # Routing of [T]
    masks,  # ActivationMasks
    num_tokens,
    num_features,
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
        tokens = load_tokens(routing, rows, present)
        out = rows[:, None] * num_features + features[None, :]
        a_tile = load_tile(a, rows, features, valid)
        value, derivative = value_and_derivative(a_tile.to(tl.float32), ACTIVATION)
        if z is not None:
            z_tile = masked(value, masks.forward, routing, tokens, features, inside)
            z_tile = masked(z_tile, masks.update_out, routing, tokens, features, inside)
            tl.store(z + out, rounded(z_tile, z.dtype.element_ty), mask=valid)
        if dz is not None:
            g = load_tile(dz, rows, features, valid).to(tl.float32)
            g = masked(g, masks.forward, routing, tokens, features, inside)
            g = masked(g, masks.hidden, routing, tokens, features, inside)
            g = masked(g * derivative, masks.pre, routing, tokens, features, inside)
            tl.store(da + out, rounded(g, da.dtype.element_ty), mask=valid)
            if partial is not None:
                g = masked(g, masks.update_in, routing, tokens, features, inside)
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
    sites: ActivationTables,
    activation: str,
    *,
    want_z: bool,
    want_bias: bool,
    overwrite: bool = False,  # torch's allocator for CUDA has new matrices at no cost
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """See `gradroute.primitives.protocol.Primitives`."""
    da, z, db = activation_backward_op(
        dz, a, *ActivationArguments.of(a, routes, sites, activation, want_z, want_bias)
    )
    return wanted((da, dz is not None), (z, want_z), (db, want_bias))


@kernel_op(f"activation_backward(Tensor? dz, Tensor a, {ACTIVATION_SCHEMA}) -> (Tensor, Tensor, Tensor)")
def activation_backward_op(
    dz: Tensor | None,
    a: Tensor,
    *rest: Any,  # the fields of ActivationArguments
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs that are not wanted have no elements."""
    arguments = ActivationArguments(*rest)
    want_z, want_bias = arguments.want_z, arguments.want_bias
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
        dz=Matrix.of(dz),
        a=Matrix.of(a),
        da=da if want_grad else None,
        z=z if want_z else None,
        partial=partial if want_bias else None,
        routing=Routing.of(arguments.ids, arguments.strength),
        masks=ActivationMasks.of(arguments.tables),
        num_tokens=tokens,
        num_features=features,
        ACTIVATION=arguments.activation,
        TOKENS=tokens_per_program,
    )
    return da, z, partial.sum(0).to(a.dtype)
