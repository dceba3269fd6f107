"""The ordinary RMS norm, with the rounding of three families of models: every backend's forward."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .primitives.arguments import product_dtype


def rms_norm_value(x: Tensor, weight: Tensor, eps: float | None, offset: float, casting_mode: str) -> Tensor:
    """The RMS norm of the three families of models, with their rounding of every intermediate.

    "torch" is `torch.nn.functional.rms_norm`; "llama" rounds x̂ to x's dtype before the weight; "gemma" multiplies
    in fp32 and rounds last. Both families compute in fp32 whatever x's dtype is, fp64 too. `offset` is added to the
    weight.
    """
    if casting_mode == "torch":
        return F.rms_norm(x, x.shape[-1:], weight + offset if offset else weight, eps)
    x_wide = x.float()
    x_hat = x_wide * torch.rsqrt(x_wide.pow(2).mean(-1, keepdim=True) + rms_norm_eps(eps, x, casting_mode))
    if casting_mode == "llama":
        return (weight + offset if offset else weight) * x_hat.to(x.dtype)
    return (x_hat * (offset + weight.float())).to(x.dtype)


def rms_norm_eps(eps: float | None, x: Tensor, casting_mode: str) -> float:
    """eps, or F.rms_norm's own where it is None: the machine epsilon of the dtype that the forward computes in."""
    if eps is not None:
        return eps
    return torch.finfo(product_dtype(x.dtype) if casting_mode == "torch" else torch.float32).eps
