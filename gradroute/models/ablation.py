"""ablate: takes out of a routed model what one route does not see in its forward (SGTM's last step)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..arguments import check_int
from ..checks import check_optimizer
from .architectures import inner_model
from .attention import Attention
from .dtensors import local, whole
from .experts import BatchedExperts
from .fsdp import reshard
from .linear import matrix
from .lora import refuse_unreadable
from .mlp import MLP
from .moe import Router
from .offloaded import Offloaded, offloaded
from .top import TopModel

# What masks in forward.
_Masking = MLP | Attention | BatchedExperts


@torch.no_grad()
def ablate(model: nn.Module, route: int = 0, *, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Makes the ordinary forward of a routed model, in place, what it is for tokens of one route.

    Hidden units, heads and experts that the route does not see (weight 0 in `forward`, `forward_heads` and
    `forward_experts`) are zeroed, those of other weights scaled: after SGTM (arXiv 2512.05648) `ablate(model,
    retain)` takes the forget part out. Hidden units that are zeroed, and heads whose key and value head is
    zeroed with them, have gradients of zero too: training the model as a whole does not bring them back. A
    query head that shares its key and value head with one that is seen adds nothing either, but its columns
    of the output projection have gradients: choose whole groups, or freeze them.

    Args:
        model: a routed model whose plan masks in forward; unroute it afterwards.
        route: the route whose forward stays.
        optimizer: its state of what is zeroed becomes 0 too. Without it momentum would bring some of that back.

    Raises:
        TypeError: linear layers with adapters, tensor-parallel or offloaded ones; a route or an optimizer that is none.
        ValueError: the model is not routed, has no such route, or the plan does not mask in forward; the route sees
            everything; the model was ablated already since it was routed, which would scale fractions twice; layers
            that share weights have different tables; the model is on the meta device.
    """
    top = inner_model(model)
    if not isinstance(top, TopModel):
        raise ValueError(
            f"model: got a {type(top).__name__} that is not routed, expected one that route() made so"
        )
    route = check_int("route", route, 0, top.routing_plan.num_routes - 1)
    check_optimizer(optimizer, top)
    _refuse_choice(top, route)
    reshard(top)  # FSDP2's parameters are whole after some forwards, and what is written to them then is lost
    masked = _distinct(_masked_in_forward(top, route))
    if all(bool((weights == 1).all()) for _, weights in masked):
        raise ValueError(
            f"route: got {route}, whose tokens see everything, so that there is nothing to take out; expected a route "
            "that forward tables mask: of sgtm the retain route"
        )
    if top._ablated_fractions or not any(_adds(module, weights) for module, weights in masked):
        raise ValueError(
            f"model: got one in which what route {route} does not see was ablated already, expected one with influence"
        )
    for module, weights in masked:
        module.scale_features(weights)
        for _, part in _parts(module):
            for parameter in part.parameters(recurse=False):
                _zero_history(parameter, optimizer)
    top._ablated_fractions = any(bool(((weights != 0) & (weights != 1)).any()) for _, weights in masked)


def _parts(module: _Masking) -> list[tuple[str, nn.Module]]:
    """The modules whose parameters are a masking module's, with their paths in it."""
    if isinstance(module, BatchedExperts):
        return [("", module)]
    return [(f".{name}", getattr(module, name)) for name in module.names]


def _refuse_choice(top: TopModel, route: int) -> None:
    """Raises where a route's tokens are not sent to every expert, which no weight of a router can say."""
    for module in top.modules():
        choice = module.sites.choice if isinstance(module, Router) and module.sites is not None else None
        if choice is not None and bool((choice.weights[route] == 0).any()):
            raise ValueError(
                f"route: got {route}, whose tokens MoESites.choice does not send to every expert, which an ordinary "
                "router cannot be told; expected a route that may choose all, or a plan with forward_experts"
            )


def _masked_in_forward(top: TopModel, route: int) -> list[tuple[_Masking, Tensor]]:
    """The MLPs, attentions and experts that mask in forward, each with the weights `[features]` that a route sees."""
    masked = [
        (module, table.weights[route])
        for module in top.modules()
        if isinstance(module, _Masking) and (table := module.forward_table()) is not None
    ]
    if not masked:
        raise ValueError("model: got a plan that masks nothing in forward, expected forward or forward_heads")
    for module, _ in masked:
        for name, part in _parts(module):
            refuse_unreadable(f"{type(module).__name__}{name}", part)
            _refuse_without_values(f"{type(module).__name__}{name}", part, offloaded(top))
    return masked


def _refuse_without_values(path: str, part: nn.Module, outside: Mapping[tuple[int, str], Offloaded]) -> None:
    """Raises where the parameters of a linear layer or of experts have no values that could be scaled."""
    for name, parameter in part.named_parameters(recurse=False):
        if (id(part), name) in outside:
            raise TypeError(
                f"{path}.{name}: got an offloaded parameter, expected one in memory: load the model without offload, "
                "or take the block out with gradroute.era.ablate, which changes offloaded ones"
            )
        if parameter.is_meta:
            raise ValueError(f"{path}.{name}: got a parameter on the meta device, expected one with values")


def _distinct(masked: list[tuple[_Masking, Tensor]]) -> list[tuple[_Masking, Tensor]]:
    """Each module once of those that share their weights, which would be scaled once for each of them.

    Raises:
        ValueError: modules that share weights have different tables, or not all of their weights in common.
    """
    owners: dict[nn.Parameter, tuple[_Masking, Tensor]] = {}
    distinct = []
    for module, weights in masked:
        parameters = [p for _, part in _parts(module) for p in part.parameters(recurse=False)]
        shared = [owners[parameter] for parameter in parameters if parameter in owners]
        if any(len(shared) < len(parameters) or not torch.equal(weights, its) for _, its in shared):
            raise ValueError(
                f"model: got a {type(module).__name__} that shares some weights with another one, or masks them "
                "otherwise, expected weights of its own: they would be scaled twice"
            )
        if not shared:
            distinct.append((module, weights))
            owners |= dict.fromkeys(parameters, (module, weights))
    return distinct


def _zero_history(parameter: nn.Parameter, optimizer: torch.optim.Optimizer | None) -> None:
    """Zeroes gradients and moments where a parameter is 0: they would bring it back in the next step."""
    state = {} if optimizer is None else optimizer.state.get(parameter, {})
    zero = local(parameter) == 0
    for value in (parameter.grad, *state.values()):
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            local(value).masked_fill_(zero, 0.0)


def _adds(module: _Masking, weights: Tensor) -> bool:
    """Whether scaling a module's features by `weights` would change what it computes."""
    if isinstance(module, BatchedExperts):
        return module.adds(weights)
    output = whole(matrix(getattr(module, module.names[-1])))  # [d_model, features]
    weights = weights.repeat_interleave(output.shape[1] // len(weights)).to(output)
    return not torch.equal(output * weights, output)
