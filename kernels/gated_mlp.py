"""The backward of act(gate) * up with every mask of a gated MLP folded in, and the bias gradients on the way."""

from typing import Any

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
from .masks import Routing, load_tokens, masked
from .matrices import Matrix, load_tile
from .mlp import TOKENS_PER_PROGRAM, MaskWeights
from .rounding import rounded


@triton.jit
def glu_bwd_kernel(
    dz,  # Matrix [T, F] or None
    gate,  # Matrix [T, F]
    up,  # Matrix [T, F]
    dgate,  # [T, F] or None
    dup,  # [T, F] or None
    z,  # [T, F] or None
    gate_partial,  # [ceil(T / TOKENS), F] fp32 or None
    up_partial,  # [ceil(T / TOKENS), F] fp32 or None
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
    """With dh = m_dh ⊙ dz: dgate = m_da ⊙ dh ⊙ up ⊙ act'(gate), dup = m_da ⊙ dh ⊙ act(gate).

    On the way z = m_z ⊙ act(gate) ⊙ up, and partial sums of m_update ⊙ dgate and m_update ⊙ dup over runs of TOKENS
    tokens.
    """
    features = tl.program_id(1).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = features < num_features
    first = tl.program_id(0).to(tl.int64) * TOKENS
    gate_total = tl.zeros([BLOCK_F], dtype=tl.float32)
    up_total = tl.zeros([BLOCK_F], dtype=tl.float32)
    for start in tl.range(0, tl.minimum(TOKENS, num_tokens - first), BLOCK_T, num_stages=STAGES):
        rows = first + start + tl.arange(0, BLOCK_T)
        present = rows < num_tokens
        valid = present[:, None] & inside[None, :]
        tokens = load_tokens(routing, rows, present)
        out = rows[:, None] * num_features + features[None, :]
        gate_tile = load_tile(gate, rows, features, valid)
        up_tile = load_tile(up, rows, features, valid).to(tl.float32)
        if dz is not None:
            dh = load_tile(dz, rows, features, valid).to(tl.float32)
        value, derivative = value_and_derivative(gate_tile.to(tl.float32), ACTIVATION)
        if z is not None:
            z_tile = value * up_tile
            for i in tl.static_range(len(masks.z)):
                z_tile = masked(z_tile, masks.tables[masks.z[i]], routing, tokens, features, inside)
            tl.store(z + out, rounded(z_tile, z.dtype.element_ty), mask=valid)
        if dz is not None:
            for i in tl.static_range(len(masks.dh)):
                dh = masked(dh, masks.tables[masks.dh[i]], routing, tokens, features, inside)
            dgate_tile, dup_tile = dh * up_tile * derivative, dh * value
            for i in tl.static_range(len(masks.da)):
                dgate_tile = masked(dgate_tile, masks.tables[masks.da[i]], routing, tokens, features, inside)
                dup_tile = masked(dup_tile, masks.tables[masks.da[i]], routing, tokens, features, inside)
            tl.store(dgate + out, rounded(dgate_tile, dgate.dtype.element_ty), mask=valid)
            tl.store(dup + out, rounded(dup_tile, dup.dtype.element_ty), mask=valid)
            if gate_partial is not None:
                for i in tl.static_range(len(masks.update)):
                    dgate_tile = masked(
                        dgate_tile, masks.tables[masks.update[i]], routing, tokens, features, inside
                    )
                    dup_tile = masked(
                        dup_tile, masks.tables[masks.update[i]], routing, tokens, features, inside
                    )
                gate_total += tl.sum(dgate_tile, axis=0)
                up_total += tl.sum(dup_tile, axis=0)
    if gate_partial is not None:
        partial = tl.program_id(0).to(tl.int64) * num_features + features
        tl.store(gate_partial + partial, gate_total, mask=inside)
        tl.store(up_partial + partial, up_total, mask=inside)


def glu_backward(
    dz: Tensor | None,
    gate: Tensor,
    up: Tensor,
    routes: Routes,
    masks: ActivationMasks,
    activation: str,
    *,
    want_z: bool,
    want_bias: bool,
    overwrite: bool = False,  # torch's allocator for CUDA has new matrices at no cost
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """See `gradroute.primitives.protocol.Primitives`."""
    dgate, dup, z, db_gate, db_up = glu_backward_op(
        dz, gate, up, *ActivationArguments.of(gate, routes, masks, activation, want_z, want_bias)
    )
    has_grad = dz is not None
    return wanted((dgate, has_grad), (dup, has_grad), (z, want_z), (db_gate, want_bias), (db_up, want_bias))


@kernel_op(
    f"glu_backward(Tensor? dz, Tensor gate, Tensor up, {ACTIVATION_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
def glu_backward_op(
    dz: Tensor | None,
    gate: Tensor,
    up: Tensor,
    *rest: Any,  # the fields of ActivationArguments
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Outputs that are not wanted have no elements."""
    arguments = ActivationArguments(*rest)
    want_z, want_bias = arguments.want_z, arguments.want_bias
    tokens, features = gate.shape
    config = config_of(glu_bwd_kernel, gate.device)
    want_grad = dz is not None
    dgate, dup = (gate.new_empty(tokens if want_grad else 0, features) for _ in range(2))
    z = gate.new_empty(tokens if want_z else 0, features)
    tokens_per_program = TOKENS_PER_PARTIAL if want_bias else TOKENS_PER_PROGRAM
    programs = triton.cdiv(tokens, tokens_per_program)
    gate_partial, up_partial = (
        gate.new_empty(programs if want_bias else 0, features, dtype=torch.float32) for _ in range(2)
    )
    launch(
        glu_bwd_kernel,
        (programs, triton.cdiv(features, config["BLOCK_F"])),
        config,
        dz=Matrix.of(dz),
        gate=Matrix.of(gate),
        up=Matrix.of(up),
        dgate=dgate if want_grad else None,
        dup=dup if want_grad else None,
        z=z if want_z else None,
        gate_partial=gate_partial if want_bias else None,
        up_partial=up_partial if want_bias else None,
        routing=Routing.of(arguments.ids, arguments.strength),
        masks=MaskWeights.of(arguments),
        num_tokens=tokens,
        num_features=features,
        ACTIVATION=arguments.activation,
        TOKENS=tokens_per_program,
    )
    return dgate, dup, z, gate_partial.sum(0).to(gate.dtype), up_partial.sum(0).to(gate.dtype)
