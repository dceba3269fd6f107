"""Samples of routed_embedding."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..draw import Draw, Sizes
from ..marks import Marks
from ..op import Op


def _inputs(draw: Draw) -> dict[str, Tensor | None]:
    sizes = draw.sizes
    tokens = draw.integers(sizes.vocabulary, *draw.tokens)
    return {"tokens": tokens, "weight": draw.normal(sizes.vocabulary, sizes.d_model)}


def _site_features(sizes: Sizes, num_routes: int, bias: bool) -> dict[str, int]:
    return {"update": sizes.d_model}


def _formula(marks: Marks, tokens: Tensor, weight: Tensor, padding_idx: int | None = None) -> Tensor:
    return marks.gradient("update", F.embedding(tokens, weight, padding_idx))


OPS = {
    "routed_embedding": Op(
        _inputs,
        _site_features,
        _formula,
        "EmbeddingSites",
        activations=("tokens",),
        variants=({}, {"padding_idx": 3}),
    )
}
