"""The weight gradient of an embedding: tokens sorted by id, a program sums the masked gradients of one row's tokens."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..primitives.arguments import tokens_of, weights_on
from ..primitives.registration import kernel_op
from ..routes import Routes
from ..tables import Table
from .launch import config_of, launch
from .masks import Routing, Weights, load_tokens, masked
from .matrices import Matrix, load_tile
from .rounding import rounded


@triton.jit
def embedding_bwd_kernel(
    dy,  # Matrix [T, D]
    out,  # [V, D], zeros
    tokens,  # [T], sorted
    order,  # [T], the row of dy of each sorted token
    ends,  # [T], the position after the last token equal to this one
    routing,  # Routing of [T]
    update,  # Weights [R, D] or None
    num_features,
    padding_idx,  # -1 for none
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    """out[token] = Σ m ⊙ dy over the run of equal tokens that begins at this program's position, if one does."""
    first = tl.program_id(0).to(tl.int64)
    token = tl.load(tokens + first).to(tl.int64)
    earlier = tl.load(tokens + first - 1, mask=first > 0, other=-1).to(tl.int64)
    if (token != earlier) & (token != padding_idx):
        features = tl.program_id(1).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
        inside = features < num_features
        total = tl.zeros([BLOCK_F], dtype=tl.float32)
        end = tl.load(ends + first)
        for start in range(first, end, BLOCK_T):
            positions = start + tl.arange(0, BLOCK_T)
            present = positions < end
            rows = tl.load(order + positions, mask=present, other=0)
            valid = present[:, None] & inside[None, :]
            loaded = load_tokens(routing, rows, present)
            g = load_tile(dy, rows, features, valid).to(tl.float32)
            g = masked(g, update, routing, loaded, features, inside)
            total += tl.sum(g, axis=0)
        tl.store(
            out + token * num_features + features,
            rounded(total, out.dtype.element_ty),
            mask=inside,
        )


def embedding_backward(
    dy: Tensor,
    tokens: Tensor,
    routes: Routes,
    update: Table | None,
    num_embeddings: int,
    padding_idx: int | None,
) -> Tensor:
    """See `gradroute.primitives.protocol.Primitives`."""
    return embedding_backward_op(
        dy, tokens, *tokens_of(routes), *weights_on(dy.device, update), num_embeddings, padding_idx
    )


@kernel_op(
    "embedding_backward(Tensor dy, Tensor tokens, Tensor ids, Tensor? strength, Tensor? update, "
    "SymInt num_embeddings, int? padding_idx) -> Tensor"
)
def embedding_backward_op(
    dy: Tensor,
    tokens: Tensor,
    ids: Tensor,
    strength: Tensor | None,
    update: Tensor | None,
    num_embeddings: int,
    padding_idx: int | None,
) -> Tensor:
    features = dy.shape[1]
    config = config_of(embedding_bwd_kernel, dy.device)
    out = dy.new_zeros(num_embeddings, features)
    ordered, order = torch.sort(tokens, stable=True)
    launch(
        embedding_bwd_kernel,
        (tokens.shape[0], triton.cdiv(features, config["BLOCK_F"])),
        config,
        dy=Matrix.of(dy),
        out=out,
        tokens=ordered,
        order=order,
        ends=torch.searchsorted(ordered, ordered, right=True),
        routing=Routing.of(ids, strength),
        update=Weights.of(update),
        num_features=features,
        padding_idx=-1 if padding_idx is None else padding_idx,
    )
    return out
