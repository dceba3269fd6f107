"""ablate: takes out of a routed model what one route does not see in its forward (SGTM's last step)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..arguments import check_int
from ..checks import check_optimizer
from .architectures import inner_model
from .attention import Attention
from .linear import matrix
from .lora import refuse_unreadable
from .mlp import MLP
from .top import TopModel


@torch.no_grad()
def ablate(model: nn.Module, route: int = 0, *, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Makes the ordinary forward of a routed model, in place, what it is for tokens of one route.

    Hidden units and heads that the route does not see (weight 0 in `forward` and `forward_heads`) are zeroed, those of
    other weights scaled: after SGTM (arXiv 2512.05648) `ablate(model, retain)` takes the forget part out. Hidden units
    that are zeroed, and heads whose key and value head is zeroed with them, have gradients of zero too: training the
    model as a whole does not bring them back. A query head that shares its key and value head with one that is seen
    adds nothing either, but its columns of the output projection have gradients: choose whole groups, or freeze them.

    Args:
        model: a routed model whose plan masks in forward; unroute it afterwards.
        route: the route whose forward stays.
        optimizer: its state of what is zeroed becomes 0 too. Without it momentum would bring some of that back.

    Raises:
        TypeError: linear layers with adapters, or sharded ones; a route or an optimizer that is none.
        ValueError: the model is not routed, has no such route, or the plan does not mask in forward; the route sees
            everything; the model was ablated already since it was routed, which would scale fractions twice.
    """
    top = inner_model(model)
    if not isinstance(top, TopModel):
        raise ValueError(
            f"model: got a {type(top).__name__} that is not routed, expected one that route() made so"
        )
    route = check_int("route", route, 0, top.routing_plan.num_routes - 1)
    check_optimizer(optimizer, top)
    masked = _masked_in_forward(top, route)
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
        for name in module.names:
            for parameter in getattr(module, name).parameters(recurse=False):
                _zero_history(parameter, optimizer)
    top._ablated_fractions = any(bool(((weights != 0) & (weights != 1)).any()) for _, weights in masked)


def _masked_in_forward(top: TopModel, route: int) -> list[tuple[MLP | Attention, Tensor]]:
    """The MLPs and attentions that mask in forward, each with the weights `[features]` that a route sees."""
    masked = [
        (module, table.weights[route])
        for module in top.modules()
        if isinstance(module, (MLP, Attention)) and (table := module.forward_table()) is not None
    ]
    if not masked:
        raise ValueError("model: got a plan that masks nothing in forward, expected forward or forward_heads")
    for module, _ in masked:
        for name in module.names:
            refuse_unreadable(f"{type(module).__name__}.{name}", getattr(module, name))
    return masked


def _zero_history(parameter: nn.Parameter, optimizer: torch.optim.Optimizer | None) -> None:
    """Zeroes gradients and moments where a parameter is 0: they would bring it back in the next step."""
    state = {} if optimizer is None else optimizer.state.get(parameter, {})
    for value in (parameter.grad, *state.values()):
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            value.masked_fill_(parameter == 0, 0.0)


def _adds(module: MLP | Attention, weights: Tensor) -> bool:
    """Whether scaling a module's features by `weights` would change what it computes."""
    output = matrix(getattr(module, module.names[-1]))  # [d_model, features]
    weights = weights.repeat_interleave(output.shape[1] // len(weights)).to(output)
    return not torch.equal(output * weights, output)
