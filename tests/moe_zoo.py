"""Tiny mixtures of experts of transformers, and the gradients that routing them must give, by the detach idiom.

Nothing here asks gradroute what a site means: that is written out again, expert by expert over all tokens, without a
sort and without a grouped product.
"""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import torch
import transformers
from model_zoo import HEADS, VOCABULARY, WIDTH
from routed_by_hand import detach, mask
from routed_models import table
from torch.nn import functional as F

EXPERTS, CHOSEN, UNITS = 4, 2, 24
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": UNITS,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "num_experts_per_tok": CHOSEN,
}
_QWEN = {"num_experts": EXPERTS, "moe_intermediate_size": UNITS}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
CONFIGS = {
    "mixtral": lambda: transformers.MixtralConfig(**_COMMON, num_local_experts=EXPERTS),
    "olmoe": lambda: transformers.OlmoeConfig(**_COMMON, num_experts=EXPERTS, clip_qkv=0.5),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **_COMMON, **_QWEN, head_dim=16, norm_topk_prob=True, mlp_only_layers=[1]
    ),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **_COMMON, num_local_experts=EXPERTS, head_dim=16, rope_parameters=_ROPE, sliding_window=4
    ),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(**_COMMON, **_QWEN, shared_expert_intermediate_size=8),
}
NAMES = tuple(CONFIGS)

_GROUPS = {
    "moe_intermediate_size": UNITS,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 1.5,
    "norm_topk_prob": True,
}
_LATENT = {
    "num_key_value_heads": HEADS,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
_GRANITE = {"num_local_experts": EXPERTS, "residual_multiplier": 0.5}


def _of(kind: str, **changes: Any):
    return lambda: getattr(transformers, f"{kind}Config")(**_COMMON | changes)


#: Mixtures beside experts that every token visits, with groups of experts, and of Granite.
FAMILIES = {
    "deepseek_v2": _of("DeepseekV2", **_GROUPS, **_LATENT, topk_method="group_limited_greedy"),
    "deepseek_v3": _of("DeepseekV3", **_GROUPS, **_LATENT),
    "dots1": _of("Dots1", **_GROUPS, head_dim=8),
    "glm4_moe": _of("Glm4Moe", **_GROUPS, head_dim=8, use_qk_norm=True),
    "glm4_moe_lite": _of("Glm4MoeLite", **_GROUPS, **_LATENT),
    "granitemoe": _of("GraniteMoe", **_GRANITE),
    "granitemoeshared": _of("GraniteMoeShared", **_GRANITE, shared_intermediate_size=16),
    "solar_open": _of("SolarOpen", **_GROUPS | {"first_k_dense_replace": 0}, head_dim=8),
}
CONFIGS |= FAMILIES

BY_UNIT = ("pre", "hidden", "forward", "update_in", "update_out")
BY_EXPERT = ("experts", "forward_experts", "update_experts", "router", "update_router")


def all_sites(name, units, base=False) -> dict[str, Any]:
    """Every site at once; `base`: route 0 is masked nowhere, so that a strength may interpolate from it."""
    tables = {site: table(units, 3) for site in BY_UNIT} | {site: table(EXPERTS, 3) for site in BY_EXPERT}
    tables["output"] = table(WIDTH, 3)
    if name == "gpt_oss":
        tables["update_output_bias"] = table(WIDTH, 3)
    for weights in tables.values():
        weights[0] = 1.0 if base else weights[0]
    return tables


def mixtures(model) -> dict[int, Any]:
    """The mixtures of experts of a model, by the index of their layer."""
    inner = (getattr(layer, "mlp", None) or layer.block_sparse_moe for layer in model.model.layers)
    return {i: mixture for i, mixture in enumerate(inner) if hasattr(mixture, "experts")}


@functools.cache
def plain(name: str):
    """The model that all tests share; copy it before anything is done to it."""
    with torch.random.fork_rng():
        model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation="eager")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise / math.sqrt(WIDTH))
            else:
                parameter.add_(0.2 * noise)
        for key, buffer in model.named_buffers():
            if key.endswith("e_score_correction_bias"):
                buffer.add_(0.2 * torch.randn(buffer.shape, generator=generator))
    return model.train()


def fresh(name: str, implementation: str = "grouped_mm"):
    model = copy.deepcopy(plain(name))
    model.set_experts_implementation(implementation)
    return model


def _confined(x, weight, bias, update_rows=None, update_cols=None, update_bias=None):
    """A linear layer whose weight's gradient alone is masked: [T, I] → [T, O]."""
    y = F.linear(x, weight.detach(), None if bias is None else bias.detach())
    read = x if update_cols is None else update_cols * x
    taught = F.linear(read.detach(), weight)
    taught = taught - taught.detach()
    y = y + (taught if update_rows is None else update_rows * taught)
    if bias is not None:
        taught = (bias - bias.detach()).expand_as(y)
        y = y + (taught if update_bias is None else update_bias * taught)
    return y


class Hand:
    """A mixture computed by hand, in the place of a plain model's: `mixture.forward = Hand(mixture, ...)`."""

    def __init__(self, mixture, name: str, sites, ids, strength=None) -> None:
        self.mixture, self.name, self.sites = mixture, name, sites
        self.ids, self.strength = ids.flatten(), strength if strength is None else strength.flatten()

    def _mask(self, site: str):  # [T, F]
        return mask(self.sites.tables.get(site), self.ids, self.strength)

    def _of(self, site: str, expert: int, features: int = 1):
        """A site's mask for the rows of one expert."""
        m = self._mask(site)
        if m is not None and m.shape[1] == EXPERTS * features and m.shape[1] > 1:
            m = m.unflatten(1, (EXPERTS, features))[:, expert]
        return m

    def __call__(self, hidden_states):
        x = hidden_states.flatten(0, 1)
        weights = self._weights(x)  # [T, E], 0 where an expert was not chosen
        y = sum(weights[:, e, None] * self._expert(e, x) for e in range(EXPERTS))
        if hasattr(self.mixture, "shared_expert"):
            y = y + torch.sigmoid(self.mixture.shared_expert_gate(x)) * self.mixture.shared_expert(x)
        if hasattr(self.mixture, "shared_experts"):
            y = y + self.mixture.shared_experts(x)
        y = detach(y, self._mask("output")).view(hidden_states.shape)
        return (y, weights) if self.name == "gpt_oss" else y

    def _weights(self, x):
        router = self.mixture.gate if hasattr(self.mixture, "gate") else self.mixture.router
        rows = self._mask("update_router")
        logits = _confined(x, router.weight, getattr(router, "bias", None), rows, update_bias=rows)
        logits = detach(logits, self._mask("router"))
        if self._mask("choice") is not None:
            logits = logits.masked_fill(self._mask("choice") == 0, -math.inf)
        if hasattr(router, "num_group"):
            return self._of_best_group(router, logits)
        chosen = torch.zeros_like(logits).scatter(1, logits.topk(CHOSEN).indices, 1.0)
        if self.name in ("mixtral", "gpt_oss") or "granite" in self.name or router.norm_topk_prob:
            return logits.masked_fill(chosen == 0, -math.inf).softmax(-1)
        return logits.softmax(-1) * chosen

    def _of_best_group(self, router, logits):
        """Two groups of two experts, of which a token visits both of one."""
        if self.name == "deepseek_v2":
            scores = logits.softmax(-1)
            ranks = scores.unflatten(1, (2, 2)).amax(-1)
        else:
            scores = logits.sigmoid()
            ranks = (scores + router.e_score_correction_bias).unflatten(1, (2, 2)).sum(-1)
        chosen = torch.zeros_like(ranks).scatter(1, ranks.topk(1).indices, 1.0).repeat_interleave(2, 1)
        weights = scores * chosen
        if self.name != "deepseek_v2":
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * router.routed_scaling_factor

    def _updates(self, site: str, expert: int, features: int):
        """The mask of a site of parameters, times that of whole experts."""
        site = site if site in self.sites.tables or site == "update_output_bias" else "update"
        tables = self.sites.tables
        one, whole = tables.get(site), tables.get("update_experts")
        if one is None and whole is None:
            return None
        weights = torch.ones(1)
        if one is not None:
            by_expert = one.features == EXPERTS * features and site != "update_output_bias"
            weights = one.weights.unflatten(1, (EXPERTS, features))[:, expert] if by_expert else one.weights
        if whole is not None:
            weights = weights * whole.weights.expand(-1, EXPERTS)[:, expert, None]
        return mask(type(one or whole)(weights), self.ids, self.strength)

    def _expert(self, e: int, x):
        experts, is_gpt = self.mixture.experts, self.name == "gpt_oss"
        w_in, w_out = experts.gate_up_proj[e], experts.down_proj[e]
        b_in = b_out = None
        if is_gpt:
            w_in, w_out = w_in.t(), w_out.t()
            b_in, b_out = experts.gate_up_proj_bias[e], experts.down_proj_bias[e]
        rows = self._updates("update_in", e, UNITS)
        if rows is not None:
            rows = rows.expand(-1, UNITS)
            rows = rows.repeat_interleave(2, 1) if is_gpt else torch.cat((rows, rows), 1)
        a = _confined(x, w_in, b_in, rows, update_bias=rows)
        gate, up = (a[:, ::2], a[:, 1::2]) if is_gpt else a.chunk(2, 1)
        gate, up = (detach(one, self._of("pre", e, UNITS)) for one in (gate, up))
        if is_gpt:
            gate, up = gate.clamp(max=experts.limit), up.clamp(-experts.limit, experts.limit)
            h = (up + 1) * gate * torch.sigmoid(experts.alpha * gate)
        else:
            h = F.silu(gate) * up
        forward = self._of("forward", e, UNITS)
        h = detach(h if forward is None else forward * h, self._of("hidden", e, UNITS))
        cols = self._updates("update_out", e, UNITS)
        bias = self._updates("update_output_bias", e, WIDTH)
        y = _confined(h, w_out, b_out, update_cols=cols, update_bias=bias)
        seen = self._of("forward_experts", e)
        return detach(y if seen is None else seen * y, self._of("experts", e))


def by_hand(name: str, sites, ids, tokens, targets, strength=None) -> dict[str, Any]:
    """The gradients that a plan of these sites of every mixture must give, and the logits."""
    model = fresh(name, "eager")
    for mixture in mixtures(model).values():
        mixture.forward = Hand(mixture, name, sites, ids, strength)
    return step(model, tokens, targets)


def step(model, tokens, targets, **inputs) -> dict[str, Any]:
    """The gradients of one batch, and its logits as "logits"."""
    model.zero_grad()
    logits = model(tokens, use_cache=False, **inputs).logits
    F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    gradients = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
    return gradients | {"logits": logits.detach()}
