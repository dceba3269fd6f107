"""Attention of existing models, routed in place, where q, k and v come from linear layers of their own."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import repeat
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..attention import AttentionSites
from ..layers.projections import ProjectionSites, check_sites
from ..linear import LinearSites
from ..norm import NormSites
from ..routes import Routes
from ..tables import Table
from .attention_function import attention_forward
from .computed import is_known
from .linear import call_linear, call_linears, features, is_fusible, scale_columns, scale_rows
from .lora import swap_linear
from .modules import AnyModule, Argument, call
from .norm import Norm, rms_norm_mixin
from .swapped import Swapped, check_children, swap

_NO_SITES = AttentionSites()


class Heads(NamedTuple):
    """The numbers of heads of an attention module, and their width.

    Attributes:
        queries: H, the number of query heads.
        groups: G, the number of key and value heads.
        dim: D, the width of a head.
    """

    queries: int
    groups: int
    dim: int


class AttentionRouting(NamedTuple):
    """The routing of an Attention besides its sites.

    Attributes:
        norm: the sites of the query's and the key's norm.
        everywhere: whether attention masks in any layer of the model, which then all run on
            `gradroute.routed_attention`.
    """

    norm: NormSites | None
    everywhere: bool


class Attention(Swapped):
    """Self-attention between linear layers. With routes it keeps no cache: routes are for training.

    Attributes:
        names: the linear submodules that make q, k and v, then the output's.
        dropout_name: the submodule that drops out of the output, where there is one.
        has_free_heads: whether the model's configuration says how many heads there are whatever d_model is.
    """

    sites_type = AttentionSites
    has_free_heads: ClassVar[bool] = True
    names: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    dropout_name: str | None = None
    _routing: AttentionRouting

    @classmethod
    def check_module(cls, module: nn.Module) -> None:
        check_children(module, cls.names)

    def swap_children(self) -> None:
        if self._routing.everywhere:
            self._refuse_own_attention()
        for name, sites in zip(self.names, self._linear_sites(), strict=True):
            swap_linear(getattr(self, name), sites, self.backend)
        if self._routing.norm is not None:
            for name in ("q_norm", "k_norm"):
                mixin = self._norm_mixin(name)
                swap(getattr(self, name), mixin, self._routing.norm, self.backend)

    @classmethod
    def heads_of(cls, module: AnyModule) -> Heads:
        """The heads of an attention module that this mixin can route or has routed."""
        q_width, k_width = (features(getattr(module, name))[0] for name in cls.names[:2])
        return Heads(q_width // module.head_dim, k_width // module.head_dim, module.head_dim)

    @classmethod
    def size_of(cls, module: nn.Module) -> tuple[int, int]:
        """The number of query heads, and how many of them share a key and value head."""
        heads = cls.heads_of(module)
        return heads.queries, heads.queries // heads.groups

    @classmethod
    def features_of(cls, module: nn.Module, chosen: Tensor) -> tuple[list[Tensor], Tensor]:
        """The rows of the layers before attention and the columns of the layer after it that chosen heads have.

        Rows of k and v are among them where all query heads that share them are.

        Args:
            module: the attention.
            chosen: bool `[n]`, of n query heads in all.
        """
        heads = cls.heads_of(module)
        q, kv = head_features(chosen, heads.queries // heads.groups, heads.dim)
        rows = cls._lay_out_rows(q, kv, heads.dim)
        return [mask.nonzero().flatten() for mask in rows], q.nonzero().flatten()

    @classmethod
    def _lay_out_rows(cls, q: Tensor, kv: Tensor, head_dim: int) -> list[Tensor]:
        """Each input projection's rows, given q's and k/v's."""
        return [q, kv, kv]

    def _linear_sites(self) -> tuple[LinearSites | None, ...]:
        """The sites of each of the submodules `names`."""
        return self._op_sites[:-1] or (None,) * len(self.names)

    def _attention_sites(self) -> AttentionSites:
        """The sites of attention itself, without those of its projections."""
        return (self._op_sites and self._op_sites[-1]) or _NO_SITES

    def _norm_mixin(self, name: str) -> type[Norm]:
        norm = getattr(self, name, None)
        if norm is None:
            raise TypeError(f"got a {type(self).__name__} without {name}, expected qk_norm to be None")
        return rms_norm_mixin(norm)

    def _sites_of_ops(self, sites: AttentionSites) -> tuple[Any, ...]:
        heads = self.heads_of(self)
        output = getattr(self, self.names[-1])
        bias = f"{self.names[-1]} has no bias" if output.bias is None else features(output)[0]
        check_sites(sites, heads.queries, heads.groups, bias)
        projections = ProjectionSites.of(sites, heads.dim)
        return (*self._by_linear(projections), projections.attention)

    def _by_linear(self, projections: ProjectionSites) -> tuple[LinearSites | None, ...]:
        """The sites of each of the submodules `names`."""
        return projections.query, projections.key_value, projections.key_value, projections.output

    def forward(
        self, hidden_states: Tensor, *args: Argument, routes: Routes | None = None, **kwargs: Argument
    ) -> Argument:
        if routes is None:
            return super().forward(hidden_states, *args, **kwargs)
        assert not args, "decoder layers name every further argument"
        q, k, v = self._project(hidden_states, routes)  # each [B, heads, S, D]
        if kwargs.get("position_embeddings") is not None:
            q, k = self._rotate(q, k, *kwargs.pop("position_embeddings"))
        z, probabilities = self._attend(q, k, v, routes, **kwargs)  # [B, S, H, D]
        z = z.reshape(*hidden_states.shape[:-1], -1).contiguous()
        y = call_linear(getattr(self, self.names[-1]), z, routes, self._linear_sites()[-1], self.backend)
        if self.dropout_name is not None:
            y = getattr(self, self.dropout_name)(y)
        return y, probabilities

    def _project(self, x: Tensor, routes: Routes) -> tuple[Tensor, ...]:
        head_dim = self.heads_of(self).dim
        linears = [getattr(self, name) for name in self.names[:-1]]
        if all(map(is_fusible, linears)) and not torch.compiler.is_compiling():
            outputs = call_linears(linears, x, routes, self.backend)
        else:
            sites, backend = self._linear_sites(), repeat(self.backend)
            outputs = tuple(map(call_linear, linears, repeat(x), repeat(routes), sites, backend))
        return tuple(y.transpose(1, 2) for y in self._by_head(outputs, head_dim, routes))

    def _by_head(self, outputs: tuple[Tensor, ...], head_dim: int, routes: Routes) -> tuple[Tensor, ...]:
        """The linear layers' outputs as q, k and v, normed: each [B, S, heads, D]."""
        q, k, v = (y.unflatten(-1, (-1, head_dim)) for y in outputs)
        return self._normed("q_norm", q, routes), self._normed("k_norm", k, routes), v

    def _normed(self, name: str, x: Tensor, routes: Routes) -> Tensor:
        norm = getattr(self, name, None)
        return x if norm is None else call(norm, x, routes, self._routing.norm)

    def _rotate(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """RoPE, by the function of the module that defines the model."""
        return module_of(self).apply_rotary_pos_emb(q, k, cos, sin)

    def forward_table(self) -> Table | None:
        """The heads that tokens of each route see; None: all."""
        return self._attention_sites().effective.forward_heads

    def scale_features(self, weights: Tensor) -> None:
        """Scales the heads by `weights` `[H]` or `[1]`.

        A head of weight 0 loses its q too, and a group whose heads all have weight 0 its k and v.
        """
        heads = self.heads_of(self)
        weights = weights.expand(heads.queries)
        seen = (weights != 0).float()
        seen_kv = seen.view(heads.groups, -1).amax(dim=1)
        by_head = AttentionSites(update_q=seen[None], update_kv=seen_kv[None], update_out=weights[None])
        by_feature = ProjectionSites.of(by_head, heads.dim)
        for name, sites in zip(self.names, self._by_linear(by_feature), strict=True):
            assert sites is not None  # every linear layer has a part of the heads
            for site, table in sites.tables.items():
                scale = scale_rows if site == "update_rows" else scale_columns
                scale(getattr(self, name), table.weights[0])

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        routes: Routes,
        attention_mask: Tensor | None = None,
        **kwargs: Argument,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention with routes, or the model's own implementation where attention itself masks in no layer."""
        for name in ("past_key_values", "layer_past"):
            assert kwargs.pop(name, None) is None, "the model refuses a cache beside routes"
        function: Callable[..., tuple[Tensor, Tensor | None]] = attention_forward
        if self._routing.everywhere:
            if not torch.compiler.is_compiling():
                self._refuse_own_attention()
            kwargs = kwargs | {"routes": routes, "sites": self._attention_sites()}
        else:
            function = self._own_attention()
        return function(self, q, k, v, attention_mask, **self._options(), **kwargs)

    def _options(self) -> dict[str, Argument]:
        """The arguments of transformers' attention functions that are no tensors."""
        options = {"dropout": self._dropout() if self.training else 0.0, "scaling": self._scaling()}
        window = self._window()
        if window is not None:
            # Where the configuration makes attention bidirectional, transformers' window is one token wider.
            options["sliding_window"] = window + (not getattr(self.config, "is_causal", True))
        return options

    def _own_attention(self) -> Callable[..., tuple[Tensor, Tensor | None]]:
        module = module_of(self)
        functions = module.ALL_ATTENTION_FUNCTIONS
        return functions.get_interface(self.config._attn_implementation, module.eager_attention_forward)

    def _refuse_own_attention(self) -> None:
        """Raises where the model has an attention of somebody else, in whose place gradroute's would stand."""
        if not hasattr(module_of(self), "ALL_ATTENTION_FUNCTIONS"):
            return
        function = self._own_attention()
        if not is_known(function, self.original.__module__.partition(".")[0]):
            raise ValueError(
                f"attn_implementation: got {self.config._attn_implementation!r}, which is "
                f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', function)}, beside a plan "
                "that masks attention itself, expected one of transformers' own: routed attention would stand in its "
                "place"
            )

    def _scaling(self) -> float:
        return self.scaling

    def _dropout(self) -> float:
        return self.attention_dropout

    def _window(self) -> int | None:
        return getattr(self, "sliding_window", None)


def module_of(module: Swapped) -> Argument:
    """The Python module that defines a model, with its rotary embedding and its eager attention."""
    return sys.modules[module.original.__module__]


class ConfiguredWindowAttention(Attention):
    """The attention of Mistral, whose window stands in the configuration alone."""

    def _window(self) -> int | None:
        return getattr(self.config, "sliding_window", None)


class WideNormAttention(ConfiguredWindowAttention):
    """The attention of OLMo 2, OLMo 3 and OLMoE: q and k are normalised over all heads together, then clipped."""

    def _by_head(self, outputs: tuple[Tensor, ...], head_dim: int, routes: Routes) -> tuple[Tensor, ...]:
        q, k, v = outputs  # each [B, S, heads * D]
        whole = [self._normed("q_norm", q, routes), self._normed("k_norm", k, routes), v]
        limit = getattr(self.config, "clip_qkv", None)
        if limit is not None:
            whole = [x.clamp(min=-limit, max=limit) for x in whole]
        return tuple(x.unflatten(-1, (-1, head_dim)) for x in whole)


class SinkAttention(Attention):
    """The attention of gpt-oss, whose heads have sinks: routed attention has none, so its own attention stays."""

    def swap_children(self) -> None:
        if self._routing.everywhere:
            raise TypeError(
                f"got a {type(self).__name__} with attention sinks, which routed attention does not have, expected a "
                "plan that masks no attention itself: update sites alone (update_q, update_kv, update_out)"
            )
        super().swap_children()

    def _options(self) -> dict[str, Argument]:
        return super()._options() | {"s_aux": self.sinks}


class NeoAttention(Attention):
    """The attention of GPT-Neo: scores are not scaled; every other layer has a window."""

    has_free_heads = False
    names = ("q_proj", "k_proj", "v_proj", "out_proj")
    dropout_name = "resid_dropout"

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        routes: Routes,
        attention_mask: Tensor | None = None,
        **kwargs: Argument,
    ) -> tuple[Tensor, Tensor | None]:
        if self._routing.everywhere:
            return super()._attend(q, k, v, routes, attention_mask, **kwargs)
        z, probabilities = self._attn(q, k, v, attention_mask)
        return z.transpose(1, 2), probabilities

    def _scaling(self) -> float:
        return 1.0

    def _dropout(self) -> float:
        return self.attn_dropout.p

    def _window(self) -> int | None:
        return self.config.window_size if self.attention_type == "local" else None


def head_features(chosen: Tensor, group: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """The features of q `[n * D]`, and those of k and v `[n / group * D]`, that chosen heads have, as bools.

    A key and value head is chosen where all query heads of its group are.

    Args:
        chosen: bool `[n]`, of n query heads in all.
        group: how many query heads share a key and value head.
        head_dim: D, the width of a head.
    """
    chosen_groups = chosen.view(-1, group).all(dim=1)
    return chosen.repeat_interleave(head_dim), chosen_groups.repeat_interleave(head_dim)
