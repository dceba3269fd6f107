"""Tokenised documents as evaluations read them, and batches of them that have a bounded number of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ...arguments import shown
from ..conversations import NOT_LEARNT

#: The name of documents that say nothing of their source.
UNNAMED = "text"


class Row(NamedTuple):
    """A document.

    Attributes:
        tokens: int64 `[S]`.
        source: the name of where it comes from.
        routes: int64 `[S]`, the route of each token, or None.
        learnt: bool `[S]`, whether a token's loss is counted; None: every token's is.
    """

    tokens: Tensor
    source: str
    routes: Tensor | None
    learnt: Tensor | None = None


#: What evaluations take: mappings with `input_ids`, `source`, `route_ids` and `labels`, or rows.
Documents = Iterable[Mapping[str, Any]] | Iterable[Row]


class Batch(NamedTuple):
    """Documents of one forward, padded on the right.

    Attributes:
        numbers: which documents they are.
        lengths: their numbers of tokens.
        input_ids: int64 `[B, S]`.
        attention_mask: int64 `[B, S]`, 0 at padding.
    """

    numbers: list[int]
    lengths: list[int]
    input_ids: Tensor
    attention_mask: Tensor


def as_rows(rows: Documents, *, routed: bool = False) -> list[Row]:
    """Documents with the columns that evaluations read.

    Args:
        rows: mappings with `input_ids` (integers `[S]`), and where they have them `source` (a name), `route_ids`
            (integers `[S]`) and `labels` (integers `[S]`, -100 where a token is no part of the loss): a list of dicts,
            or a `datasets.Dataset`. Rows stay as they are.
        routed: whether every document needs `route_ids`.

    Raises:
        TypeError: `rows` is no collection of mappings, or a column has other values.
        ValueError: there are no documents; a column is missing, or `route_ids` or `labels` are not one a token.
    """
    if isinstance(rows, (str, bytes, Mapping)) or not isinstance(rows, Iterable):
        raise TypeError(f"rows: got {shown(rows)}, expected a list or dataset of documents")
    found = [_row(number, row, routed) for number, row in enumerate(rows)]
    if not found:
        raise ValueError("rows: got no documents, expected at least one")
    return found


def _row(number: int, row: object, routed: bool) -> Row:
    name = f"rows[{number}]"
    if isinstance(row, Row):
        if routed and row.routes is None:
            raise ValueError(f"{name}: got no route_ids, expected one for each token")
        return row
    if not isinstance(row, Mapping):
        raise TypeError(f"{name}: got {shown(row)}, expected a mapping with input_ids")
    if "input_ids" not in row:
        raise ValueError(f"{name}: got the columns {', '.join(map(str, row)) or 'none'}, expected input_ids")
    tokens = _integers(f"{name}.input_ids", row["input_ids"])
    source = row.get("source", UNNAMED)
    if not isinstance(source, str):
        raise TypeError(f"{name}.source: got {shown(source)}, expected a name")
    routes, labels = (
        _of_tokens(f"{name}.{column}", row.get(column), tokens) for column in ("route_ids", "labels")
    )
    if routed and routes is None:
        raise ValueError(f"{name}: got no route_ids, expected one for each token")
    return Row(tokens, source, routes, None if labels is None else labels != NOT_LEARNT)


def _of_tokens(name: str, values: Any, tokens: Tensor) -> Tensor | None:
    """A column with a number for each token, where a document has it."""
    if values is None:
        return None
    column = _integers(name, values)
    if column.shape != tokens.shape:
        raise ValueError(f"{name}: got {len(column)}, expected one for each of {len(tokens)} tokens")
    return column


def _integers(name: str, values: Any) -> Tensor:
    try:
        tensor = values if isinstance(values, Tensor) else torch.from_numpy(np.array(values))
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name}: got {shown(values)}, expected a list of integers") from None
    if tensor.numel() == 0 and not isinstance(values, Tensor):
        tensor = tensor.long()  # an empty list has no dtype of its own
    if tensor.dim() != 1 or tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"{name}: got {shown(values)}, expected a list of integers")
    return tensor.long().cpu()


def batches(rows: Sequence[Row], batch_tokens: int) -> list[list[int]]:
    """The numbers of the documents of each forward, longest first, of `batch_tokens` tokens with padding at most.

    A document that is longer has a forward of its own. Documents without two tokens, which predict nothing, have none.
    """
    order = sorted(
        (n for n, row in enumerate(rows) if len(row.tokens) > 1), key=lambda n: -len(rows[n].tokens)
    )
    found: list[list[int]] = []
    longest = 0
    for number in order:
        if not found or (len(found[-1]) + 1) * longest > batch_tokens:
            found.append([])
            longest = len(rows[number].tokens)
        found[-1].append(number)
    return found


def collate(rows: Sequence[Row], numbers: list[int], device: torch.device) -> Batch:
    """Documents padded on the right by token 0, which the attention mask hides."""
    lengths = [len(rows[number].tokens) for number in numbers]
    input_ids = torch.zeros(len(numbers), max(lengths), dtype=torch.int64, device="cpu")
    attention_mask = torch.zeros_like(input_ids)
    for at, number in enumerate(numbers):
        input_ids[at, : lengths[at]] = rows[number].tokens
        attention_mask[at, : lengths[at]] = 1
    return Batch(numbers, lengths, input_ids.to(device), attention_mask.to(device))


def check_fits(model: nn.Module, rows: Sequence[Row]) -> None:
    """Raises ValueError where documents have tokens, or more of them, than the model knows."""
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    vocabulary = getattr(embedding, "num_embeddings", None)
    config = getattr(model, "config", None)
    longest = getattr(config, "max_position_embeddings", None)
    for number, row in enumerate(rows):
        if len(row.tokens) == 0:
            continue
        if vocabulary is not None and not 0 <= int(row.tokens.min()) <= int(row.tokens.max()) < vocabulary:
            wrong = int(row.tokens.max()) if int(row.tokens.max()) >= vocabulary else int(row.tokens.min())
            raise ValueError(
                f"rows[{number}].input_ids: got the token {wrong}, expected tokens below {vocabulary}, the model's "
                "vocabulary; they are another tokenizer's"
            )
        if isinstance(longest, int) and len(row.tokens) > longest:
            raise ValueError(
                f"rows[{number}].input_ids: got {len(row.tokens)} tokens, expected {longest} at most, the model's "
                "max_position_embeddings; cut documents to that length"
            )
