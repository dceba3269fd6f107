"""What a run says while it works: lines, and how far it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TextIO

from ..progress import Progress
from .question import Question


class Lines:
    """Lines to a stream, above the progress of a run.

    Attributes:
        stream: where lines go.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self._progress: Progress | None = None

    def write(self, line: str) -> None:
        """Writes a line."""
        if self._progress is not None:
            self._progress.write(line, self.stream)
        else:
            print(line, file=self.stream, flush=True)

    def one_by_one(self, asked: Sequence[Question]) -> Iterator[Question]:
        """The questions, each announced."""
        self._progress = Progress(len(asked), "question")
        try:
            for question in asked:
                self._progress.begin(question.name)
                yield question
                self._progress.end()
        finally:
            self._progress.close()
            self._progress = None
