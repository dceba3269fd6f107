"""The steps of RoutedAdamW, composed of PyTorch operations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..primitives.arguments import AdamWOptions, Blocks, number_of_blocks

# The lowest 32 bits of an integer.
WORD = 0xFFFFFFFF


def touched_blocks(gradients: Sequence[Tensor], blocks: Sequence[int]) -> Tensor:
    """See `gradroute.primitives.protocol.Primitives`."""
    found = [_touched(gradient, kind) for gradient, kind in zip(gradients, blocks, strict=True)]
    return torch.cat(found)


def _touched(gradient: Tensor, kind: int) -> Tensor:
    """Which blocks of one gradient have an element that is not 0: bool `[n]`."""
    matrix = gradient if gradient.dim() == 2 else gradient[None]
    if matrix.numel() == 0:
        return matrix.new_zeros(number_of_blocks(matrix.shape, kind), dtype=torch.bool)
    if kind == Blocks.COLUMNS and matrix.shape[0] == 1:
        return matrix[0] != 0
    # On the CPU amin and amax took 0.04 ms for 2¹⁸ elements, and `(gradient != 0).any(...)` 0.37. Both hand on NaN,
    # which is true.
    dim = {Blocks.ROWS: [1], Blocks.COLUMNS: [0], Blocks.ONE: [0, 1]}[Blocks(kind)]
    return torch.logical_or(*(reduce(matrix, dim) for reduce in (torch.amin, torch.amax))).reshape(-1)


def adamw_step(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    factors: Tensor,
    blocks: Sequence[int],
    options: AdamWOptions,
) -> None:
    """See `gradroute.primitives.protocol.Primitives`."""
    first = 0
    for index, (parameter, kind) in enumerate(zip(parameters, blocks, strict=True)):
        count = number_of_blocks(parameter.shape, kind)
        # [5, N, 1], [5, 1, M] or [5, 1, 1], of one row [5, M]
        own = factors[:, first : first + count].unsqueeze(1 if kind == Blocks.COLUMNS else 2)
        moments = [exp_avgs[index], exp_avg_sqs[index], *(most[index] for most in [max_exp_avg_sqs] if most)]
        _step(parameter, gradients[index], moments, own if parameter.dim() == 2 else own[:, 0], options)
        first += count


def _step(
    parameter: Tensor,  # [N, M] or [M]
    gradient: Tensor,
    moments: Sequence[Tensor],  # m, v and with amsgrad the largest v
    factors: Tensor,  # [5, ...], each of which broadcasts against the parameter
    options: AdamWOptions,
) -> None:
    beta1, beta2, eps, maximize, stochastic = options
    decay, size, scale, touched, count = factors
    exp_avg, exp_avg_sq = moments[:2]
    raw = gradient.to(factors.dtype)
    random = random_bits(raw, parameter, exp_avg, exp_avg_sq, count) if stochastic else None
    g = -raw if maximize else raw
    average = torch.lerp(exp_avg.to(g.dtype), g, 1 - beta1)
    square = beta2 * exp_avg_sq.to(g.dtype) + (1 - beta2) * g * g
    changed = [(exp_avg, average, 0), (exp_avg_sq, square, 16)]
    if len(moments) > 2:
        square = torch.maximum(moments[2].to(g.dtype), square)
        changed.append((moments[2], square, 16))
    new = parameter * decay - size * average / (square.sqrt() * scale + eps)
    for old, value, shift in changed:
        value = value if random is None else to_bfloat16_by(random >> shift, value)
        old.copy_(torch.where(touched != 0, value.to(old.dtype), old))
    parameter.copy_(torch.where(touched != 0, new.to(parameter.dtype), parameter))


def random_bits(
    gradient: Tensor, parameter: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, count: Tensor
) -> Tensor:
    """32 random bits for each element's step, in int64; those of `random_bits` in csrc/math.h, which says of what."""
    g, p, m, v = (_bits(tensor) for tensor in (gradient, parameter, exp_avg, exp_avg_sq))
    h = _times(g, 0x9E3779B1) ^ _times(p, 0x85EBCA77) ^ _times(m, 0xC2B2AE3D) ^ _times(v, 0x27D4EB2F)
    h = (h + _times(count.long(), 0x165667B1)) & WORD
    h = _times(h ^ h >> 16, 0x85EBCA6B)
    h = _times(h ^ h >> 13, 0xC2B2AE35)
    return h ^ h >> 16


def to_bfloat16_by(random: Tensor, x: Tensor) -> Tensor:
    """fp32 x rounded to a bfloat16 below or above it by 16 random bits, whose expectation is x; still in fp32."""
    bits = (_bits(x) + (random & 0xFFFF)) & 0xFFFF0000
    rounded = torch.where(bits > 0x7FFFFFFF, bits - (1 << 32), bits).int().view(torch.float32)
    return torch.where(torch.isfinite(x), rounded, x)


def _bits(x: Tensor) -> Tensor:
    """The bits of x in fp32, a number from 0 to 2³² in int64."""
    return x.float().contiguous().view(torch.int32).long() & WORD


def _times(word: Tensor, factor: int) -> Tensor:
    """The lowest 32 bits of a product, by halves of the factor: int64 holds no product of 64 bits without a sign."""
    low, high = factor & 0xFFFF, factor >> 16
    return (word * low + ((word * high & 0xFFFF) << 16)) & WORD
