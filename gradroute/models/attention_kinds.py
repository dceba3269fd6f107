"""Attention of further dense models: each differs from Llama's in what this file's classes say, and in nothing else."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..routes import Routes
from .attention import Attention, ConfiguredWindowAttention, WideNormAttention, module_of
from .modules import Argument
from .norm import Norm, WideLlamaNorm


class SometimesRotatedAttention(Attention):
    """The attention of SmolLM3, EXAONE 4 and Cohere 2, some of whose layers have no positions."""

    def _rotate(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return super()._rotate(q, k, cos, sin) if self._has_positions() else (q, k)

    def _has_positions(self) -> bool:
        raise NotImplementedError


class SmolLM3Attention(SometimesRotatedAttention):
    """The attention of SmolLM3."""

    def _has_positions(self) -> bool:
        return bool(self.use_rope)


class Exaone4Attention(SometimesRotatedAttention):
    """The attention of EXAONE 4: where some layers have a window, the others have no positions."""

    def _has_positions(self) -> bool:
        return self.sliding_window is None or self.is_sliding

    def _window(self) -> int | None:
        return self.sliding_window if self.is_sliding else None


class Cohere2Attention(SometimesRotatedAttention):
    """The attention of Cohere 2: layers with a window have positions."""

    def _has_positions(self) -> bool:
        return self.sliding_window is not None


class PartlyRotatedAttention(Attention):
    """The attention of StableLM: the first features of a head are rotated, and q and k may be normalised by head.

    Those norms are one for each head, which no site of a plan is for; they stay ordinary.
    """

    def _by_head(self, outputs: tuple[Tensor, ...], head_dim: int, routes: Routes) -> tuple[Tensor, ...]:
        q, k, v = super()._by_head(outputs, head_dim, routes)  # each [B, S, heads, D]
        if self.qk_layernorm:
            q, k = (
                norm(x.transpose(1, 2)).transpose(1, 2)
                for norm, x in ((self.q_layernorm, q), (self.k_layernorm, k))
            )
        return q, k, v

    def _rotate(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        width = self.rotary_ndims
        turned_q, turned_k = super()._rotate(q[..., :width], k[..., :width], cos, sin)
        return torch.cat((turned_q, q[..., width:]), -1), torch.cat((turned_k, k[..., width:]), -1)


class PhiAttention(PartlyRotatedAttention):
    """The attention of Phi 1 and 2."""

    names = ("q_proj", "k_proj", "v_proj", "dense")


class HunYuanAttention(Attention):
    """The attention of HunYuan, which normalises q and k after their rotation. Those norms stay ordinary."""

    def _rotate(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        q, k = super()._rotate(q, k, cos, sin)
        return self.query_layernorm(q), self.key_layernorm(k)


class Ministral3Attention(ConfiguredWindowAttention):
    """The attention of Ministral 3, whose queries are scaled by their positions."""

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, routes: Routes, *args: Argument, **kwargs: Argument
    ) -> tuple[Tensor, Tensor | None]:
        rope = self.config.rope_parameters
        beta, length = rope.get("llama_4_scaling_beta"), rope.get("original_max_position_embeddings")
        scale = module_of(self).get_llama_4_attn_scale(kwargs["position_ids"], beta, length)
        return super()._attend(q * scale.to(q.dtype), k, v, routes, *args, **kwargs)


class CappedAttention(Attention):
    """The attention of Gemma 2, whose scores may be capped: routed attention caps none, so its own stays then."""

    def swap_children(self) -> None:
        if self._routing.everywhere and self.attn_logit_softcapping is not None:
            raise TypeError(
                f"got a {type(self).__name__} that caps its scores (attn_logit_softcapping), which routed attention "
                "does not, expected a plan that masks no attention itself: update sites alone (update_q, update_kv, "
                "update_out)"
            )
        super().swap_children()

    def _options(self) -> dict[str, Argument]:
        return super()._options() | {"softcap": self.attn_logit_softcapping}


class DroppingAttention(Attention):
    """The attention of Seed-OSS, which drops out of its output by a number of its own."""

    def forward(
        self, hidden_states: Tensor, *args: Argument, routes: Routes | None = None, **kwargs: Argument
    ) -> Argument:
        y = super().forward(hidden_states, *args, routes=routes, **kwargs)
        if routes is None:
            return y
        return F.dropout(y[0], self.residual_dropout, self.training), *y[1:]


class Starcoder2Attention(DroppingAttention, ConfiguredWindowAttention):
    """The attention of StarCoder 2."""


class Olmo2Attention(WideNormAttention):
    """The attention of OLMo 2 and OLMo 3, whose layers say themselves whether they have a window."""

    def _norm_mixin(self, name: str) -> type[Norm]:
        super()._norm_mixin(name)
        return WideLlamaNorm

    def _window(self) -> int | None:
        return getattr(self, "sliding_window", None)
