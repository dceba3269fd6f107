"""Asks questions about a device, and writes every answer as it comes."""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Callable
from typing import Any

import torch

from .. import answers
from ..records import TUNING, Record
from .measuring import Effort, Measuring
from .question import Outcome, Question

# A question is called noisy where the quartiles of a candidate's rounds are so far apart, as a share of their median.
NOISY_SPREAD = 0.2

Tell = Callable[[str], None]


class Session:
    """One run on one device.

    Attributes:
        device: the CPU, or a CUDA device by its number.
        effort: how much is measured.
        record: where answers are written.
        failed: the questions that nothing could answer.
    """

    def __init__(self, device: torch.device, effort: Effort, tell: Tell) -> None:
        self.device = device
        self.effort = effort
        self.record = Record(TUNING, device)
        self.failed: list[str] = []
        self._tell = tell
        self._measuring = Measuring(device, effort)

    def present(self) -> dict[str, Any]:
        """What is in the file of this machine, by question: what can be followed."""
        return _undamaged(self.record.read())

    def remove_damaged(self) -> None:
        """Removes from the file what cannot be read: answers of another form, and to questions that there are not.

        Raises:
            OSError: the file cannot be written.
        """
        earlier = self.record.read()
        if len(_undamaged(earlier)) < len(earlier):
            self.record.change(_undamaged)

    def unanswered(self, questions: list[Question]) -> list[Question]:
        """Those without an answer in the file; a whole run asks again what a quick one answered."""
        present = self.present()
        return [
            question
            for question in questions
            if question.name not in present
            or (present[question.name].get("quick") and not self.effort.is_quick)
        ]

    def ask(self, question: Question) -> None:
        """Measures, and writes the answer; where no candidate is right, says so and writes none."""
        start = time.monotonic()
        try:
            outcome = question.measure(self._measuring)
            answers.parsed(question.name, outcome.answer)
        except Exception as error:  # one question must not take the others' answers along
            self.failed.append(question.name)
            self._tell(f"{question.name}: no answer, {type(error).__name__}: {error}")
            return
        self._keep(question.name, self._entry(outcome, time.monotonic() - start))
        as_shipped = outcome.answer == question.shipped
        than = "as shipped" if as_shipped else f"shipped is {json.dumps(question.shipped)}"
        self._tell(f"{question.name}: {json.dumps(outcome.answer)}, {than}")
        for name, why in outcome.left_out.items():
            self._tell(f"  {name} is left out: {why}")
        if outcome.spread > NOISY_SPREAD:
            apart = f"the quartiles of some rounds are {outcome.spread:.0%} apart"
            self._tell(f"  noisy: {apart}; --again measures anew, best where nothing else runs")

    def _keep(self, name: str, entry: dict[str, Any]) -> None:
        """Writes an answer; that of a quick run never takes the place of a whole run's."""

        def changed(earlier: dict[str, Any]) -> dict[str, Any]:
            before = _undamaged(earlier).get(name)
            if entry["quick"] and before is not None and not before.get("quick"):
                self._tell(f"{name}: the answer of a whole run stays")
                return earlier
            return earlier | {name: entry}

        self.record.change(changed)

    def _entry(self, outcome: Outcome, seconds: float) -> dict[str, Any]:
        """What the file says about a question."""
        return {
            "answer": outcome.answer,
            "measured": outcome.measured,
            "left_out": outcome.left_out,
            "spread": round(outcome.spread, 3),
            "rounds": outcome.rounds,
            "seconds": round(seconds, 1),
            "date": datetime.datetime.now().isoformat(timespec="seconds"),
            "quick": self.effort.is_quick,
        }


def _undamaged(findings: dict[str, Any]) -> dict[str, Any]:
    """The findings that can be read."""
    return {name: found for name, found in findings.items() if answers.damage_of(name, found) is None}
