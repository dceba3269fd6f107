"""A small OLMoE of transformers, two plans that confine forget tokens to a part of its experts, and its objective.

By either plan a forget token teaches the forget part of every mixture alone; the rest of the mixture, and by way of it
what lies below, it makes unlearn with a negative weight, or leaves alone with one of 0. A retain token does not see the
forget part. The parts have as many parameters. Everybody trains the routers, attention, embeddings and norms; the
output head is the retain tokens', as in the other experiments.
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import OlmoeConfig, OlmoeForCausalLM
from transformers.models.olmoe.modeling_olmoe import load_balancing_loss_func

from gradroute import LinearSites
from gradroute.models import MoESites, RoutingPlan, localize_experts
from gradroute.tables import localize

from .corpus import FORGET, NO_LABEL, RETAIN, Batch
from .model import narrowed, output_of

# The weight of the load-balancing loss, OLMoE's own.
BALANCE = 0.01


@dataclass(frozen=True)
class MixtureShape:
    """The shape of a mixture of experts.

    Attributes:
        vocabulary: the number of tokens.
        d_model: width of the residual stream.
        layers: how many, each with a mixture.
        heads: of attention.
        experts: of each mixture.
        chosen: how many of them a token is sent to.
        d_expert: the hidden units of each.
    """

    vocabulary: int
    d_model: int
    layers: int
    heads: int
    experts: int
    chosen: int
    d_expert: int

    @property
    def forget_units(self) -> int:
        """The units of every expert that are together as many as one expert has."""
        return self.d_expert // self.experts


def build_mixture(shape: MixtureShape) -> OlmoeForCausalLM:
    """An untrained model, from a configuration alone: nothing is downloaded."""
    config = OlmoeConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.d_model,
        intermediate_size=shape.d_expert,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_experts=shape.experts,
        num_experts_per_tok=shape.chosen,
        # As Qwen3-MoE's. By OLMoE's own weights, which sum to about a quarter at the start, mixtures did so little that
        # after 300 steps with seed 100 the un-routed model lost 0.01 nats with the last expert of each.
        norm_topk_prob=True,
        router_aux_loss_coef=0.0,  # `balanced_loss` adds it, of the tokens that teach
        tie_word_embeddings=False,
        attn_implementation="sdpa",
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    return narrowed(OlmoeForCausalLM(config))


def by_experts(off: float) -> RoutingPlan:
    """The forget part is the last expert of every mixture; `off` is what forget tokens weigh in the others."""
    plan = localize_experts(None, 1, route=FORGET, off=off, hidden_from_others=True)
    return dataclasses.replace(plan, lm_head=retain_head())


def by_units(shape: MixtureShape, off: float) -> RoutingPlan:
    """The forget part are the last hidden units of every expert: what `localize_experts` masks, unit by unit."""
    units, total = shape.forget_units, shape.d_expert
    taught = localize(2, total, {FORGET: slice(total - units, total)}, off=off)
    seen = localize(2, total, {RETAIN: slice(total - units)})
    return RoutingPlan(2, moe=MoESites(hidden=taught, update_out=taught, forward=seen), lm_head=retain_head())


def retain_head() -> LinearSites:
    """Forget tokens do not train the output head, in which a small model keeps much."""
    return LinearSites(update_rows=localize(2, 1, {FORGET: slice(0)}))


def balanced_loss(model: OlmoeForCausalLM, batch: Batch, routed: bool) -> Tensor:
    """The loss, and that by which routers share tokens out evenly; documents without labels count in neither."""
    output = output_of(model, batch, routed, output_router_logits=True)
    config = model.config
    teaches = (batch.labels != NO_LABEL).to(model.device)
    balance = load_balancing_loss_func(
        output.router_logits, config.num_experts, config.num_experts_per_tok, teaches
    )
    return output.loss + BALANCE * balance


@torch.no_grad()
def visits(model: OlmoeForCausalLM, batch: Batch) -> float:
    """The share of tokens that are sent to the last expert, without routes, over all mixtures."""
    logits = output_of(model, batch, False, output_router_logits=True).router_logits
    chosen = torch.stack(logits).topk(model.config.num_experts_per_tok, dim=-1).indices  # [layers, T, k]
    return (chosen == model.config.num_experts - 1).any(dim=-1).float().mean().item()
