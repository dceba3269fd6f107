"""The weight gradient of an embedding: the masked gradients of each token's rows, summed in their order."""

from __future__ import annotations

import torch
from torch import Tensor

from ...primitives.arguments import tokens_of, weights_on
from ...primitives.registration import kernel_op
from ...routes import Routes
from ...tables import Table
from .launch import launch
from .operands import EmbeddingOperands, Mask, Positions


def embedding_backward(
    dy: Tensor,
    tokens: Tensor,
    routes: Routes,
    update: Table | None,
    num_embeddings: int,
    padding_idx: int | None,
) -> Tensor:
    masks = (*tokens_of(routes), *weights_on(dy.device, update))
    return embedding_backward_op(dy, tokens, *masks, num_embeddings, padding_idx)


@kernel_op(
    "native_embedding_backward(Tensor dy, Tensor tokens, Tensor ids, Tensor? strength, Tensor? update, "
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
    """The op behind `embedding_backward`."""
    out = dy.new_zeros(num_embeddings, dy.shape[1])
    ordered, order = torch.sort(tokens.to(torch.int64), stable=True)
    launch(
        "embedding_backward",
        EmbeddingOperands(
            dy,
            out,
            Positions(ordered),
            Positions(order),
            -1 if padding_idx is None else padding_idx,
            Mask.of(ids, strength, update),
        ),
    )
    return out
