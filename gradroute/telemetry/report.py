"""Records as tables, lines of JSON and scalars."""

from __future__ import annotations

import importlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from ..arguments import check_is

if TYPE_CHECKING:
    from rich.table import Table
    from torch.utils.tensorboard import SummaryWriter

Record = Mapping[str, float]


class Writer(Protocol):
    """A log of scalars, such as TensorBoard's SummaryWriter."""

    def add_scalar(self, tag: str, value: float, step: int, /) -> object:
        """Takes one value."""


def cells(record: Record, columns: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """The header and rows of a record's table: the last part of a key is its column, the rest its row.

    Args:
        record: the record.
        columns: the names of columns in their order; those that no key has are left out.
    """
    rows: dict[str, dict[str, str]] = {}
    for key, value in record.items():
        row, _, column = key.rpartition("/")
        if row:
            rows.setdefault(row, {})[column] = "–" if math.isnan(value) else f"{value:.4g}"
    present = {column for row in rows.values() for column in row}
    shown = [name for name in dict.fromkeys(columns) if name in present]
    return ["", *shown], [[row, *(values.get(name, "") for name in shown)] for row, values in rows.items()]


def text_table(record: Record, columns: Sequence[str]) -> str:
    """A record as a table of plain text."""
    header, rows = cells(record, columns)
    header[0] = f"step {record['step']:.0f}"
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = (
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in (header, *rows)
    )
    return "\n".join(lines)


def require_rich() -> None:
    """Raises ImportError where rich is missing."""
    try:
        importlib.import_module("rich.table")
    except ImportError as error:
        raise ImportError(
            "table: got no package rich, expected it installed: pip install 'gradroute[telemetry]'; "
            "str(telemetry) needs none"
        ) from error


def rich_table(record: Record, columns: Sequence[str]) -> Table:
    """A record as a table of rich."""
    from rich.table import Table

    header, rows = cells(record, columns)
    table = Table(title=f"step {record['step']:.0f}")
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def write_json_lines(path: str | os.PathLike[str], records: Iterable[Record]) -> None:
    """Writes records, one JSON object a line; numbers that are not finite become null."""
    with open(path, "w", encoding="utf-8") as file:
        for record in records:
            finite = {key: value if math.isfinite(value) else None for key, value in record.items()}
            file.write(json.dumps(finite) + "\n")


def summary_writer(log_dir: str | os.PathLike[str] | None = None, **options: Any) -> SummaryWriter:
    """TensorBoard's SummaryWriter, for `Telemetry.log_to`.

    Args:
        log_dir: the folder to write to; default: TensorBoard's, in runs/.
        options: further arguments of torch.utils.tensorboard.SummaryWriter.

    Raises:
        ImportError: tensorboard is missing.
        TypeError: a folder that is no path.
    """
    check_is("log_dir", log_dir, (str, os.PathLike, type(None)), "the path of a folder, or None")
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(
            "summary_writer: got no package tensorboard, expected it installed: pip install 'gradroute[telemetry]'"
        ) from error
    return SummaryWriter(log_dir, **options)
