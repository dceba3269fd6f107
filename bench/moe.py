"""The suite `moe`: one training step of a mixture of experts (OLMoE), routed in every layer, beside unrouted."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gradroute.models import localize_experts, localize_mlp, route

from . import progress
from .cases import STEP, Case, Findings, Plan, Step, Variant, attempt
from .model import why_missing as why_missing
from .model_cases import (
    DTYPES,
    FORGET,
    SHAPES,
    Batch,
    Loss,
    Shape,
    made_of,
    make_batch,
    make_optimizer,
    own_loss,
    routed_loss,
    transformers,
    with_shared_weights,
)

BASE, UNITS, WHOLE = "unrouted", "routed, hidden units", "routed, experts"
EXPERTS, CHOSEN, CONFINED = (
    16,
    4,
    2,
)  # in a layer; those that a token visits; those that a route is confined to
SEEDS = (0, 1)

CHECKED = (
    "every routed variant, before it is timed, with the weights and the batch that are timed: the loss is that of the "
    "unrouted model bit for bit; tokens of the confined route alone give the experts, or the hidden units, that they "
    "are not confined to no gradient at all, and the others some wherever the unrouted model has some (the tests "
    "compare every gradient with plain PyTorch)"
)


def plans(device: torch.device) -> list[Plan]:
    """The one case of a device; none where there is no transformers."""
    shape = SHAPES[device.type]
    shape = shape._replace(d_ff=shape.d_ff // CHOSEN)
    dtype = str(DTYPES[device.type]).removeprefix("torch.")
    name = f"training step of an OLMoE of {shape.layers} layers"
    axes = shape._asdict() | {"dtype": dtype, "tokens": shape.tokens, "experts": EXPERTS, "chosen": CHOSEN}
    return [Plan("moe", name, "OLMoE", axes, partial(case, shape, device))]


def case(shape: Shape, device: torch.device) -> Case:
    model = make_mixture(shape, device)
    losses = make_losses(model, shape)
    optimizer = make_optimizer(model)
    batches = [make_batch(shape, device, seed) for seed in SEEDS]
    return Case(
        variants={
            name: Variant(partial(steps, loss, batches, optimizer), is_rival=name == BASE)
            for name, loss in losses.items()
        },
        rivals=(BASE,),
        examine=partial(examine, model, shape, losses, batches[0]),
        checked=CHECKED,
        modes=(STEP,),
        tokens=shape.tokens,
        facts={"parameters": sum(weight.numel() for weight in model.parameters())},
    )


def make_mixture(shape: Shape, device: torch.device) -> nn.Module:
    """An OLMoE with random weights, from a configuration alone."""
    config = transformers().OlmoeConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.d_model,
        intermediate_size=shape.d_ff,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.length,
        num_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        pad_token_id=None,
        use_cache=False,
    )
    return made_of(config, device)


def make_losses(model: nn.Module, shape: Shape) -> dict[str, Loss]:
    """The loss of each variant, around the same parameters."""
    units = localize_mlp(range(shape.layers), slice(shape.d_ff - shape.units, shape.d_ff), route=FORGET)
    whole = localize_experts(None, CONFINED, route=FORGET)
    return {
        BASE: partial(own_loss, model),
        UNITS: routed_loss(route(with_shared_weights(model), units)),
        WHOLE: routed_loss(route(with_shared_weights(model), whole)),
    }


def steps(loss: Loss, batches: list[Batch], optimizer: torch.optim.Optimizer, mode: str) -> list[Step]:
    def step(batch: Batch) -> None:
        loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    return [partial(step, batch) for batch in batches]


def examine(
    model: nn.Module, shape: Shape, losses: Mapping[str, Loss], batch: Batch, variants: Mapping[str, Any]
) -> Findings:
    """Checks the routed variants; see CHECKED."""
    found: Findings = {}
    for name in variants:
        progress.step(f"checking {name}")
        found[name] = attempt(partial(_examine, model, shape, losses, batch, name))
    return found


def _examine(
    model: nn.Module, shape: Shape, losses: Mapping[str, Loss], batch: Batch, name: str
) -> dict[str, Any]:
    if name == BASE:
        return {}
    if not torch.equal(losses[name](batch), losses[BASE](batch)):
        return {"wrong": "the loss is not that of the unrouted model"}
    short = Batch(batch.input_ids[:1, :64], torch.full_like(batch.route_ids[:1, :64], FORGET))
    weights = {key: value for key, value in model.named_parameters() if "experts.gate_up_proj" in key}
    routed, plain = (
        torch.autograd.grad(losses[which](short), list(weights.values())) for which in (name, BASE)
    )
    for key, *gradients in zip(weights, routed, plain, strict=True):
        outside, inside = _parts(gradients[0], shape, name)
        # A router may send none of so few tokens to the experts that they are confined to.
        if outside.any() or bool(inside.any()) != bool(_parts(gradients[1], shape, name)[1].any()):
            return {"wrong": f"{key}: the gradient of confined tokens is not where it should be"}
    if not any(_parts(gradient, shape, name)[1].any() for gradient in routed):
        return {"wrong": "confined tokens have no gradient in any layer"}
    return {}


def _parts(gradient: Tensor, shape: Shape, name: str) -> tuple[Tensor, Tensor]:
    """A gradient `[E, 2 * d_expert, d_model]` outside of what tokens are confined to, and inside of it."""
    by_unit = gradient.unflatten(1, (2, shape.d_ff))
    if name == WHOLE:
        return by_unit[:-CONFINED], by_unit[-CONFINED:]
    return by_unit[:, :, : -shape.units], by_unit[:, :, -shape.units :]
