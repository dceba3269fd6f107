"""Tokenised documents on disk: folders of `datasets.Dataset.save_to_disk`, written in pieces that fit any memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

#: Columns of documents → their type, in pyarrow's words; lists are aligned to `input_ids`.
COLUMNS: dict[str, str] = {
    "text": "string",
    "source": "string",
    "input_ids": "list int32",
    "offsets": "list list int32",
    "label": "string",
    "labels": "list int32",
    "route_ids": "list int16",
    "route_strength": "list float",
}


def load(folder: Path) -> Any:
    """The documents of a folder, a `datasets.Dataset` that reads them from the disk as they are asked for."""
    import datasets

    return datasets.load_from_disk(str(folder))


def batches(documents: Any, size: int = 1000) -> Iterator[dict[str, list[Any]]]:
    """Documents in pieces: column → list."""
    for start in range(0, len(documents), size):
        yield documents[start : start + size]


class Writer:
    """Writes documents piece by piece; a context manager, at whose end the folder is there.

    Args:
        folder: where `load` will find them.
        columns: the columns, of COLUMNS.
    """

    def __init__(self, folder: Path, columns: list[str]) -> None:
        import pyarrow

        self._folder = folder
        self._stream = folder.with_name(f"{folder.name}.arrow")
        self._schema = pyarrow.schema([(name, _type(COLUMNS[name])) for name in columns])
        self._file = pyarrow.ipc.new_stream(str(self._stream), self._schema)
        self.documents = 0

    def write(self, columns: Mapping[str, list[Any]]) -> None:
        """Writes the documents of some columns; None is a missing value."""
        import pyarrow

        self._file.write_table(
            pyarrow.table({name: columns[name] for name in self._schema.names}, self._schema)
        )
        self.documents += len(columns["text"])

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()
        if error is None:
            with _without_bars() as datasets:
                datasets.Dataset.from_file(str(self._stream)).save_to_disk(str(self._folder))
        self._stream.unlink()


def _type(words: str) -> Any:
    import pyarrow

    head, _, item = words.partition(" ")
    return (
        pyarrow.list_(_type(item))
        if head == "list"
        else getattr(pyarrow, {"float": "float32"}.get(head, head))()
    )


class _without_bars:
    """Takes the bars of datasets away for a while, because the caller has its own."""

    def __enter__(self) -> Any:
        import datasets

        self._were_shown = not datasets.are_progress_bars_disabled()
        datasets.disable_progress_bars()
        return datasets

    def __exit__(self, *_: object) -> None:
        import datasets

        if self._were_shown:
            datasets.enable_progress_bars()
