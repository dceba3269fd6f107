"""RoutedEmbedding: torch.nn.Embedding with routed updates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..arguments import check_bool, check_int, check_number
from ..backends import check_backend
from ..checks import check_shape
from ..embedding import EmbeddingSites, routed_embedding
from ..routes import Routes
from .module import Device, RoutedModule, check_plain, share
from .reading import refuse_dtensor

if TYPE_CHECKING:
    from typing_extensions import Self


class RoutedEmbedding(RoutedModule, nn.Embedding):
    """torch.nn.Embedding with routed updates: `gradroute.routed_embedding`.

    Args:
        num_embeddings: V, the size of the vocabulary.
        embedding_dim: D.
        padding_idx: the token whose embedding gets no gradient.
        max_norm: must be None.
        norm_type: torch.nn.Embedding's argument, which has no effect without max_norm.
        scale_grad_by_freq: must be False.
        sparse: must be False.
        _weight: the weight, as `torch.nn.Embedding.from_pretrained` gives it.
        _freeze: whether the weight is not trained, as `torch.nn.Embedding.from_pretrained` gives it.
        device: the weight's device.
        dtype: the weight's dtype.
        sites: where to mask.
        backend: see `gradroute.use_backend`.

    Raises:
        TypeError: sites of another layer.
        ValueError: an argument that cannot be honoured, or a table does not fit the layer.
    """

    sites_type = EmbeddingSites
    routes_are_second = True

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        _freeze: bool = False,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        sites: EmbeddingSites | None = None,
        backend: str | None = None,
    ) -> None:
        num_embeddings = check_int("num_embeddings", num_embeddings, 0)
        embedding_dim = check_int("embedding_dim", embedding_dim, 0)
        if padding_idx is not None:
            padding_idx = check_int("padding_idx", padding_idx, -num_embeddings, num_embeddings - 1)
        check_number("norm_type", norm_type, 0)
        check_bool("_freeze", _freeze)
        if _weight is not None:
            check_shape("_weight", _weight, num_embeddings, embedding_dim)
        check_embedding(max_norm, scale_grad_by_freq, sparse)
        super().__init__(
            num_embeddings,
            embedding_dim,
            padding_idx,
            norm_type=norm_type,
            _weight=_weight,
            _freeze=_freeze,
            device=device,
            dtype=dtype,
        )
        self.backend = check_backend(backend)
        self.sites = sites

    @classmethod
    def from_embedding(
        cls, embedding: nn.Embedding, sites: EmbeddingSites | None = None, *, backend: str | None = None
    ) -> Self:
        """A routed layer that shares the weight of `embedding`; its hooks are not copied.

        Raises:
            TypeError: `embedding` is not a torch.nn.Embedding itself but, say, one that scales its output.
            ValueError: it has max_norm, scale_grad_by_freq or sparse, or a table does not fit.
        """
        instead = "call it, and mask its output with gradroute.route_grad"
        check_plain("embedding", embedding, nn.Embedding, instead)
        check_embedding(embedding.max_norm, embedding.scale_grad_by_freq, embedding.sparse)
        layer = cls(
            embedding.num_embeddings,
            embedding.embedding_dim,
            embedding.padding_idx,
            device="meta",
            backend=backend,
        )
        return share(layer, embedding, sites)

    def _widths(self) -> Mapping[str, int | str]:
        return {"features": self.embedding_dim}

    def forward(
        self, tokens: Tensor, routes: Routes | None = None, *, sites: EmbeddingSites | None = None
    ) -> Tensor:
        """tokens `[*tokens]` → `[*tokens, D]`.

        Args:
            tokens: any integer dtype.
            routes: the routes of the tokens; None: the ordinary layer.
            sites: masks of this call in the place of the layer's own: those of a layer that this one is a part of.
        """
        sites = self._sites if sites is None else sites
        weight = self.weight
        if routes is not None:
            refuse_dtensor(self, "weight", weight)
        return routed_embedding(tokens, weight, routes, sites, self.padding_idx, backend=self.backend)


def check_embedding(max_norm: float | None, scale_grad_by_freq: bool, sparse: bool) -> None:
    """Raises where an embedding's options cannot be honoured."""
    if max_norm is not None:
        raise ValueError(
            f"max_norm: got {max_norm}, expected None: renormalising in forward changes the weight outside any route"
        )
    if scale_grad_by_freq:
        raise ValueError(
            "scale_grad_by_freq: got True, expected False: the frequency would count tokens of every route"
        )
    if sparse:
        raise ValueError("sparse: got True, expected False: routed gradients are dense")
