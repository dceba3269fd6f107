"""RoutingPlan: where a model masks, layer by layer, and the check of it against the model before anything changes."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

from ..arguments import is_int, shown
from ..attention import AttentionSites
from ..embedding import EmbeddingSites
from ..linear import LinearSites
from ..mlp import MLPSites
from ..norm import NormSites
from ..routes import check_num_routes
from ..sites import Site, Sites, site
from ..tables import Table
from .moe_sites import MoESites

# A configuration of transformers, of any class.
Configuration = Any


@dataclass(frozen=True, eq=False, repr=False)
class ResidualSites(Sites):
    """Where a decoder layer masks the residual stream. Each site is a table `[R, d_model]` or `[R, 1]`, or None.

    The gradient that passes the point is masked: what flows back along the stream, and so all that earlier layers
    learn from it (Cloud et al. 2024, arXiv 2410.04332, section 4.2.1).

    Attributes:
        pre: at the layer's input, before its first norm.
        mid: after attention was added, before the MLP. Layers that compute both in parallel have no such point.
        post: at the layer's output.
    """

    pre: Site = site("d_model")
    mid: Site = site("d_model")
    post: Site = site("d_model")


class Shape(NamedTuple):
    """The number of decoder layers of a model, and their widths, which functions of a plan may ask for.

    Attributes:
        layers: the number of decoder layers.
        d_model: width of the residual stream.
        d_ff: hidden units of the MLP.
        heads: H, query heads.
        kv_heads: G, key and value heads.
        head_dim: D, the width of a head.
        attention_output_bias: whether attention's output projection has a bias, where that is known.
        mlp_output_bias: whether the MLP's has one, where that is known.
        added_units: how many of the hidden units `gradroute.era.expand` added, where that is known.
        experts: E, the number of experts of a mixture; 0: there are none.
        d_expert: hidden units of each expert.
        experts_per_token: how many of them a token visits.
        expert_layers: the indices of the layers whose MLP is a mixture of experts.
        expert_output_bias: whether the experts' outputs have biases, where that is known.
    """

    layers: int
    d_model: int
    d_ff: int
    heads: int
    kv_heads: int
    head_dim: int
    attention_output_bias: bool = False
    mlp_output_bias: bool = False
    added_units: int | None = None
    experts: int = 0
    d_expert: int = 0
    experts_per_token: int = 0
    expert_layers: tuple[int, ...] = ()
    expert_output_bias: bool = False

    @classmethod
    def of(cls, config: Configuration) -> Shape:
        """The shape that a transformers configuration says (its text part, where it has several).

        Raises:
            TypeError: the configuration has no such numbers.
        """
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        try:
            d_model, heads = config.hidden_size, config.num_attention_heads
            d_ff = next(
                (n for n in (getattr(config, name, None) for name in ("intermediate_size", "n_inner")) if n),
                4 * d_model,  # GPT-2 and GPT-Neo leave it out
            )
            kv_heads = getattr(config, "num_key_value_heads", None) or heads
            head_dim = getattr(config, "head_dim", None) or d_model // heads
            layers = config.num_hidden_layers
            return cls(layers, d_model, d_ff, heads, kv_heads, head_dim, **_experts_of(config, layers, d_ff))
        except (AttributeError, TypeError) as error:
            raise TypeError(
                f"config: got a {type(config).__name__}, expected a transformers configuration: {error}"
            ) from None


def _experts_of(config: Configuration, layers: int, d_ff: int) -> dict[str, Any]:
    """What a configuration says of experts, as fields of a Shape."""
    names = ("num_local_experts", "num_experts")
    count = next((n for n in (getattr(config, name, None) for name in names) if n), 0)
    if not count:
        return {}
    dense, step = getattr(config, "mlp_only_layers", None) or (), getattr(config, "decoder_sparse_step", 1)
    first = getattr(config, "first_k_dense_replace", None) or 0
    return {
        "experts": count,
        "d_expert": getattr(config, "moe_intermediate_size", None) or d_ff,
        "experts_per_token": config.num_experts_per_tok,
        "expert_layers": tuple(i for i in range(first, layers) if i not in dense and (i + 1) % step == 0),
    }


# Sites of the layers: the same for all, by index, a list of all, or what a function makes of an index (and the Shape).
PerLayer = Sites | Mapping[int, Any] | Sequence[Any] | Callable[..., Any] | None


class LayerSites(NamedTuple):
    """A plan's sites of one decoder layer; None: nothing is routed there."""

    mlp: MLPSites | None
    attention: AttentionSites | None
    residual: ResidualSites | None
    norm: NormSites | None
    qk_norm: NormSites | None
    moe: MoESites | None = None


_PER_LAYER: dict[str, type[Sites]] = {
    "mlp": MLPSites,
    "attention": AttentionSites,
    "residual": ResidualSites,
    "norm": NormSites,
    "qk_norm": NormSites,
    "moe": MoESites,
}
_ONCE: dict[str, type[Sites]] = {
    "final_norm": NormSites,
    "embedding": EmbeddingSites,
    "lm_head": LinearSites,
}


@dataclass(frozen=True, eq=False)
class RoutingPlan:
    """The sites of a model that mask, with their tables: the second argument of `gradroute.models.route`.

    The first five, and `moe`, are per layer: one Sites for all layers, a dict {index: sites}, a sequence with one entry
    (or None) for each layer, or a function of the index, or of the index and the model's `Shape`, that returns one or
    None.

    Attributes:
        num_routes: R, the number of routes; every table has as many rows.
        mlp: MLPSites, `[R, d_ff]`.
        attention: AttentionSites, `[R, H]` and `[R, G]`.
        residual: ResidualSites, `[R, d_model]`.
        norm: NormSites of all norms of width d_model in a layer, `[R, d_model]`.
        qk_norm: NormSites of the query's and the key's norm (Qwen3, Gemma 3), `[R, head_dim]`.
        final_norm: NormSites of the norm after the last layer, `[R, d_model]`.
        embedding: EmbeddingSites of the token embedding and, where positions are learnt, of theirs.
        lm_head: LinearSites of the output head. Where it is tied to the embedding, both write to one parameter.
        adapters: by the name of a LoRA adapter the routes that may train it, such as `{"retain": [0], "forget": [1]}`;
            tokens of others leave no gradient in its A and B, and nothing else changes. See
            `gradroute.models.lora.LoRALinear`.
        moe: MoESites of the layers whose MLP is a mixture of experts; `mlp` is for the others.

    Raises:
        TypeError: an entry is not of the sites' type.
        ValueError: num_routes is not that of a table, a route is out of range, or nothing is routed at all.
    """

    num_routes: int
    mlp: PerLayer = None
    attention: PerLayer = None
    residual: PerLayer = None
    norm: PerLayer = None
    qk_norm: PerLayer = None
    final_norm: NormSites | None = None
    embedding: EmbeddingSites | None = None
    lm_head: LinearSites | None = None
    adapters: Mapping[str, Collection[int]] | None = None
    moe: PerLayer = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_routes", check_num_routes(self.num_routes))
        if all(getattr(self, field.name) is None for field in fields(self) if field.name != "num_routes"):
            raise ValueError(
                "RoutingPlan: got no sites, expected at least one of mlp, attention, residual, ..."
            )
        for name, expected in _ONCE.items():
            self._checked(name, getattr(self, name), expected)
        for name, expected in _PER_LAYER.items():
            self._check_entry(name, getattr(self, name), expected)
        _ = self.adapter_tables  # raises where they are not routes

    @functools.cached_property
    def adapter_tables(self) -> dict[str, Table]:
        """The table `[R, 1]` of an adapter by its name: 1 where the route may train it."""
        return _adapter_tables(self.adapters, self.num_routes)

    def resolved(self, shape: Shape) -> RoutingPlan:
        """The same plan with what its functions make of a model in their place, so that it can be pickled."""
        entries = {name: getattr(self, name) for name in _PER_LAYER}
        made: dict[str, Any] = {
            name: _entries(name, entry, shape) for name, entry in entries.items() if callable(entry)
        }
        return replace(self, **made)

    def layers(self, shape: Shape) -> tuple[LayerSites, ...]:
        """The sites of every decoder layer of a model.

        Raises:
            TypeError: an entry is not of the sites' type.
            ValueError: a layer that the model does not have; a sequence of another length; a table of other routes.
        """
        columns = {name: self._column(name, expected, shape) for name, expected in _PER_LAYER.items()}
        return tuple(
            LayerSites(**{name: column[i] for name, column in columns.items()}) for i in range(shape.layers)
        )

    def _column(self, name: str, expected: type[Sites], shape: Shape) -> list[Any]:
        """The sites of one entry of the plan, layer by layer."""
        entries = _entries(name, getattr(self, name), shape)
        return [self._checked(f"{name}, layer {i}", entry, expected) for i, entry in enumerate(entries)]

    def _check_entry(self, name: str, entry: Any, expected: type[Sites]) -> None:
        """Raises where an entry is wrong whatever the model is."""
        if entry is None or isinstance(entry, Sites):
            self._checked(name, entry, expected)
        elif isinstance(entry, Mapping):
            wrong = [i for i in entry if not is_int(i) or i < 0]
            if wrong:
                raise ValueError(f"RoutingPlan.{name}: got layers {wrong}, expected indices of 0 or more")
            for i, sites in entry.items():
                self._checked(f"{name}, layer {i}", sites, expected)
        elif isinstance(entry, Sequence) and not isinstance(entry, str):
            for i, sites in enumerate(entry):
                self._checked(f"{name}, layer {i}", sites, expected)
        elif isinstance(entry, type) or not callable(entry):
            raise TypeError(
                f"RoutingPlan.{name}: got {shown(entry)}, expected {expected.__name__}, or a dict, a sequence or a "
                "function that gives those of a layer"
            )

    def _checked(self, where: str, sites: object, expected: type[Sites]) -> Sites | None:
        if sites is None:
            return None
        if not isinstance(sites, expected):
            raise TypeError(f"RoutingPlan.{where}: got {shown(sites)}, expected {expected.__name__} or None")
        for name, table in sites.tables.items():
            if table.num_routes != self.num_routes:
                raise ValueError(
                    f"RoutingPlan.{where}: got {expected.__name__}.{name}, which has {table.num_routes} routes, "
                    f"expected num_routes = {self.num_routes}"
                )
        return sites


def _adapter_tables(adapters: object, num_routes: int) -> dict[str, Table]:
    if adapters is None:
        return {}
    if not isinstance(adapters, Mapping):
        raise TypeError(
            f"RoutingPlan.adapters: got a {type(adapters).__name__}, expected a dict {{adapter: routes}}"
        )
    tables = {}
    for name, routes in adapters.items():
        if not isinstance(name, str):
            raise TypeError(f"RoutingPlan.adapters: got {shown(name)}, expected names of adapters")
        if not isinstance(routes, Collection) or isinstance(routes, (str, Mapping)):
            raise TypeError(f"RoutingPlan.adapters[{name!r}]: got {routes!r}, expected a list of routes")
        wrong = [route for route in routes if not is_int(route) or route not in range(num_routes)]
        if wrong:
            raise ValueError(
                f"RoutingPlan.adapters[{name!r}]: got routes {wrong}, expected routes from 0 to {num_routes - 1}"
            )
        tables[name] = Table([[float(route in routes)] for route in range(num_routes)])
    return tables


def _entries(name: str, entries: PerLayer, shape: Shape) -> list[Any]:
    """An entry of the plan as a list of one entry a layer."""
    if entries is None or isinstance(entries, Sites):
        return [entries] * shape.layers
    if isinstance(entries, Mapping):
        unknown = [i for i in entries if i not in range(shape.layers)]
        if unknown:
            raise ValueError(
                f"RoutingPlan.{name}: got layers {unknown}, expected indices from 0 to {shape.layers - 1}"
            )
        return [entries.get(i) for i in range(shape.layers)]
    if callable(entries):
        return _called(f"RoutingPlan.{name}", entries, shape)
    if len(entries) != shape.layers:
        raise ValueError(
            f"RoutingPlan.{name}: got a sequence of {len(entries)}, expected one entry for each of the "
            f"{shape.layers} layers"
        )
    return list(entries)


def _called(name: str, function: Callable[..., Any], shape: Shape) -> list[Any]:
    """The results of a function of the index alone, or of the index and the model's shape, for every layer."""
    signature = inspect.signature(function)
    positional = [
        parameter
        for parameter in signature.parameters.values()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        and parameter.default is parameter.empty
    ]
    extra = (shape,) if len(positional) > 1 else ()
    try:
        signature.bind(0, *extra)
    except TypeError as error:
        raise TypeError(
            f"{name}: got a function of {signature}, expected one of the layer's index, or of that and the model's "
            f"Shape ({error})"
        ) from None
    return [function(i, *extra) for i in range(shape.layers)]
