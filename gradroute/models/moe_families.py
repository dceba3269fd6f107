"""Further mixtures of experts: DeepSeek's and those of its form, Granite's, and what of others is refused by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..linear import routed_linear
from ..routes import Routes
from .attention import Attention, Heads
from .families import RMSLayer, ScaledLayer
from .modules import AnyModule
from .moe import MoE, Router
from .moe_sites import MoESites
from .norm import LayerNorm


class GroupRouter(Router):
    """The router of DeepSeek-V3, GLM-4-MoE, Dots 1 and Solar: sigmoids, and experts of the best groups alone."""

    _experts_of_a_group = 2

    def _sites_of_ops(self, sites: MoESites) -> tuple[Any, ...]:
        if sites.choice is not None:
            raise ValueError(
                f"MoESites.choice: got a table for a {type(self).__name__}, which chooses among groups of experts by "
                "numbers that are no weights, expected None"
            )
        return super()._sites_of_ops(sites)

    def _logits(self, x: Tensor, routes: Routes) -> Tensor:
        weight = self.weight.to(torch.float32)
        return routed_linear(x.float(), weight, None, routes, self._op_sites[0], backend=self.backend)

    def _scores(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        scores = logits.sigmoid()
        ranks = self._in_best_groups(scores + self.e_score_correction_bias, float("-inf"))
        index = torch.topk(ranks, k=self.top_k, dim=-1, sorted=False)[1]
        weights = scores.gather(1, index)
        if self.norm_topk_prob:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return weights * self.routed_scaling_factor, index

    def _in_best_groups(self, scores: Tensor, elsewhere: float) -> Tensor:
        """The scores `[T, E]`, and `elsewhere` in the groups whose best experts have lower sums."""
        groups = scores.view(-1, self.num_group, self.num_experts // self.num_group)
        best = groups.topk(self._experts_of_a_group, dim=-1)[0].sum(dim=-1)
        index = torch.topk(best, k=self.topk_group, dim=-1, sorted=False)[1]
        chosen = torch.zeros_like(best).scatter(1, index, 1).bool()
        return groups.masked_fill(~chosen[:, :, None], elsewhere).flatten(1)


class DeepseekV2Router(GroupRouter):
    """The router of DeepSeek-V2: a softmax, over all experts or over those of the best groups."""

    _experts_of_a_group = 1

    def _scores(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        scores = logits.softmax(dim=-1, dtype=torch.float32)
        if self.topk_method == "group_limited_greedy":
            scores = self._in_best_groups(scores, 0.0)
        weights, index = torch.topk(scores, k=self.top_k, dim=-1, sorted=False)
        return weights * self.routed_scaling_factor, index


class GraniteRouter(Router):
    """The router of Granite, whose softmax is over the chosen experts alone, in fp32."""

    def _scores(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        values, index = logits.float().topk(self.top_k, dim=-1)
        return torch.softmax(values, dim=-1).type_as(logits), index


class DeepseekMoE(MoE):
    """A mixture beside experts that every token visits, which are not routed: DeepSeek-V3, GLM-4-MoE, Dots 1, Solar."""

    router_mixin = GroupRouter

    def _mixed(self, x: Tensor, y: Tensor) -> Tensor:
        shared = self.shared_experts(x)
        return y + shared


class DeepseekV2MoE(DeepseekMoE):
    """The mixture of DeepSeek-V2."""

    router_mixin = DeepseekV2Router


class GraniteMoE(MoE):
    """The mixture of Granite."""

    router_name = "router"
    router_mixin = GraniteRouter


class SampledMoE(MoE):
    """The mixture of Phi-3.5-MoE, which is refused: it draws its experts at random in training."""

    router_name = "router"

    @classmethod
    def check_module(cls, module: nn.Module) -> None:
        raise TypeError(
            f"got a {type(module).__name__}, whose router draws experts at random in training and has a backward of "
            "its own (sparsemixer), expected no sites there"
        )


class LatentAttention(Attention):
    """Multi-head latent attention, whose sites are refused: q, k and v come from compressed ones."""

    @classmethod
    def check_module(cls, module: nn.Module) -> None:
        cls.heads_of(module)

    @classmethod
    def heads_of(cls, module: AnyModule) -> Heads:
        raise TypeError(
            f"got a {type(module).__name__}, which makes q, k and v of compressed ones (multi-head latent attention), "
            "expected no sites of attention, and no plan that masks attention in another layer"
        )


class GlmMoELayer(RMSLayer):
    """The decoder layer of GLM-4-MoE, Dots 1 and Solar."""

    moe_mixin = DeepseekMoE


class DeepseekLayer(RMSLayer):
    """The decoder layer of DeepSeek-V3 and GLM-4.7-Flash."""

    attention_mixin = LatentAttention
    moe_mixin = DeepseekMoE


class DeepseekV2Layer(RMSLayer):
    """The decoder layer of DeepSeek-V2."""

    attention_mixin = LatentAttention
    moe_mixin = DeepseekV2MoE


class LatentLayer(RMSLayer):
    """The decoder layer of Youtu."""

    attention_mixin = LatentAttention


class GraniteMoELayer(ScaledLayer):
    """The decoder layer of Granite with experts."""

    mlp_name = "block_sparse_moe"
    moe_mixin = GraniteMoE


class GraniteSharedLayer(GraniteMoELayer):
    """The decoder layer of Granite with experts beside an MLP that every token visits, which is not routed."""

    def _mlp(self, x: Tensor, routes: Routes) -> Tensor:
        y = super()._mlp(x, routes)
        return y if self.shared_mlp is None else y + self.shared_mlp(x)


class PhiMoELayer(RMSLayer):
    """The decoder layer of Phi-3.5-MoE, whose experts are refused."""

    norm_mixin = LayerNorm
    moe_mixin = SampledMoE
