"""The decoder layers of further dense models, as mixins: what each has that Llama's has not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from ..routes import Routes
from .attention import Attention, WideNormAttention
from .attention_kinds import (
    CappedAttention,
    Cohere2Attention,
    DroppingAttention,
    Exaone4Attention,
    HunYuanAttention,
    Ministral3Attention,
    Olmo2Attention,
    PartlyRotatedAttention,
    PhiAttention,
    SmolLM3Attention,
    Starcoder2Attention,
)
from .decoder_layer import DecoderLayer, SandwichLayer
from .gated_mlp import GatedMLP, PhiMLP
from .mlp import MLP
from .modules import Argument
from .norm import CohereNorm, GemmaNorm, LayerNorm, LlamaNorm, NemotronNorm, Norm, WideLlamaNorm


class UpDownMLP(MLP):
    """The MLP of Arcee, Nemotron and Jais 2: no gate."""

    names = ("up_proj", "down_proj")
    activation_name = "act_fn"


class FcMLP(MLP):
    """The MLP of Phi 1 and 2."""

    names = ("fc1", "fc2")
    activation_name = "activation_fn"


class Starcoder2MLP(MLP):
    """The MLP of StarCoder 2, which drops out of its output by a number of its own."""

    def forward(self, x: Tensor, routes: Routes | None = None) -> Tensor:
        y = super().forward(x, routes)
        if routes is None or self._sites is None:
            return y
        return F.dropout(y, self.residual_dropout, self.training)


class RMSLayer(DecoderLayer):
    """A decoder layer of Llama's form: Ernie 4.5, Ministral, CWM, and base of those below."""

    norm_mixin: ClassVar[type[Norm]] = LlamaNorm
    attention_mixin: ClassVar[type[Attention]] = Attention
    mlp_mixin: ClassVar[type[MLP]] = GatedMLP


class HeliumLayer(RMSLayer):
    """The decoder layer of Helium."""

    norm_mixin = WideLlamaNorm


class GemmaOneLayer(RMSLayer):
    """The decoder layer of Gemma 1."""

    norm_mixin = GemmaNorm


class Gemma2Layer(SandwichLayer):
    """The decoder layer of Gemma 2."""

    norm_mixin = GemmaNorm
    attention_mixin = CappedAttention
    mlp_mixin = GatedMLP


class VaultGemmaLayer(RMSLayer):
    """The decoder layer of VaultGemma."""

    norm_names = ("input_layernorm", "pre_feedforward_layernorm")
    norm_mixin = GemmaNorm
    attention_mixin = CappedAttention


class SmolLM3Layer(RMSLayer):
    """The decoder layer of SmolLM3."""

    attention_mixin = SmolLM3Attention


class HunYuanLayer(RMSLayer):
    """The decoder layer of HunYuan."""

    attention_mixin = HunYuanAttention


class Ministral3Layer(RMSLayer):
    """The decoder layer of Ministral 3."""

    attention_mixin = Ministral3Attention


class SeedOssLayer(RMSLayer):
    """The decoder layer of Seed-OSS."""

    attention_mixin = DroppingAttention


class ArceeLayer(RMSLayer):
    """The decoder layer of Arcee."""

    mlp_mixin = UpDownMLP


class ApertusLayer(RMSLayer):
    """The decoder layer of Apertus. Its activation has parameters, so that the sites of its MLP are refused."""

    norm_names = ("attention_layernorm", "feedforward_layernorm")
    mlp_mixin = UpDownMLP


class GlmLayer(RMSLayer):
    """The decoder layer of GLM."""

    mlp_mixin = PhiMLP


class Glm4Layer(SandwichLayer):
    """The decoder layer of GLM-4."""

    norm_names = (
        "input_layernorm",
        "post_self_attn_layernorm",
        "post_attention_layernorm",
        "post_mlp_layernorm",
    )
    norm_mixin = LlamaNorm
    attention_mixin = Attention
    mlp_mixin = PhiMLP


class JaisLayer(RMSLayer):
    """The decoder layer of Jais 2."""

    norm_mixin = LayerNorm
    mlp_mixin = UpDownMLP


class NemotronLayer(RMSLayer):
    """The decoder layer of Nemotron."""

    norm_mixin = NemotronNorm
    mlp_mixin = UpDownMLP


class Starcoder2Layer(RMSLayer):
    """The decoder layer of StarCoder 2."""

    norm_mixin = LayerNorm
    attention_mixin = Starcoder2Attention
    mlp_mixin = Starcoder2MLP


class OlmoLayer(RMSLayer):
    """The decoder layer of OLMo, whose norms have no parameters, so that their sites are refused."""

    attention_mixin = WideNormAttention

    def _widths(self) -> Mapping[str, int | str]:
        return {"d_model": self.hidden_size}


class ScaledLayer(RMSLayer):
    """The decoder layer of Granite, which scales what it adds to the residual stream."""

    def _dropped(self, index: int, x: Tensor) -> Tensor:
        return x * self.residual_multiplier


class PostNormLayer(RMSLayer):
    """A decoder layer with norms after attention and after the MLP alone: OLMo 2 and 3, EXAONE 4."""

    norm_names = ("post_attention_layernorm", "post_feedforward_layernorm")

    def _body(self, x: Tensor, routes: Routes, kwargs: dict[str, Argument]) -> tuple[Tensor, Tensor | None]:
        first, second = self.norm_names
        y, probabilities = self._attend(x, routes, kwargs)
        x = self._masked_sum("mid", x + self._normed(first, y, routes), routes)
        return x + self._normed(second, self._mlp(x, routes), routes), probabilities


class Olmo2Layer(PostNormLayer):
    """The decoder layer of OLMo 2 and OLMo 3."""

    norm_mixin = WideLlamaNorm
    attention_mixin = Olmo2Attention


class Exaone4Layer(PostNormLayer):
    """The decoder layer of EXAONE 4."""

    attention_mixin = Exaone4Attention


class ParallelLayer(RMSLayer):
    """A decoder layer of attention and MLP beside each other, after one norm: Cohere."""

    norm_names = ("input_layernorm",)
    norm_mixin: ClassVar[type[Norm]] = CohereNorm

    def _widths(self) -> Mapping[str, int | str]:
        return {**super()._widths(), "mid": "attention and MLP are computed in parallel"}

    def _body(self, x: Tensor, routes: Routes, kwargs: dict[str, Argument]) -> tuple[Tensor, Tensor | None]:
        normed = self._normed(self.norm_names[0], x, routes)
        attended, probabilities = self._attend(normed, routes, kwargs)
        return self._sum(x, attended, self._mlp(normed, routes)), probabilities

    def _sum(self, x: Tensor, attended: Tensor, fed: Tensor) -> Tensor:
        return x + attended + fed


class Cohere2Layer(ParallelLayer):
    """The decoder layer of Cohere 2."""

    attention_mixin = Cohere2Attention


class PhiOneLayer(ParallelLayer):
    """The decoder layer of Phi 1 and 2."""

    norm_mixin = LayerNorm
    attention_mixin = PhiAttention
    mlp_mixin = FcMLP

    def _sum(self, x: Tensor, attended: Tensor, fed: Tensor) -> Tensor:
        return self.resid_dropout(attended) + self.resid_dropout(fed) + x


class StableLmLayer(ParallelLayer):
    """The decoder layer of StableLM, of either form."""

    norm_mixin = LayerNorm
    attention_mixin = PartlyRotatedAttention
    dropout_names = (None, "dropout")
    use_parallel_residual: bool

    @classmethod
    def norms_of(cls, layer: nn.Module) -> tuple[str, ...]:
        serial = ("input_layernorm", "post_attention_layernorm")
        return cls.norm_names if getattr(layer, "use_parallel_residual", False) else serial

    def _widths(self) -> Mapping[str, int | str]:
        return super()._widths() if self.use_parallel_residual else DecoderLayer._widths(self)

    def _body(self, x: Tensor, routes: Routes, kwargs: dict[str, Argument]) -> tuple[Tensor, Tensor | None]:
        if self.use_parallel_residual:
            return super()._body(x, routes, kwargs)
        return DecoderLayer._body(self, x, routes, kwargs)

    def _sum(self, x: Tensor, attended: Tensor, fed: Tensor) -> Tensor:
        return x + attended + self._dropped(1, fed)
