"""The linear submodules of a layer: read by a fused op, or called where a call does more than that."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..linear import LinearSites, routed_linear
from ..route_grad import route_grad
from ..routes import Routes
from ..sites import Sites
from .linear import RoutedLinear
from .lora import RoutedLoRALinear, is_lora, lora_linear
from .module import RoutedModule
from .reading import full_name, is_dtensor, is_readable, is_watched


def call_linear(
    layer: RoutedModule, name: str, x: Tensor, routes: Routes | None, sites: LinearSites | None
) -> Tensor:
    """The output of a layer's linear submodule, whatever stands in its place, with the layer's sites for it.

    Args:
        layer: the layer.
        name: the submodule's name.
        x: `[*tokens, I]`.
        routes: the batch's routes; None: the ordinary layer.
        sites: what the layer masks there; None: nothing.

    Raises:
        TypeError: sites say who may update the submodule, and it can neither be read nor routed.
    """
    child: Any = layer._modules[name]
    if is_readable(child):
        return routed_linear(x, child.weight, child.bias, routes, sites, backend=layer.backend)
    y: Tensor
    if routes is not None and isinstance(child, (RoutedLinear, RoutedLoRALinear)):
        y = _call_routed(layer, name, child, x, routes, sites)
    elif routes is None or sites is None:
        y = child(x)
    elif is_lora(child) and not is_watched(child):
        y = lora_linear(child, x, routes, sites, layer.backend)
    elif any(site.startswith("update") for site in sites.tables) and _is_trained(child):
        raise TypeError(_refusal(layer, name, child))
    else:
        y = child(x)
        if sites.output is not None:
            check_whole(layer, name, y, -1, sites)
            y = route_grad(y, routes, sites.output, backend=layer.backend)
    return y


def _call_routed(
    layer: RoutedModule, name: str, child: Any, x: Tensor, routes: Routes, sites: LinearSites | None
) -> Any:
    """A submodule that takes routes: with its own sites, or with those of the layer."""
    own = child.sites if isinstance(child, RoutedLinear) else child.get_base_layer().sites
    if sites is None:
        return child(x, routes=routes)
    if own is not None:
        raise TypeError(
            f"{type(layer).__name__}.{name}: got {own} of its own beside {type(layer.sites).__name__} of the "
            f"layer that mask there too, expected one of them: set the sites of {name} to None"
        )
    return child(x, routes=routes, sites=sites)


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _refusal(layer: RoutedModule, name: str, child: nn.Module) -> str:
    parts = type(layer.sites).__name__
    updates = ", ".join(site for site in layer.sites.tables if site.startswith("update"))
    got = f"a {full_name(child)}"
    if any(map(is_dtensor, child.parameters())):
        got += " whose parameters are distributed"
    elif is_watched(child):
        got += " with hooks, on it or on every module, or with another forward"
    return (
        f"{type(layer).__name__}.{name}: got {got} beside {parts} that say who may update it ({updates}), expected one "
        f"whose gradients can be routed: {name} = RoutedLinear.from_linear({name}) before hooks, pruning or sharding, "
        "or PEFT's plain LoRA of a torch.nn.Linear; masks of activations alone need none of this"
    )


def check_whole(layer: RoutedModule, name: str, y: Tensor, features: int, sites: Sites | None) -> None:
    """Raises where a submodule that was called made other features than the masks of its output are for.

    Args:
        layer: the layer.
        name: the submodule's name.
        y: its output, `[*tokens, features]`.
        features: how many it should have; -1: any number.
        sites: what the layer masks behind it; None: nothing.
    """
    if sites is None:
        return
    if is_dtensor(y):
        raise TypeError(f"{type(layer).__name__}.{name}: got a DTensor as its output, {_TENSOR_PARALLEL}")
    by_feature = any(table.features > 1 for table in sites.tables.values())
    if by_feature and features not in (-1, y.shape[-1]):
        raise TypeError(
            f"{type(layer).__name__}.{name}: got an output of {y.shape[-1]} features, expected {features}; where it is "
            f"sharded, {_TENSOR_PARALLEL}"
        )


_TENSOR_PARALLEL = (
    "expected the whole as a local tensor: a rank would need its own part of the tables, which "
    "gradroute.models.tensor_parallel hands to the MLPs and the attention of models"
)
