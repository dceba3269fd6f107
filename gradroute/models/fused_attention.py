"""Attention of existing models whose q, k and v come from one linear layer, routed in place."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..arguments import ordinary_tensors
from ..attention import routed_attention
from ..layers.projections import ProjectionSites
from ..linear import LinearSites
from ..routes import Routes
from ..sites import given
from ..tables import Table, concatenate
from .attention import ConfiguredWindowAttention, Heads
from .linear import call_linear
from .modules import AnyModule, Argument


class FusedAttention(ConfiguredWindowAttention):
    """The attention of Phi-3: one linear layer makes q, k and v, one after the other."""

    names = ("qkv_proj", "o_proj")

    @classmethod
    def heads_of(cls, module: AnyModule) -> Heads:
        config = module.config
        return Heads(config.num_attention_heads, config.num_key_value_heads, module.head_dim)

    @classmethod
    def parts_of(cls, module: AnyModule) -> list[int]:
        """How many outputs the one linear layer makes of each part before it makes the next: of q, of k and of v."""
        return cls._splits(module)

    @classmethod
    def _splits(cls, module: AnyModule) -> list[int]:
        heads = cls.heads_of(module)
        return [heads.queries * heads.dim, heads.groups * heads.dim, heads.groups * heads.dim]

    def _by_linear(self, projections: ProjectionSites) -> tuple[LinearSites | None, ...]:
        tables = [
            None if sites is None else sites.tables["update_rows"]
            for sites in (projections.query, projections.key_value, projections.key_value)
        ]
        return given(LinearSites, update_rows=self._row_table(tables)), projections.output

    @ordinary_tensors()
    def _row_table(self, tables: list[Table | None]) -> Table | None:
        """The tables of q, k and v as one for the rows of the one linear layer."""
        table = concatenate(tables, self._splits(self))
        return None if table is None else Table(self._lay_out(table.weights, self.heads_of(self).dim))

    @classmethod
    def _lay_out(cls, features: Tensor, head_dim: int) -> Tensor:
        """Features `[..., q + k + v]` in the order of the one linear layer's rows."""
        return features

    @classmethod
    def _lay_out_rows(cls, q: Tensor, kv: Tensor, head_dim: int) -> list[Tensor]:
        return [cls._lay_out(torch.cat((q, kv, kv)), head_dim)]

    def _project(self, x: Tensor, routes: Routes) -> tuple[Tensor, ...]:
        qkv = call_linear(getattr(self, self.names[0]), x, routes, self._linear_sites()[0], self.backend)
        head_dim, splits = self.heads_of(self).dim, self._splits(self)
        ranks = sum(splits) // qkv.shape[-1]  # under tensor parallelism a rank makes its share of each
        parts = qkv.split([width // ranks for width in splits], dim=-1)
        return tuple(x.unflatten(-1, (-1, head_dim)).transpose(1, 2) for x in parts)


class GPT2Attention(FusedAttention):
    """The attention of GPT-2."""

    has_free_heads = False
    names = ("c_attn", "c_proj")
    dropout_name = "resid_dropout"

    @classmethod
    def heads_of(cls, module: AnyModule) -> Heads:
        return Heads(module.num_heads, module.num_heads, module.head_dim)

    def _dropout(self) -> float:
        return self.attn_dropout.p


class NanoGPTAttention(GPT2Attention):
    """The attention of nanoGPT: as GPT-2's, but hidden states alone come in and go out."""

    @classmethod
    def heads_of(cls, module: AnyModule) -> Heads:
        return Heads(module.n_head, module.n_head, module.n_embd // module.n_head)

    def forward(
        self, hidden_states: Tensor, *args: Argument, routes: Routes | None = None, **kwargs: Argument
    ) -> Argument:
        y = super().forward(hidden_states, *args, routes=routes, **kwargs)
        return y if routes is None else y[0]

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        routes: Routes,
        attention_mask: Tensor | None = None,
        **kwargs: Argument,
    ) -> tuple[Tensor, None]:
        dropout = self.dropout if self.training else 0.0
        if self._routing.everywhere:
            sites = self._attention_sites()
            z = routed_attention(q, k, v, routes, sites, dropout=dropout, backend=self.backend)
        else:
            z = nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return z.transpose(1, 2), None


class NeoXAttention(FusedAttention):
    """The attention of GPT-NeoX and Pythia: one linear layer makes q, k and v head by head."""

    has_free_heads = False
    names = ("query_key_value", "dense")

    @classmethod
    def heads_of(cls, module: AnyModule) -> Heads:
        heads = module.config.num_attention_heads
        return Heads(heads, heads, module.head_size)

    @classmethod
    def parts_of(cls, module: AnyModule) -> list[int]:
        return [sum(cls._splits(module))]

    @classmethod
    def _lay_out(cls, features: Tensor, head_dim: int) -> Tensor:
        by_head = features.unflatten(-1, (3, -1, head_dim)).transpose(-3, -2)
        return by_head.flatten(-3)

    def _project(self, x: Tensor, routes: Routes) -> tuple[Tensor, ...]:
        qkv = call_linear(getattr(self, self.names[0]), x, routes, self._linear_sites()[0], self.backend)
        return qkv.unflatten(-1, (-1, 3 * self.head_size)).transpose(1, 2).chunk(3, dim=-1)
