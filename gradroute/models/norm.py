"""Norms of existing models, routed in place."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ..layers.reading import full_name
from ..norm import NormSites, routed_layer_norm, routed_rms_norm
from ..routes import Routes
from .modules import AnyModule, refuse_dtensors, refuse_special
from .swapped import Swapped


class Norm(Swapped):
    """Base of the norms. A norm of heads `[B, S, H, D]` masks each head with its token's route."""

    sites_type = NormSites
    owns_sites = True
    weight: Tensor

    @classmethod
    def check_module(cls, module: nn.Module) -> None:
        weight = getattr(module, "weight", None)
        if weight is None or weight.dim() != 1:
            raise TypeError(f"got a {full_name(module)}, expected a norm with a weight of one dimension")
        refuse_special(module)

    def _widths(self) -> Mapping[str, int | str]:
        return {"features": self.weight.shape[0]}

    def forward(self, x: Tensor, routes: Routes | None = None) -> Tensor:
        if routes is None or self._sites is None:
            return super().forward(x)
        refuse_dtensors(self)
        if x.dim() > len(routes.shape) + 1:
            routes = routes.repeat(x.shape[-2])
        return self._routed(x, routes)

    def _routed(self, x: Tensor, routes: Routes) -> Tensor:
        raise NotImplementedError


class LlamaNorm(Norm):
    """The RMS norms of Llama, Mistral, Qwen and Phi-3, or Liger's in their place."""

    variance_epsilon: float

    def _routed(self, x: Tensor, routes: Routes) -> Tensor:
        return routed_rms_norm(
            x,
            self.weight,
            routes,
            self._sites,
            self.variance_epsilon,
            casting_mode="llama",
            backend=self.backend,
        )


class WideLlamaNorm(Norm):
    """The RMS norm of gpt-oss and OLMo 2, whose product with the weight is made in fp32 and rounded last."""

    variance_epsilon: float

    def _routed(self, x: Tensor, routes: Routes) -> Tensor:
        eps = self.variance_epsilon
        return routed_rms_norm(x, self.weight, routes, self._sites, eps, 0.0, "gemma", backend=self.backend)


class GemmaNorm(Norm):
    """The RMS norm of Gemma 3, which stores its weight less one, or Liger's in its place."""

    def _routed(self, x: Tensor, routes: Routes) -> Tensor:
        eps = self.eps if hasattr(self, "eps") else self.variance_epsilon
        return routed_rms_norm(x, self.weight, routes, self._sites, eps, 1.0, "gemma", backend=self.backend)


def rms_norm_mixin(norm: AnyModule) -> type[Norm]:
    """The mixin that routes an RMS norm, which says by its attributes how it computes."""
    own = "llama" if hasattr(norm, "variance_epsilon") else "gemma"
    mode = getattr(norm, "casting_mode", own)  # Liger's say it
    return GemmaNorm if mode == "gemma" else LlamaNorm


class LayerNorm(Norm):
    """torch.nn.LayerNorm."""

    bias: Tensor | None
    eps: float

    def _routed(self, x: Tensor, routes: Routes) -> Tensor:
        return routed_layer_norm(
            x, self.weight, self.bias, routes, self._sites, self.eps, backend=self.backend
        )


class CohereNorm(Norm):
    """The LayerNorm of Cohere, which has no bias and spells its formula out."""

    variance_epsilon: float

    def _routed(self, x: Tensor, routes: Routes) -> Tensor:
        eps = self.variance_epsilon
        return routed_layer_norm(x, self.weight, None, routes, self._sites, eps, backend=self.backend)


class NemotronNorm(LayerNorm):
    """The LayerNorm of Nemotron, which stores its weight less one."""

    def _routed(self, x: Tensor, routes: Routes) -> Tensor:
        weight = self.weight + 1
        return routed_layer_norm(x, weight, self.bias, routes, self._sites, self.eps, backend=self.backend)
