"""What `python -m gradroute tune` measured here: answers to questions that have shipped estimates otherwise.

A question has a name, `KIND/WHAT`, such as `backends/routed_linear/bfloat16`; its kind says what an answer looks like:

| kind | what | answer |
| --- | --- | --- |
| `backends` | op, dtype | `[[most elements of the activation, or null], [backends, fastest first]]`, by size |
| `rectangles` | product, dtype | from which share of the work and which tokens a rectangle on they pay: `Rectangles` |
| `run` | product, dtype | how many tokens a product takes at once on the CPU |
| `vendors` | dtype | vendors' kernels of attention, fastest first |
| `skip_below` | dtype | the share of attention's work below which own kernels beat vendors' |
| `launch` | entry of kernels/configs.py | a launch configuration |

Each device's file is read at the first question about it, and checked whole. GRADROUTE_TUNING=0 ignores the files.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from ..tracing import constant_when_traced
from . import identity
from .records import TUNING, Record, warn_ignored

#: What a choice rests on.
MEASURED: str = "measured here"
SHIPPED: str = "shipped estimate"

Orders = tuple[tuple["int | None", tuple[str, ...]], ...]


class Rectangles(NamedTuple):
    """When the products of a backward are made as rectangles.

    Attributes:
        min_saving: the least share of the work that they must leave out.
        min_tokens: the fewest tokens a rectangle, on average.
    """

    min_saving: float
    min_tokens: int


def _order(value: Any, known: Collection[str]) -> tuple[str, ...]:
    """Some of the known names, each once."""
    names = tuple(value)
    if not names or len(set(names)) != len(names) or not all(name in known for name in names):
        raise ValueError(f"got {value!r}, expected some of {', '.join(known)}, each once")
    return names


def _orders(value: Any) -> Orders:
    """Orders of backends by size, the smallest sizes first; the last one has no limit."""
    from ..backends import BACKENDS

    found = tuple((limit, _order(names, BACKENDS)) for limit, names in value)
    limits = [limit for limit, _ in found]
    if not limits or limits[-1] is not None or any(type(limit) is not int for limit in limits[:-1]):
        raise ValueError(f"got the limits {limits}, expected whole numbers, and null for the last one")
    if limits[:-1] != sorted(set(limits[:-1])):
        raise ValueError(f"got the limits {limits}, expected growing ones")
    return found


def _vendors(value: Any) -> tuple[str, ...]:
    from ..backends.vendor import VENDORS

    return _order(value, VENDORS)


def _rectangles(value: Any) -> Rectangles:
    return Rectangles(_number(value["min_saving"]), _count(value["min_tokens"]))


def _count(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"got {value!r}, expected a whole number of at least 1")
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not 0 <= value < float("inf"):
        raise ValueError(f"got {value!r}, expected a number of at least 0")
    return float(value)


def _launch(value: Any) -> dict[str, int]:
    return {str(name): _count(number) for name, number in value.items()}


#: By kind of question: what makes an answer of what a file says, and raises where it says something else.
KINDS: Mapping[str, Callable[[Any], Any]] = {
    "backends": _orders,
    "rectangles": _rectangles,
    "run": _count,
    "vendors": _vendors,
    "skip_below": _number,
    "launch": _launch,
}


def answer(device: torch.device, kind: str, *what: str | torch.dtype) -> Any:
    """What was measured on a device, as the kind has it; None where nothing was."""
    found = _found.get(device)
    if found is None:
        found = _found[device] = _read(device)
    if not found:
        return None
    return found.get("/".join((kind, *map(_word, what))))


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


def rectangles(product: str, device: torch.device, dtype: torch.dtype) -> Rectangles | None:
    """When a product ("linear", "mlp" or "gated_mlp") is made as rectangles."""
    return answer(device, "rectangles", product, dtype)


def run(product: str, device: torch.device, dtype: torch.dtype) -> int | None:
    """How many tokens a product takes at once on the CPU."""
    return answer(device, "run", product, dtype)


def launch(entry: str, device: torch.device) -> dict[str, int] | None:
    """The configuration of an entry of kernels/configs.py."""
    return answer(device, "launch", entry)


@contextmanager
def trying(device: torch.device, answers: Mapping[str, Any]) -> Iterator[None]:
    """Within it these are a device's only answers, as values of files by question; for measuring them."""
    before = _found.get(device)
    _found[device] = {question: parsed(question, value) for question, value in answers.items()}
    try:
        yield
    finally:
        del _found[device]
        if before is not None:
            _found[device] = before


def parsed(question: str, value: Any) -> Any:
    """An answer made of what a file says; raises ValueError, KeyError or TypeError where it says something else."""
    kind = question.partition("/")[0]
    if kind not in KINDS:
        raise ValueError(f"got the question {question!r}, expected one of {', '.join(KINDS)}")
    return KINDS[kind](value)


def forget() -> None:
    """Has the files read again at the next call."""
    _found.clear()


_found: dict[torch.device, dict[str, Any]] = {}


def _from_environment() -> bool:
    """Whether GRADROUTE_TUNING lets files be read."""
    said = os.environ.get("GRADROUTE_TUNING") or "1"
    if said not in ("0", "1"):
        raise ValueError(f"GRADROUTE_TUNING: got {said!r}, expected 0 (ignore what was measured here) or 1")
    return said == "1"


_reads_files = _from_environment()


def _word(what: str | torch.dtype) -> str:
    return what if isinstance(what, str) else str(what).removeprefix("torch.")


def _read(device: torch.device) -> dict[str, Any]:
    if not _reads_files or not identity.keeps_findings(device):
        return {}
    record = Record(TUNING, device)
    found = {}
    for question, written in record.read().items():
        try:
            found[question] = parsed(question, written["answer"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            warn_ignored(record.file, f"{question}: {type(error).__name__}: {error}")
    return found
