"""The plan that confines a route's tokens to experts of a mixture."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from ..arguments import check_bool, check_indices, check_int, check_number, is_int
from ..tables import Features, check_features, localize
from .moe_sites import MoESites
from .plan import RoutingPlan, Shape
from .presets import layers_of, number_of_routes, some_of


def localize_experts(
    layers: Collection[int] | None,
    experts: int | Features,
    *,
    route: int = 1,
    num_routes: int | None = None,
    on: float = 1.0,
    off: float = 0.0,
    hidden_from_others: bool = False,
) -> RoutingPlan:
    """One route's tokens teach some experts of some layers only: those of Cloud et al. 2024, with experts for units.

    The gradient is masked where it enters an expert, so that such a token teaches the other experts nothing and nothing
    flows through them to what lies below. The router learns from every token: what it is worth to be sent to an expert
    is the same whoever it teaches. Tokens are sent where the router sends them; those of the route that come to none of
    the experts teach no expert of the layer. Nothing makes the router send more of them there: in a training from
    scratch with `off` = 0 the experts may be left without them. `MoESites(choice=...)` says where a route's tokens may
    go.

    Args:
        layers: the layers' indices; None: all that have experts.
        experts: how many, counted from the last; or which (a slice, indices or a boolean for each).
        route: the route whose tokens are confined.
        num_routes: R; default: as many as `route` needs, at least two.
        on: the weight of the experts.
        off: the weight of the others; negative numbers unlearn there.
        hidden_from_others: tokens of the other routes do not see the experts in forward, and so teach them nothing:
            `ablate(model, route)` of another route then takes the experts out, as SGTM takes its forget part.

    Returns:
        The plan. `route` raises ValueError where a model has no such layers or experts, or no experts there.

    Raises:
        TypeError: layers, experts, numbers or flags of another kind.
        ValueError: none of them, negative layers, a route out of range, weights that are not finite.
    """
    routes = number_of_routes(route, num_routes)
    on, off = check_number("on", on), check_number("off", off)
    hides = check_bool("hidden_from_others", hidden_from_others)
    chosen = None if layers is None else check_indices("layers", layers)
    count = check_int("experts", experts, 1) if is_int(experts) else None
    which: Any = experts if count is None else slice(-count, None)
    check_features("experts", which)

    def sites(index: int, shape: Shape) -> MoESites | None:
        if index not in _expert_layers(chosen, shape):
            return None
        if count is not None:
            check_int("experts", count, 1, shape.experts)
        indices = some_of(which, shape.experts, "experts")
        seen = {other: _all_but(indices, shape.experts) for other in range(routes) if other != route}
        return MoESites(
            experts=localize(routes, shape.experts, {route: indices}, on, off),
            forward_experts=localize(routes, shape.experts, seen) if hides else None,
        )

    return RoutingPlan(routes, moe=sites)


def _expert_layers(chosen: tuple[int, ...] | None, shape: Shape) -> tuple[int, ...]:
    """Those of the chosen layers that are to have experts, which they must have if they were named."""
    if not shape.expert_layers:
        raise ValueError("layers: got a model without mixtures of experts, expected one with some")
    if chosen is None:
        return shape.expert_layers
    dense = [i for i in layers_of(chosen, shape.layers) if i not in shape.expert_layers]
    if dense:
        raise ValueError(
            f"layers: got {dense}, which have no experts, expected some of {shape.expert_layers}"
        )
    return chosen


def _all_but(indices: Collection[int], count: int) -> list[int]:
    return [i for i in range(count) if i not in indices]
