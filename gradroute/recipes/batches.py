"""Documents grouped into batches of so many tokens, in an order that follows from a seed alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset

from ..models import RouteCollator
from .conversations import NOT_LEARNT

# Documents: a datasets.Dataset or a list of mappings; see docs/recipes.md for their columns.
Rows = Any
Row = Mapping[str, Any]

_TOKEN_COLUMNS = ("input_ids", "route_ids", "route_strength", "labels")


class Piece(NamedTuple):
    """Tokens `start` to `end` of document number `row`."""

    row: int
    start: int
    end: int


class Batches(Dataset[dict[str, Any]]):
    """Batches of documents, each of at most `tokens` tokens, drawn without replacement and anew in every epoch.

    The order follows from the seed, so that a run that is resumed sees what it would have seen. Documents longer than
    a batch are taken in pieces; those of one token, and pieces without a label but -100 behind the first, are left out,
    because they teach nothing: a batch of them alone would have a loss of NaN.

    Args:
        rows: the documents, with `input_ids`, and as many `route_ids`, `route_strength` and `labels` where they have
            them; other columns are not read.
        tokens: the most tokens of a batch, padding included where batches are padded.
        count: how many batches.
        seed: the seed of their order.
        packed: whether documents are put one after the other instead of being padded to the longest.

    Raises:
        ValueError: no document has two tokens, of which the second is learnt.
    """

    def __init__(self, rows: Rows, *, tokens: int, count: int, seed: int, packed: bool = True) -> None:
        self._rows = rows
        pieces = _learnt(rows, _pieces(lengths(rows), tokens))
        if not pieces:
            raise ValueError(
                f"rows: got {len(rows)} documents, expected at least one of two tokens or more, and a label that is "
                "not -100 behind its first"
            )
        self.groups = _groups(pieces, tokens, count, seed, packed)

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A batch as the one example that a `GroupCollator` is given."""
        return {"documents": [_cut(self._rows[piece.row], piece) for piece in self.groups[index]]}

    @property
    def tokens(self) -> int:
        """The tokens of all batches together."""
        return sum(piece.end - piece.start for group in self.groups for piece in group)


class PairedBatches(Dataset[dict[str, Any]]):
    """Batches of forget and retain documents in one row, half of the tokens each; route 1 marks what is forgotten."""

    def __init__(
        self, forget: Rows, retain: Rows, *, tokens: int, count: int, seed: int, packed: bool = True
    ) -> None:
        half = max(2, tokens // 2)
        self._halves = [
            Batches(rows, tokens=half, count=count, seed=seed + number, packed=packed)
            for number, rows in enumerate((retain, forget))
        ]

    def __len__(self) -> int:
        return len(self._halves[0])

    def __getitem__(self, index: int) -> dict[str, Any]:
        documents = [
            {name: document[name] for name in ("input_ids", "labels") if name in document}
            | {"route_ids": number}
            for number, half in enumerate(self._halves)
            for document in half[index]["documents"]
        ]
        return {"documents": documents}

    @property
    def tokens(self) -> int:
        """The tokens of all batches together."""
        return sum(half.tokens for half in self._halves)


@dataclass(frozen=True)
class GroupCollator(RouteCollator):
    """Collates the batches of `Batches`: one example is a whole batch of documents.

    Attributes:
        routed: False: the batch has no routes, whether or not the documents have.
    """

    routed: bool = True

    def __call__(self, examples: Sequence[Row]) -> dict[str, Any]:
        """One batch, as a `RouteCollator` makes it of the documents of all examples."""
        documents = [document for example in examples for document in example["documents"]]
        if self.routed:
            return super().__call__(documents)
        plain = [_without_routes(document) | {"route_ids": 0} for document in documents]
        return _without_routes(super().__call__(plain))


def _without_routes(columns: Row) -> dict[str, Any]:
    return {name: column for name, column in columns.items() if name not in ("route_ids", "route_strength")}


def lengths(rows: Rows) -> np.ndarray:  # int64 [documents]
    """The tokens of every document."""
    if hasattr(rows, "with_format"):  # of datasets: counted in Arrow's own memory
        import pyarrow.compute

        if len(rows) == 0:
            return np.zeros(0, dtype=np.int64)
        table = rows.select_columns(["input_ids"]).with_format("arrow")[:]
        return pyarrow.compute.list_value_length(table["input_ids"]).to_numpy().astype(np.int64)
    return np.array([len(row["input_ids"]) for row in rows], dtype=np.int64)


def _pieces(tokens: np.ndarray, most: int) -> list[Piece]:
    """All documents in pieces of two to `most` tokens."""
    return [
        Piece(row, start, min(start + most, int(length)))
        for row, length in enumerate(tokens)
        for start in range(0, int(length), most)
        if min(start + most, int(length)) - start >= 2
    ]


def _learnt(rows: Rows, pieces: Sequence[Piece]) -> list[Piece]:
    """The pieces that have a label behind their first token; all, where documents have no labels."""
    if hasattr(rows, "column_names"):
        labels = rows["labels"] if "labels" in rows.column_names else None
    else:
        labels = [row["labels"] for row in rows] if len(rows) and "labels" in rows[0] else None
    if labels is None:
        return list(pieces)
    taught = [np.flatnonzero(np.asarray(of_one) != NOT_LEARNT) for of_one in labels]
    return [
        piece
        for piece in pieces
        if np.any((taught[piece.row] > piece.start) & (taught[piece.row] < piece.end))
    ]


def _groups(pieces: Sequence[Piece], tokens: int, count: int, seed: int, packed: bool) -> list[list[Piece]]:
    """The pieces of `count` batches, epoch by epoch."""
    groups: list[list[Piece]] = []
    epoch = 0
    while len(groups) < count:
        order = np.random.default_rng((seed, epoch)).permutation(len(pieces))
        groups.extend(_filled((pieces[index] for index in order), tokens, packed))
        epoch += 1
    return groups[:count]


def _filled(pieces: Iterator[Piece], tokens: int, packed: bool) -> Iterator[list[Piece]]:
    """The pieces in their order, as many in a group as there is room for."""
    group: list[Piece] = []
    total = longest = 0
    for piece in pieces:
        length = piece.end - piece.start
        needed = total + length if packed else (len(group) + 1) * max(longest, length)
        if group and needed > tokens:
            yield group
            group, total, longest = [], 0, 0
        group.append(piece)
        total, longest = total + length, max(longest, length)
    if group:
        yield group


def _cut(row: Row, piece: Piece) -> dict[str, Any]:
    """The tokens of a piece, in every column that has one entry a token."""
    columns = {name: row[name] for name in _TOKEN_COLUMNS if name in row}
    return {
        name: column[piece.start : piece.end] if np.ndim(column) else column
        for name, column in columns.items()
    }
