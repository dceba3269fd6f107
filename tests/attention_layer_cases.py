"""RoutedAttention in its ordinary form, with every site, by its ops and by the detach idiom."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor, nn

from gradroute import (
    AttentionSites,
    LinearSites,
    RoutedAttention,
    Routes,
    Table,
    backends,
    routed_attention,
    routed_linear,
    testing,
)

ROUTES, D_MODEL, HEADS, KV_HEADS, HEAD_DIM = 3, 12, 4, 2, 4
BATCH, SEQUENCE = 2, 7
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
EVERY_BACKEND = pytest.mark.parametrize("backend", backends.OPS["routed_attention"])
FUNCTION_BACKENDS = [name for name in backends.OPS["routed_attention"] if name != "reference"]


class LlamaAttention(nn.Module):
    """Llama's attention without the rotation."""

    def __init__(self, bias: bool = False, kv_heads: int = KV_HEADS) -> None:
        super().__init__()
        self.q_proj = nn.Linear(D_MODEL, HEADS * HEAD_DIM, bias)
        self.k_proj, self.v_proj = (nn.Linear(D_MODEL, kv_heads * HEAD_DIM, bias) for _ in range(2))
        self.o_proj = nn.Linear(HEADS * HEAD_DIM, D_MODEL, bias)

    def forward(self, x: Tensor) -> Tensor:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (linear(x).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for linear in projections)
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(z.transpose(1, 2).flatten(2))


def all_sites(kv_heads: int = KV_HEADS, bias: bool = False) -> AttentionSites:
    """Every site that a layer of these numbers of heads has, each another table of {0, 1, 0.5, -0.75}."""
    widths = {
        **dict.fromkeys(("query", "heads", "forward_heads", "update_q", "update_out"), HEADS),
        **dict.fromkeys(("key", "value", "update_kv"), kv_heads),
        **dict.fromkeys(("score_edges", "value_edges"), ROUTES),
        **({"update_output_bias": D_MODEL} if bias else {}),
    }
    return AttentionSites(
        **{
            name: testing.make_table("dense", ROUTES, width, seed)
            for seed, (name, width) in enumerate(widths.items())
        }
    )


def make_layer(sites: Any = None, kv_heads: int = KV_HEADS, **options: Any) -> RoutedAttention:
    return RoutedAttention(
        D_MODEL, HEADS, kv_heads, HEAD_DIM, sites=sites, **{"backend": "reference"} | options
    )


def random_routes(strength: bool = False) -> Routes:
    ids = torch.randint(ROUTES, (BATCH, SEQUENCE))
    return Routes.of(ids, ROUTES, strength=torch.rand(BATCH, SEQUENCE) if strength else None)


def random_input(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(BATCH, SEQUENCE, D_MODEL, dtype=dtype).requires_grad_()


def rotated(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Llama's RoPE, for positions from 0."""

    def turn(x: Tensor) -> Tensor:  # [B, heads, S, D]
        length, width = x.shape[2:]
        frequencies = 10_000.0 ** (-torch.arange(0, width, 2) / width)
        angles = torch.outer(torch.arange(length), frequencies).repeat(1, 2).to(x.dtype)
        first, second = x.chunk(2, dim=-1)
        return x * angles.cos() + torch.cat((-second, first), dim=-1) * angles.sin()

    return turn(q), turn(k)


def by_head(x: Tensor) -> Tensor:  # [B, S, heads * D] → [B, heads, S, D]
    return x.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)


def by_feature(table: Any) -> Table | None:
    """A table by head, for the features of the heads; a `[R, 1]` one is for all."""
    if table is None:
        return None
    return Table(table.weights if table.features == 1 else table.weights.repeat_interleave(HEAD_DIM, 1))


def attention_sites_of(sites: AttentionSites) -> AttentionSites:
    return AttentionSites(
        **{name: table for name, table in sites.tables.items() if not name.startswith("update")}
    )


def composed_by_hand(
    layer: Any, x: Tensor, routes: Routes, rotate: Any = lambda q, k: (q, k), **keywords: Any
) -> Tensor:
    """The layer's output by its ops; its sites name each of update_q, update_kv and update_out."""
    sites = layer.sites

    def linear(name: str, inputs: Tensor, linear_sites: LinearSites) -> Tensor:
        module = getattr(layer, name)
        return routed_linear(inputs, module.weight, module.bias, routes, linear_sites, backend=layer.backend)

    key_sites = LinearSites(update_rows=by_feature(sites.update_kv))
    q = by_head(linear("q_proj", x, LinearSites(update_rows=by_feature(sites.update_q))))
    k, v = (by_head(linear(name, x, key_sites)) for name in ("k_proj", "v_proj"))
    q, k = rotate(q, k)
    z = routed_attention(q, k, v, routes, attention_sites_of(sites), **keywords, backend=layer.backend)
    of_output = LinearSites(update_cols=by_feature(sites.update_out), update_bias=sites.update_output_bias)
    return linear("o_proj", z.transpose(1, 2).flatten(2), of_output)


def detached_by_hand(layer: Any, x: Tensor, routes: Routes) -> Tensor:
    """The layer's output by the detach idiom, every token with its own copy of every parameter."""
    sites, marks = layer.sites, testing.Marks(routes, layer.sites.tables, copies=True)

    def linear(name: str, inputs: Tensor, **routed: Any) -> Tensor:
        module = getattr(layer, name)
        return marks.linear(inputs, module.weight, module.bias, **routed)

    q_rows, kv_rows = by_feature(sites.update_q), by_feature(sites.update_kv)
    q = by_head(linear("q_proj", x, rows=q_rows, bias_rows=q_rows))
    k, v = (by_head(linear(name, x, rows=kv_rows, bias_rows=kv_rows)) for name in ("k_proj", "v_proj"))
    z = testing.OPS["routed_attention"].formula(marks, q, k, v).transpose(1, 2).flatten(2)
    return linear("o_proj", z, cols=by_feature(sites.update_out), bias_rows=sites.update_output_bias)


def gradients(output: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    return torch.autograd.grad(output, inputs, torch.randn_like(output))


def assert_same(got: Any, expected: Any) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def assert_same_step(got: Tensor, expected: Tensor, *inputs: Tensor) -> None:
    """The same bits in the output, and in the gradients of all inputs."""
    assert_same(got, expected)
    assert_same(gradients(got, *inputs), gradients(expected, *inputs))
