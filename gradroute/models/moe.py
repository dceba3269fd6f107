"""Mixtures of experts of existing models, routed in place: the router, and what stands around it and the experts."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..linear import LinearSites, routed_linear
from ..route_grad import route_own
from ..routes import Routes
from ..sites import given
from ..tables import Table
from .experts import BatchedExperts
from .modules import AnyModule, Argument, call, refuse_dtensors, refuse_special
from .moe_sites import Experts, MoESites, check
from .swapped import Swapped, check_children, swap


class Router(Swapped):
    """The linear layer that sends each token to its experts: OLMoE, Qwen2-MoE, Qwen3-MoE."""

    sites_type = MoESites
    weight: Tensor
    top_k: int

    @classmethod
    def check_module(cls, module: nn.Module) -> None:
        missing = [name for name in ("weight", "top_k") if not hasattr(module, name)]
        if missing:
            raise TypeError(f"got a {type(module).__name__} without {', '.join(missing)}, expected a router")
        refuse_special(module)

    def _sites_of_ops(self, sites: MoESites) -> tuple[Any, ...]:
        effective = sites.effective
        linear = given(LinearSites, output=effective.router, update_rows=effective.update_router)
        # The mixture has checked all of its sites; this keeps a copy of the choice's table on the device.
        return linear, given(MoESites, choice=effective.choice)

    def forward(self, hidden_states: Tensor, routes: Routes | None = None) -> Any:
        if routes is None or not any(self._op_sites):
            return super().forward(hidden_states)
        refuse_dtensors(self)
        x, routes = hidden_states.reshape(-1, hidden_states.shape[-1]), routes.reshape(-1)
        logits = self._chosen(self._logits(x, routes), routes)
        return logits, *self._scores(logits)

    def _logits(self, x: Tensor, routes: Routes) -> Tensor:
        """The logits `[T, E]` of hidden states `[T, d_model]`."""
        bias = getattr(self, "bias", None)
        return routed_linear(x, self.weight, bias, routes, self._op_sites[0], backend=self.backend)

    def _chosen(self, logits: Tensor, routes: Routes) -> Tensor:
        """The logits `[T, E]`, -inf where a token may not be sent."""
        if self._op_sites[1] is None:
            return logits
        if routes.strength is not None:
            raise ValueError(
                "route_strength: got one beside MoESites.choice, expected none: an expert is eligible or it is not"
            )
        eligible = self._op_sites[1].choice.on(logits.device)[routes.ids] != 0
        return logits.masked_fill(~eligible, float("-inf"))

    def _scores(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The weights `[T, k]` of the experts of each token, and which these are, as the ordinary forward has them."""
        probabilities = torch.nn.functional.softmax(logits, dtype=torch.float, dim=-1)
        weights, index = torch.topk(probabilities, self.top_k, dim=-1)
        if self.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights.to(logits.dtype), index


class MixtralRouter(Router):
    """The router of Mixtral, whose weights stay in fp32."""

    def _scores(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        probabilities = torch.nn.functional.softmax(logits.float(), dim=-1)
        weights, index = torch.topk(probabilities, self.top_k, dim=-1)
        return weights / weights.sum(dim=-1, keepdim=True), index


class GptOssRouter(Router):
    """The router of gpt-oss, whose softmax is over the chosen experts alone."""

    def _scores(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        values, index = torch.topk(logits, self.top_k, dim=-1)
        return torch.nn.functional.softmax(values, dim=1, dtype=values.dtype), index


class MoE(Swapped):
    """A router and its experts: OLMoE, Qwen3-MoE.

    Attributes:
        router_name: the router's submodule.
        experts_name: the experts' submodule.
        router_mixin: what routes the router.
    """

    sites_type = MoESites
    router_name: ClassVar[str] = "gate"
    experts_name: ClassVar[str] = "experts"
    router_mixin: ClassVar[type[Router]] = Router

    @classmethod
    def check_module(cls, module: nn.Module) -> None:
        if not cls.has_experts(module):
            raise TypeError(f"got a {type(module).__name__}, expected a mixture of experts")
        check_children(module, (cls.router_name, cls.experts_name))

    @classmethod
    def has_experts(cls, module: AnyModule) -> bool:
        """Whether a module is a mixture of experts, routed or not."""
        return hasattr(module, cls.experts_name)

    def swap_children(self) -> None:
        for name, mixin in ((self.router_name, self.router_mixin), (self.experts_name, BatchedExperts)):
            swap(getattr(self, name), mixin, self._sites, self.backend)

    @classmethod
    def extents_of(cls, module: nn.Module) -> Experts:
        """The extents of a mixture that this mixin can route or has routed.

        Raises:
            TypeError: its experts or its router are of another form.
        """
        experts, router = getattr(module, cls.experts_name), getattr(module, cls.router_name)
        BatchedExperts.check_module(experts)
        cls.router_mixin.check_module(router)
        return BatchedExperts.extents_of(experts, router.top_k)

    def _sites_of_ops(self, sites: MoESites) -> tuple[Any, ...]:
        check(sites, self.extents_of(self))
        return (given(MoESites, output=sites.effective.output),)

    def forward(self, hidden_states: Tensor, routes: Routes | None = None) -> Argument:
        if routes is None or self._sites is None:
            return super().forward(hidden_states)
        x = self._noisy(hidden_states)
        flat = x.reshape(-1, x.shape[-1])
        _, weights, index = call(getattr(self, self.router_name), flat, routes, self._sites)
        y = getattr(self, self.experts_name)(flat, index, weights, routes=routes)
        y = self._masked(self._mixed(flat, y).reshape(hidden_states.shape), routes)
        return self._output(y, weights)

    def _noisy(self, x: Tensor) -> Tensor:
        return x

    def _mixed(self, x: Tensor, y: Tensor) -> Tensor:
        """The experts' output with what the model adds to it."""
        return y

    def _output(self, y: Tensor, weights: Tensor) -> Argument:
        return y

    def _masked(self, y: Tensor, routes: Routes) -> Tensor:
        table: Table | None = None if self._op_sites[0] is None else self._op_sites[0].output
        return y if table is None else route_own(y, routes, table, self.backend)


class MixtralMoE(MoE):
    """The mixture of Mixtral, which jitters its input in training where its configuration says so."""

    router_mixin = MixtralRouter

    def _noisy(self, x: Tensor) -> Tensor:
        if self.training and self.jitter_noise > 0:
            x = x * torch.empty_like(x).uniform_(1.0 - self.jitter_noise, 1.0 + self.jitter_noise)
        return x


class GptOssMoE(MoE):
    """The mixture of gpt-oss."""

    router_name = "router"
    router_mixin = GptOssRouter

    def _output(self, y: Tensor, weights: Tensor) -> Argument:
        return y, weights


class SharedMoE(MoE):
    """The mixture of Qwen2-MoE, beside an expert that every token visits. That one is not routed."""

    def _mixed(self, x: Tensor, y: Tensor) -> Tensor:
        shared = self.shared_expert(x)
        shared = torch.nn.functional.sigmoid(self.shared_expert_gate(x)) * shared
        return y + shared
