"""The steps of RoutedAdamW on parameters, in one pass over all of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...fake_tensors import has_data
from ...primitives.arguments import ADAMW_SCHEMA, TOUCHED_SCHEMA, AdamWOptions, number_of_blocks
from ...primitives.registration import kernel_op
from .launch import call
from .operands import AdamWOperands, AdamWTensors, BlockedGradient, TouchedOperands, matrices


def touched_blocks(gradients: Sequence[Tensor], blocks: Sequence[int]) -> Tensor:
    return touched_blocks_op(gradients, blocks)


@kernel_op(f"native_touched_blocks{TOUCHED_SCHEMA}")
def touched_blocks_op(gradients: Sequence[Tensor], blocks: Sequence[int]) -> Tensor:
    shapes = [gradient.shape for gradient in gradients]
    firsts, count = _firsts(shapes, blocks)
    touched = torch.zeros(count, dtype=torch.bool, device=gradients[0].device)
    if has_data(touched):
        each = zip(matrices(gradients, shapes, touched.device), blocks, firsts, strict=True)
        given = [BlockedGradient(*one) for one in each]
        call("touched_blocks", touched.device, TouchedOperands(given, touched.data_ptr()))
    return touched


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
    adamw_step_op(parameters, gradients, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, factors, blocks, *options)


@kernel_op(f"native_adamw_step{ADAMW_SCHEMA}")
def adamw_step_op(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    factors: Tensor,
    blocks: Sequence[int],
    *options: Any,  # the fields of AdamWOptions
) -> None:
    if not has_data(factors):
        return
    device = factors.device
    shapes = [parameter.shape for parameter in parameters]
    firsts, _ = _firsts(shapes, blocks)
    of_each = [
        matrices(tensors, shapes, device) for tensors in (parameters, gradients, exp_avgs, exp_avg_sqs)
    ]
    most: list[Any] = (
        matrices(max_exp_avg_sqs, shapes, device) if max_exp_avg_sqs else [None] * len(parameters)
    )
    given = [AdamWTensors(*one) for one in zip(*of_each, most, blocks, firsts, strict=True)]
    call("adamw_step", device, AdamWOperands(given, factors, *options))


def _firsts(shapes: Sequence[torch.Size], blocks: Sequence[int]) -> tuple[list[int], int]:
    """The number of each tensor's first block among the blocks of all, and how many there are."""
    *firsts, count = itertools.accumulate(map(number_of_blocks, shapes, blocks), initial=0)
    return firsts, count
