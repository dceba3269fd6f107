"""The suite `optim`: a step of RoutedAdamW on a Llama routed by SGTM, beside torch's AdamW."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradroute.models import Shape as Widths
from gradroute.models import route, sgtm
from gradroute.optim import RoutedAdamW, routed_param_groups

from . import progress
from .cases import STEP, Case, Findings, Limit, Plan, Step, Variant, attempt
from .model import why_missing as why_missing
from .model_cases import DTYPES, SHAPES, Shape, make_batch, make_model, own_loss

OWN, FUSED = "RoutedAdamW", "RoutedAdamW, fused=True"
BASE, TORCHS_FUSED = "AdamW, foreach=False", "AdamW, fused=True"
RIVALS = (BASE, "AdamW, foreach=True", TORCHS_FUSED)
OPTIONS = {"lr": 1e-5, "weight_decay": 0.1}
CHECKED_STEPS = 3
# The targets: so many times as long as torch's loop, its default on the CPU, and as its fused kernel. RoutedAdamW
# without fused=True has none, because its purpose is to give the loop's bits.
MOST = 1.0
MOST_OF_FUSED = 1.1

# Shares of a parameter's largest change, beyond one unit in its last place a step: foreach, fused and CUDA round
# elsewhere, and moments in bf16 have eight bits.
TOLERANCE = 1e-5  # in fp32
TOLERANCE_OF_BF16 = 1e-1

CHECKED = (
    f"every variant, before it is timed, with the gradients that are timed: {CHECKED_STEPS} steps against torch's loop "
    f"over tensors, RoutedAdamW without fused=True bit for bit on the CPU where gradients touch, else to {TOLERANCE:g} "
    f"of a parameter's largest change ({TOLERANCE_OF_BF16:g} in bf16) and a unit in the last place a step; of "
    "RoutedAdamW also that what no gradient touches keeps every bit"
)


class Weights(NamedTuple):
    """A model's parameters.

    Attributes:
        values: the value of each parameter.
        gradients: the gradient of each.
        block_dims: the block dimension of each, as a routed model says it.
    """

    values: list[Tensor]
    gradients: list[Tensor]
    block_dims: list[int]

    def parameters(self) -> list[nn.Parameter]:
        """Fresh parameters, which share their gradients, because an optimizer writes to none."""
        made = [nn.Parameter(value.clone()) for value in self.values]
        for parameter, gradient in zip(made, self.gradients, strict=True):
            parameter.grad = gradient
        return made

    def untouched(self) -> list[Tensor]:
        """A mask for each parameter, true in blocks without a gradient; its shape broadcasts to the parameter's."""
        within = [
            [other for other in range(gradient.dim()) if other != dim]
            for gradient, dim in zip(self.gradients, self.block_dims, strict=True)
        ]
        return [
            (gradient == 0).all(dim=dims, keepdim=True) if dims else gradient == 0
            for gradient, dims in zip(self.gradients, within, strict=True)
        ]


#: SmolLM2-135M: on the CPU, four layers of the suite `model` are so small that Python takes much of a step.
PRETRAINED = Shape(
    batch=1, length=64, layers=30, d_model=576, d_ff=1536, heads=9, kv_heads=3, vocabulary=49152
)


def plans(device: torch.device) -> list[Plan]:
    """Of each model a case whose gradients touch every block, and one whose batch does not touch the forget part."""
    on_cpu = device.type == "cpu"
    dtype = str(DTYPES[device.type]).removeprefix("torch.")
    limits = (
        Limit(FUSED, BASE, MOST, mode=STEP),
        Limit(FUSED, TORCHS_FUSED, MOST_OF_FUSED, mode=STEP),
    )
    models = {"": SHAPES[device.type]} | ({", SmolLM2-135M": PRETRAINED} if on_cpu else {})
    return [
        Plan(
            "optim",
            f"AdamW{name}, {what}",
            "AdamW",
            shape._asdict() | {"dtype": dtype},
            partial(case, shape, device, touches_all, limits if on_cpu else ()),
            "d_model",
        )
        for name, shape in models.items()
        for what, touches_all in (("every block touched", True), ("a batch of retain tokens", False))
    ]


def case(shape: Shape, device: torch.device, touches_all: bool, limits: tuple[Limit, ...] = ()) -> Case:
    weights = make_weights(shape, device, touches_all)
    elements = sum(value.numel() for value in weights.values)
    still = sum(
        int(mask.expand_as(value).sum())
        for mask, value in zip(weights.untouched(), weights.values, strict=True)
    )
    return Case(
        variants={
            name: Variant(partial(steps, make(weights)), is_rival=name in RIVALS)
            for name, make in OPTIMIZERS.items()
        },
        rivals=RIVALS,
        examine=partial(examine, weights),
        checked=CHECKED,
        modes=(STEP,),
        limits=limits,
        facts={"parameters": elements, "untouched": still},
    )


def make_weights(shape: Shape, device: torch.device, touches_all: bool) -> Weights:
    """The weights of a routed model, with random gradients or those of one short row of retain tokens."""
    model = make_model(shape, device)
    widths = Widths(shape.layers, shape.d_model, shape.d_ff, shape.heads, shape.kv_heads, shape.head_dim)
    route(model, sgtm(widths, shape.forget_heads, shape.units))
    generator = torch.Generator().manual_seed(0)
    if not touches_all:
        batch = make_batch(shape._replace(batch=1, length=min(shape.length, 64)), device)
        routed = partial(model, route_ids=torch.zeros_like(batch.route_ids))
        own_loss(routed, batch).backward()
    dims = {
        id(parameter): group["block_dim"]
        for group in routed_param_groups(model)
        for parameter in group["params"]
    }
    parameters = list(model.parameters())
    return Weights(
        [parameter.detach() for parameter in parameters],
        [_random_like(parameter, generator) if touches_all else parameter.grad for parameter in parameters],
        [dims[id(parameter)] for parameter in parameters],
    )


def _random_like(parameter: Tensor, generator: torch.Generator) -> Tensor:
    """Random numbers without a zero, which in bf16 some would be."""
    random = torch.randn(parameter.shape, generator=generator).to(parameter)
    return torch.where(random == 0, 1.0, random)


def routed_adamw(weights: Weights, fused: bool) -> torch.optim.Optimizer:
    """RoutedAdamW with the blocks of a routed model, in one group for each block dimension."""
    made = weights.parameters()
    groups = [
        {
            "params": [p for p, dim in zip(made, weights.block_dims, strict=True) if dim == block_dim],
            "block_dim": block_dim,
        }
        for block_dim in dict.fromkeys(weights.block_dims)
    ]
    return RoutedAdamW(groups, **OPTIONS, fused=fused)


def adamw(weights: Weights, **how: bool) -> torch.optim.Optimizer:
    return torch.optim.AdamW(weights.parameters(), **OPTIONS, **how)


OPTIMIZERS: dict[str, Callable[[Weights], torch.optim.Optimizer]] = {
    BASE: partial(adamw, foreach=False),
    "AdamW, foreach=True": partial(adamw, foreach=True),
    TORCHS_FUSED: partial(adamw, fused=True),
    OWN: partial(routed_adamw, fused=False),
    FUSED: partial(routed_adamw, fused=True),
}


def steps(optimizer: torch.optim.Optimizer, mode: str) -> list[Step]:
    return [optimizer.step]


def examine(weights: Weights, variants: Mapping[str, Any]) -> Findings:
    """Compares the variants with torch's loop over tensors; see CHECKED."""
    expected = stepped(weights, OPTIMIZERS[BASE])
    found: Findings = {}
    for name in variants:
        progress.step(f"checking {name}")
        found[name] = attempt(partial(_examine, weights, expected, name))
    return found


def stepped(weights: Weights, make: Callable[[Weights], torch.optim.Optimizer]) -> list[Tensor]:
    """The parameters after some steps, in the order of the weights."""
    optimizer = make(weights)
    for _ in range(CHECKED_STEPS):
        optimizer.step()
    by_gradient = {id(p.grad): p.detach() for group in optimizer.param_groups for p in group["params"]}
    return [by_gradient[id(gradient)] for gradient in weights.gradients]


def _examine(weights: Weights, expected: list[Tensor], name: str) -> dict[str, Any]:
    got = stepped(weights, OPTIMIZERS[name])
    worst = 0.0
    of_all = zip(got, expected, weights.values, weights.untouched(), strict=True)
    for index, (one, exact, before, untouched) in enumerate(of_all):
        if name not in RIVALS:
            if not torch.equal(one.where(untouched, before), before):
                return {"wrong": f"parameter {index}: what no gradient touches has moved"}
            exact = exact.where(~untouched, before)
            if name == OWN and one.device.type == "cpu" and not torch.equal(one, exact):
                return {"wrong": f"parameter {index}: got other bits than torch's loop"}
        change = (exact.float() - before.float()).abs().max().clamp_min(1e-30)
        rounding = CHECKED_STEPS * torch.finfo(exact.dtype).eps * exact.float().abs()
        beyond = ((one.float() - exact.float()).abs() - rounding).clamp_min(0)
        worst = max(worst, float(beyond.max() / change))
    allowed = TOLERANCE_OF_BF16 if weights.values[0].dtype == torch.bfloat16 else TOLERANCE
    if not worst <= allowed:
        return {"wrong": f"the error is {worst:.3g} of a parameter's largest change, expected {allowed:g}"}
    return {"largest_error": worst}
