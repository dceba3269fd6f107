"""The README's table: a few cases by machine, and how many targets are reached; nothing in it is typed by hand."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .cases import ADDED, SECONDS
from .results import MISSED, NOT_MEASURED, REACHED, RELATIVE, LimitFound, Run, machine_name

#: The cases of the table, in its order, of whichever machine; a machine's runs have some of them.
CASES = (
    "gated MLP, 3.7% of tokens train 64 of 1024 units",
    "gated MLP, 50% of tokens train 64 of 1024 units",
    "gated MLP, 3.7% of tokens train the last 64 units",
    "gated MLP, four routes, quarters, tokens mixed",
    "linear, one token in 16 may not update",
    "training step of the demo",
    "training step of a Llama of 16 layers",
    "attention, both edges",
    "attention, masks by head",
    "AdamW, a batch of retain tokens",
)
PLAIN, IDIOM = "PyTorch without routing", "the detach idiom"
NOTHING = "–"


class Headline(NamedTuple):
    """A row of the table.

    Attributes:
        case: its name.
        variant: gradroute's, which the case's first target is about.
        plain: the variant's time relative to the case's base; None: not measured.
        idiom: its time relative to "detach"; None: there is none.
    """

    case: str
    variant: str
    plain: float | None
    idiom: float | None


def headlines(run: Run) -> Iterator[Headline]:
    """The rows that a run has, in the order of CASES."""
    for name in CASES:
        case = run.cases.get(name)
        if case is not None and case["limits"]:
            variant, mode = case["limits"][0]["variant"], case["limits"][0]["mode"]
            plain, idiom = (
                run.figure(name, variant, mode, RELATIVE + rival) for rival in (case["base"], "detach")
            )
            yield Headline(name, variant, *(None if one is None else one.p50 for one in (plain, idiom)))


def part(runs: Sequence[Run]) -> str:
    """Markdown of one machine: where, the table, and what became of its targets; "" where nothing has a target."""
    rows = [(run, row) for run in runs for row in headlines(run)]
    if not rows:
        return ""
    used = [run for run in runs if any(run is one for one, _ in rows)]
    bases = {run.cases[row.case]["base"] for run, row in rows}
    lines = [
        f"{where(used)}:",
        "",
        f"| time relative to | {PLAIN} | {IDIOM} |",
        "| --- | --- | --- |",
        *(
            f"| {row.case}{beside(run, row, bases)} | {ratio(row.plain)} | {ratio(row.idiom)} |"
            for run, row in rows
        ),
        "",
        textwrap.fill(verdicts(runs), 120, break_long_words=False, break_on_hyphens=False),
    ]
    return "\n".join(lines) + "\n"


def beside(run: Run, row: Headline, bases: set[str]) -> str:
    """Names the base where "without routing" does not: that of an optimizer or of attention."""
    base = run.cases[row.case]["base"]
    return (
        "" if base in ("unmasked", "unrouted") or len(bases) == 1 else f" (`{row.variant}` beside `{base}`)"
    )


def ratio(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2f}"


def where(runs: Sequence[Run]) -> str:
    """The machine, PyTorch's version and the commits of some runs."""
    environments = [run.description["environment"] for run in runs]
    commits = list(dict.fromkeys(commit(one) for one in environments))
    torch = " and ".join(dict.fromkeys(one["torch"] for one in environments))
    text = f"{machine_name(environments[0])}, torch {torch}, commit {', '.join(commits)}"
    return text + (", **interrupted**" if any(run.description.get("interrupted") for run in runs) else "")


def commit(environment: dict[str, object], digits: int = 7) -> str:
    """The commit's digits, and whether the checkout had other changes."""
    if not environment.get("commit"):
        return "none"
    return str(environment["commit"])[:digits] + ("" if environment.get("clean") else " (**dirty**)")


def verdicts(runs: Sequence[Run]) -> str:
    """How many targets are reached, and every one that is missed or was not measured."""
    found = [(name, limit) for run in runs for name, case in run.cases.items() for limit in case["limits"]]
    by_verdict = {
        verdict: [(name, limit) for name, limit in found if limit["verdict"] == verdict]
        for verdict in (REACHED, MISSED, NOT_MEASURED)
    }
    text = f"{len(by_verdict[REACHED])} of {len(found)} targets are reached."
    if by_verdict[MISSED]:
        text += " Missed: " + "; ".join(all_missed(by_verdict[MISSED])) + "."
    if by_verdict[NOT_MEASURED]:
        text += f" {len(by_verdict[NOT_MEASURED])} not measured."
    return text


def all_missed(found: Sequence[tuple[str, LimitFound]]) -> Iterator[str]:
    """Targets that are missed; those of one overhead, of many ops, together."""
    added: dict[float, list[str]] = {}
    for case, limit in found:
        if limit["quantity"] == ADDED:
            name = case.removesuffix(", launch")
            added.setdefault(limit["most"], []).append(f"{name} +{limit['got']:.1f}")
        else:
            yield missed(case, limit)
    for most, cases in added.items():
        yield f"launch of {', '.join(cases)} µs (target {most:g})"


def missed(case: str, limit: LimitFound) -> str:
    """A target that is not of an overhead, and by how much it is missed."""
    got, most = limit["got"], limit["most"]
    if limit["quantity"] == SECONDS:
        return f"{case} {got:.3g} s (target {most:g})"
    return f"{case}, {limit['quantity']} {got:.2f} × {limit['rival']} (target {most:.4g})"
