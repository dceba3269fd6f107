"""What a question is, and what comes of asking it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .. import answers
from .measuring import Contest, Measuring, ranking


@dataclass
class Outcome:
    """What was measured.

    Attributes:
        answer: as files have it.
        measured: the median in milliseconds of every candidate, and that of its ratios to the shipped one's.
        rounds: how many rounds each contest had, at least.
        left_out: candidates that failed or were wrong, and why.
        spread: how far the quartiles of a candidate's rounds were apart, as a share of their median: the largest.
    """

    answer: Any = None
    measured: dict[str, dict[str, float]] = field(default_factory=dict)
    rounds: int = 0
    left_out: dict[str, str] = field(default_factory=dict)
    spread: float = 0.0

    def add(self, contest: Contest, prefix: str = "") -> None:
        """Adds what a contest found, its candidates named with a prefix."""
        self.measured |= contest.figures(prefix)
        self.left_out |= {prefix + name: why for name, why in contest.left_out.items()}
        self.spread = max(self.spread, contest.spread)
        self.rounds = min(self.rounds or contest.rounds, contest.rounds)


class Question(ABC):
    """A question about a device.

    Attributes:
        name: `KIND/WHAT`.
        decides: what its answer decides.
        shipped: the shipped answer, as files have it.
    """

    decides: str

    def __init__(self, kind: str, *what: str | torch.dtype, shipped: Any) -> None:
        assert kind in answers.KINDS
        self.name = answers.name_of(kind, *what)
        self.shipped = shipped

    @abstractmethod
    def measure(self, measuring: Measuring) -> Outcome:
        """Verifies and times the candidates.

        Raises:
            AssertionError: none of them is right.
        """


def threshold(
    points: Mapping[Any, Contest], form: str, takes: Callable[[Any], bool], shipped: Any, never: Any
) -> Any:
    """From which point on a form of computation is the faster of two.

    Chance has as many occasions to move the threshold as there are points: contests are corrected for their number.

    Args:
        points: contests of both forms, from where the form asked about pays least to where it pays most. The first of
            a contest is the one that the shipped threshold takes; its rounds are those of `Measuring.contest` with
            the number of points.
        form: the form.
        takes: whether the shipped threshold takes the form at a point.
        shipped: the shipped threshold, which stays unless a contest says otherwise.
        never: the threshold by which the form is never taken.
    """
    is_faster = {
        point: ranking(contest.milliseconds, len(points))[0] == form for point, contest in points.items()
    }
    if all(found == takes(point) for point, found in is_faster.items()):
        return shipped
    first = never
    for point in reversed(points):
        if not is_faster[point]:
            break
        first = point
    return first
