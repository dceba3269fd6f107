"""routed_embedding: an embedding whose rows learn, per token, only where they may."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor

from . import backends, reference
from .arguments import check_int
from .checks import check_matrix, check_tensor, flat, unrouted
from .function import Function, RoutedContext
from .primitives.protocol import Primitives
from .routes import Routes
from .sites import Site, Sites, site
from .transforms import first_order


@dataclass(frozen=True, eq=False, repr=False)
class EmbeddingSites(Sites):
    """Where an embedding masks gradients: a table `[R, D]` or `[R, 1]`, or None.

    Attributes:
        update: which features of its row a token may update (SGTM, arXiv 2512.05648); `[R, 1]`: whether it may at all.
    """

    update: Site = site("features")


def routed_embedding(
    tokens: Tensor,
    weight: Tensor,
    routes: Routes | None,
    sites: EmbeddingSites | None,
    padding_idx: int | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """y_t = W[token_t], which is `torch.nn.functional.embedding`, with a routed weight gradient.

    dW[v] = Σ_{t: token_t = v} m_update ⊙ dy_t, summed in fp32 (fp64 for fp64), rounded once. Masking who may update is
    the parameter routing of SGTM (arXiv 2512.05648), per token. Saved for backward: the tokens.

    Args:
        tokens: `[*tokens]`, int32 or int64, on the weight's device.
        weight: `[V, D]`, fp32, bf16, fp16 or fp64.
        routes: the batch's routes; None: the ordinary op.
        sites: where to mask; None: the ordinary op.
        padding_idx: the row that no token updates; negative: counted from the end.
        backend: see `gradroute.use_backend`; default: the fastest that supports the call.

    Returns:
        y `[*tokens, D]`.

    Raises:
        ValueError: shapes, devices or tables do not fit, or padding_idx is not a row.
        IndexError: tokens out of range (on CUDA a device assertion), from torch itself.
        BackendError: the requested backend cannot run the call.
        RuntimeError: in backward with create_graph=True.
    """
    if unrouted(routes, sites, EmbeddingSites):
        backends.check_backend(backend)
        return F.embedding(tokens, weight, padding_idx)
    assert routes is not None and sites is not None
    num_embeddings, features = check_matrix("weight", weight)
    if padding_idx is not None:
        padding_idx = _checked_row(padding_idx, num_embeddings)
    check_tensor("tokens", tokens)
    routes.check_tokens(tokens.shape, tokens, "tokens", "shape")
    sites.check(routes, {"features": features})
    chosen = backends.choose("routed_embedding", backend, weight)
    if chosen == "reference":
        return reference.routed_embedding(tokens, weight, routes, sites, padding_idx)
    return EmbeddingFunction.apply(
        tokens, weight, routes, sites.effective, padding_idx, backends.primitives(chosen)
    )


def _checked_row(padding_idx: int, num_embeddings: int) -> int:
    padding_idx = check_int("padding_idx", padding_idx)
    if not -num_embeddings <= padding_idx < num_embeddings:
        raise ValueError(
            f"padding_idx: got {padding_idx}, expected a row of weight, "
            f"-{num_embeddings} <= padding_idx < {num_embeddings}"
        )
    return padding_idx % num_embeddings


class EmbeddingContext(RoutedContext[EmbeddingSites], Protocol):
    """The context of an embedding.

    Attributes:
        padding_idx: the row that no token updates, or None.
        num_embeddings: V.
    """

    padding_idx: int | None
    num_embeddings: int


class EmbeddingFunction(Function):
    """routed_embedding on the primitives of a backend."""

    @staticmethod
    def forward(
        tokens: Tensor,
        weight: Tensor,
        routes: Routes,
        sites: EmbeddingSites,
        padding_idx: int | None,
        primitives: Primitives,
    ) -> Tensor:
        return F.embedding(tokens, weight, padding_idx)

    @staticmethod
    def setup_context(ctx: EmbeddingContext, inputs: tuple[Any, ...], output: Tensor) -> None:
        tokens, weight, ctx.routes, ctx.sites, ctx.padding_idx, ctx.primitives = inputs
        ctx.num_embeddings = weight.shape[0]
        ctx.save_for_backward(tokens)

    @staticmethod
    @first_order("routed_embedding")
    def backward(ctx: EmbeddingContext, dy: Tensor) -> tuple[Any, ...]:
        (tokens,) = ctx.saved_tensors
        dweight = ctx.primitives.embedding_backward(
            flat(dy), tokens.reshape(-1), ctx.routes, ctx.sites.update, ctx.num_embeddings, ctx.padding_idx
        )
        return (
            None,  # tokens
            dweight,
            None,  # routes
            None,  # sites
            None,  # padding_idx
            None,  # primitives
        )
