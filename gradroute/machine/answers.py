"""What `python -m gradroute tune` measured here: answers to questions that have shipped estimates otherwise.

A question has a name, `KIND/WHAT`, such as `backends/routed_linear/bfloat16`; its kind says what an answer looks like:

| kind | what | answer |
| --- | --- | --- |
| `backends` | op, dtype | `[[most elements of the activation, or null], [backends, fastest first]]`, by size |
| `rectangles` | product, dtype | from which share of the work and which tokens a rectangle on they pay: `Rectangles` |
| `run` | product, dtype | how many tokens a product takes at once on the CPU |
| `vendors` | dtype | vendors' kernels of attention, fastest first |
| `skip_below` | dtype | the share of attention's work below which own kernels beat vendors' |
| `tiles` | dtype | how attention is cut into tiles on the CPU: `Tiles` |
| `launch` | entry of kernels/configs.py | a launch configuration |

Whoever follows answers of a kind says by `read_by` how they are read, because it knows what can be one: nothing here
imports them. Each device's file is read at the first question about it, and checked whole. GRADROUTE_TUNING=0 ignores
the files.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch

from ..tracing import constant_when_traced
from . import identity
from .records import DAMAGED, TUNING, Record, warn_ignored

#: What a choice rests on.
MEASURED: str = "measured here"
SHIPPED: str = "shipped estimate"

#: The kinds of questions, in the order in which they are worth asking.
KINDS: tuple[str, ...] = (
    "backends",
    "vendors",
    "skip_below",
    "rectangles",
    "grouped",
    "run",
    "tiles",
    "launch",
)

#: The dtypes that questions may be about.
DTYPES: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

#: The largest count in an answer: of tokens, rows or keys. Sums of two still fit PyTorch's 64 bits.
MOST: int = 1 << 40

What = tuple["str | torch.dtype", ...]
Derived = TypeVar("Derived")
Read = Callable[[What, Any], Any]
Orders = tuple[tuple["int | None", tuple[str, ...]], ...]


class Rectangles(NamedTuple):
    """When the products of a backward are made as rectangles.

    Attributes:
        min_saving: the least share of the work that they must leave out.
        min_tokens: the fewest tokens a rectangle, on average.
    """

    min_saving: float
    min_tokens: int


class Tiles(NamedTuple):
    """How attention is cut into tiles on the CPU.

    Attributes:
        rows: the most rows of a tile, which are queries of the heads that share keys.
        keys: the most keys of a tile.
    """

    rows: int
    keys: int


def order(value: Any, known: Collection[str]) -> tuple[str, ...]:
    """Some of the known names, each once; raises ValueError where the value is none."""
    names = tuple(value)
    if not names or len(set(names)) != len(names) or not all(name in known for name in names):
        raise ValueError(f"got {value!r}, expected some of {', '.join(known)}, each once")
    return names


def count(value: Any) -> int:
    """A whole number of 1 to MOST; raises ValueError where the value is none."""
    if type(value) is not int or not 1 <= value <= MOST:
        raise ValueError(f"got {value!r}, expected a whole number of 1 to {MOST}")
    return value


def number(value: Any) -> float:
    """A number of at least 0; raises ValueError where the value is none."""
    if type(value) not in (int, float) or not 0 <= value < float("inf"):
        raise ValueError(f"got {value!r}, expected a number of at least 0")
    return float(value)


def check_what(what: What, *expected: Collection[str | torch.dtype]) -> None:
    """Raises ValueError unless a question is about one of each of these."""
    if len(what) != len(expected):
        raise ValueError(f"got {len(what)} words after the kind, expected {len(expected)}")
    for word, known in zip(what, expected, strict=True):
        if word not in known:
            raise ValueError(f"got {_text(word)!r}, expected one of {', '.join(map(_text, known))}")


def read_by(kind: str, read: Read) -> None:
    """Says how answers of a kind are read: `read(what, value)` makes one of what a file says.

    It raises one of `records.DAMAGED` where the file says something else.
    """
    assert kind in KINDS
    _readers[kind] = read
    forget()


def answer(device: torch.device, kind: str, *what: str | torch.dtype) -> Any:
    """What was measured on a device, as the kind has it; None where nothing was."""
    found = _found.get(device)
    if found is None:
        found = _found[device] = _read(device)
    return found.get((kind, *what))


@constant_when_traced
def backends(op: str, device: torch.device, dtype: torch.dtype) -> Orders | None:
    """The orders of an op's backends by size."""
    return answer(device, "backends", op, dtype)


@constant_when_traced
def vendors(device: torch.device, dtype: torch.dtype) -> tuple[str, ...] | None:
    """The vendors' kernels of attention, fastest first."""
    return answer(device, "vendors", dtype)


@constant_when_traced
def share_for_own(device: torch.device, dtype: torch.dtype) -> float | None:
    """The share of attention's work below which own kernels are faster than vendors'."""
    return answer(device, "skip_below", dtype)


@constant_when_traced
def tiles(device: torch.device, dtype: torch.dtype) -> Tiles | None:
    """How attention is cut into tiles."""
    return answer(device, "tiles", dtype)


def rectangles(product: str, device: torch.device, dtype: torch.dtype) -> Rectangles | None:
    """When a product ("linear", "mlp" or "gated_mlp") is made as rectangles."""
    return answer(device, "rectangles", product, dtype)


def grouped(product: str, device: torch.device, dtype: torch.dtype) -> float | None:
    """The least share of the work that a grouped product must leave out; products are those of `rectangles`."""
    return answer(device, "grouped", product, dtype)


def run(product: str, device: torch.device, dtype: torch.dtype) -> int | None:
    """How many tokens a product takes at once on the CPU."""
    return answer(device, "run", product, dtype)


def launch(entry: str, device: torch.device) -> dict[str, int] | None:
    """The configuration of an entry of kernels/configs.py."""
    return answer(device, "launch", entry)


def derived(key: Any, derive: Callable[[], Derived]) -> Derived:
    """What `derive` makes of answers, kept under `key` until they change."""
    if key not in _derived:
        _derived[key] = derive()
    return _derived[key]


class _Asked(dict[tuple[Any, ...], Any]):
    """Answers by question, and the questions that were asked."""

    def __init__(self, answers: Mapping[tuple[Any, ...], Any]) -> None:
        super().__init__(answers)
        self.questions: list[str] = []

    def get(self, key: tuple[Any, ...], default: Any = None) -> Any:
        question = name_of(*key)
        if question not in self.questions:
            self.questions.append(question)
        return super().get(key, default)


@contextmanager
def trying(device: torch.device, answers: Mapping[str, Any]) -> Iterator[list[str]]:
    """Within it these are a device's only answers, as values of files by question; for measuring them.

    Yields:
        The questions that are asked within it, as they come.
    """
    before = _found.get(device)
    tried = _Asked({_key(question): parsed(question, value) for question, value in answers.items()})
    _found[device] = tried
    _derived.clear()
    try:
        yield tried.questions
    finally:
        _found.pop(device, None)
        _derived.clear()
        if before is not None:
            _found[device] = before


def name_of(kind: str, *what: str | torch.dtype) -> str:
    """The name of a question."""
    return "/".join((kind, *map(_text, what)))


def parsed(question: str, value: Any) -> Any:
    """An answer made of what a file says.

    Raises:
        ValueError, or another one of `records.DAMAGED`: it says something else.
    """
    kind, *what = _key(question)
    if kind not in KINDS:
        raise ValueError(f"got the question {question!r}, expected one of {', '.join(KINDS)}")
    if kind not in _readers:
        raise ValueError(f"nothing that follows answers of the kind {kind!r} is loaded")
    return _readers[kind](tuple(what), value)


def damage_of(question: str, found: Any) -> Exception | None:
    """What a finding raises that has no answer to its question; None where it has one.

    An answer of a kind that nothing follows in this process cannot be judged, and is taken as none of them.
    """
    if (kind := question.split("/")[0]) in KINDS and kind not in _readers:
        return None
    try:
        parsed(question, found["answer"])
    except DAMAGED as error:
        return error
    return None


def reads_files() -> bool:
    """Whether files are followed; GRADROUTE_TUNING=0 has them ignored."""
    return _reads_files


def forget() -> None:
    """Has the files read again at the next call."""
    _found.clear()
    _derived.clear()


_readers: dict[str, Read] = {}
_found: dict[torch.device, dict[tuple[Any, ...], Any]] = {}
_derived: dict[Any, Any] = {}
_NAMED_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


def _from_environment() -> bool:
    """Whether GRADROUTE_TUNING lets files be read."""
    said = os.environ.get("GRADROUTE_TUNING") or "1"
    if said not in ("0", "1"):
        raise ValueError(f"GRADROUTE_TUNING: got {said!r}, expected 0 (ignore what was measured here) or 1")
    return said == "1"


_reads_files = _from_environment()


def _text(what: str | torch.dtype) -> str:
    return what if isinstance(what, str) else str(what).removeprefix("torch.")


def _key(question: str) -> tuple[Any, ...]:
    """A question's words, dtypes as such: an answer is looked up without making a name."""
    return tuple(_NAMED_DTYPES.get(word, word) for word in question.split("/"))


def _read(device: torch.device) -> dict[tuple[Any, ...], Any]:
    if not _reads_files or not identity.keeps_findings(device):
        return {}
    record = Record(TUNING, device)
    found = {}
    for question, written in record.read().items():
        damage = damage_of(question, written)
        if damage is not None:
            warn_ignored(record.file, damage, question)
        elif _key(question)[0] in _readers:  # when a reader is loaded later, files are read again
            found[_key(question)] = parsed(question, written["answer"])
    return found
