"""TransformerLens 4: a routed model inside a TransformerBridge.

A bridge calls the decoder layers, MLPs, linear layers, embeddings and the head of the model it wraps, with whatever
arguments come. It computes attention and fused MLPs itself, and calls norms with their input alone: routes would end
there.
`pass_routes` lets these call the wrapped module while there are routes, and compute as before while there are none.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TypeVar

from torch import Tensor, nn

from ..routes import Routes
from .calls import running_call
from .modules import AnyModule, Argument
from .swapped import Swapped

Bridge = TypeVar("Bridge", bound=nn.Module)


def pass_routes(bridge: Bridge) -> Bridge:
    """Lets routes reach what a bridge wraps: `bridge(tokens, route_ids=...)` then trains as the model alone does.

    `bridge = transformer_lens.model_bridge.sources.build_bridge_from_module(model, "LlamaForCausalLM",
    hf_config=model.config)` wraps a routed model (route it before). With routes, hooks inside of attention and of norms
    (rotated queries and keys, scores, scales) do not run; all others, and all of them without routes, do. A bridge with
    processed weights (folded norms, compatibility mode) computes MLPs itself and cannot be trained with routes.

    Args:
        bridge: the TransformerBridge; changed in place.

    Returns:
        The same bridge.

    Raises:
        ValueError: nothing in it is routed, or its weights were processed.
    """
    components = importlib.import_module("transformer_lens.model_bridge.generalized_components")
    mixins = (
        (components.AttentionBridge, _Attention),
        (components.NormalizationBridge, _Module),
        (components.JointGateUpMLPBridge, _Module),
    )
    modules = list(bridge.modules())
    if not any(isinstance(module, Swapped) for module in modules):
        raise ValueError("bridge: got a bridge of a model that is not routed, expected to route it before")
    if any(getattr(module, "_use_processed_weights", False) for module in modules):
        raise ValueError(
            "bridge: got processed weights, expected those of the model: it then computes MLPs itself"
        )
    for module in modules:
        for component, mixin in mixins:
            if isinstance(module, component) and isinstance(module.original_component, Swapped):
                module.__class__ = type(type(module).__name__, (mixin, type(module)), {})
    return bridge


class _Module(nn.Module):
    """A bridge of a norm or of a fused MLP that calls what it wraps while there are routes, given or handed."""

    hook_in: Callable[[Tensor], Tensor]
    hook_out: Callable[[Tensor], Tensor]
    original_component: AnyModule

    def forward(self, hidden_states: Tensor, routes: Routes | None = None, **kwargs: Argument) -> Tensor:
        call = running_call(self.original_component._owner) if self.original_component._is_handed else None
        routes = call.routes if routes is None and call is not None else routes
        if routes is None:
            return super().forward(hidden_states, **kwargs)
        return self.hook_out(self.original_component(self.hook_in(hidden_states), routes=routes))


class _Attention(nn.Module):
    """An attention's bridge that calls the attention while there are routes."""

    hook_in: Callable[[Tensor], Tensor]
    hook_out: Callable[[Tensor], Tensor]
    original_component: AnyModule

    def forward(
        self, hidden_states: Tensor, *args: Argument, routes: Routes | None = None, **kwargs: Argument
    ) -> Argument:
        if routes is None:
            return super().forward(hidden_states, *args, **kwargs)
        y = self.original_component(self.hook_in(hidden_states), *args, routes=routes, **kwargs)
        return (self.hook_out(y[0]), *y[1:]) if isinstance(y, tuple) else self.hook_out(y)
