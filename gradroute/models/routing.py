"""route and unroute: one call makes an existing model routed, one makes it ordinary again."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch import nn

from ..arguments import shown
from ..attention import AttentionSites
from ..backends import check_backend
from ..mlp import MLPSites
from ..routes import Routes
from ..sites import Sites
from .architectures import Architecture, architecture_of, inner_model, submodule
from .attention_function import register
from .base_model import BaseModel
from .calls import Owner, offering, retire
from .computed import foreign_forward
from .decoder_layer import DecoderLayer, LayerRouting
from .embedding import PositionEmbedding
from .inspection import added_units
from .linear import Linear
from .lora import LoRALinear, holds_adapters, linear_mixin, route_adapters
from .modules import AnyModule
from .plan import LayerSites, RoutingPlan, Shape
from .swapped import Swapped, errors_name, refuse_remade, refuse_unswappable, swap, unswap
from .top import ModelRouting, TopModel

Model = TypeVar("Model", bound=nn.Module)


def route(
    model: Model,
    plan: RoutingPlan,
    *,
    architecture: Architecture | None = None,
    backend: str | None = None,
) -> Model:
    """Makes a model routed, in place: gradient routing (Cloud et al. 2024, arXiv 2410.04332) by a plan.

    Its forward then takes `route_ids` `[B, S]` (integers, `[0, plan.num_routes)`), `route_strength` (see Routes.of),
    or `routes` (a Routes), and without them is the ordinary one, bit for bit. Parameters, state_dict keys, hooks and
    `save_pretrained` stay as they were. Add adapters before; shard (FSDP, tensor parallel) and compile after.

    Args:
        model: a causal language model of transformers 5 (see ARCHITECTURES), PEFT's model around one, or with
            `architecture` any module of that form.
        plan: what to route.
        architecture: where the model's submodules are; default: by its `config.model_type`.
        backend: the backend of every op, see `gradroute.use_backend`.

    Returns:
        The same model.

    Raises:
        TypeError: no such architecture; a submodule is not what its mixin routes; sites of another type.
        ValueError: the plan does not fit the model, or it is routed already.

    After an error nothing has changed. Warns (RuntimeWarning) where the embedding and the head are one tied parameter
    and only one of them is in the plan.
    """
    if not isinstance(plan, RoutingPlan):
        raise TypeError(f"plan: got a {type(plan).__name__}, expected a RoutingPlan")
    if architecture is not None and not isinstance(architecture, Architecture):
        raise TypeError(f"architecture: got {shown(architecture)}, expected an Architecture or None")
    check_backend(backend)
    inner = inner_model(model)
    for module in (inner, *filter(_is_routed, inner.modules())):
        refuse_unswappable(module)
    register()
    found = architecture_of(inner) if architecture is None else architecture
    try:
        _swap_all(inner, plan, found, backend)
        if architecture is None:
            _refuse_foreign(inner)
    except BaseException:
        _unswap_all(inner)
        raise
    _warn_of_ties(inner, plan, found)
    return model


def unroute(model: Model) -> Model:
    """Makes a routed model ordinary again, in place: classes, parameters and state_dict keys are what they were.

    What others put around the model stays and calls the ordinary forward: mixed precision of accelerate and of Trainer,
    hooks of device_map, DistributedDataParallel, torch.compile. A checkpoint of a forward before, whose backward comes
    after, is refused in that backward, because it would run again without its routes.

    Args:
        model: the model that was routed, or what wraps it.

    Returns:
        The same object.

    Raises:
        TypeError: it is not a module; it was sharded since (FSDP2, tensor parallel): unroute before that.
        ValueError: it is not routed.
    """
    top = routed_model(model)
    for module in top.modules():  # all of them before anything changes
        refuse_remade(module)
    owner = top._owner
    layers = [module for module in top.modules() if isinstance(module, DecoderLayer)]
    _unswap_all(top)
    retire(owner, layers)
    return model


@contextmanager
def routing(
    model: nn.Module,
    route_ids: object = None,
    *,
    route_strength: object = None,
    routes: Routes | None = None,
) -> Iterator[None]:
    """Hands routes to the forwards of a model in a `with` block whose callers do not pass them on.

    For trainers and evaluations that call `model(input_ids=..., attention_mask=...)` themselves. Every forward of the
    model in this thread that is given no routes takes these, and passes them on as if they had been its arguments; so
    they are right with the checkpointing of layers, torch.compile and DistributedDataParallel. A checkpoint around the
    whole model is refused in backward, because it knows the model's arguments alone. `generate` stays unrouted.

    Args:
        model: a routed model, or what wraps it.
        route_ids: see the forward of a routed model: integers `[B, S]`.
        route_strength: likewise.
        routes: a Routes in the place of both.

    Raises:
        TypeError: `model` is not a module, or `routes` is no Routes.
        ValueError: it is not routed, or there are no routes, or two sorts.
        RuntimeError: at the end of the block, where no forward took the routes, or where blocks of one model overlap,
            as those of generators that take turns do (tasks of asyncio keep theirs apart).
    """
    top = routed_model(model)
    given = {"route_ids": route_ids, "route_strength": route_strength, "routes": routes}
    arguments = {name: value for name, value in given.items() if value is not None}
    if "routes" in arguments and len(arguments) > 1:
        raise ValueError("routes: got routes beside route_ids or route_strength, expected one of both")
    if "routes" not in arguments and "route_ids" not in arguments:
        raise ValueError("route_ids: got None, expected route_ids or routes; unrouted(model) is for none")
    if routes is not None and not isinstance(routes, Routes):
        raise TypeError(
            f"routes: got a {type(routes).__name__}, expected gradroute.Routes; raw ids are given as "
            "route_ids, or made one by gradroute.Routes.of(ids, num_routes)"
        )
    with offering(top._owner, arguments) as offer:
        yield
    if not offer.taken:
        raise RuntimeError(
            f"routing: got no forward of the {type(top).__name__} in the block that took its routes, expected at least "
            "one in this thread, without routes of its own"
        )


@contextmanager
def unrouted(model: nn.Module) -> Iterator[None]:
    """Says that forwards without routes are meant, in a `with` block: no UnroutedWarning, and not routing()'s routes.

    Args:
        model: a routed model, or what wraps it.

    Raises:
        TypeError: `model` is not a module.
        ValueError: it is not routed.
    """
    with offering(routed_model(model)._owner, {}):
        yield


def routed_model(model: nn.Module) -> AnyModule:
    """The routed model in a module: itself, or what PEFT's, DistributedDataParallel, torch.compile or others wrap.

    Raises:
        TypeError: `model` is not a module.
        ValueError: there is none, or there are several.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got a {type(model).__name__}, expected a torch.nn.Module")
    found = [
        module
        for module in model.modules()
        if isinstance(module, TopModel) and not isinstance(module, BaseModel)
    ]
    if len(found) != 1:
        many = f"with {len(found)} routed models in it" if found else "that is not routed"
        raise ValueError(f"model: got a {type(model).__name__} {many}, expected one that route() made so")
    return found[0]


def _is_routed(module: nn.Module) -> bool:
    return isinstance(module, Swapped)


def _swap_all(model: nn.Module, plan: RoutingPlan, architecture: Architecture, backend: str | None) -> None:
    layers = submodule(model, architecture.layers)
    if layers is None:
        raise TypeError(f"model: got a {type(model).__name__} without {architecture.layers}")
    shape = _shape_of(model, layers, architecture)
    plan = plan.resolved(shape)
    by_layer = [
        _reaching_adapters(sites, layer, architecture, plan)
        for sites, layer in zip(plan.layers(shape), layers, strict=True)
    ]
    everywhere = any(_masks_attention(sites) for sites in by_layer)
    routed = _swap_layers(layers, by_layer, architecture, backend, everywhere)
    outer = _swap_outer(model, plan, architecture, backend)
    with errors_name("RoutingPlan.adapters"):
        route_adapters(model, plan.adapter_tables)
    handed = [*(() if architecture.passes_routes else routed), *outer]
    for module in handed:
        module._is_handed = True
    routing = ModelRouting(
        plan=plan,
        has_handed=bool(handed),
        expected=_expected(model, outer),
        everywhere=everywhere,
        passes_routes=architecture.passes_routes,
    )
    _swap_base(model, architecture, routing, backend)
    swap(model, TopModel, None, backend, routing)
    owner = Owner(model)
    for module in model.modules():
        if isinstance(module, Swapped):
            module._owner = owner


def _refuse_foreign(model: AnyModule) -> None:
    """Raises where a module is of a class that only has the names of the architecture's submodules."""
    for name, module in model.named_modules():
        if not isinstance(module, Swapped) or not module.computes:
            continue
        foreign = foreign_forward(type(module).original, type(model).original)
        if foreign is not None:
            raise TypeError(
                f"model.{name}: got a {type(module).__name__} with the forward {foreign}, expected a class of "
                "transformers, which routed modules compute themselves: route() before it is put there, or give the "
                "architecture, for a model of your own of that form"
            )


def _swap_base(
    model: nn.Module, architecture: Architecture, routing: ModelRouting, backend: str | None
) -> None:
    """Routes the model without its head, for those who call it past the whole model."""
    path = architecture.layers.rpartition(".")[0]
    base = submodule(model, path) if path else None
    if base is None or isinstance(base, nn.ModuleDict) or type(base).__name__ == "OptimizedModule":
        return  # nobody can call it, or what is compiled stays as it is
    inside = {id(module) for module in base.modules()}
    expected = [(name.removeprefix(f"{path}."), it) for name, it in routing.expected if id(it) in inside]
    beyond = [name for name, it in routing.expected if id(it) not in inside]
    swap(base, BaseModel, None, backend, routing._replace(expected=tuple(expected), beyond=tuple(beyond)))


def _swap_layers(
    layers: nn.ModuleList,
    by_layer: list[LayerSites],
    architecture: Architecture,
    backend: str | None,
    everywhere: bool,
) -> list[AnyModule]:
    """Routes the decoder layers that have sites, and lists them."""
    routed = []
    for i, (layer, sites) in enumerate(zip(layers, by_layer, strict=True)):
        if everywhere or any(entry is not None for entry in sites):
            with errors_name(f"layer {i}"):
                swap(layer, architecture.layer, sites.residual, backend, LayerRouting(sites, everywhere))
            routed.append(layer)
    return routed


def _expected(model: nn.Module, outer: list[AnyModule]) -> tuple[tuple[str, Swapped], ...]:
    """The modules that routes must reach, by name; raises where there are none.

    Linear layers may be read instead of called, so those around them say whether routes arrived.
    """
    expected = tuple(
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, Swapped) and (module in outer or not isinstance(module, (Linear, LoRALinear)))
    )
    if not expected:
        raise ValueError("plan: got no sites in any layer, expected at least one")
    return expected


def _swap_outer(
    model: nn.Module, plan: RoutingPlan, architecture: Architecture, backend: str | None
) -> list[AnyModule]:
    """Routes what is outside of the decoder layers, and lists it."""
    outer: list[tuple[str, str | None, type[Swapped] | None, Sites | None]] = [
        ("embedding", architecture.embedding, architecture.embedding_mixin, plan.embedding),
        ("embedding", architecture.positions, PositionEmbedding, plan.embedding),
        ("final_norm", architecture.final_norm, architecture.layer.norm_mixin, plan.final_norm),
        ("lm_head", architecture.lm_head, None, plan.lm_head),
    ]
    swapped = []
    for entry, path, mixin, sites in outer:
        if path is None:
            continue
        module = submodule(model, path)
        if sites is None and not (entry == "lm_head" and _has_adapters(module, plan)):
            continue
        module = _trained_copy(module)
        if module is None:
            raise ValueError(
                f"RoutingPlan.{entry}: got sites, expected None: {type(model).__name__} has no {path}"
            )
        with errors_name(f"RoutingPlan.{entry}"):
            swap(module, linear_mixin(module) if mixin is None else mixin, sites, backend)
        swapped.append(module)
    return swapped


def _reaching_adapters(
    sites: LayerSites, layer: nn.Module, architecture: Architecture, plan: RoutingPlan
) -> LayerSites:
    """A layer's sites, empty ones where its attention or its MLP has nothing but adapters to hand routes to."""
    children = dict(layer.named_children())
    if sites.attention is None and _has_adapters(children.get(architecture.layer.attention_name), plan):
        sites = sites._replace(attention=AttentionSites())
    if sites.mlp is None and _has_adapters(children.get(architecture.layer.mlp_name), plan):
        sites = sites._replace(mlp=MLPSites())
    return sites


def _has_adapters(module: nn.Module | None, plan: RoutingPlan) -> bool:
    return module is not None and holds_adapters(module, plan.adapter_tables)


def _trained_copy(module: AnyModule) -> AnyModule:
    """The copy that PEFT's modules_to_save trains in a module's place, or the module itself."""
    copies = getattr(module, "modules_to_save", None)
    if not isinstance(copies, nn.ModuleDict):
        return module
    active = [name for name in module.active_adapters if name in copies]
    return copies[active[0]] if active else module.original_module


def _masks_attention(sites: LayerSites) -> bool:
    tables = {} if sites.attention is None else sites.attention.effective.tables
    return any(not name.startswith("update") for name in tables)


def _shape_of(model: nn.Module, layers: nn.ModuleList, architecture: Architecture) -> Shape:
    config = getattr(model, "config", None)
    known = hasattr(config, "num_attention_heads")
    shape = Shape.of(config) if known else architecture.layer.shape_of(layers)
    biases = architecture.layer.output_biases(layers[0])
    experts = architecture.layer.experts_of(layers)
    return shape._replace(layers=len(layers), added_units=added_units(model), **biases, **experts)


def _unswap_all(model: nn.Module) -> None:
    for module in list(model.modules()):
        unswap(module)


def _warn_of_ties(model: nn.Module, plan: RoutingPlan, architecture: Architecture) -> None:
    embedding, head = (submodule(model, path) for path in (architecture.embedding, architecture.lm_head))
    if head is None or getattr(head, "weight", None) is not getattr(embedding, "weight", None):
        return
    if (plan.embedding is None) != (plan.lm_head is None):
        routed, other = ("embedding", "lm_head") if plan.lm_head is None else ("lm_head", "embedding")
        warnings.warn(
            f"RoutingPlan.{routed} is given and {other} is not, but both are one tied parameter: every token still "
            f"updates it through {other}",
            RuntimeWarning,
            stacklevel=3,
        )
