"""Two runs side by side: `python -m bench compare A B`.

Absolute times of a machine wander from run to run; ratios to the base of the same rounds do so less. Both are shown;
the latter count, where there are any.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .report import milliseconds, reason
from .results import RELATIVE, Figure, Run

FASTER, SAME, SLOWER = "faster", "same", "SLOWER"


class Change(NamedTuple):
    """The change of one variant in one pass of one case from a run A to a run B.

    Attributes:
        case, mode, variant: the names of these.
        is_rival: whether it is others' code.
        times: its milliseconds in A and in B.
        relatives: its times relative to the base in A and in B; None: one has none, or it is the base.
    """

    case: str
    mode: str
    variant: str
    is_rival: bool
    times: tuple[Figure, Figure]
    relatives: tuple[Figure, Figure] | None

    def verdict(self, threshold: float) -> str:
        """Faster, same or slower, by the relative times where there are any."""
        return verdict(*(self.relatives or self.times), threshold)

    def is_regression(self, threshold: float) -> bool:
        """Whether it is ours and got slower beside its base."""
        return not self.is_rival and self.relatives is not None and self.verdict(threshold) == SLOWER


def main(a: Path, b: Path, threshold: float) -> int:
    """Prints how B differs from A; 1 if something of gradroute got slower beside its base.

    Args:
        a, b: the JSON or CSV file of a run, or a folder of such files, of which those of one name are compared.
        threshold: by how much ratios may differ and be the same, such as 0.05.

    Raises:
        ValueError: an argument names no run, the folders have none of one name, or nothing was timed in both.
    """
    pairs, text = paired(load(a, "A"), load(b, "B"))
    regressions: list[Change] = []
    number = 0
    for before, after in pairs:
        found = changes(before, after)
        number += len(found)
        regressions += [change for change in found if change.is_regression(threshold)]
        text += ["", *header(before, after), *lines(found, threshold), *unpaired(before, after)]
    if number == 0:
        raise ValueError("A, B: got no case that both timed, expected at least one to compare")
    print("\n".join([*text, "", *summary(regressions, threshold)]))
    return int(bool(regressions))


def load(path: Path, argument: str) -> dict[str, Run]:
    """The run of a file, or those of a folder, by name.

    Raises:
        ValueError: naming the argument, there are none or they cannot be read.
    """
    if not path.exists() and not path.with_suffix(".csv").exists():
        raise ValueError(f"{argument}: {path}: no such file or folder")
    files = sorted(path.glob("*.csv")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{argument}: {path}: got no NAME.csv in it, expected the results of a run")
    try:
        return {run.name: run for run in map(Run.load, files)}
    except FileNotFoundError as error:
        raise ValueError(f"{argument}: {path}: {error.filename} is missing beside it") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{argument}: {path}: not the results of a run: {error}") from None


def paired(a: dict[str, Run], b: dict[str, Run]) -> tuple[list[tuple[Run, Run]], list[str]]:
    """The runs to compare, one of each whatever their names, and in words those that have no other.

    Raises:
        ValueError: no name is in both.
    """
    if len(a) == len(b) == 1:
        return [(*a.values(), *b.values())], []
    both = [name for name in a if name in b]
    if not both:
        raise ValueError(
            f"A has the runs {', '.join(a)}, B has {', '.join(b)}: none has the same name in both"
        )
    lonely = [f"only in A: run {name}" for name in a if name not in b]
    lonely += [f"only in B: run {name}" for name in b if name not in a]
    return [(a[name], b[name]) for name in both], lonely


def changes(a: Run, b: Run) -> list[Change]:
    """The changes of everything that was timed in both, in A's order."""
    return [
        Change(case, mode, variant, entry.get("is_rival", False), times, relatives(a, b, case, variant, mode))
        for case, described in a.cases.items()
        if case in b.cases
        for mode in a.modes(case)
        for variant, entry in described["variants"].items()
        if (times := figures(a, b, case, variant, mode, "speed")) is not None
    ]


def relatives(a: Run, b: Run, case: str, variant: str, mode: str) -> tuple[Figure, Figure] | None:
    """The times relative to the base; None for the base itself, whose ratio is always 1."""
    base = a.cases[case]["base"]
    if variant == base or b.cases[case]["base"] != base:
        return None
    return figures(a, b, case, variant, mode, RELATIVE + base)


def figures(a: Run, b: Run, case: str, variant: str, mode: str, metric: str) -> tuple[Figure, Figure] | None:
    before, after = (run.figure(case, variant, mode, metric) for run in (a, b))
    return None if before is None or after is None else (before, after)


def verdict(before: Figure, after: Figure, threshold: float) -> str:
    """Faster or slower, or the same where the medians are close or the 20th to 80th percentiles overlap."""
    ratio = after.p50 / before.p50
    overlap = before.p20 <= after.p80 and after.p20 <= before.p80
    if overlap or 1 / (1 + threshold) <= ratio <= 1 + threshold:
        return SAME
    return SLOWER if ratio > 1 else FASTER


def header(a: Run, b: Run) -> list[str]:
    """The two runs, and in what they differ besides the code."""
    text = [f"A: run {a.name} on {a.machine}", f"B: run {b.name} on {b.machine}"]
    differing = differences(a.description, b.description)
    if a.machine != b.machine:
        text.append(
            "WARNING: A and B are of different machines: times say nothing about the code, ratios little."
        )
    if differing:
        text += ["", "What else differs:", *aligned([("", "A", "B"), *differing])]
    for name, run in (("A", a), ("B", b)):
        if run.description["environment"].get("clean") is False:
            text.append(
                f"WARNING: {name} is of a checkout with changes: its commit does not say what was measured."
            )
        if run.description.get("interrupted"):
            text.append(f"WARNING: {name} was interrupted.")
    return text


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The entries of the environments, and the rounds, that are not the same."""
    before, after = ({"rounds": one["rounds"], **one["environment"]} for one in (a, b))
    names = dict.fromkeys([*before, *after])
    return [
        (name.replace("_", " "), worded(name, before.get(name)), worded(name, after.get(name)))
        for name in names
        if before.get(name) != after.get(name)
    ]


def worded(name: str, value: object) -> str:
    if value is None:
        return "none"
    if name == "clean":
        return "yes" if value else "no"
    return str(value)[:12] if name == "commit" else str(value)


def lines(found: list[Change], threshold: float) -> list[str]:
    """A row for every change, under the names of their cases."""
    heads = ("pass", "variant", "A", "B", "B/A", "relative A", "relative B", "B/A", "")
    aligned_rows = aligned([heads, *(cells(change, threshold) for change in found)])
    text, before = ["", aligned_rows[0]] if found else ["", "Nothing was timed in both."], None
    for change, row in zip(found, aligned_rows[1:], strict=True):
        text += [] if change.case == before else ["", change.case]
        text.append(row)
        before = change.case
    return text


def cells(change: Change, threshold: float) -> tuple[str, ...]:
    before, after = change.times
    relative = ("–", "–", "–")
    if change.relatives is not None:
        own, other = (figure.p50 for figure in change.relatives)
        relative = (f"{own:.3f}", f"{other:.3f}", f"{other / own:.3f}")
    ratio = f"{after.p50 / before.p50:.3f}"
    by_time = " by time" if change.relatives is None else ""
    said = change.verdict(threshold) + by_time
    return (
        change.mode,
        change.variant,
        milliseconds(before.p50),
        milliseconds(after.p50),
        ratio,
        *relative,
        said,
    )


def aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """The rows as indented lines whose columns have one width each."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        ("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))).rstrip()
        for row in rows
    ]


def unpaired(a: Run, b: Run) -> list[str]:
    """The cases and variants that only one run timed, with the reason if the other tells it."""
    text = [*only(a, b, "A"), *only(b, a, "B")]
    return ["", *text] if text else []


def only(run: Run, other: Run, name: str) -> Iterator[str]:
    for case, described in run.cases.items():
        if case not in other.cases:
            yield f"only in {name}: {case}"
            continue
        for mode in run.modes(case):
            for variant in described["variants"]:
                if run.figure(case, variant, mode) and not other.figure(case, variant, mode):
                    word, why = reason(other.cases[case]["variants"].get(variant, {}))
                    yield f"only in {name}: {case}, {mode}, {variant}" + (f"; {word}: {why}" if word else "")


def summary(regressions: list[Change], threshold: float) -> list[str]:
    if not regressions:
        return [f"Nothing of gradroute got slower beside its base by more than {threshold:.0%}."]
    return [
        f"Slower beside its base by more than {threshold:.0%}:",
        *(f"  {change.case}, {change.mode}, {change.variant}" for change in regressions),
    ]
