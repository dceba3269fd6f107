"""Texts of the files that a config names: JSONL, Parquet, plain text, and folders of `datasets`."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .conversations import Message, checked_messages
from .files import matched
from .reading import ConfigError, nearest
from .repeats import Repeats
from .sections import Source

_ENDINGS = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
}
_OF_DATASETS = ("dataset_info.json", "dataset_dict.json")


class Text(NamedTuple):
    """One text before it is tokenised.

    Attributes:
        text: the text, with its prompt before it; of a conversation, what was said.
        label: what the column of labels says of it, as a string; None where no column was named.
        place: where it stands, for errors.
        prompt: how many of its characters are its prompt.
        messages: the conversation; None where the source has none.
    """

    text: str
    label: str | None
    place: str
    prompt: int = 0
    messages: tuple[Message, ...] | None = None


def texts(key: str, source: Source) -> Iterator[Text]:
    """The texts of one source, in the order of their files' names and inside them.

    Args:
        key: the dotted key of the source, for errors.
        source: which files, and how they are read.

    Raises:
        ConfigError: files of another format than the config says, a column that is not there, a value that is no text.
    """
    count, repeats = 0, Repeats()
    for path in _paths(key, source):
        try:
            for text in _unrepeated(source, repeats, _READERS[_format(key, source, path)](key, source, path)):
                if count == source.most:
                    return
                count += 1
                yield text
        except (UnicodeDecodeError, EOFError, OSError, zlib.error) as error:
            raise ConfigError(f"{key}.path: got {path}, expected a file that can be read ({error})") from None


def _unrepeated(source: Source, repeats: Repeats, found: Iterator[Text]) -> Iterator[Text]:
    """Texts without those that the source leaves out as repeats; whole paragraphs are put together last."""
    kept = found if source.repeats == "keep" else (text for text in found if not repeats.has(text.text))
    return _joined(source, kept) if source.split == "paragraphs" else kept


def _joined(source: Source, paragraphs: Iterator[Text]) -> Iterator[Text]:
    """The paragraphs of one file as documents, each of whole paragraphs: as many as reach `characters`."""
    taken: list[Text] = []
    for paragraph in paragraphs:
        if not paragraph.text.strip():
            continue
        taken.append(paragraph)
        if sum(len(text.text) for text in taken) >= source.characters:
            yield _document(taken)
            taken = []
    if taken:
        yield _document(taken)


def _document(paragraphs: list[Text]) -> Text:
    return Text("\n\n".join(text.text for text in paragraphs), None, paragraphs[0].place)


def check_source(key: str, source: Source) -> None:
    """Raises ConfigError where the format of a source's files cannot be told, or the config's does not fit them."""
    if source.messages is not None:
        for name, value, default in (("prompt", source.prompt, None), ("text", source.text, "text")):
            if value != default:
                raise ConfigError.of(
                    f"{key}.{name}", value, "nothing beside messages, which are all of the text"
                )
    for path in _paths(key, source):
        _check_splits(key, path)
        kind = _format(key, source, path)
        if kind != "text" and source.split != "file":
            raise ConfigError.of(f"{key}.split", source.split, f"file, because {path.name} is {kind}")
        for name in ("label", "prompt", "messages"):
            if kind == "text" and getattr(source, name) is not None:
                expected = f"null, because {path.name} is text, without columns"
                raise ConfigError.of(f"{key}.{name}", getattr(source, name), expected)


def _paths(key: str, source: Source) -> list[Path]:
    """The files of a source, sorted: those of a folder, unless `datasets` made it."""
    found: list[Path] = []
    for path in matched(source.path):
        if not path.is_dir() or _is_of_datasets(path):
            found.append(path)
        else:
            known = [file for file in sorted(path.rglob("*")) if file.is_file() and _ending(file) in _ENDINGS]
            kinds = sorted({_ENDINGS[_ending(file)] for file in known})
            if source.format == "auto" and len(kinds) > 1:
                expected = f"one of {', '.join(kinds)}, because the folder {path.name} has files of each"
                raise ConfigError.of(f"{key}.format", "auto", expected)
            if source.format in ("jsonl", "parquet"):
                known = [file for file in known if _ENDINGS[_ending(file)] == source.format]
            if source.format == "text":
                known = [file for file in sorted(path.rglob("*")) if file.is_file() and file.name[0] != "."]
            found += known
    if not found:
        endings = ", ".join(_ENDINGS)
        raise ConfigError.of(
            f"{key}.path", source.path, f"a folder of datasets, or one with files of {endings}"
        )
    return found


def _is_of_datasets(path: Path) -> bool:
    return path.is_dir() and any((path / name).exists() for name in _OF_DATASETS)


def _check_splits(key: str, path: Path) -> None:
    """Raises ConfigError of a folder with several splits: to train on one that somebody kept for tests is a mistake."""
    splits = path / "dataset_dict.json"
    names = json.loads(splits.read_text(encoding="utf-8")).get("splits", []) if splits.is_file() else []
    if len(names) > 1:
        expected = f"the folder of one of its splits, {', '.join(names)}: {path / names[0]}"
        raise ConfigError.of(f"{key}.path", str(path), expected)


def format_of_name(path: Path) -> str | None:
    """The format that a file's name tells, or None."""
    return _ENDINGS.get(_ending(path))


def _ending(path: Path) -> str:
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def _format(key: str, source: Source, path: Path) -> str:
    """The format of one file or folder."""
    if source.format == "datasets" and not _is_of_datasets(path):
        raise ConfigError.of(f"{key}.path", str(path), "a folder of datasets.Dataset.save_to_disk")
    if _is_of_datasets(path):
        if source.format not in ("auto", "datasets"):
            raise ConfigError.of(
                f"{key}.format", source.format, f"datasets, which made the folder {path.name}"
            )
        return "datasets"
    if source.format != "auto":
        return source.format
    if _ending(path) not in _ENDINGS:
        expected = f"one of jsonl, parquet, text, because the name {path.name} does not tell"
        raise ConfigError.of(f"{key}.format", "auto", expected)
    return _ENDINGS[_ending(path)]


def _of_jsonl(key: str, source: Source, path: Path) -> Iterator[Text]:
    """One object a line; or one list of objects."""
    with _opened(path) as lines:
        first = lines.read(1)
        lines.seek(0)
        if first == "[":
            for index, row in enumerate(_json(key, lines.read(), str(path))):
                yield _of_row(key, source, row, f"{path}, object {index}")
            return
        for number, line in enumerate(lines, 1):
            if line.strip():
                place = f"{path}, line {number}"
                yield _of_row(key, source, _json(key, line, place), place)


def _json(key: str, text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{key}: got {text[:40]!r} in {place}, expected JSON ({error})") from None


def _of_parquet(key: str, source: Source, path: Path) -> Iterator[Text]:
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise ConfigError(f"{key}.path: got {path}, expected a Parquet file ({error})") from None
    columns = _columns(key, source, file.schema_arrow.names, str(path))
    number = 0
    for batch in file.iter_batches(columns=columns):
        for row in batch.to_pylist():
            yield _of_row(key, source, row, f"{path}, row {number}")
            number += 1


def _of_datasets(key: str, source: Source, path: Path) -> Iterator[Text]:
    from .documents import batches, load

    loaded = load(path)
    for name, split in loaded.items() if isinstance(loaded, dict) else [("", loaded)]:
        columns = _columns(key, source, split.column_names, f"{path} {name}".strip())
        for start, batch in enumerate(batches(split.select_columns(columns))):
            for index in range(len(batch[columns[0]])):
                row = {column: batch[column][index] for column in columns}
                yield _of_row(key, source, row, f"{path} {name}, row {start * 1000 + index}")


def _of_text(key: str, source: Source, path: Path) -> Iterator[Text]:
    with _opened(path) as file:
        text = file.read()
    if source.split in ("blank_lines", "paragraphs"):
        pieces = re.split(r"\n(?:[ \t]*\n)+", text)  # the next line keeps its indentation
    elif source.split == "characters":
        pieces = [text[start : start + source.characters] for start in range(0, len(text), source.characters)]
    else:
        pieces = [text]
    for number, piece in enumerate(pieces, 1):
        yield Text(piece, None, f"{path}, piece {number}")


_READERS: dict[str, Callable[[str, Source, Path], Iterator[Text]]] = {
    "jsonl": _of_jsonl,
    "parquet": _of_parquet,
    "datasets": _of_datasets,
    "text": _of_text,
}


def _opened(path: Path) -> Any:
    """A text file, or one that gzip has packed. A byte order mark is no part of the text."""
    return (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig")


def _columns(key: str, source: Source, names: list[str], place: str) -> list[str]:
    """The columns that a source reads, which must be there."""
    wanted = {"text": source.text} if source.messages is None else {"messages": source.messages}
    wanted |= {name: column for name in ("label", "prompt") if (column := getattr(source, name)) is not None}
    for option, name in wanted.items():
        if name not in names:
            expected = f"a column of {place}: {', '.join(names)}{nearest(name, names)}"
            raise ConfigError.of(f"{key}.{option}", name, expected)
    return list(dict.fromkeys(wanted.values()))


def _of_row(key: str, source: Source, row: Any, place: str) -> Text:
    if not isinstance(row, dict):
        raise ConfigError(f"{key}: got a {type(row).__name__} in {place}, expected an object")
    _columns(key, source, list(row), place)
    label = None if source.label is None else row[source.label]
    if source.label is not None and not isinstance(label, (str, int, bool)):
        raise ConfigError.of(f"{key}.label", label, f"a string or whole number in {source.label} of {place}")
    label = None if label is None else str(label)
    if source.messages is not None:
        expected = f"a list of {{role, content}} in the column {source.messages} of {place}"
        messages = checked_messages(f"{key}.messages", row[source.messages], expected)
        said = "\n\n".join(message["content"] for message in messages)
        return Text(said, label, place, messages=messages)
    parts = {"text": source.text} if source.prompt is None else {"prompt": source.prompt, "text": source.text}
    for option, column in parts.items():
        if not isinstance(row[column], str):
            raise ConfigError.of(
                f"{key}.{option}", row[column], f"a string in the column {column} of {place}"
            )
    prompt = "" if source.prompt is None else row[source.prompt]
    return Text(prompt + row[source.text], label, place, prompt=len(prompt))
