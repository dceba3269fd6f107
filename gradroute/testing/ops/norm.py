"""Samples of routed_rms_norm and routed_layer_norm."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..draw import Draw, Sizes
from ..marks import Marks
from ..op import Op


def _rms_norm_inputs(draw: Draw) -> dict[str, Tensor | None]:
    return {"x": draw.activation(draw.sizes.d_model), "weight": draw.normal(draw.sizes.d_model)}


def _site_features(sizes: Sizes, num_routes: int, bias: bool) -> dict[str, int]:
    return {"update": sizes.d_model}


def _rms_norm(
    marks: Marks,
    x: Tensor,
    weight: Tensor,
    eps: float | None = 1e-6,
    offset: float = 0.0,
    casting_mode: str = "torch",
) -> Tensor:
    copies = marks.parameter(weight, x.shape[:-1], marks.table("update"))
    if casting_mode == "torch":
        if copies is weight:
            return F.rms_norm(x, x.shape[-1:], weight + offset if offset else weight, eps)
        return F.rms_norm(x, x.shape[-1:], eps=eps) * (copies + offset)
    # These are the operations of LlamaRMSNorm and GemmaRMSNorm of transformers: in fp32 for fp64 too.
    assert eps is not None
    wide = torch.float32
    normalised = x.to(wide) * torch.rsqrt(x.to(wide).pow(2).mean(-1, keepdim=True) + eps)
    if casting_mode == "llama":
        return (copies + offset if offset else copies) * normalised.to(x.dtype)
    return (normalised * (offset + copies.to(wide))).to(x.dtype)


def _layer_norm_inputs(draw: Draw) -> dict[str, Tensor | None]:
    d_model = draw.sizes.d_model
    return {"x": draw.activation(d_model), "weight": draw.normal(d_model), "bias": draw.bias(d_model)}


def _layer_norm(marks: Marks, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-5) -> Tensor:
    update, tokens = marks.table("update"), x.shape[:-1]
    if update is None:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    y = F.layer_norm(x, x.shape[-1:], eps=eps) * marks.parameter(weight, tokens, update)
    return y if bias is None else y + marks.parameter(bias, tokens, update)


OPS = {
    "routed_rms_norm": Op(
        _rms_norm_inputs,
        _site_features,
        _rms_norm,
        "NormSites",
        variants=(
            {},
            {"eps": None},
            {"offset": 1.0},
            {"casting_mode": "llama"},
            {"casting_mode": "gemma", "offset": 1.0},
        ),
        exact={"casting_mode": "torch"},
    ),
    "routed_layer_norm": Op(
        _layer_norm_inputs, _site_features, _layer_norm, "NormSites", variants=({}, {"eps": 1e-3})
    ),
}
