"""Candidates for an answer: verified, then timed in the same rounds; and the rule by which one is faster."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...testing import Result, Sample, assert_result_within_budget, assert_same_bits, timing
from ...testing.ops import OPS
from .. import answers

# The shipped answer stays unless another one is faster by so much in the median of the rounds' ratios, and in so many
# rounds that chance alone, which decides a round of equals as a coin does, would have any of the others win them with
# less than this probability.
LEAST_GAIN = 0.03
MOST_CHANCE = 0.02

# What is bound by launching is called so often a round, because a single call is shorter than what disturbs it.
LAUNCHES = 20


class Effort(NamedTuple):
    """How much a run measures.

    Attributes:
        is_quick: whether it asks less, with smaller inputs.
        least_rounds: of every contest, however long they take.
        most_rounds: of every contest.
        seconds: after which a contest ends once it has the least rounds.
        sets: how many sets of random inputs take turns.
    """

    is_quick: bool
    least_rounds: int
    most_rounds: int
    seconds: float
    sets: int


QUICK = Effort(True, least_rounds=5, most_rounds=9, seconds=0.4, sets=2)
WHOLE = Effort(False, least_rounds=9, most_rounds=25, seconds=3.0, sets=3)


@dataclass(frozen=True)
class Trial:
    """One candidate on one set of inputs.

    Attributes:
        step: what is timed.
        check: raises where the candidate's result is wrong.
        answers: the answers that hold meanwhile, by question.
        is_launch_bound: whether launching is what takes the time.
    """

    step: Callable[[], Any]
    check: Callable[[], None]
    answers: Mapping[str, Any] = field(default_factory=dict)
    is_launch_bound: bool = False


class Contest(NamedTuple):
    """What timing found.

    Attributes:
        milliseconds: of every round, by candidate: those that were right, the shipped one first where it is.
        left_out: the candidates that failed or were wrong, and why.
    """

    milliseconds: dict[str, list[float]]
    left_out: dict[str, str]

    @property
    def rounds(self) -> int:
        """How many rounds were timed."""
        return len(next(iter(self.milliseconds.values())))

    def figures(self, prefix: str = "") -> dict[str, dict[str, float]]:
        """Of each candidate the median in milliseconds, and that of the ratios to the first one's in the same round."""
        first = next(iter(self.milliseconds.values()))
        return {
            prefix + name: {"ms": statistics.median(times), "ratio": statistics.median(ratios(times, first))}
            for name, times in self.milliseconds.items()
        }

    @property
    def spread(self) -> float:
        """How far the quartiles of a candidate's rounds are apart, as a share of their median: the largest."""
        quartiles = (
            statistics.quantiles(times, n=4, method="inclusive") for times in self.milliseconds.values()
        )
        return max((upper - lower) / middle for lower, middle, upper in quartiles)


class Measuring:
    """Verifies and times candidates on a device.

    Attributes:
        device: the CPU or a CUDA device, by its number.
        effort: how much is measured.
    """

    def __init__(self, device: torch.device, effort: Effort) -> None:
        self.device = device
        self.effort = effort
        self._of_launching = timing.host_clock(device)

    @cached_property
    def _of_running(self) -> timing.Clock:
        return timing.clock_of(self.device)

    def contest(self, candidates: Mapping[str, Sequence[Trial]], points: int = 1) -> Contest:
        """Times those of the candidates that are right, the shipped one first.

        `points`: how many contests decide one answer together.

        Raises:
            AssertionError: none is.
        """
        left_out = {}
        for name, trials in candidates.items():
            why = self._why_wrong(trials)
            if why is not None:
                left_out[name] = why
        right = {name: trials for name, trials in candidates.items() if name not in left_out}
        if not right:
            raise AssertionError("; ".join(f"{name}: {why}" for name, why in left_out.items()))
        rounds = self._rounds(least_rounds(points * (len(right) - 1)))
        return Contest(timing.interleaved(right, rounds, self.seconds), left_out)

    def seconds(self, trial: Trial) -> float:
        """Runs a trial, and returns how long one call took."""
        with answers.trying(self.device, trial.answers):
            if not trial.is_launch_bound:
                return self._of_running(trial.step)
            return self._of_launching(partial(_often, trial.step)) / LAUNCHES

    def _why_wrong(self, trials: Sequence[Trial]) -> str | None:
        for trial in trials:
            try:
                with answers.trying(self.device, trial.answers):
                    trial.check()
            except Exception as error:  # a candidate may fail in any way, and another one is taken
                if self.device.type == "cuda":
                    torch.cuda.synchronize(
                        self.device
                    )  # raises where the device is lost, and nothing can follow
                return f"{type(error).__name__}: {error}"
        return None

    def _rounds(self, needed: int) -> Iterator[int]:
        """The numbers of a contest's rounds, at least so many as the rule needs."""
        start = time.perf_counter()
        least = max(self.effort.least_rounds, needed)
        for number in range(timing.WARMUP_ROUNDS + max(self.effort.most_rounds, least)):
            has_least = number >= timing.WARMUP_ROUNDS + least
            if has_least and time.perf_counter() - start > self.effort.seconds:
                return
            yield number


def _often(step: Callable[[], Any]) -> None:
    for _ in range(LAUNCHES):
        step()


def ratios(own: Sequence[float], base: Sequence[float]) -> list[float]:
    """One candidate's times, each divided by another's in the same round."""
    return [one / other for one, other in zip(own, base, strict=True)]


def chance_of(wins: int, rounds: int) -> float:
    """The probability that one of two equals is faster in at least so many rounds: a one-sided sign test."""
    return sum(math.comb(rounds, number) for number in range(wins, rounds + 1)) / 2**rounds


def least_rounds(others: int) -> int:
    """The fewest rounds in which one of so many other candidates can replace the first though it lost one of them."""
    return next(
        rounds for rounds in itertools.count(2) if others * chance_of(rounds - 1, rounds) < MOST_CHANCE
    )


def is_faster(own: Sequence[float], incumbent: Sequence[float], others: int = 1) -> bool:
    """Whether a candidate is faster by more than the noise, as one of so many others that could have been."""
    found = ratios(own, incumbent)
    wins = sum(ratio < 1 for ratio in found)
    is_chance = others * chance_of(wins, len(found)) >= MOST_CHANCE
    return not is_chance and statistics.median(found) <= 1 - LEAST_GAIN


def ranking(milliseconds: Mapping[str, Sequence[float]], points: int = 1) -> list[str]:
    """The candidates, fastest first; where none is faster by more than the noise, in the order in which they come.

    `points`: of how many contests, which decide one answer together, this is one.
    """
    left, ranked, others = list(milliseconds), [], points * (len(milliseconds) - 1)
    while left:
        first = milliseconds[left[0]]
        faster = [name for name in left if is_faster(milliseconds[name], first, others)]
        medians = {name: statistics.median(ratios(milliseconds[name], first)) for name in faster}
        best = min(medians, key=medians.__getitem__) if medians else left[0]
        left.remove(best)
        ranked.append(best)
    return ranked


class Judged:
    """A call whose results on the candidates are judged; what is exact is computed once."""

    def __init__(self, call: Sample) -> None:
        self.call = call

    @cached_property
    def _expected(self) -> tuple[Result, Result, dict[str, float]]:
        call = self.call
        cancelling = OPS[call.op].cancelling(call.tensors, call.keywords, call.upstream)
        return call.in_float64().run("reference"), call.run_plain(), cancelling

    def check(self, backend: str | None, is_deterministic: bool = True) -> None:
        """Raises AssertionError unless the call keeps the error budget, and where asked has the same bits again."""
        result = self.call.run(backend)
        exact, plain, cancelling = self._expected
        assert_result_within_budget(result, exact, plain, self.call.op, cancelling)
        if is_deterministic:
            assert_same_bits(self.call.run(backend), result, f"{self.call.op} run again")


class Backward:
    """The backward of a call, alone, again and again."""

    def __init__(self, call: Sample, backend: str) -> None:
        self.call = call
        self.backend = backend

    @cached_property
    def _graph(self) -> tuple[Tensor, list[Tensor]]:
        leaves = self.call.leaves()
        output = self.call.call(leaves, self.backend)
        return output, [leaf for leaf in leaves.values() if leaf is not None and leaf.requires_grad]

    def __call__(self) -> None:
        output, wanted = self._graph
        torch.autograd.grad(output, wanted, self.call.upstream, retain_graph=True)
