"""What a run says while it works: lines, and a bar above which they stay."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

from .question import Question


class Lines:
    """Lines to a stream, and a bar on standard error where tqdm is installed and that is a terminal.

    Attributes:
        stream: where lines go.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        has_tqdm = importlib.util.find_spec("tqdm") is not None
        self._tqdm: Any = importlib.import_module("tqdm").tqdm if has_tqdm else None

    def write(self, line: str) -> None:
        """Writes a line."""
        if self._tqdm is None:
            print(line, file=self.stream)
        else:
            self._tqdm.write(line, file=self.stream)
        self.stream.flush()

    def one_by_one(self, asked: Sequence[Question]) -> Iterator[Question]:
        """The questions, announced by a bar, or by a line each where there is none."""
        if self._tqdm is None or not sys.stderr.isatty():
            for number, question in enumerate(asked, 1):
                print(f"[{number}/{len(asked)}] {question.name}", file=sys.stderr, flush=True)
                yield question
            return
        with self._tqdm(asked, unit="question") as bar:
            for question in bar:
                bar.set_description(question.name)
                yield question
