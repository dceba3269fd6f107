"""What was found about a backend, counted by op and kind of check, and worded for people and for machines."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

from .cases import KINDS, Case, Selection
from .judging import REFUSED, RIGHT, UNCHECKED, UNMADE, WRONG, Outcome
from .keeping import Run, shortened
from .workers import Plan

# Far rows may need more memory than there is, and not all that torch does can be captured: the verdict says so.
MAY_STAY_UNCHECKED = ("strides", "graphs")


class Failure(NamedTuple):
    """A case that went wrong.

    Attributes:
        case: itself.
        text: what is wrong, and by how much.
        repeat: the command that repeats it.
    """

    case: Case
    text: str
    repeat: str

    @property
    def line(self) -> str:
        """All of it in a line."""
        return f"{self.case}: {self.text}; repeat it by `{self.repeat}`"


class Findings:
    """What a run found about a backend on a device.

    Attributes:
        plan: how it is run.
        selection: what was asked for.
        total: how many cases that is.
        counts: by op and kind of check, how often which state came.
        failures: the cases that went wrong.
        reasons: why cases were not checked, with how many.
        trouble: why the run did not come to its end; None: it did.
    """

    def __init__(self, plan: Plan, selection: Selection, total: int) -> None:
        self.plan, self.selection, self.total = plan, selection, total
        self.counts: dict[tuple[str, str], Counter[str]] = {}
        self.failures: list[Failure] = []
        self.reasons: Counter[str] = Counter()
        self.trouble: str | None = None

    def add(self, case: Case, outcome: Outcome) -> None:
        """Counts a case."""
        self.counts.setdefault((case.op, case.kind), Counter())[outcome.state] += 1
        if outcome.state == WRONG:
            self.failures.append(Failure(case, outcome.text, self.command(case)))
        if outcome.state in (UNCHECKED, UNMADE):
            self.reasons[f"{case.kind} of {case.op} in {case.dtype}: {outcome.text}"] += 1

    @property
    def done(self) -> int:
        """How many cases have ended."""
        return sum(sum(states.values()) for states in self.counts.values())

    @property
    def is_finished(self) -> bool:
        """Whether all that was asked for was checked, but for what MAY_STAY_UNCHECKED."""
        missing = any(
            states[UNMADE] or (states[UNCHECKED] and kind not in MAY_STAY_UNCHECKED)
            for (_, kind), states in self.counts.items()
        )
        return self.trouble is None and self.done == self.total and not missing

    @property
    def is_whole(self) -> bool:
        """Whether all that there is was checked: only then may a backend pass."""
        return self.selection.is_complete and self.is_finished

    @property
    def is_right(self) -> bool:
        """Whether it was checked, and nothing was wrong."""
        return self.is_finished and not self.failures

    def command(self, case: Case | None = None) -> str:
        """The command that repeats the run, or what one of its cases is of."""
        words = [f"python -m gradroute check --device {self.plan.device} --backend {self.plan.backend}"]
        if case is not None:
            words.append(f"--op {case.op} --dtype {case.dtype} --kind {case.kind}")
        words += ["--quick"] * self.selection.quick
        words += [f"--seed {self.selection.seed}"] * bool(self.selection.seed)
        return " ".join(words)

    def run(self, date: str) -> Run:
        """What is kept of it."""
        return Run(
            seed=self.selection.seed,
            quick=self.selection.quick,
            is_whole=self.is_whole,
            failures=tuple(failure.line for failure in self.failures),
            unchecked=tuple(self.reasons),
            date=date,
        )

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        return {
            "checked": self.done,
            "of": self.total,
            "is_whole": self.is_whole,
            "trouble": self.trouble,
            "counts": {
                op: {kind: dict(states) for (of, kind), states in self.counts.items() if of == op}
                for op, _ in self.counts
            },
            "failures": [
                {
                    "op": case.op,
                    "dtype": case.dtype,
                    "kind": case.kind,
                    "options": {name: str(value) for name, value in case.options.items()},
                    "text": text,
                    "repeat": repeat,
                }
                for case, text, repeat in self.failures
            ],
            "unchecked": list(self.reasons),
        }

    def as_text(self) -> str:
        """For people: ops × kinds of checks, then what went wrong, and what was not checked."""
        kinds = [kind for kind in KINDS if any(kind == known for _, known in self.counts)]
        ops = list(dict.fromkeys(op for op, _ in self.counts))
        rows = [["", *kinds]]
        rows += [[op, *(_cell(self.counts.get((op, kind))) for kind in kinds)] for op in ops]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        lines += shortened(tuple(f"WRONG {failure.line}" for failure in self.failures))
        lines += shortened(tuple(f"not checked: {reason}" for reason in self.reasons))
        return "\n".join(lines)


def _cell(states: Counter[str] | None) -> str:
    """How many cases were right, and how many were not."""
    if states is None:
        return "-"
    if states[WRONG]:
        return f"{states[WRONG]} of {states.total()} WRONG"
    said = [f"ok {states[RIGHT]}"] if states[RIGHT] else []
    said += [f"{states[state]} {state}" for state in (UNCHECKED, UNMADE, REFUSED) if states[state]]
    return ", ".join(said)
