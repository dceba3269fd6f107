"""Embeddings of existing models, routed in place."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ..embedding import EmbeddingSites, routed_embedding
from ..layers import check_embedding
from ..layers.reading import full_name
from ..routes import Routes
from .modules import refuse_dtensors, refuse_special
from .swapped import Swapped


class Embedding(Swapped):
    """torch.nn.Embedding: `gradroute.routed_embedding`."""

    sites_type = EmbeddingSites
    owns_sites = True
    weight: Tensor
    padding_idx: int | None

    @classmethod
    def check_module(cls, module: nn.Module) -> None:
        if not isinstance(module, nn.Embedding):
            raise TypeError(f"got a {full_name(module)}, expected a torch.nn.Embedding")
        refuse_special(module)
        if module.weight.dim() != 2:
            raise TypeError(
                f"got a weight of shape {list(module.weight.shape)}, expected [vocabulary, d_model]: FSDP flattens "
                "what it shards, so route the model before that"
            )
        check_embedding(module.max_norm, module.scale_grad_by_freq, module.sparse)

    def _widths(self) -> Mapping[str, int | str]:
        return {"features": self.weight.shape[1]}

    def forward(self, tokens: Tensor, routes: Routes | None = None) -> Tensor:
        if routes is None or self._sites is None:
            return super().forward(tokens)
        return self._routed(tokens, routes)

    def _routed(self, tokens: Tensor, routes: Routes) -> Tensor:
        refuse_dtensors(self)
        return routed_embedding(
            tokens, self.weight, routes, self._sites, self.padding_idx, backend=self.backend
        )


class ScaledEmbedding(Embedding):
    """Gemma 3's embedding, which multiplies its output."""

    embed_scale: Tensor

    def _routed(self, tokens: Tensor, routes: Routes) -> Tensor:
        return super()._routed(tokens, routes) * self.embed_scale.to(self.weight.dtype)


class PositionEmbedding(Embedding):
    """Learnt positions: one row of them may serve the whole batch, whose tokens take different routes."""

    def _routed(self, tokens: Tensor, routes: Routes) -> Tensor:
        return super()._routed(tokens.expand(routes.shape), routes)
