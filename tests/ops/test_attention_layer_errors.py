"""Errors of RoutedAttention: the type, and the words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from attention_layer_cases import (
    BATCH,
    D_MODEL,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    SEQUENCE,
    LlamaAttention,
    all_sites,
    make_layer,
    random_input,
)
from torch import nn

from gradroute import (
    AttentionSites,
    LinearSites,
    RoutedAttention,
    Routes,
)


def with_child(module: Any, name: str, child: nn.Module) -> Any:
    module.add_module(name, child)
    return module


class LoRALinear(nn.Linear):
    pass


def call(*shape: int, **sites: Any) -> Any:
    layer = make_layer(AttentionSites(**sites))
    return layer(torch.zeros(shape), Routes.of(torch.zeros(BATCH, SEQUENCE, dtype=torch.int64), 2))


ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "update with fewer key heads": (
        lambda: make_layer(AttentionSites(update=torch.zeros(2, 4))),
        ValueError,
        r"AttentionSites\.update_kv: got None beside update, expected a table \[R, 2\] or \[R, 1\]: with 4 query heads",
    ),
    "update with fewer key heads, reassigned": (
        lambda: setattr(make_layer(), "sites", AttentionSites(update=torch.zeros(2, 1))),
        ValueError,
        r"AttentionSites\.update_kv: got None beside update",
    ),
    "query": (
        lambda: make_layer(AttentionSites(query=torch.zeros(2, 2))),
        ValueError,
        r"AttentionSites\.query: got a table of 2 features, expected 4 or 1",
    ),
    "key": (
        lambda: make_layer(AttentionSites(key=torch.zeros(2, 4))),
        ValueError,
        r"AttentionSites\.key: got a table of 4 features, expected 2 or 1",
    ),
    "update_q by feature": (
        lambda: make_layer(AttentionSites(update_q=torch.zeros(2, 16))),
        ValueError,
        r"AttentionSites\.update_q: got a table of 16 features, expected 4 or 1",
    ),
    "update_kv": (
        lambda: make_layer(AttentionSites(update_kv=torch.zeros(2, 4))),
        ValueError,
        r"AttentionSites\.update_kv: got a table of 4 features, expected 2 or 1",
    ),
    "update_out": (
        lambda: make_layer(AttentionSites(update_out=torch.zeros(2, 2))),
        ValueError,
        r"AttentionSites\.update_out: got a table of 2 features, expected 4 or 1",
    ),
    "update_output_bias": (
        lambda: make_layer(AttentionSites(update_output_bias=torch.zeros(2, 4)), bias=True),
        ValueError,
        r"AttentionSites\.update_output_bias: got a table of 4 features, expected 12 or 1",
    ),
    "update_output_bias without a bias": (
        lambda: make_layer(AttentionSites(update_output_bias=torch.zeros(2, 12))),
        ValueError,
        r"AttentionSites\.update_output_bias: got Table.*expected None: o_proj has no bias",
    ),
    "edges": (
        lambda: make_layer(AttentionSites(score_edges=torch.zeros(2, 3))),
        ValueError,
        r"AttentionSites\.score_edges: got a table of 3 features, expected 2 or 1",
    ),
    "edges of one column": (
        lambda: make_layer(AttentionSites(value_edges=torch.zeros(2, 1))),
        ValueError,
        r"AttentionSites\.value_edges: got a table of 1 columns, expected \[R, R\].*R = 2",
    ),
    "numbers of routes": (
        lambda: make_layer(AttentionSites(query=torch.zeros(2, 4), update_q=torch.zeros(3, 4))),
        ValueError,
        r"AttentionSites\.update_q: got a table of 3 routes, expected 2 \(as in query\)",
    ),
    "sites of another layer": (
        lambda: make_layer(LinearSites()),
        TypeError,
        r"sites: got a LinearSites, expected gradroute\.AttentionSites or None",
    ),
    "heads of d_model": (
        lambda: RoutedAttention(8, 3),
        ValueError,
        "heads: got 3, expected a divisor of d_model, 8",
    ),
    "no heads": (lambda: RoutedAttention(8, 0), ValueError, "heads: got 0, expected an int of 1 or more"),
    "key heads": (
        lambda: RoutedAttention(8, 4, 3),
        ValueError,
        "kv_heads: got 3, expected a divisor of heads = 4",
    ),
    "no key heads": (
        lambda: RoutedAttention(8, 4, 0),
        ValueError,
        "kv_heads: got 0, expected a divisor of heads = 4",
    ),
    "head_dim": (
        lambda: RoutedAttention(8, 4, head_dim=0),
        ValueError,
        "head_dim: got 0, expected an int of 1 or more",
    ),
    "width of x": (
        lambda: call(BATCH, SEQUENCE, 8),
        ValueError,
        r"x: got shape \[2, 7, 8\], expected \[any, any, 12\]",
    ),
    "dimensions of x": (
        lambda: call(SEQUENCE, D_MODEL),
        ValueError,
        r"x: got shape \[7, 12\], expected \[any, any, 12\]",
    ),
    "tokens": (
        lambda: call(BATCH, 5, D_MODEL),
        ValueError,
        r"routes: got ids of shape \[2, 7\], expected x's leading shape \[2, 5\]",
    ),
    "routes of a call": (
        lambda: call(BATCH, SEQUENCE, D_MODEL, update_q=torch.zeros(3, 4)),
        ValueError,
        r"AttentionSites\.update_q: got a table of 3 routes, expected 2 \(routes\.num_routes\)",
    ),
    "a tensor for routes": (
        lambda: make_layer(all_sites())(random_input(), torch.zeros(BATCH, SEQUENCE)),
        TypeError,
        r"routes: got a Tensor, expected gradroute\.Routes",
    ),
    "LoRA": (
        lambda: RoutedAttention.from_projections(
            with_child(LlamaAttention(), "v_proj", LoRALinear(D_MODEL, KV_HEADS * HEAD_DIM)), HEADS, KV_HEADS
        ),
        TypeError,
        r"module\.v_proj: got a LoRALinear.*call such modules, with gradroute\.routed_attention between them",
    ),
    "names": (
        lambda: RoutedAttention.from_projections(LlamaAttention(), HEADS, names=("wq", "wk", "wv", "wo")),
        ValueError,
        "names: got 'wq', expected submodules of LlamaAttention: q_proj, k_proj, v_proj, o_proj",
    ),
    "number of names": (
        lambda: RoutedAttention.from_projections(LlamaAttention(), HEADS, names=("q_proj", "o_proj")),
        ValueError,
        r"names: got \('q_proj', 'o_proj'\), expected 4 names",
    ),
    "other parameters": (
        lambda: RoutedAttention.from_projections(
            with_child(LlamaAttention(), "q_norm", nn.RMSNorm(HEAD_DIM)), HEADS, KV_HEADS
        ),
        ValueError,
        r"module: got parameters or buffers q_norm\.weight, expected only those of \('q_proj', 'k_proj'",
    ),
    "dropout": (
        lambda: RoutedAttention.from_projections(
            with_child(LlamaAttention(), "attn_dropout", nn.Dropout(0.1)), HEADS, KV_HEADS
        ),
        ValueError,
        r"module\.attn_dropout: got dropout with p = 0\.1, expected none",
    ),
    "heads of a projection": (
        lambda: RoutedAttention.from_projections(LlamaAttention(), 3, 1),
        ValueError,
        "heads: got 3, expected a divisor of the outputs of q_proj, 16",
    ),
    "key heads of a projection": (
        lambda: RoutedAttention.from_projections(LlamaAttention(), HEADS),
        ValueError,
        r"names: got k_proj of shape \[8, 12\], expected \[16, 12\]: q_proj is \[16, 12\], with 4 heads and 4 key",
    ),
    "order of names": (
        lambda: RoutedAttention.from_projections(
            LlamaAttention(), HEADS, KV_HEADS, names=("q_proj", "k_proj", "o_proj", "v_proj")
        ),
        ValueError,
        r"names: got o_proj of shape \[12, 16\], expected \[8, 12\]",
    ),
}


@pytest.mark.parametrize(("make", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
