"""Attention of existing models, routed in place, and the function "gradroute" of transformers' AttentionInterface."""

from __future__ import annotations

import importlib
import sys
from itertools import repeat
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..attention import AttentionSites, routed_attention
from ..layers.projections import ProjectionSites, check_sites
from ..linear import LinearSites
from ..norm import NormSites
from ..routes import Routes
from ..sites import given
from ..tables import Table, concatenate
from .mlp import features
from .modules import (
    GemmaNorm,
    LlamaNorm,
    Norm,
    call_linear,
    call_linears,
    is_fusible,
    scale_columns,
    scale_rows,
    swap_linear,
)
from .swapped import Swapped, check_children, swap

#: What the function is called in transformers' AttentionInterface and AttentionMaskInterface.
NAME = "gradroute"


def attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    routes: Routes | None = None,
    sites: AttentionSites | None = None,
    cu_seq_lens_q: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`gradroute.routed_attention` as transformers calls attention functions; without routes, its "sdpa".

    Args:
        module: the attention module.
        query: `[B, H, S, D]`.
        key: `[B, G, S, D]`.
        value: `[B, G, S, D]`.
        attention_mask: with routes `[B, 1, 1, S]` bool, False where a key is padding, or of one element: no padding.
        dropout: of the probabilities.
        scaling: of the scores.
        sliding_window: a key is visible only if i - j < sliding_window.
        routes: the batch's routes.
        sites: where attention masks.
        cu_seq_lens_q: `[documents + 1]` int32 over the flattened batch: attention stays inside documents.
        is_causal: default: the module's.
        kwargs: as "sdpa" takes them; with routes those that change attention are refused.

    Returns:
        `[B, S, H, D]`, and None for the probabilities.

    Raises:
        ValueError: with routes, an arbitrary mask, soft-capping or attention sinks.
    """
    if routes is None:
        return _sdpa()(
            module,
            query,
            key,
            value,
            attention_mask,
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **kwargs,
        )
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise ValueError(f"{name}: got a value, expected None: routed attention has no {name}")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    key_mask = key_mask_of(attention_mask, query, key)
    batch, _, tokens, _ = query.shape
    if cu_seq_lens_q is not None and batch > 1:  # rows become one: documents end where rows do
        query, key, value = (t.transpose(0, 1).flatten(1, 2)[None] for t in (query, key, value))
        key_mask = None if key_mask is None else key_mask.reshape(1, -1)
        routes = routes.reshape(1, -1)
    z = routed_attention(
        query,
        key,
        value,
        routes,
        sites,
        causal,
        sliding_window,
        scaling,
        cu_seq_lens_q,
        key_mask,
        dropout,
        backend=getattr(module, "backend", None),
    )
    return z.transpose(1, 2).unflatten(1, (-1, tokens)).flatten(0, 1), None


def key_mask_of(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:  # [B, S] bool
    """Which keys a mask made by `structured_mask` lets be seen; None: all."""
    if mask is None or mask.numel() == 1:
        return None
    if mask.dtype != torch.bool or mask.shape != (query.shape[0], 1, 1, key.shape[2]):
        raise ValueError(
            f"attention_mask: got {mask.dtype} {list(mask.shape)}, expected a padding mask [B, S]: routed attention "
            "has no arbitrary masks"
        )
    return mask[:, 0, 0]


def structured_mask(attention_mask: Tensor | None, tokens: tuple[int, ...], device: torch.device) -> Tensor:
    """A padding mask `[B, S]` as `[B, 1, 1, S]` bool, or one True where nothing is padding.

    Models of transformers hand a mask of four dimensions on as it is. So none of `[B, 1, S, S]` is made.

    Raises:
        ValueError: a mask that is not one of padding.
    """
    if attention_mask is None:
        return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)
    if not isinstance(attention_mask, Tensor) or tuple(attention_mask.shape) != tokens:
        shape = list(getattr(attention_mask, "shape", ())) or type(attention_mask).__name__
        raise ValueError(
            f"attention_mask: got {shape}, expected a padding mask {list(tokens)}: routed attention has no arbitrary "
            "masks"
        )
    visible = attention_mask.to(device=device, dtype=torch.bool)
    if not torch.compiler.is_compiling() and bool(visible.all()):
        return structured_mask(None, tokens, device)
    return visible[:, None, None, :]


def document_bounds(position_ids: Tensor, tokens: tuple[int, ...]) -> Tensor | None:  # [documents + 1] int32
    """Where documents begin and end in the flattened batch, if positions say that rows hold several; else None."""
    if torch.compiler.is_compiling():
        raise ValueError(
            "position_ids: got positions under torch.compile, where documents cannot be counted; give their bounds as "
            "cu_seq_lens_q, as RouteCollator(packed=True) does, or no position_ids"
        )
    positions = position_ids.expand(tokens)
    begins = torch.ones_like(positions, dtype=torch.bool)
    begins[:, 1:] = positions.diff(dim=-1) != 1
    if int(begins.sum()) == tokens[0]:
        return None
    bounds = begins.flatten().nonzero().flatten()
    return torch.cat((bounds, bounds.new_tensor([positions.numel()]))).to(torch.int32)


def register() -> None:
    """Makes "gradroute" an attention implementation of transformers, if that was imported.

    Its mask function is that of "sdpa": a function without one would be given no padding mask at all.
    """
    if "transformers" in sys.modules:
        transformers = importlib.import_module("transformers")
        masking = importlib.import_module("transformers.masking_utils")
        transformers.AttentionInterface.register(NAME, attention_forward)
        transformers.AttentionMaskInterface.register(NAME, masking.sdpa_mask)


def _sdpa() -> Any:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward


class Attention(Swapped):
    """Self-attention between linear layers. With routes it has no cache: those are for inference.

    What its `_routing` says: `norm`, the sites of the query's and the key's norm; `everywhere`, whether attention
    masks in any layer of the model, which then all run on `gradroute.routed_attention`.

    Attributes:
        names: the linear submodules that make q, k and v, then that of the output.
        dropout_name: the submodule that drops out of the output, where there is one.
        has_free_heads: whether the model's configuration says how many heads there are whatever d_model is.
    """

    sites_type = AttentionSites
    has_free_heads: ClassVar[bool] = True
    names: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    dropout_name: str | None = None

    @classmethod
    def check_module(cls, module: nn.Module) -> None:
        check_children(module, cls.names)

    def swap_children(self) -> None:
        for name, sites in zip(self.names, self._linear_sites(), strict=True):
            swap_linear(getattr(self, name), sites, self.backend)
        for name in ("q_norm", "k_norm"):
            if self._norm_sites() is not None:
                kind = self._norm_kind(name)
                swap(getattr(self, name), kind, self._norm_sites(), self.backend)

    @classmethod
    def heads_of(cls, module: Any) -> tuple[int, int, int]:
        """H, G and D of an attention module that this kind routes, whether it does already or not."""
        head_dim = module.head_dim
        outputs = [features(getattr(module, name))[0] for name in cls.names[:2]]
        return outputs[0] // head_dim, outputs[1] // head_dim, head_dim

    @classmethod
    def size_of(cls, module: Any) -> tuple[int, int]:
        """The number of query heads, and how many of them share a key and value head."""
        heads, kv_heads, _ = cls.heads_of(module)
        return heads, heads // kv_heads

    @classmethod
    def features_of(cls, module: Any, chosen: Tensor) -> tuple[list[Tensor], Tensor]:
        """Of chosen query heads, bool `[n]` of n in all, the rows of the layers before and the columns of the last.

        Rows of k and v are among them where all query heads that share them are.
        """
        heads, kv_heads, head_dim = cls.heads_of(module)
        q, kv = head_features(chosen, heads // kv_heads, head_dim)
        rows = cls._lay_out_rows(q, kv, head_dim)
        return [mask.nonzero().flatten() for mask in rows], q.nonzero().flatten()

    @classmethod
    def _lay_out_rows(cls, q: Tensor, kv: Tensor, head_dim: int) -> list[Tensor]:
        """Of every layer before attention its rows, from those of q and those of k and v."""
        return [q, kv, kv]

    def _heads(self) -> tuple[int, int, int]:
        return self.heads_of(self)

    def _linear_sites(self) -> tuple[LinearSites | None, ...]:
        """Of each of the submodules `names`."""
        return self._op_sites[:-1] or (None,) * len(self.names)

    def _attention_sites(self) -> AttentionSites:
        """Of attention itself."""
        return (self._op_sites and self._op_sites[-1]) or _NO_SITES

    def _norm_sites(self) -> NormSites | None:
        return self._routing["norm"]

    def _norm_kind(self, name: str) -> type[Norm]:
        norm = getattr(self, name, None)
        if norm is None:
            raise TypeError(f"got a {type(self).__name__} without {name}, expected qk_norm to be None")
        return LlamaNorm if hasattr(norm, "variance_epsilon") else GemmaNorm

    def _sites_of_ops(self, sites: AttentionSites) -> tuple[Any, ...]:
        heads, kv_heads, head_dim = self._heads()
        output = getattr(self, self.names[-1])
        bias = f"{self.names[-1]} has no bias" if output.bias is None else features(output)[0]
        check_sites(sites, heads, kv_heads, bias)
        projections = ProjectionSites.of(sites, head_dim)
        return (*self._by_linear(projections), projections.attention)

    def _by_linear(self, projections: ProjectionSites) -> tuple[LinearSites | None, ...]:
        """The sites of each of the submodules `names`."""
        return projections.query, projections.key_value, projections.key_value, projections.output

    def forward(self, hidden_states: Tensor, *args: Any, routes: Routes | None = None, **kwargs: Any) -> Any:
        if routes is None:
            return super().forward(hidden_states, *args, **kwargs)
        assert not args, "decoder layers name every further argument"
        q, k, v = self._project(hidden_states, routes)  # each [B, heads, S, D]
        if kwargs.get("position_embeddings") is not None:
            q, k = self._rotate(q, k, *kwargs.pop("position_embeddings"))
        z, probabilities = self._attend(q, k, v, routes, **kwargs)  # [B, S, H, D]
        z = z.reshape(*hidden_states.shape[:-1], -1).contiguous()
        y = call_linear(getattr(self, self.names[-1]), z, routes, self._linear_sites()[-1])
        if self.dropout_name is not None:
            y = getattr(self, self.dropout_name)(y)
        return y, probabilities

    def _project(self, x: Tensor, routes: Routes) -> tuple[Tensor, ...]:
        head_dim = self._heads()[2]
        linears = [getattr(self, name) for name in self.names[:-1]]
        if all(map(is_fusible, linears)) and not torch.compiler.is_compiling():
            outputs = call_linears(linears, x, routes, self.backend)
        else:
            outputs = tuple(map(call_linear, linears, repeat(x), repeat(routes), self._linear_sites()))
        q, k, v = (y.unflatten(-1, (-1, head_dim)) for y in outputs)  # each [B, S, heads, D]
        q, k = self._norm("q_norm", q, routes), self._norm("k_norm", k, routes)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def _norm(self, name: str, x: Tensor, routes: Routes) -> Tensor:
        norm = getattr(self, name, None)
        if norm is None:
            return x
        return norm(x) if self._norm_sites() is None else norm(x, routes=routes)

    def _rotate(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """RoPE, by the function of the module that defines the model."""
        return _module_of(self).apply_rotary_pos_emb(q, k, cos, sin)

    def forward_table(self) -> Table | None:
        """What tokens of each route see of the heads; None: all."""
        return self._attention_sites().effective.forward_heads

    def scale_features(self, weights: Tensor) -> None:
        """Scales the heads by `weights` `[H]` or `[1]`.

        Of heads of weight 0 it zeroes q too, and k and v where no head of the group has another weight.
        """
        heads, kv_heads, head_dim = self._heads()
        weights = weights.expand(heads)
        seen = (weights != 0).float()
        seen_kv = seen.view(kv_heads, -1).amax(dim=1)
        wide = ProjectionSites.of(
            AttentionSites(update_q=seen[None], update_kv=seen_kv[None], update_out=weights[None]), head_dim
        )
        for name, sites in zip(self.names, self._by_linear(wide), strict=True):
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
        **kwargs: Any,
    ) -> Any:
        """Attention with routes, or the model's own implementation where attention itself masks in no layer."""
        for name in ("past_key_values", "layer_past"):
            assert kwargs.pop(name, None) is None, "the model refuses a cache beside routes"
        options: dict[str, Any] = {
            "dropout": self._dropout() if self.training else 0.0,
            "scaling": self._scaling(),
        }
        window = self._window()
        if window is not None:
            # Where the configuration makes attention bidirectional, transformers' window is one token wider.
            options["sliding_window"] = window + (not getattr(self.config, "is_causal", True))
        if self._routing["everywhere"]:
            function, kwargs = (
                attention_forward,
                kwargs
                | {
                    "routes": routes,
                    "sites": self._attention_sites(),
                },
            )
        else:
            function = self._own_attention()
        return function(self, q, k, v, attention_mask, **options, **kwargs)

    def _own_attention(self) -> Any:
        module = _module_of(self)
        functions = module.ALL_ATTENTION_FUNCTIONS
        return functions.get_interface(self.config._attn_implementation, module.eager_attention_forward)

    def _scaling(self) -> float:
        return self.scaling

    def _dropout(self) -> float:
        return self.attention_dropout

    def _window(self) -> int | None:
        return getattr(self, "sliding_window", None)


_NO_SITES = AttentionSites()


def _module_of(module: Swapped) -> Any:
    """The Python module that defines a model, with its rotary embedding and its eager attention."""
    return sys.modules[module.original.__module__]


class ConfiguredWindowAttention(Attention):
    """That of Mistral, whose window stands in the configuration alone."""

    def _window(self) -> int | None:
        return getattr(self.config, "sliding_window", None)


class FusedAttention(ConfiguredWindowAttention):
    """That of Phi-3: one linear layer makes q, k and v, one after the other."""

    names = ("qkv_proj", "o_proj")

    @classmethod
    def heads_of(cls, module: Any) -> tuple[int, int, int]:
        config = module.config
        return config.num_attention_heads, config.num_key_value_heads, module.head_dim

    def _splits(self) -> list[int]:
        heads, kv_heads, head_dim = self._heads()
        return [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim]

    def _by_linear(self, projections: ProjectionSites) -> tuple[LinearSites | None, ...]:
        parts = [
            None if sites is None else sites.tables["update_rows"]
            for sites in (projections.query, projections.key_value, projections.key_value)
        ]
        return given(LinearSites, update_rows=self._rows(parts)), projections.output

    def _rows(self, parts: list[Table | None]) -> Table | None:
        """The tables of q, k and v for the rows of the one linear layer."""
        table = concatenate(parts, self._splits())
        return None if table is None else Table(self._lay_out(table.weights, self._heads()[2]))

    @classmethod
    def _lay_out(cls, features: Tensor, head_dim: int) -> Tensor:
        """Features `[..., q + k + v]` in the order of the one linear layer's rows."""
        return features

    @classmethod
    def _lay_out_rows(cls, q: Tensor, kv: Tensor, head_dim: int) -> list[Tensor]:
        return [cls._lay_out(torch.cat((q, kv, kv)), head_dim)]

    def _project(self, x: Tensor, routes: Routes) -> tuple[Tensor, ...]:
        qkv = call_linear(getattr(self, self.names[0]), x, routes, self._linear_sites()[0])
        head_dim = self._heads()[2]
        return tuple(
            part.unflatten(-1, (-1, head_dim)).transpose(1, 2) for part in qkv.split(self._splits(), dim=-1)
        )


class GPT2Attention(FusedAttention):
    """That of GPT-2."""

    has_free_heads = False
    names = ("c_attn", "c_proj")
    dropout_name = "resid_dropout"

    @classmethod
    def heads_of(cls, module: Any) -> tuple[int, int, int]:
        return module.num_heads, module.num_heads, module.head_dim

    def _dropout(self) -> float:
        return self.attn_dropout.p


class NanoGPTAttention(GPT2Attention):
    """That of nanoGPT: GPT-2's, with torch.nn.Linear, and nothing but the hidden states comes in and goes out."""

    @classmethod
    def heads_of(cls, module: Any) -> tuple[int, int, int]:
        return module.n_head, module.n_head, module.n_embd // module.n_head

    def forward(self, hidden_states: Tensor, *args: Any, routes: Routes | None = None, **kwargs: Any) -> Any:
        y = super().forward(hidden_states, *args, routes=routes, **kwargs)
        return y if routes is None else y[0]

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        routes: Routes,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        dropout = self.dropout if self.training else 0.0
        if self._routing["everywhere"]:
            sites = self._attention_sites()
            z = routed_attention(q, k, v, routes, sites, dropout=dropout, backend=self.backend)
        else:
            z = nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return z.transpose(1, 2), None


class NeoXAttention(FusedAttention):
    """That of GPT-NeoX and Pythia: one linear layer makes q, k and v of the first head, of the second, and so on."""

    has_free_heads = False
    names = ("query_key_value", "dense")

    @classmethod
    def heads_of(cls, module: Any) -> tuple[int, int, int]:
        heads = module.config.num_attention_heads
        return heads, heads, module.head_size

    @classmethod
    def _lay_out(cls, features: Tensor, head_dim: int) -> Tensor:
        by_head = features.unflatten(-1, (3, -1, head_dim)).transpose(-3, -2)
        return by_head.flatten(-3)

    def _project(self, x: Tensor, routes: Routes) -> tuple[Tensor, ...]:
        qkv = call_linear(getattr(self, self.names[0]), x, routes, self._linear_sites()[0])
        return qkv.unflatten(-1, (-1, 3 * self.head_size)).transpose(1, 2).chunk(3, dim=-1)


class NeoAttention(Attention):
    """That of GPT-Neo: scores are not scaled; every other layer has a window."""

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
        **kwargs: Any,
    ) -> Any:
        if self._routing["everywhere"]:
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
    """Of chosen query heads, bool `[n]`, the features of q `[n * D]`, and of k and v `[n / group * D]`, as bools.

    A key and value head is chosen where all query heads of its group are.
    """
    of_groups = chosen.view(-1, group).all(dim=1)
    return chosen.repeat_interleave(head_dim), of_groups.repeat_interleave(head_dim)
