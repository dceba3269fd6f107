"""Plans of the published uses of gradient routing."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from typing import Any, Literal, NamedTuple

from ..arguments import check_bool, check_choice, check_indices, check_int, check_number, is_int, shown
from ..attention import AttentionSites
from ..embedding import EmbeddingSites
from ..linear import LinearSites
from ..mlp import MLPSites
from ..norm import NormSites
from ..routes import MAX_ROUTES, check_num_routes
from ..tables import Features, Table, check_features, indices_of, localize
from .moe_sites import MoESites
from .plan import Configuration, ResidualSites, RoutingPlan, Shape


def sgtm(
    config: Configuration,
    forget_heads: int = 1,
    forget_units: int = 64,
    *,
    retain: int = 0,
    forget: int = 1,
    unlabelled: int | None = None,
    layers: Collection[int] | None = None,
    joint_down_projection: bool = False,
    joint_embedding: bool = True,
    joint_head: bool = True,
) -> RoutingPlan:
    """SGTM (Shilov et al. 2025, arXiv 2512.05648, section 3), with a label for each token instead of one a step.

    Each layer's last attention heads and last hidden units are the forget part. Forget tokens update nothing else in
    attention and MLPs (the biases of their outputs neither), with an ordinary forward and an ordinary gradient of
    activations; retain tokens do not see the forget part in forward, and so teach it nothing; unlabelled ones train
    everything. In a mixture of experts the forget part are the last units of every expert, and everybody trains the
    router. Embeddings, norms and the head are joint: everybody trains them. A key and value head that several
    query heads share belongs to the forget part only if all of them do. To take the knowledge out, zero the forget
    part (`ablate`).

    All this is true of documents of one label, kept apart in attention: a mask belongs to a position. In a document of
    mixed labels the loss of a forget token also arrives at the retain positions that it attends to, and trains there
    what retain tokens train (and the forget part's rows of k and v); the loss of a retain token trains the forget part
    of earlier layers at the forget positions that it attends to.

    Args:
        config: the model's transformers configuration, or a Shape.
        forget_heads: the number of query heads of the forget part, counted from the last; 0: none.
        forget_units: the number of hidden units of the forget part, counted from the last; 0: none.
        retain: the route of retain tokens.
        forget: the route of forget tokens.
        unlabelled: the route of tokens without a label, if there is one.
        layers: which layers have a forget part; default: all.
        joint_down_projection: everybody trains the MLP's output weight, the paper's variant.
        joint_embedding: False: forget tokens update neither the embeddings nor, in layers with a forget part, the norms
            of width d_model.
        joint_head: False: forget tokens do not update the output head, in which a small model keeps much.

    Returns:
        The plan, of as many routes as the largest one named needs.

    Raises:
        TypeError: no configuration; numbers, layers or flags of another kind.
        ValueError: routes that are not different, numbers of heads, units or layers that the model does not have.
    """
    shape = _shape_of(config)
    retain, forget = (check_route(name, route) for name, route in (("retain", retain), ("forget", forget)))
    unlabelled = None if unlabelled is None else check_route("unlabelled", unlabelled)
    named = [route for route in (retain, forget, unlabelled) if route is not None]
    if len(set(named)) < len(named):
        raise ValueError(f"retain, forget, unlabelled: got {named}, expected different routes")
    forget_heads = check_int("forget_heads", forget_heads, 0, shape.heads)
    forget_units = check_int("forget_units", forget_units, 0, shape.d_ff)
    if not forget_heads and not forget_units:
        raise ValueError("forget_heads, forget_units: got 0 and 0, expected a forget part")
    joint_down_projection = check_bool("joint_down_projection", joint_down_projection)
    joint_embedding = check_bool("joint_embedding", joint_embedding)
    joint_head = check_bool("joint_head", joint_head)
    routes = max(named) + 1
    tables = _ForgetTables.of(shape, forget_heads, forget_units, routes, retain, forget)
    chosen = layers_of(layers, shape.layers)

    def attention(index: int, shape: Shape) -> AttentionSites | None:
        return tables.attention(shape.attention_output_bias) if index in chosen else None

    def mlp(index: int, shape: Shape) -> MLPSites | None:
        if index not in chosen or index in shape.expert_layers:
            return None
        return tables.mlp(shape.mlp_output_bias, joint_down_projection)

    def moe(index: int, shape: Shape) -> MoESites | None:
        if index not in chosen or index not in shape.expert_layers:
            return None
        check_int("forget_units", forget_units, 0, shape.d_expert)
        of_experts = _ForgetTables.of(
            shape._replace(d_ff=shape.d_expert), forget_heads, forget_units, routes, retain, forget
        )
        return of_experts.moe(shape.expert_output_bias, joint_down_projection)

    norm = None if joint_embedding else dict.fromkeys(chosen, NormSites(tables.nothing))
    return RoutingPlan(
        routes,
        mlp=mlp,
        moe=moe,
        attention=attention,
        norm=norm,
        embedding=None if joint_embedding else EmbeddingSites(tables.nothing),
        lm_head=None if joint_head else LinearSites(update_rows=tables.nothing),
    )


class _ForgetTables(NamedTuple):
    """SGTM's tables: forget tokens update the last heads and hidden units alone, and retain tokens do not see those.

    Attributes:
        heads: `[R, H]`, the query heads that tokens update.
        kv_heads: `[R, G]`, the key and value heads that tokens update.
        units: `[R, d_ff]`, the hidden units that tokens update.
        seen_heads: `[R, H]`, the query heads that tokens see.
        seen_units: `[R, d_ff]`, the hidden units that tokens see.
        nothing: `[R, 1]`, 0 for forget tokens, for parameters that belong to no head and to no unit.
    """

    heads: Table
    kv_heads: Table
    units: Table
    seen_heads: Table
    seen_units: Table
    nothing: Table

    @classmethod
    def of(cls, shape: Shape, heads: int, units: int, routes: int, retain: int, forget: int) -> _ForgetTables:
        """The tables of a model whose last `heads` query heads and last `units` hidden units are the forget part."""
        kv_heads = heads // (shape.heads // shape.kv_heads)
        return cls(
            heads=_last(routes, shape.heads, heads, forget),
            kv_heads=_last(routes, shape.kv_heads, kv_heads, forget),
            units=_last(routes, shape.d_ff, units, forget),
            seen_heads=_last(routes, shape.heads, heads, retain, on=0.0, off=1.0),
            seen_units=_last(routes, shape.d_ff, units, retain, on=0.0, off=1.0),
            nothing=localize(routes, 1, {forget: slice(0)}),
        )

    def attention(self, has_output_bias: bool) -> AttentionSites:
        """The sites of one attention."""
        return AttentionSites(
            forward_heads=self.seen_heads,
            update_q=self.heads,
            update_kv=self.kv_heads,
            update_out=self.heads,
            update_output_bias=self.nothing if has_output_bias else None,
        )

    def moe(self, has_output_bias: bool, joint_down_projection: bool) -> MoESites:
        """The sites of one mixture of experts, of tables for the units of one expert."""
        return MoESites(**self.mlp(has_output_bias, joint_down_projection).tables)

    def mlp(self, has_output_bias: bool, joint_down_projection: bool) -> MLPSites:
        """The sites of one MLP."""
        return MLPSites(
            forward=self.seen_units,
            update_in=self.units,
            update_out=None if joint_down_projection else self.units,
            update_output_bias=self.nothing if has_output_bias and not joint_down_projection else None,
        )


def localize_mlp(
    layers: Collection[int],
    units: int | Features,
    *,
    route: int = 1,
    num_routes: int | None = None,
    on: float = 1.0,
    off: float = 0.0,
) -> RoutingPlan:
    """One route's tokens teach some units of some layers only (Cloud et al. 2024, arXiv 2410.04332, section 4.2.3).

    The gradient is masked at the hidden units, so that what is stopped there does not reach earlier layers through the
    MLP either. The output weights of all units learn from every token. The paper routes 20 words to the first 80 units
    of each of layers 0 to 7, and masks the positions that predict them: `RouteCollator(align="next_token")`. In a
    mixture of experts they are the same units of every expert; `localize_experts` confines tokens to whole experts.

    Args:
        layers: the layers' indices.
        units: how many, counted from the first (`sgtm` and `era` count theirs from the last); or which (a slice,
            indices or a boolean for each). `slice(-n, None)` are the last n, `[i]` is one.
        route: the route whose tokens are confined.
        num_routes: R; default: as many as `route` needs, at least two.
        on: the weight of the units.
        off: the weight of the others; negative numbers unlearn there.

    Returns:
        The plan. `route` raises ValueError where a model has no such layers or units.

    Raises:
        TypeError: layers, units or numbers of another kind.
        ValueError: none of them, negative layers, a route out of range, weights that are not finite.
    """
    routes = number_of_routes(route, num_routes)
    on, off = check_number("on", on), check_number("off", off)
    chosen = check_indices("layers", layers)
    count = check_int("units", units, 1) if is_int(units) else None
    which: Any = units if count is None else slice(count)
    check_features("units", which)

    def table(size: int) -> Table:
        if count is not None:
            check_int("units", count, 1, size)
        return localize(routes, size, {route: some_of(which, size, "units")}, on, off)

    def mlp(index: int, shape: Shape) -> MLPSites | None:
        layers_of(chosen, shape.layers)
        if index in shape.expert_layers:
            return None
        hidden = table(shape.d_ff)
        return MLPSites(hidden=hidden) if index in chosen else None

    def moe(index: int, shape: Shape) -> MoESites | None:
        is_routed = index in chosen and index in shape.expert_layers
        return MoESites(hidden=table(shape.d_expert)) if is_routed else None

    return RoutingPlan(routes, mlp=mlp, moe=moe)


def steering(
    layers: Collection[int],
    dim: int | Features = 0,
    *,
    route: int = 1,
    num_routes: int | None = None,
    off: float = 0.0,
) -> RoutingPlan:
    """A dimension of the residual stream that steers (Cloud et al. 2024, arXiv 2410.04332, section 4.2.1).

    At the outputs of these layers the gradient of one route's tokens flows through one dimension only; adding to that
    dimension afterwards steers the model toward what those tokens say. Masks are chosen by the token to be predicted:
    `RouteCollator(align="next_token")`.

    Args:
        layers: the layers' indices, 6 to 18 in the paper.
        dim: the index of the dimension, or indices of several.
        route: the route whose tokens are confined.
        num_routes: R; default: as many as `route` needs, at least two.
        off: the weight of the other dimensions.

    Returns:
        The plan. `route` raises ValueError where a model has no such layers or dimensions.

    Raises:
        TypeError: layers, dimensions or numbers of another kind.
        ValueError: none of them, negative layers, a route out of range, a weight that is not finite.
    """
    routes = number_of_routes(route, num_routes)
    off = check_number("off", off)
    chosen = check_indices("layers", layers)
    dims: Any = [dim] if is_int(dim) else dim
    check_features("dim", dims)

    def sites(index: int, shape: Shape) -> ResidualSites | None:
        layers_of(chosen, shape.layers)
        table = localize(routes, shape.d_model, {route: some_of(dims, shape.d_model, "dim")}, off=off)
        return ResidualSites(post=table) if index in chosen else None

    return RoutingPlan(routes, residual=sites)


def era(
    layers: Collection[int] | None = None,
    units: int = 64,
    *,
    route: int = 1,
    num_routes: int | None = None,
    off: float = 0.0,
    site: Literal["hidden", "update"] = "hidden",
) -> RoutingPlan:
    """Expand, Route, Ablate (Cloud et al. 2024, arXiv 2410.04332, section 4.2.2): the second of the three steps.

    `expand(model, units)` adds hidden units to every MLP; under this plan the gradient of one route's tokens passes, in
    the MLPs, through the added units alone; `contract(model, units)` takes them away again, and with them what those
    tokens taught there. Attention, embeddings and the output weights of the original units learn from the tokens too.

    Args:
        layers: the layers that are routed; default: all.
        units: the number of units that were added to each MLP, the last ones.
        route: the route whose tokens are confined to them.
        num_routes: R; default: as many as `route` needs, at least two.
        off: the weight of the original units; negative numbers unlearn there, the paper's negative learning rate.
        site: what the weights weigh: "hidden", the gradient of the hidden units, which then passes to what lies below
            as well, as in the paper; or "update", only what the units' input and output weights learn, while the
            whole gradient passes. Negative weights of many layers multiply one another in "hidden" alone.

    Returns:
        The plan. `route` raises ValueError where a model has no such layers or units, and warns (RuntimeWarning) where
        `gradroute.era.expand` did not add as many: original units are masked then.

    Raises:
        TypeError: layers, units or numbers of another kind.
        ValueError: none of them, negative layers, a route out of range, a weight that is not finite.
    """
    routes = number_of_routes(route, num_routes)
    off = check_number("off", off)
    units = check_int("units", units, 1)
    check_choice("site", site, ("hidden", "update"))
    chosen = None if layers is None else check_indices("layers", layers)

    def sites(index: int, shape: Shape) -> MLPSites | None:
        routed = layers_of(chosen, shape.layers)
        if index in routed and index in shape.expert_layers:
            raise ValueError(
                f"layers: got layer {index}, which is a mixture of experts, to which gradroute.era.expand adds "
                "nothing; expected layers with an MLP, or localize_experts, which confines tokens to experts"
            )
        check_int("units", units, 1, shape.d_ff)
        if index == routed[0]:
            _warn_of_original_units(units, shape)
        if index not in routed:
            return None
        added = list(range(shape.d_ff - units, shape.d_ff))
        return MLPSites(**{site: localize(routes, shape.d_ff, {route: added}, off=off)})

    return RoutingPlan(routes, mlp=sites)


def _warn_of_original_units(units: int, shape: Shape) -> None:
    if shape.added_units is not None and units > shape.added_units:
        warnings.warn(
            f"era: the plan takes the last {units} of {shape.d_ff} hidden units for added ones, and "
            f"gradroute.era.expand added {shape.added_units} to this model: original units become the forget part. "
            "Expand the model first; where units of a model from scratch are meant, "
            "localize_mlp(layers, slice(-units, None)) says so",
            RuntimeWarning,
            stacklevel=2,
        )


def check_route(name: str, route: int) -> int:
    """A route as an int; raises unless it is one that a plan may have."""
    return int(check_int(name, route, 0, MAX_ROUTES - 1))


def number_of_routes(route: int, num_routes: int | None) -> int:
    """The number of routes: as many as one route needs, where none is given."""
    check_route("route", route)
    number = max(2, int(route) + 1) if num_routes is None else check_num_routes(num_routes)
    if route >= number:
        raise ValueError(f"route: got {route}, expected 0 <= route < num_routes = {number}")
    return number


def _shape_of(config: Configuration) -> Shape:
    if not isinstance(config, Shape):
        return Shape.of(config)
    for name, value in config._asdict().items():
        if name.endswith("_output_bias"):
            check_bool(f"config.{name}", value)
        elif name == "expert_layers":
            if value != ():
                check_indices(f"config.{name}", value, config.layers)
        elif name in ("experts", "d_expert", "experts_per_token"):
            check_int(f"config.{name}", value, 0)
        else:
            check_int(
                f"config.{name}", value, 1 if name != "added_units" else 0, optional=name == "added_units"
            )
    if config.heads % config.kv_heads:
        raise ValueError(
            f"config.kv_heads: got {config.kv_heads}, expected a divisor of heads = {config.heads}"
        )
    return config


def some_of(chosen: Any, count: int, name: str) -> list[int]:
    """The indices of units or dimensions, at least one."""
    indices = indices_of(chosen, count, name)
    if not indices:
        raise ValueError(f"{name}: got {shown(chosen)}, which chooses none of {count}, expected at least one")
    return indices


def _last(routes: int, features: int, count: int, route: int, on: float = 1.0, off: float = 0.0) -> Table:
    """A table that confines one route to the last `count` features."""
    return localize(routes, features, {route: list(range(features - count, features))}, on, off)


def layers_of(layers: Collection[int] | None, count: int) -> tuple[int, ...]:
    """The indices of the chosen layers of a model with `count`; None chooses all."""
    return tuple(range(count)) if layers is None else check_indices("layers", layers, count)
