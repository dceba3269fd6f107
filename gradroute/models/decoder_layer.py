"""Decoder layers of existing models, routed in place: they hand the routes to what is routed in them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from ..route_grad import route_grad, route_own
from ..routes import Routes
from ..sites import Sites
from .attention import Attention, AttentionRouting
from .calls import Call
from .linear import features
from .mlp import MLP
from .modules import AnyModule, Argument, call
from .moe import MoE
from .norm import Norm
from .plan import LayerSites, ResidualSites, Shape
from .swapped import Swapped, check_children, errors_name, swap


class LayerRouting(NamedTuple):
    """The routing of a DecoderLayer besides its own sites.

    Attributes:
        sites: the plan's sites of this layer and its submodules.
        everywhere: see AttentionRouting.
    """

    sites: LayerSites
    everywhere: bool


class DecoderLayer(Swapped):
    """Norm, attention, norm, MLP, each pair beside the residual stream: Llama, Mistral, Qwen, Phi-3, GPT-2, nanoGPT.

    Attributes:
        attention_name: the attention submodule.
        mlp_name: the MLP submodule.
        norm_names: the norms of width d_model, in the order of their calls.
        norm_mixin: what routes those norms.
        attention_mixin: what routes the attention.
        mlp_mixin: what routes the MLP.
        moe_mixin: what routes a mixture of experts in the place of the MLP, where the architecture has some.
        dropout_names: the submodules that drop out of the outputs of attention and of the MLP, where those do not
            themselves.
        positional: the arguments that may come without their names, after the hidden states.
    """

    sites_type = ResidualSites
    attention_name: ClassVar[str] = "self_attn"
    mlp_name: ClassVar[str] = "mlp"
    norm_names: ClassVar[tuple[str, ...]] = ("input_layernorm", "post_attention_layernorm")
    dropout_names: ClassVar[tuple[str | None, str | None]] = (None, None)
    positional: ClassVar[tuple[str, ...]] = ()
    norm_mixin: ClassVar[type[Norm]]
    attention_mixin: ClassVar[type[Attention]]
    mlp_mixin: ClassVar[type[MLP]]
    moe_mixin: ClassVar[type[MoE] | None] = None
    _routing: LayerRouting

    @classmethod
    def check_module(cls, module: nn.Module) -> None:
        check_children(module, (cls.attention_name, cls.mlp_name, *cls.norms_of(module)))

    @classmethod
    def norms_of(cls, layer: nn.Module) -> tuple[str, ...]:
        """The names of the norms of width d_model that a layer has, in the order of their calls."""
        return cls.norm_names

    def swap_children(self) -> None:
        sites, everywhere = self._routing
        if self._attention_is_routed():
            routing = AttentionRouting(sites.qk_norm, everywhere)
            self._swap("attention", self._attention(), self.attention_mixin, sites.attention, routing)
        mlp = getattr(self, self.mlp_name)
        if sites.mlp is not None:
            self._refuse_experts(mlp)
            self._swap("mlp", mlp, self.mlp_mixin, sites.mlp)
        if sites.moe is not None:
            self._swap("moe", mlp, self._experts_mixin(mlp), sites.moe)
        if sites.norm is not None:
            for name in self.norms_of(self):
                self._swap("norm", getattr(self, name), self.norm_mixin, sites.norm)

    @classmethod
    def has_experts(cls, layer: nn.Module) -> bool:
        """Whether a layer's MLP is a mixture of experts."""
        mlp = getattr(layer, cls.mlp_name, None)
        return mlp is not None and cls.moe_mixin is not None and cls.moe_mixin.has_experts(mlp)

    def _refuse_experts(self, mlp: nn.Module) -> None:
        if self.has_experts(self):
            raise TypeError(
                f"RoutingPlan.mlp: got MLPSites for a {type(mlp).__name__}, which is a mixture of experts, expected "
                "None there, and MoESites in RoutingPlan.moe"
            )

    def _experts_mixin(self, mlp: nn.Module) -> type[MoE]:
        if self.moe_mixin is None or not self.has_experts(self):
            raise TypeError(
                f"RoutingPlan.moe: got MoESites for a {type(mlp).__name__}, which has no experts, expected None there, "
                "and MLPSites in RoutingPlan.mlp"
            )
        return self.moe_mixin

    def _swap(
        self,
        entry: str,
        module: nn.Module,
        mixin: type[Swapped],
        sites: Sites | None,
        routing: AttentionRouting | None = None,
    ) -> None:
        with errors_name(f"RoutingPlan.{entry}"):
            swap(module, mixin, sites, self.backend, routing)

    @classmethod
    def shape_of(cls, layers: nn.ModuleList) -> Shape:
        """The widths of a model's layers, where no configuration says them."""
        attention, mlp = cls.attention_of(layers[0]), getattr(layers[0], cls.mlp_name)
        d_model, d_ff = features(getattr(mlp, cls.mlp_mixin.names[-1]))
        return Shape(len(layers), d_model, d_ff, *cls.attention_mixin.heads_of(attention))

    @classmethod
    def output_biases(cls, layer: nn.Module) -> dict[str, Any]:
        """Whether the output projections of attention and of the MLP have a bias, for a Shape."""
        attention, mlp = cls.attention_of(layer), getattr(layer, cls.mlp_name, None)
        outputs = (
            getattr(attention, cls.attention_mixin.names[-1], None),
            getattr(mlp, cls.mlp_mixin.names[-1], None),
        )
        has_bias = (getattr(output, "bias", None) is not None for output in outputs)
        return dict(zip(("attention_output_bias", "mlp_output_bias"), has_bias, strict=True))

    @classmethod
    def experts_of(cls, layers: nn.ModuleList) -> dict[str, Any]:
        """What a model's layers say of experts, for a Shape."""
        indices = tuple(i for i, layer in enumerate(layers) if cls.has_experts(layer))
        if cls.moe_mixin is None or not indices:
            return {"experts": 0, "d_expert": 0, "experts_per_token": 0, "expert_layers": ()}
        extents = cls.moe_mixin.extents_of(getattr(layers[indices[0]], cls.mlp_name))
        return {
            "experts": extents.count,
            "d_expert": extents.units,
            "experts_per_token": extents.chosen,
            "expert_layers": indices,
            "expert_output_bias": extents.has_output_bias,
        }

    @classmethod
    def attention_of(cls, layer: nn.Module) -> AnyModule:
        """The attention module of a decoder layer, routed or not; None where there is none."""
        return getattr(layer, cls.attention_name, None)

    def _attention(self) -> nn.Module:
        return self.attention_of(self)

    def _attention_is_routed(self) -> bool:
        sites, everywhere = self._routing
        return everywhere or sites.attention is not None or sites.qk_norm is not None

    def _widths(self) -> Mapping[str, int | str]:
        return {"d_model": getattr(self, self.norm_names[0]).weight.shape[0]}

    def forward(
        self, hidden_states: Tensor, *args: Argument, routes: Routes | None = None, **kwargs: Argument
    ) -> Argument:
        if routes is None:
            self._refuse_ids(kwargs)
            return super().forward(hidden_states, *args, **kwargs)
        kwargs.update(zip(self.positional, args, strict=False))
        x = self._masked("pre", hidden_states, routes)
        x, probabilities = self._body(x, routes, kwargs)
        return self._output(self._masked_sum("post", x, routes), probabilities)

    def _refuse_ids(self, kwargs: dict[str, Argument]) -> None:
        """Raises where ids came past the routed model, whose base model or another forward handed them on."""
        given = [name for name in ("route_ids", "route_strength") if kwargs.get(name) is not None]
        if given:
            raise TypeError(
                f"{type(self).__name__}: got {', '.join(given)}, expected routes: call the model that was routed, not "
                "its base model, and route it after its forward was replaced"
            )

    def _body(self, x: Tensor, routes: Routes, kwargs: dict[str, Argument]) -> tuple[Tensor, Tensor | None]:
        first, second = self.norms_of(self)
        attended, probabilities = self._attend(self._normed(first, x, routes), routes, kwargs)
        x = self._masked_sum("mid", x + self._dropped(0, attended), routes)
        return x + self._dropped(1, self._mlp(self._normed(second, x, routes), routes)), probabilities

    def _output(self, x: Tensor, probabilities: Tensor | None) -> Argument:
        return x

    def _masked(self, site: str, x: Tensor, routes: Routes) -> Tensor:
        table = None if self._sites is None else getattr(self._sites.effective, site)
        return x if table is None else route_grad(x, routes, table, backend=self.backend)

    def _masked_sum(self, site: str, x: Tensor, routes: Routes) -> Tensor:
        """The same of a sum that was just made: hooks may write to what they get, as to the ordinary layer's."""
        table = None if self._sites is None else getattr(self._sites.effective, site)
        return x if table is None else route_own(x, routes, table, self.backend)

    def _normed(self, name: str, x: Tensor, routes: Routes) -> Tensor:
        return call(getattr(self, name), x, routes, self._routing.sites.norm)

    def _mlp(self, x: Tensor, routes: Routes) -> Tensor:
        sites = self._routing.sites
        y: Argument = call(
            getattr(self, self.mlp_name), x, routes, sites.moe if sites.mlp is None else sites.mlp
        )
        return y[0] if isinstance(y, tuple) else y  # some mixtures give the router's weights too

    def _attend(self, x: Tensor, routes: Routes, kwargs: dict[str, Argument]) -> tuple[Tensor, Tensor | None]:
        if self._attention_is_routed():
            kwargs = kwargs | {"routes": routes}
        y = getattr(self, self.attention_name)(x, **kwargs)
        return y if isinstance(y, tuple) else (y, None)

    def _dropped(self, index: int, x: Tensor) -> Tensor:
        name = self.dropout_names[index]
        return x if name is None else getattr(self, name)(x)


class SandwichLayer(DecoderLayer):
    """A decoder layer with norms after attention and after the MLP too: Gemma 3."""

    norm_names = (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    )

    def _body(self, x: Tensor, routes: Routes, kwargs: dict[str, Argument]) -> tuple[Tensor, Tensor | None]:
        before_attention, after_attention, before_mlp, after_mlp = self.norm_names
        y, probabilities = self._attend(self._normed(before_attention, x, routes), routes, kwargs)
        x = self._masked_sum("mid", x + self._normed(after_attention, y, routes), routes)
        y = self._mlp(self._normed(before_mlp, x, routes), routes)
        return x + self._normed(after_mlp, y, routes), probabilities


class NeoXLayer(DecoderLayer):
    """A decoder layer of attention and MLP beside each other, or one after the other: GPT-NeoX, Pythia."""

    attention_name = "attention"
    dropout_names = ("post_attention_dropout", "post_mlp_dropout")
    use_parallel_residual: bool

    def _widths(self) -> Mapping[str, int | str]:
        widths = dict(super()._widths())
        if self.use_parallel_residual:
            widths["mid"] = "attention and MLP are computed in parallel (use_parallel_residual)"
        return widths

    def _body(self, x: Tensor, routes: Routes, kwargs: dict[str, Argument]) -> tuple[Tensor, Tensor | None]:
        if not self.use_parallel_residual:
            return super()._body(x, routes, kwargs)
        first, second = self.norm_names
        attended, probabilities = self._attend(self._normed(first, x, routes), routes, kwargs)
        attended = self._dropped(0, attended)
        fed = self._dropped(1, self._mlp(self._normed(second, x, routes), routes))
        return fed + attended + x, probabilities


class NeoLayer(DecoderLayer):
    """The decoder layer of GPT-Neo: a module stands around attention, and the probabilities are returned too."""

    def _take_routes(self, call: Call | None, kwargs: dict[str, Argument]) -> None:
        super()._take_routes(call, kwargs)
        if call is not None and call.documents is not None:
            kwargs["cu_seq_lens_q"] = call.documents

    @classmethod
    def attention_of(cls, layer: nn.Module) -> AnyModule:
        return getattr(super().attention_of(layer), "attention", None)

    def _attend(self, x: Tensor, routes: Routes, kwargs: dict[str, Argument]) -> tuple[Tensor, Tensor | None]:
        if not self._attention_is_routed():
            return super()._attend(x, routes, kwargs)
        return self._attention()(x, routes=routes, **kwargs)

    def _output(self, x: Tensor, probabilities: Tensor | None) -> Argument:
        return x, probabilities
