"""Tiny models of every architecture, where their parts are, and what a step of them gives.

Nothing here asks gradroute where the parts of a model are: that is written out again.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from nano_gpt import NanoConfig, NanoGPT
from torch import nn
from torch.nn import functional as F

VOCABULARY, WIDTH, HEADS, HIDDEN, WINDOW = 50, 32, 4, 64, 4
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}


def _common(*without: str, **changes: Any) -> dict[str, Any]:
    return {key: value for key, value in _COMMON.items() if key not in without} | changes


def _llama() -> Any:
    return transformers.LlamaConfig(**_common(attention_bias=True, mlp_bias=True))


def _mistral() -> Any:
    return transformers.MistralConfig(**_common(sliding_window=WINDOW))


def _qwen2() -> Any:
    layers = ["full_attention", "sliding_attention"]
    return transformers.Qwen2Config(
        **_common(use_sliding_window=True, sliding_window=WINDOW, layer_types=layers)
    )


def _qwen3() -> Any:
    return transformers.Qwen3Config(**_common(head_dim=16, tie_word_embeddings=True))


def _gemma3() -> Any:
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    return transformers.Gemma3TextConfig(
        **_common(
            num_hidden_layers=3,
            head_dim=16,
            layer_types=layers,
            sliding_window=WINDOW,
            query_pre_attn_scalar=24,
            pad_token_id=0,
        )
    )


def _phi3() -> Any:
    return transformers.Phi3Config(**_common(sliding_window=WINDOW))


def _gpt2() -> Any:
    without = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    widths = {"n_embd": WIDTH, "n_inner": HIDDEN, "n_layer": 2, "n_head": HEADS, "n_positions": 64}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return transformers.GPT2Config(
        **_common(*without, "num_key_value_heads", "max_position_embeddings", **widths, **dropout)
    )


def _gpt_neo() -> Any:
    widths = {"num_layers": 2, "num_heads": HEADS, "attention_types": [[["global", "local"], 1]]}
    dropout = {"resid_dropout": 0.0, "embed_dropout": 0.0, "attention_dropout": 0.0}
    return transformers.GPTNeoConfig(
        **_common(
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            window_size=WINDOW,
            **widths,
            **dropout,
        )
    )


def _gpt_neox(parallel: bool) -> Any:
    dropout = {"attention_dropout": 0.0, "hidden_dropout": 0.0}
    return transformers.GPTNeoXConfig(
        **_common("num_key_value_heads", use_parallel_residual=parallel, **dropout)
    )


def _nano_gpt() -> NanoConfig:
    return NanoConfig(64, VOCABULARY, n_layer=2, n_head=HEADS, n_embd=WIDTH)


@dataclass(frozen=True)
class Layout:
    """Where the parts of a plain model are, as paths of submodules: from the model on, then from a layer on.

    Attributes:
        config: makes the configuration.
        qkv_layout: how the linear layers `qkv` make q, k and v: "separate"; one layer makes them one after the other
            ("fused") or head by head ("by_head").
        mid: the norm whose input is the residual stream between attention and MLP.
        qk_norm_heads: the dimension of heads where q and k are normalised.
        fused_gate: one linear layer makes gate and up.
        output_bias: the output projections of attention and of the MLP have biases.
        tied: the embedding and the head are one parameter.
        has_wide_qk_norm: q and k are normalised over all of their heads together.
        lacks: entries of a plan that the model has nothing for, or whose parts gradroute does not compute.
        masks_attention: attention itself may be masked.
    """

    config: Callable[[], Any]
    layers: str = "model.layers"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    positions: str | None = None
    attention: str = "self_attn"
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    qkv_layout: str = "separate"
    output: str = "o_proj"
    inner: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    outer: str = "mlp.down_proj"
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    mid: str | None = "post_attention_layernorm"
    qk_norm_heads: int | None = None
    fused_gate: bool = False
    output_bias: bool = False
    tied: bool = False
    has_wide_qk_norm: bool = False
    lacks: tuple[str, ...] = ()
    masks_attention: bool = True
    kv_heads: int = 2
    head_dim: int = WIDTH // HEADS


_GPT = {
    "layers": "transformer.h",
    "embedding": "transformer.wte",
    "final_norm": "transformer.ln_f",
    "positions": "transformer.wpe",
    "attention": "attn",
    "norms": ("ln_1", "ln_2"),
    "mid": "ln_2",
    "inner": ("mlp.c_fc",),
    "outer": "mlp.c_proj",
    "output_bias": True,
    "tied": True,
    "kv_heads": HEADS,
}
_GPT2 = _GPT | {"qkv": ("c_attn",), "qkv_layout": "fused", "output": "c_proj"}
_NEOX = {
    "layers": "gpt_neox.layers",
    "embedding": "gpt_neox.embed_in",
    "final_norm": "gpt_neox.final_layer_norm",
    "attention": "attention",
    "qkv": ("query_key_value",),
    "qkv_layout": "by_head",
    "output": "dense",
    "inner": ("mlp.dense_h_to_4h",),
    "outer": "mlp.dense_4h_to_h",
    "output_bias": True,
    "kv_heads": HEADS,
}
_SANDWICH = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
LAYOUTS: dict[str, Layout] = {
    "llama": Layout(_llama, output_bias=True),
    "mistral": Layout(_mistral),
    "qwen2": Layout(_qwen2),
    "qwen3": Layout(_qwen3, tied=True, qk_norm_heads=2, head_dim=16),
    "gemma3": Layout(
        _gemma3, tied=True, norms=_SANDWICH, mid="pre_feedforward_layernorm", qk_norm_heads=1, head_dim=16
    ),
    "phi3": Layout(
        _phi3, qkv=("qkv_proj",), qkv_layout="fused", inner=("mlp.gate_up_proj",), fused_gate=True
    ),
    "gpt2": Layout(_gpt2, **_GPT2),
    "gpt_neo": Layout(_gpt_neo, **_GPT | {"attention": "attn.attention", "output": "out_proj"}),
    "gpt_neox": Layout(functools.partial(_gpt_neox, True), **_NEOX, mid=None),
    "gpt_neox_serial": Layout(functools.partial(_gpt_neox, False), **_NEOX),
    "nano_gpt": Layout(_nano_gpt, **_GPT2),
}
NAMES = tuple(LAYOUTS)


def _of(kind: str, *without: str, **changes: Any) -> Callable[[], Any]:
    """A configuration of a class of transformers."""
    return lambda: getattr(transformers, f"{kind}Config")(**_common(*without, **changes))


_WINDOWS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
_UP_DOWN = {"inner": ("mlp.up_proj",), "output_bias": True}
_FUSED_GATE = {"inner": ("mlp.gate_up_proj",), "fused_gate": True}
_AFTER = ("post_attention_layernorm", "post_feedforward_layernorm")
_GLM4 = ("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm")
_PARALLEL = {"norms": ("input_layernorm",), "mid": None}
_WIDE = {"norms": _AFTER, "mid": "mlp", "has_wide_qk_norm": True, "kv_heads": HEADS}
_CAPPED = {"head_dim": 16, "tied": True, "masks_attention": False}
_VAULT = ("input_layernorm", "pre_feedforward_layernorm")
_APERTUS = ("attention_layernorm", "feedforward_layernorm")

#: Dense models that one entry of ARCHITECTURES suffices for; the tests of every kind run on the models above.
FAMILIES: dict[str, Layout] = {
    "apertus": Layout(
        _of("Apertus"),
        norms=_APERTUS,
        mid=_APERTUS[1],
        inner=("mlp.up_proj",),
        lacks=("mlp",),
        qk_norm_heads=1,
    ),
    "arcee": Layout(_of("Arcee", attention_bias=True, mlp_bias=True), **_UP_DOWN),
    "cohere": Layout(_of("Cohere", logit_scale=0.5), **_PARALLEL, tied=True),
    "cohere_qk_norm": Layout(_of("Cohere", use_qk_norm=True), **_PARALLEL, tied=True, lacks=("qk_norm",)),
    "cohere2": Layout(_of("Cohere2", **_WINDOWS), **_PARALLEL, tied=True),
    "cwm": Layout(_of("Cwm", head_dim=8, **_WINDOWS)),
    "ernie4_5": Layout(_of("Ernie4_5", use_bias=True, head_dim=8), output_bias=True, tied=True),
    "exaone4": Layout(_of("Exaone4", **_WINDOWS), norms=_AFTER, mid="mlp", qk_norm_heads=1),
    "gemma": Layout(_of("Gemma", head_dim=16), head_dim=16, tied=True),
    "gemma2": Layout(
        _of("Gemma2", head_dim=16, attn_logit_softcapping=2.0, **_WINDOWS),
        norms=_SANDWICH,
        mid=_SANDWICH[2],
        **_CAPPED,
    ),
    "glm": Layout(_of("Glm", head_dim=8), **_FUSED_GATE),
    "glm4": Layout(_of("Glm4", head_dim=8), **_FUSED_GATE, norms=_GLM4),
    "granite": Layout(
        _of(
            "Granite",
            residual_multiplier=0.5,
            embedding_multiplier=3.0,
            logits_scaling=2.0,
            attention_multiplier=0.25,
        )
    ),
    "helium": Layout(_of("Helium", head_dim=8)),
    "hunyuan": Layout(_of("HunYuanDenseV1", head_dim=8), lacks=("qk_norm",)),
    "jais2": Layout(_of("Jais2"), **_UP_DOWN),
    "ministral": Layout(_of("Ministral", head_dim=8, **_WINDOWS)),
    "ministral3": Layout(_of("Ministral3", head_dim=8)),
    "nemotron": Layout(_of("Nemotron", attention_bias=True, mlp_bias=True, head_dim=8), **_UP_DOWN),
    "olmo": Layout(_of("Olmo", clip_qkv=0.5), lacks=("norm", "final_norm")),
    "olmo2": Layout(_of("Olmo2", num_key_value_heads=HEADS), **_WIDE),
    "olmo3": Layout(_of("Olmo3", num_key_value_heads=HEADS, **_WINDOWS), **_WIDE),
    "phi": Layout(
        _of("Phi", qk_layernorm=True, resid_pdrop=0.0),
        **_PARALLEL,
        final_norm="model.final_layernorm",
        output="dense",
        inner=("mlp.fc1",),
        outer="mlp.fc2",
        output_bias=True,
        lacks=("qk_norm",),
    ),
    "seed_oss": Layout(_of("SeedOss", head_dim=8, residual_dropout=0.0, attention_dropout=0.0)),
    "smollm3": Layout(_of("SmolLM3", no_rope_layers=[1, 0]), tied=True),
    "stablelm": Layout(_of("StableLm", use_qkv_bias=True)),
    "stablelm_parallel": Layout(
        _of("StableLm", use_parallel_residual=True, qk_layernorm=True), **_PARALLEL, lacks=("qk_norm",)
    ),
    "starcoder2": Layout(
        _of("Starcoder2", residual_dropout=0.0, sliding_window=WINDOW),
        inner=("mlp.c_fc",),
        outer="mlp.c_proj",
        output_bias=True,
        tied=True,
    ),
    "vaultgemma": Layout(
        _of("VaultGemma", head_dim=16, attn_logit_softcapping=2.0, **_WINDOWS),
        norms=_VAULT,
        mid=_VAULT[1],
        **_CAPPED,
    ),
}
LAYOUTS |= FAMILIES


def build(name: str, **changes: Any) -> nn.Module:
    """A tiny model, with weights large enough that every mask tells; `changes` are of its configuration."""
    config = LAYOUTS[name].config()
    for key, value in changes.items():
        assert hasattr(config, key), key
        setattr(config, key, value)
    with torch.random.fork_rng():  # whichever test builds it first draws the same numbers as the others
        if name == "nano_gpt":
            model = NanoGPT(config)
        else:
            model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 2:
                parameter.copy_(noise / math.sqrt(WIDTH))
            else:
                parameter.add_(0.2 * noise)
    return model.train()


@functools.cache
def plain(name: str) -> nn.Module:
    """The model that all tests share; copy it before anything is done to it."""
    return build(name)


def fresh(name: str) -> nn.Module:
    return copy.deepcopy(plain(name))


def logits_of(model: nn.Module, tokens, **inputs):  # [B, S, VOCABULARY]
    if isinstance(model, NanoGPT):
        return model(tokens, tokens, **inputs)[0]
    # Keys and values from a cache lie in memory otherwise, and products of them are rounded otherwise.
    return model(tokens, use_cache=False, **inputs).logits


def loss_of(logits, targets):
    """A sum over positions, so that the loss of a batch is that of its parts; targets of -100 are padding."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")


def run(model: nn.Module, tokens, targets, **inputs):
    """The loss of a batch, every position of which has a target of its own."""
    return loss_of(logits_of(model, tokens, **inputs), targets)


def gradients(model: nn.Module) -> dict[str, Any]:
    """The gradients of all parameters; a missing one is an error of the model."""
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def backward(model: nn.Module, tokens, targets, **inputs) -> dict[str, Any]:
    """The gradients of one batch."""
    model.zero_grad()
    run(model, tokens, targets, **inputs).backward()
    return gradients(model)


def error(got, expected) -> float:
    """The largest difference, relative to the largest entry."""
    got, expected = got.detach(), expected.detach()
    return float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
