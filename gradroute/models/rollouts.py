"""The routes of rollouts: of a function's answers, or of the dataset's rows that were the prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .route_columns import ROUTE_COLUMNS, checked_column

# This stands at prompts whose row says nothing, and at padding: the base route, at full strength.
_BASE = {"route_ids": 0, "route_strength": 1.0}


def rollout_routes(
    route_fn: Callable[..., Any] | None, rollouts: Mapping[str, Any], batch: Mapping[str, Tensor], align: str
) -> dict[str, Tensor]:
    """The routing columns `[B, P + C]` of a batch of rollouts, on its device.

    Args:
        route_fn: see `routed_trainer`; None: the dataset's rows say the route of a rollout.
        rollouts: its keywords, all but `advantages`.
        batch: TRL's, with `prompt_mask` `[B, P]` and `completion_mask` `[B, C]`.
        align: "position" or "next_token".

    Raises:
        TypeError, ValueError: routes that are not integers, or not of B rollouts or their tokens; a row without any.
    """
    lengths = [len(ids) for ids in rollouts["completion_ids"]]
    if route_fn is None:
        answers = _of_rows(rollouts["inputs"])
    else:
        answers = _answers(route_fn(**rollouts, advantages=batch["advantages"]), lengths)
    columns = {}
    for name, answer in answers.items():
        source = "inputs" if route_fn is None else "route_fn"
        values = [
            _checked(f"{source}[{row}]", name, value, None if route_fn is None else length)
            for row, (value, length) in enumerate(zip(answer, lengths, strict=True))
        ]
        columns[name] = _laid_out(name, values, rollouts["inputs"], batch, align)
    return columns


def _of_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    for index, row in enumerate(rows):
        if "route_ids" not in row:
            raise ValueError(
                f"inputs[{index}]: got the columns {', '.join(sorted(row))}, expected route_ids too, or a route_fn"
            )
    names = [name for name in ROUTE_COLUMNS if name in rows[0]]
    return {name: [row[name] for row in rows] for name in names}


def _answers(answer: Any, lengths: list[int]) -> dict[str, list[Any]]:
    """The answer of a route_fn, by column, as one entry a rollout."""
    answers = dict(answer) if isinstance(answer, Mapping) else {"route_ids": answer}
    unknown = [name for name in answers if name not in ROUTE_COLUMNS]
    if unknown or "route_ids" not in answers:
        raise ValueError(
            f"route_fn: got {', '.join(map(str, answers))}, expected route_ids, and route_strength or nothing else"
        )
    return {name: _by_rollout(name, value, lengths) for name, value in answers.items()}


def _by_rollout(name: str, answer: Any, lengths: list[int]) -> list[Any]:
    if (
        isinstance(answer, (str, Mapping))
        or not hasattr(answer, "__len__")
        or getattr(answer, "ndim", 1) == 0
    ):
        raise TypeError(
            f"route_fn: got {name} as {answer!r}, expected one of each of the {len(lengths)} rollouts"
        )
    if len(answer) != len(lengths):
        raise ValueError(f"route_fn: got {name} of {len(answer)} rollouts, expected {len(lengths)}")
    if getattr(answer, "ndim", 1) < 2:
        return list(answer)
    width = max(lengths)
    if answer.ndim > 2 or answer.shape[1] < width:
        raise ValueError(
            f"route_fn: got {name} of shape {list(answer.shape)}, expected [{len(lengths)}], or "
            f"[{len(lengths)}, {width}] of the tokens of the completions"
        )
    return [row[:length] for row, length in zip(answer, lengths, strict=True)]


def _checked(where: str, name: str, value: Any, length: int | None) -> Tensor:
    """A rollout's entry: 0-dim of the whole, or, where there may be more, `[length]` of the completion's tokens."""
    if length is None or getattr(value, "ndim", None) == 0 or not hasattr(value, "__len__"):
        return checked_column(where, name, value, 1)[0]
    return checked_column(where, name, value, length)


def _laid_out(
    name: str,
    values: list[Tensor],
    rows: Sequence[Mapping[str, Any]],
    batch: Mapping[str, Tensor],
    align: str,
) -> Tensor:
    """A column `[B, P + C]`: prompts are padded on the left, completions on the right."""
    prompt_mask, completion_mask = batch["prompt_mask"], batch["completion_mask"]
    prompts = prompt_mask.shape[1]
    dtype = torch.int64 if name == "route_ids" else torch.float32
    shape = (len(values), prompts + completion_mask.shape[1])
    column = torch.full(shape, _BASE[name], dtype=dtype, device="cpu")
    for index, value in enumerate(values):
        if value.dim() == 0:
            column[index] = value
            continue
        if name in rows[index]:
            column[index, :prompts] = checked_column(f"inputs[{index}]", name, rows[index][name], 1)
        end = prompts + len(value)
        column[index, prompts:end] = value
        if align == "next_token":
            column[index, : end - 1] = column[index, 1:end].clone()
    padding = torch.cat([prompt_mask, completion_mask], dim=1).cpu() == 0
    return column.masked_fill(padding, _BASE[name]).to(prompt_mask.device)
