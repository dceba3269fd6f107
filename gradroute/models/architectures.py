"""The architectures: by what names each model's submodules go, and which mixins route them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from .attention import (
    Attention,
    ConfiguredWindowAttention,
    NeoAttention,
    SinkAttention,
    WideNormAttention,
)
from .decoder_layer import DecoderLayer, NeoLayer, NeoXLayer, SandwichLayer
from .embedding import Embedding, ScaledEmbedding
from .families import (
    ApertusLayer,
    ArceeLayer,
    Cohere2Layer,
    Exaone4Layer,
    Gemma2Layer,
    GemmaOneLayer,
    Glm4Layer,
    GlmLayer,
    HeliumLayer,
    HunYuanLayer,
    JaisLayer,
    Ministral3Layer,
    NemotronLayer,
    Olmo2Layer,
    OlmoLayer,
    ParallelLayer,
    PhiOneLayer,
    RMSLayer,
    ScaledLayer,
    SeedOssLayer,
    SmolLM3Layer,
    StableLmLayer,
    Starcoder2Layer,
    VaultGemmaLayer,
)
from .fused_attention import FusedAttention, GPT2Attention, NanoGPTAttention, NeoXAttention
from .gated_mlp import GatedMLP, PhiMLP
from .mlp import MLP, NeoXMLP
from .modules import AnyModule
from .moe import GptOssMoE, MixtralMoE, MoE, SharedMoE
from .moe_families import (
    DeepseekLayer,
    DeepseekV2Layer,
    GlmMoELayer,
    GraniteMoELayer,
    GraniteSharedLayer,
    LatentLayer,
    PhiMoELayer,
)
from .norm import GemmaNorm, LayerNorm, LlamaNorm, Norm, WideLlamaNorm


@dataclass(frozen=True)
class Architecture:
    """Where a model's submodules are, as paths, and what routes them.

    Attributes:
        layers: the list of decoder layers.
        embedding: the token embedding.
        final_norm: the norm after the last layer.
        layer: the mixin of a decoder layer, which names the layer's submodules and their mixins.
        lm_head: the output head; a model without one has nothing there to route.
        positions: learnt positions, if any.
        embedding_mixin: what routes the embedding.
        passes_routes: whether the model hands further keyword arguments on to its decoder layers.
    """

    layers: str
    embedding: str
    final_norm: str
    layer: type[DecoderLayer]
    lm_head: str = "lm_head"
    positions: str | None = None
    embedding_mixin: type[Embedding] = Embedding
    passes_routes: bool = True


def submodule(model: nn.Module, path: str) -> AnyModule:
    """A submodule by its path in a causal language model, or None; the base model lacks the path's first name."""
    for candidate in (path, path.split(".", 1)[-1]):
        try:
            return model.get_submodule(candidate)
        except AttributeError:
            continue
    return None


def inner_model(model: nn.Module) -> nn.Module:
    """The model itself, inside PEFT's."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got a {type(model).__name__}, expected a torch.nn.Module")
    is_peft = hasattr(model, "peft_config") and hasattr(model, "get_base_model")
    return model.get_base_model() if is_peft else model  # type: ignore[operator]


class LlamaLayer(DecoderLayer):
    """The decoder layer of Llama, Qwen2 and Qwen3."""

    norm_mixin: ClassVar[type[Norm]] = LlamaNorm
    attention_mixin = Attention
    mlp_mixin = GatedMLP


class MistralLayer(LlamaLayer):
    """The decoder layer of Mistral."""

    attention_mixin = ConfiguredWindowAttention


class MixtralLayer(MistralLayer):
    """The decoder layer of Mixtral."""

    moe_mixin = MixtralMoE


class QwenMoELayer(LlamaLayer):
    """The decoder layer of Qwen3-MoE, which has a mixture of experts or an MLP."""

    moe_mixin = MoE


class Qwen2MoELayer(LlamaLayer):
    """The decoder layer of Qwen2-MoE."""

    moe_mixin = SharedMoE


class OlmoeLayer(LlamaLayer):
    """The decoder layer of OLMoE."""

    attention_mixin = WideNormAttention
    moe_mixin = MoE


class GptOssLayer(LlamaLayer):
    """The decoder layer of gpt-oss."""

    norm_mixin = WideLlamaNorm
    attention_mixin = SinkAttention
    moe_mixin = GptOssMoE


class PhiLayer(LlamaLayer):
    """The decoder layer of Phi-3."""

    dropout_names = ("resid_attn_dropout", "resid_mlp_dropout")
    attention_mixin = FusedAttention
    mlp_mixin = PhiMLP


class GemmaLayer(SandwichLayer):
    """The decoder layer of Gemma 3."""

    norm_mixin = GemmaNorm
    attention_mixin = Attention
    mlp_mixin = GatedMLP


class GPT2Layer(DecoderLayer):
    """The decoder layer of GPT-2."""

    attention_name = "attn"
    norm_names = ("ln_1", "ln_2")
    positional = ("past_key_values", "attention_mask", "encoder_hidden_states")
    norm_mixin = LayerNorm
    attention_mixin = GPT2Attention
    mlp_mixin = MLP

    @classmethod
    def check_module(cls, module: nn.Module) -> None:
        super().check_module(module)
        if hasattr(module, "crossattention"):
            raise TypeError(f"got a {type(module).__name__} with cross-attention, expected a decoder alone")


class GPTNeoLayer(NeoLayer):
    """The decoder layer of GPT-Neo."""

    attention_name = "attn"
    norm_names = ("ln_1", "ln_2")
    positional = ("layer_past", "attention_mask")
    norm_mixin = LayerNorm
    attention_mixin = NeoAttention
    mlp_mixin = MLP


class GPTNeoXLayer(NeoXLayer):
    """The decoder layer of GPT-NeoX and Pythia."""

    norm_mixin = LayerNorm
    attention_mixin = NeoXAttention
    mlp_mixin = NeoXMLP


class NanoGPTMLP(MLP):
    """nanoGPT's MLP."""

    activation_name = "gelu"


class NanoGPTNorm(LayerNorm):
    """nanoGPT's LayerNorm, which stores no eps."""

    eps = 1e-5


class NanoGPTLayer(DecoderLayer):
    """The decoder layer of nanoGPT."""

    attention_name = "attn"
    norm_names = ("ln_1", "ln_2")
    norm_mixin = NanoGPTNorm
    attention_mixin = NanoGPTAttention
    mlp_mixin = NanoGPTMLP


def _llama_like(layer: type[DecoderLayer], embedding_mixin: type[Embedding] = Embedding) -> Architecture:
    return Architecture(
        "model.layers", "model.embed_tokens", "model.norm", layer, embedding_mixin=embedding_mixin
    )


def _gpt_like(layer: type[DecoderLayer], passes_routes: bool) -> Architecture:
    names = ("transformer.h", "transformer.wte", "transformer.ln_f")
    return Architecture(*names, layer, positions="transformer.wpe", passes_routes=passes_routes)


#: The architectures by the model_type of a transformers configuration.
ARCHITECTURES: dict[str, Architecture] = {
    "llama": _llama_like(LlamaLayer),
    "internlm3": _llama_like(LlamaLayer),
    "iquestcoder": _llama_like(LlamaLayer),
    "mistral": _llama_like(MistralLayer),
    "qwen2": _llama_like(LlamaLayer),
    "qwen3": _llama_like(LlamaLayer),
    "mixtral": _llama_like(MixtralLayer),
    "qwen2_moe": _llama_like(Qwen2MoELayer),
    "qwen3_moe": _llama_like(QwenMoELayer),
    "olmoe": _llama_like(OlmoeLayer),
    "gpt_oss": _llama_like(GptOssLayer),
    "deepseek_v2": _llama_like(DeepseekV2Layer),
    "deepseek_v3": _llama_like(DeepseekLayer),
    "dots1": _llama_like(GlmMoELayer),
    "glm4_moe": _llama_like(GlmMoELayer),
    "glm4_moe_lite": _llama_like(DeepseekLayer),
    "solar_open": _llama_like(GlmMoELayer),
    "granitemoe": _llama_like(GraniteMoELayer),
    "granitemoeshared": _llama_like(GraniteSharedLayer),
    "phimoe": _llama_like(PhiMoELayer),
    "youtu": _llama_like(LatentLayer),
    "gemma3_text": _llama_like(GemmaLayer, ScaledEmbedding),
    "phi3": _llama_like(PhiLayer),
    "gemma": _llama_like(GemmaOneLayer, ScaledEmbedding),
    "gemma2": _llama_like(Gemma2Layer, ScaledEmbedding),
    "vaultgemma": _llama_like(VaultGemmaLayer, ScaledEmbedding),
    "granite": _llama_like(ScaledLayer),
    "olmo": _llama_like(OlmoLayer),
    "olmo2": _llama_like(Olmo2Layer),
    "olmo3": _llama_like(Olmo2Layer),
    "smollm3": _llama_like(SmolLM3Layer),
    "glm": _llama_like(GlmLayer),
    "glm4": _llama_like(Glm4Layer),
    "stablelm": _llama_like(StableLmLayer),
    "starcoder2": _llama_like(Starcoder2Layer),
    "cohere": _llama_like(ParallelLayer),
    "cohere2": _llama_like(Cohere2Layer),
    "nemotron": _llama_like(NemotronLayer),
    "helium": _llama_like(HeliumLayer),
    "exaone4": _llama_like(Exaone4Layer),
    "ministral": _llama_like(RMSLayer),
    "ministral3": _llama_like(Ministral3Layer),
    "cwm": _llama_like(RMSLayer),
    "ernie4_5": _llama_like(RMSLayer),
    "seed_oss": _llama_like(SeedOssLayer),
    "hunyuan_v1_dense": _llama_like(HunYuanLayer),
    "arcee": _llama_like(ArceeLayer),
    "jais2": _llama_like(JaisLayer),
    "apertus": _llama_like(ApertusLayer),
    "phi": Architecture("model.layers", "model.embed_tokens", "model.final_layernorm", PhiOneLayer),
    "gpt2": _gpt_like(GPT2Layer, passes_routes=True),
    "gpt_neo": _gpt_like(GPTNeoLayer, passes_routes=False),
    "gpt_neox": Architecture(
        "gpt_neox.layers", "gpt_neox.embed_in", "gpt_neox.final_layer_norm", GPTNeoXLayer
    ),
}

#: What is known of architectures that have none, by the same name: why not.
REFUSED = {
    "llama4": "its experts are handed every token, scaled by its score",
    "llama4_text": "its experts are handed every token, scaled by its score",
}

#: karpathy/nanoGPT's GPT, and modules of the same names: `route(model, plan, architecture=NANO_GPT)`.
NANO_GPT = _gpt_like(NanoGPTLayer, passes_routes=False)


def architecture_of(model: nn.Module) -> Architecture:
    """The architecture of a model of transformers.

    Raises:
        TypeError: the model's configuration names none of ARCHITECTURES.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type in REFUSED:
        raise TypeError(
            f"model: got a {type(model).__name__} of model_type {model_type!r}, which is not routed: "
            f"{REFUSED[model_type]}; expected one of {', '.join(ARCHITECTURES)}"
        )
    if model_type not in ARCHITECTURES:
        raise TypeError(
            f"model: got a {type(model).__name__} of model_type {model_type!r}, expected one of "
            f"{', '.join(ARCHITECTURES)}; for others say where the parts are with architecture="
        )
    return ARCHITECTURES[model_type]
