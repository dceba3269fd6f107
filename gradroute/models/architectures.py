"""The architectures: by what names each model's submodules go, and which mixins route them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .attention import Attention, ConfiguredWindowAttention, NeoAttention
from .decoder_layer import DecoderLayer, NeoLayer, NeoXLayer, SandwichLayer
from .embedding import Embedding, ScaledEmbedding
from .fused_attention import FusedAttention, GPT2Attention, NanoGPTAttention, NeoXAttention
from .gated_mlp import GatedMLP, PhiMLP
from .mlp import MLP, NeoXMLP
from .modules import AnyModule
from .norm import GemmaNorm, LayerNorm, LlamaNorm


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

    norm_mixin = LlamaNorm
    attention_mixin = Attention
    mlp_mixin = GatedMLP


class MistralLayer(LlamaLayer):
    """The decoder layer of Mistral."""

    attention_mixin = ConfiguredWindowAttention


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
    "mistral": _llama_like(MistralLayer),
    "qwen2": _llama_like(LlamaLayer),
    "qwen3": _llama_like(LlamaLayer),
    "gemma3_text": _llama_like(GemmaLayer, ScaledEmbedding),
    "phi3": _llama_like(PhiLayer),
    "gpt2": _gpt_like(GPT2Layer, passes_routes=True),
    "gpt_neo": _gpt_like(GPTNeoLayer, passes_routes=False),
    "gpt_neox": Architecture(
        "gpt_neox.layers", "gpt_neox.embed_in", "gpt_neox.final_layer_norm", GPTNeoXLayer
    ),
}

#: karpathy/nanoGPT's GPT, and modules of the same names: `route(model, plan, architecture=NANO_GPT)`.
NANO_GPT = _gpt_like(NanoGPTLayer, passes_routes=False)


def architecture_of(model: nn.Module) -> Architecture:
    """The architecture of a model of transformers.

    Raises:
        TypeError: the model's configuration names none of ARCHITECTURES.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in ARCHITECTURES:
        raise TypeError(
            f"model: got a {type(model).__name__} of model_type {model_type!r}, expected one of "
            f"{', '.join(ARCHITECTURES)}; for others say where the parts are with architecture="
        )
    return ARCHITECTURES[model_type]
