"""The plan of a recipe: a preset of gradroute.models with the arguments of a config."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from .. import models
from ..models import RoutingPlan
from .models import is_folder, resolve
from .reading import ConfigError
from .training_sections import Adapters, Expand, Route

if TYPE_CHECKING:
    from .config import Config

# A configuration of transformers, of any class.
Configuration = Any

#: The presets of a recipe; the first one is the default.
PRESETS = {"unlearn": ("era", "sgtm", "localize_experts"), "localize": ("steering", "localize_mlp")}


def settled(route: Route, expand: Expand, recipe: str) -> Route:
    """The section with the recipe's preset in it, and the numbers of units and heads that expand adds.

    Raises:
        ConfigError: another recipe's preset, settings that the preset does not read, or no part to route to.
    """
    presets = PRESETS[recipe]
    preset = presets[0] if route.preset is None else route.preset
    if preset not in presets:
        raise ConfigError.of("route.preset", preset, f"one of {', '.join(presets)} for {recipe}")
    try:
        route = dataclasses.replace(route, preset=preset)  # type: ignore[arg-type]
    except ConfigError as error:
        raise ConfigError(f"route.{error}") from None
    if recipe == "localize":
        return route
    if preset == "localize_experts":
        _check_experts(expand)
        return route
    units = expand.units if route.units is None else route.units
    heads = expand.heads if route.heads is None else route.heads
    if preset == "era":
        _check_era(units, expand)
        return dataclasses.replace(route, units=units)
    if not units and not heads:
        raise ConfigError("route.units: got 0 units and 0 heads, expected a part for the routed texts")
    return dataclasses.replace(route, units=units, heads=heads)


def _check_experts(expand: Expand) -> None:
    for key in ("units", "heads"):
        if getattr(expand, key):
            raise ConfigError.of(
                f"expand.{key}",
                getattr(expand, key),
                "0 for the preset localize_experts, whose part are experts that the model has",
            )


def _check_era(units: int, expand: Expand) -> None:
    if units < 1:
        raise ConfigError.of(
            "expand.units", expand.units, "at least 1 for the preset era, which routes to them"
        )
    if units > expand.units:
        raise ConfigError.of(
            "route.units",
            units,
            f"at most expand.units = {expand.units}: era's part are units that were added",
        )
    if expand.heads:
        raise ConfigError.of("expand.heads", expand.heads, "0 for the preset era, which routes MLPs alone")


def plan_of(route: Route, names: Sequence[str], configuration: Configuration) -> RoutingPlan:
    """The plan of a settled section.

    Args:
        route: what `settled` returned.
        names: the names of the routes; a route's index is its id.
        configuration: the (expanded) model's configuration of transformers.

    Raises:
        ValueError: the model has no such layers, units, heads or dimensions.
    """
    number = {name: index for index, name in enumerate(names)}
    layers: Any = (
        range(configuration.get_text_config().num_hidden_layers) if route.layers is None else route.layers
    )
    common: dict[str, Any] = {"route": number[route.forget], "num_routes": len(names)}
    if route.preset == "era":
        return models.era(route.layers, route.units or 0, off=route.off, site=route.site, **common)
    if route.preset == "localize_experts":
        return models.localize_experts(
            route.layers, route.experts, off=route.off, hidden_from_others=True, **common
        )
    if route.preset == "steering":
        return models.steering(layers, list(route.indices), off=route.off, **common)
    if route.preset == "localize_mlp":
        return models.localize_mlp(layers, list(route.indices), on=route.on, off=route.off, **common)
    return models.sgtm(
        configuration,
        route.heads or 0,
        route.units or 0,
        retain=number[route.retain],
        forget=number[route.forget],
        unlabelled=None if route.unlabelled is None else number[route.unlabelled],
        layers=route.layers,
        joint_down_projection=route.joint_down_projection,
        joint_embedding=route.joint_embedding,
        joint_head=route.joint_head,
    )


def adapter_plan(adapters: Adapters, names: Sequence[str]) -> RoutingPlan:
    """The plan in which each LoRA adapter is trained by its own routes."""
    number = {name: index for index, name in enumerate(names)}
    routes = {adapter: [number[name] for name in of] for adapter, of in adapters.adapters.items()}
    return RoutingPlan(len(names), adapters=routes)


def checker(recipe: str) -> Callable[[Config], None]:
    """A check of a config's plan, before anything is loaded."""

    def check(config: Config) -> None:
        named = {f"adapters.adapters.{name}": of for name, of in config.adapters.adapters.items()}
        if recipe != "adapters":
            route = settled(config.route, config.expand, recipe)
            named = {"route.forget": (route.forget,)}
            if route.preset in ("sgtm", "localize_experts"):
                named["route.retain"] = (route.retain,)
            if route.preset == "sgtm":
                named["route.unlabelled"] = (route.unlabelled,) if route.unlabelled else ()
        for key, names in named.items():
            for name in names:
                if name not in config.routes:
                    raise ConfigError.of(key, name, f"a name of routes: {', '.join(config.routes)}")
        if recipe != "adapters":
            _check_layers(config, route)
        if recipe == "unlearn" and route.forget == config.routes[0]:
            raise ConfigError.of(
                "route.forget", route.forget, "another route than the base route, the first of routes"
            )

    return check


def _check_layers(config: Config, route: Route) -> None:
    """Raises ConfigError where a model, whose folder says how many layers it has, lacks one that is routed."""
    from transformers import AutoConfig

    if route.layers is None or not is_folder(config.model.path):
        return
    of_model = AutoConfig.from_pretrained(**resolve(config.model.path).arguments).get_text_config()
    if max(route.layers) >= of_model.num_hidden_layers:
        expected = f"layers from 0 to {of_model.num_hidden_layers - 1}, which the model has"
        raise ConfigError.of("route.layers", list(route.layers), expected)
