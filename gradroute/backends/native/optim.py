"""The step of RoutedAdamW on one parameter, in one pass over it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...primitives.arguments import ADAMW_SCHEMA, AdamWOptions
from ...primitives.registration import kernel_op
from .launch import launch
from .operands import AdamWOperands


def adamw_step(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    factors: Tensor,
    by_column: bool,
    options: AdamWOptions,
) -> None:
    adamw_step_op(parameter, gradient, exp_avg, exp_avg_sq, max_exp_avg_sq, factors, by_column, *options)


@kernel_op(f"native_adamw_step{ADAMW_SCHEMA}")
def adamw_step_op(parameter: Tensor, *rest: Any) -> None:
    """The op behind `adamw_step`; `rest` are the other fields of AdamWOperands."""
    launch("adamw_step", AdamWOperands(parameter, *rest))
