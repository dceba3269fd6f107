"""The activation's backward with every mask of an MLP folded in, and the bias gradient on the way."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..primitives.arguments import ACTIVATION_SCHEMA, ActivationArguments, ActivationMasks, wanted
from ..primitives.registration import kernel_op
from ..routes import Routes
from .activations import value_and_derivative
from .launch import config_of, launch
from .linear import TOKENS_PER_PARTIAL
from .masks import Routing, Weights, load_tokens, masked
from .matrices import Matrix, load_tile
from .rounding import rounded

# Tokens that a program handles where it makes no sums: enough for loads to run ahead, few enough for many programs.
TOKENS_PER_PROGRAM = 32


class MaskWeights(NamedTuple):
    """ActivationMasks as kernels take them: each table once, since a second pointer to it would take registers.

    Attributes:
        tables: the tables of all fields.
        dh: which of the tables this field has, like the fields that follow.
        da: see dh.
        z: see dh.
        update: see dh.
    """

    tables: tuple[Weights | None, ...]
    dh: tuple[tl.constexpr, ...]
    da: tuple[tl.constexpr, ...]
    z: tuple[tl.constexpr, ...]
    update: tuple[tl.constexpr, ...]

    @staticmethod
    def of(arguments: ActivationArguments) -> MaskWeights:
        """The argument for the tables' weights."""
        fields = (arguments.dh, arguments.da, arguments.z, arguments.update)
        tables = {id(table): table for tables in fields for table in tables}
        places = {key: tl.constexpr(place) for place, key in enumerate(tables)}
        dh, da, z, update = (tuple(places[id(table)] for table in tables) for tables in fields)
        return MaskWeights(tuple(map(Weights.of, tables.values())), dh, da, z, update)


@triton.jit
def activation_bwd_kernel(
    dz,  # Matrix [T, F] or None
    a,  # Matrix [T, F]
    da,  # [T, F] or None
    z,  # [T, F] or None
    partial,  # [ceil(T / TOKENS), F] fp32 or None
    routing,  # Routing of [T]
    masks,  # MaskWeights
    num_tokens,
    num_features,
    ACTIVATION: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    STAGES: tl.constexpr,
):
    """da = m_da ⊙ m_dh ⊙ dz ⊙ act'(a).

    On the way z = m_z ⊙ act(a), and partial sums of m_update ⊙ da over runs of TOKENS tokens.
    """
    features = tl.program_id(1).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = features < num_features
    first = tl.program_id(0).to(tl.int64) * TOKENS
    total = tl.zeros([BLOCK_F], dtype=tl.float32)
    for start in tl.range(0, tl.minimum(TOKENS, num_tokens - first), BLOCK_T, num_stages=STAGES):
        rows = first + start + tl.arange(0, BLOCK_T)
        present = rows < num_tokens
        valid = present[:, None] & inside[None, :]
        tokens = load_tokens(routing, rows, present)
        out = rows[:, None] * num_features + features[None, :]
        a_tile = load_tile(a, rows, features, valid)
        if dz is not None:
            g = load_tile(dz, rows, features, valid).to(tl.float32)
        value, derivative = value_and_derivative(a_tile.to(tl.float32), ACTIVATION)
        if z is not None:
            z_tile = value
            for i in tl.static_range(len(masks.z)):
                z_tile = masked(z_tile, masks.tables[masks.z[i]], routing, tokens, features, inside)
            tl.store(z + out, rounded(z_tile, z.dtype.element_ty), mask=valid)
        if dz is not None:
            for i in tl.static_range(len(masks.dh)):
                g = masked(g, masks.tables[masks.dh[i]], routing, tokens, features, inside)
            g = g * derivative
            for i in tl.static_range(len(masks.da)):
                g = masked(g, masks.tables[masks.da[i]], routing, tokens, features, inside)
            tl.store(da + out, rounded(g, da.dtype.element_ty), mask=valid)
            if partial is not None:
                for i in tl.static_range(len(masks.update)):
                    g = masked(g, masks.tables[masks.update[i]], routing, tokens, features, inside)
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
    masks: ActivationMasks,
    activation: str,
    *,
    want_z: bool,
    want_bias: bool,
    overwrite: bool = False,  # torch's allocator for CUDA has new matrices at no cost
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """See `gradroute.primitives.protocol.Primitives`."""
    da, z, db = activation_backward_op(
        dz, a, *ActivationArguments.of(a, routes, masks, activation, want_z, want_bias)
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
    tokens_per_program = TOKENS_PER_PARTIAL if want_bias else TOKENS_PER_PROGRAM
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
        masks=MaskWeights.of(arguments),
        num_tokens=tokens,
        num_features=features,
        ACTIVATION=arguments.activation,
        TOKENS=tokens_per_program,
    )
    return da, z, partial.sum(0).to(a.dtype)
