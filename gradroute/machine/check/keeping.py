"""Verdicts as they are kept: what becomes of an earlier one when a backend was checked again.

A run that found a backend wrong stands against it until one passes that checks no less: the whole of the same seed, and
not the quick one where the other was not. A run of a part can find a backend wrong, and clears it of nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

# So many lines of a run are kept; the rest is counted.
MOST_LINES = 20


class Run(NamedTuple):
    """What one run found about a backend.

    Attributes:
        seed: of the run.
        quick: whether it was a quick one.
        is_whole: whether it checked everything that such a run does.
        failures: what was wrong, a line each.
        unchecked: what could not be checked here, a line each.
        date: when, in ISO 8601.
    """

    seed: int
    quick: bool
    is_whole: bool
    failures: tuple[str, ...]
    unchecked: tuple[str, ...]
    date: str


def verdict(before: Any, run: Run) -> dict[str, Any] | None:
    """The verdict to keep, as JSON; None: the one before stands as it is.

    Args:
        before: the verdict that is kept, if any, in whatever form it is found.
        run: what was found now.
    """
    if not run.failures and not run.is_whole:
        return None
    standing = [earlier for earlier in against(before) if not _clears(run, earlier)]
    if run.failures:
        standing = _with(standing, run)
    lines = [line for one in standing for line in one["failures"]]
    return {
        "passed": not standing,
        "date": run.date,
        "failures": lines,
        "against": standing,
        "unchecked": list(run.unchecked),
    }


def against(kept: Any) -> list[dict[str, Any]]:
    """The runs that stand against a backend: {"seed", "quick", "failures"} each."""
    if not isinstance(kept, Mapping) or kept.get("passed") is not False:
        return []
    try:
        return [
            {"seed": int(one["seed"]), "quick": bool(one["quick"]), "failures": list(one["failures"])}
            for one in kept["against"]
        ]
    except (KeyError, TypeError, ValueError):  # of another form: what it says was found by a whole run
        return [{"seed": 0, "quick": False, "failures": list(kept.get("failures") or ())}]


def _clears(run: Run, earlier: Mapping[str, Any]) -> bool:
    return run.is_whole and run.seed == earlier["seed"] and (earlier["quick"] or not run.quick)


def _with(standing: Iterable[dict[str, Any]], run: Run) -> list[dict[str, Any]]:
    """The runs that stand, this one among them; another of the same seed and kind is one with it."""
    others, lines = [], list(shortened(run.failures))
    for one in standing:
        if (one["seed"], one["quick"]) == (run.seed, run.quick):
            lines += [line for line in one["failures"] if line not in lines]
        else:
            others.append(one)
    return [{"seed": run.seed, "quick": run.quick, "failures": lines}, *others]


def shortened(lines: tuple[str, ...]) -> tuple[str, ...]:
    """The first lines, and how many more there are."""
    if len(lines) <= MOST_LINES:
        return lines
    return (*lines[:MOST_LINES], f"and {len(lines) - MOST_LINES} more")
