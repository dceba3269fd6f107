"""The record of one step, on the device until somebody reads it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from ..arguments import check_int


class Record(Mapping[str, float]):
    """The values that one step measured, a mapping of floats, on the device until it is first read.

    Raises:
        RuntimeError: it is read before its step has ended.
    """

    def __init__(self, step: int) -> None:
        self._values: dict[str, float] = {"step": float(check_int("step", step, 0))}
        self._unread: list[tuple[list[str], Tensor]] | None = None
        self.is_complete = False

    def fill(self, results: list[tuple[list[str], Tensor]]) -> None:
        """Takes names with values `[n]`, once."""
        self._unread = results
        self.is_complete = True

    def add(self, values: Mapping[str, float]) -> None:
        """Takes values that are on the host already, beside those of `fill`."""
        self._values.update(values)

    def _read(self) -> dict[str, float]:
        if not self.is_complete:
            raise RuntimeError("record: got a read before the step has ended, expected it after the `with`")
        if self._unread is not None:
            probed = self._values
            self._values = {"step": probed.pop("step")}
            for names, values in self._unread:
                self._values.update(zip(names, values.tolist(), strict=True))
            self._values.update(probed)
            self._unread = None
        return self._values

    def __getitem__(self, key: str) -> float:
        return self._read()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._read())

    def __repr__(self) -> str:
        return f"Record({self._read()})" if self.is_complete else "Record(its step has not ended)"
