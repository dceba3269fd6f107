"""Samples of routed_attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..draw import Draw, Sizes
from ..marks import Marks
from ..op import Op


def _inputs(draw: Draw) -> dict[str, Tensor | None]:
    (batch, length), sizes = draw.tokens, draw.sizes
    heads = {"q": sizes.heads, "k": sizes.kv_heads, "v": sizes.kv_heads}
    return {
        name: draw.normal(batch, number, length, sizes.head_dim, layout=draw.layout)
        for name, number in heads.items()
    }


def _keywords(draw: Draw, keywords: dict[str, Any]) -> dict[str, Any]:
    (batch, length), keywords = draw.tokens, dict(keywords)
    documents, padding = keywords.pop("documents", None), keywords.pop("padding", None)
    if documents is not None:
        bounds = [document * length // documents for document in range(documents + 1)]
        keywords["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32, device=draw.device)
    if padding is not None:
        keywords["key_mask"] = (torch.arange(length, device=draw.device) < length - padding).expand(batch, -1)
    return keywords


def _site_features(sizes: Sizes, num_routes: int, bias: bool) -> dict[str, int]:
    by_query_head = dict.fromkeys(("query", "heads", "forward_heads"), sizes.heads)
    by_key_head = dict.fromkeys(("key", "value"), sizes.kv_heads)
    return by_query_head | by_key_head | dict.fromkeys(("score_edges", "value_edges"), num_routes)


def _formula(
    marks: Marks,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    seen = _visible(q.shape[2], k.shape[2], q.device, causal, window, cu_seqlens, key_mask)
    if not marks.tables:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True)
    group = q.shape[1] // k.shape[1]
    q, k, v = marks.by_head("query", q), marks.by_head("key", k), marks.by_head("value", v)
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = (q @ k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    score_edges = marks.edges("score_edges", q.shape[0], q.dtype)
    if score_edges is not None:
        scores = marks.detached(score_edges, scores)
    p = torch.softmax(scores.masked_fill(~seen, torch.finfo(scores.dtype).min), -1) * seen.any(
        -1, keepdim=True
    )
    value_edges = marks.edges("value_edges", q.shape[0], q.dtype)
    if value_edges is None:
        o = p @ v
    else:  # every query has its own copy of every value
        o = (p.unsqueeze(-1) * marks.detached(value_edges.unsqueeze(-1), v.unsqueeze(2))).sum(-2)
    return marks.by_head("forward_heads", marks.by_head("heads", o), forward=True)


def _visible(
    queries: int,
    keys: int,
    device: torch.device,
    causal: bool,
    window: int | None,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
) -> Tensor:
    """Whether a query sees a key, bool `[B or 1, 1, S_q, S_k]`."""
    key = torch.arange(keys, device=device)
    query = key[keys - queries :].unsqueeze(1)
    far = query - key
    seen = torch.ones_like(far, dtype=torch.bool)
    if causal:
        seen = seen & (far >= 0)
    if window is not None:
        seen = seen & ((far if causal else far.abs()) < window)
    if cu_seqlens is not None:
        lengths = cu_seqlens.diff().long()
        document = torch.arange(len(lengths), device=device).repeat_interleave(lengths)
        seen = seen & (document[query] == document)
    seen = seen.expand(1, 1, queries, keys)
    return seen if key_mask is None else seen & key_mask[:, None, None, :]


def _cancelling(
    tensors: Mapping[str, Tensor | None], keywords: Mapping[str, Any], upstream: Tensor
) -> dict[str, float]:
    """The size of the terms that cancel where there is one key, whose score has no gradient."""
    q, k, v = (tensors[name] for name in "qkv")
    assert q is not None and k is not None and v is not None
    if k.shape[2] != 1:
        return {}
    group = q.shape[1] // k.shape[1]
    scale = keywords.get("scale") or q.shape[3] ** -0.5
    dp = (upstream * v.repeat_interleave(group, 1)).sum(-1).abs().amax()
    sizes = {"q": scale * dp * k.abs().amax(), "k": group * scale * dp * q.abs().amax()}
    return {name: float(size) for name, size in sizes.items()}


OPS = {
    "routed_attention": Op(
        _inputs,
        _site_features,
        _formula,
        "AttentionSites",
        activations=("q", "k", "v"),
        variants=(
            {},
            {"causal": False},
            {"window": 5},
            {"causal": False, "window": 5, "scale": 0.2},
            {"documents": 3},
            {"padding": 4},
        ),
        keywords=_keywords,
        cancelling=_cancelling,
    )
}
