"""Questions about the products of a backward: from where on their forms pay, and how many tokens are taken at once."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from ... import backends
from ...skipping import rule
from ...skipping.rule import GROUPED, PRODUCTS, RECTANGLES, WHOLE
from ...tables import Table
from .measuring import Backward, Contest, Judged, Measuring, Trial, ranking
from .question import Outcome, Question, threshold
from .workloads import activation_of, largest, routed_product

ROUTES = 4

# Shares of the work that masks leave out, and tokens of a rectangle, at which both forms are timed. Over the shares,
# routes have features in common, as where a base route keeps all: their parts of a weight's gradient are summed, in
# half precision in fp32, which can take longer than what is left out.
SAVINGS = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8)
TOKENS = {"cpu": (8, 16, 32, 64, 128, 256), "cuda": (128, 512, 1024, 2048, 4096)}
TILES = 8
GROUPED_SAVINGS = (1 / TILES, 2 / TILES, 4 / TILES, 6 / TILES)
RUNS = (256, 512, 1024, 2048, 4096)

# Thresholds that no product reaches, and those that every one does.
NEVER_SAVED, NEVER_TOKENS = 2.0, 1 << 30
ALWAYS = {"min_saving": 0.0, "min_tokens": 1}
NEVER = {"min_saving": NEVER_SAVED, "min_tokens": NEVER_TOKENS}


class _Product(Question):
    """A question about the products of an op's backward.

    Attributes:
        op: the op.
        dtype: that of the products.
        is_counted: whether the host knows how many tokens each route of a trial has.
    """

    is_counted = True

    def __init__(self, kind: str, product: str, dtype: torch.dtype, shipped: Any) -> None:
        super().__init__(kind, product, dtype, shipped=shipped)
        self.op = PRODUCTS[product]
        self.dtype = dtype

    def trials(
        self, measuring: Measuring, tokens: int, table: Table, candidates: dict[str, Any]
    ) -> dict[str, list[Trial]]:
        """Trials of a backward, by candidate, which is an answer to this question."""
        widths = largest(measuring.device, measuring.effort).widths
        found: dict[str, list[Trial]] = {name: [] for name in candidates}
        for seed in range(measuring.effort.sets):
            call = routed_product(
                self.op, tokens, widths, table, self.dtype, measuring.device, seed, self.is_counted
            )
            backend = backends.choose(self.op, None, activation_of(call))
            judged, backward = Judged(call), Backward(call, backend)
            for name, answer in candidates.items():
                found[name].append(Trial(backward, partial(judged.check, backend), {self.name: answer}))
        return found

    def features(self, measuring: Measuring) -> int:
        """The width of the site that is masked."""
        return largest(measuring.device, measuring.effort).widths.d_ff


class Rectangles(_Product):
    """From which share of the work, and which tokens a rectangle, on a product is made as rectangles."""

    decides = (
        "from how much saved work, and how many tokens a rectangle, on a backward leaves out what masks zero"
    )

    def __init__(self, product: str, device: torch.device, dtype: torch.dtype) -> None:
        self.saving, self.tokens = rule.min_saving(device, dtype), rule.MIN_TOKENS[device.type]
        shipped = {"min_saving": self.saving, "min_tokens": self.tokens}
        super().__init__("rectangles", product, dtype, shipped)

    def measure(self, measuring: Measuring) -> Outcome:
        """Both forms, over how much masks leave out, and over how many tokens a rectangle has."""
        outcome = Outcome()
        savings = self._savings(measuring)
        for saving, contest in savings.items():
            outcome.add(contest, f"{saving:.0%} saved: ")
        tokens = self._tokens(measuring)
        for number, contest in tokens.items():
            outcome.add(contest, f"{number} tokens a rectangle: ")
        outcome.answer = {
            "min_saving": threshold(
                savings, RECTANGLES, lambda saving: saving >= self.saving, self.saving, NEVER_SAVED
            ),
            "min_tokens": threshold(
                tokens, RECTANGLES, lambda number: number >= self.tokens, self.tokens, NEVER_TOKENS
            ),
        }
        return outcome

    def _savings(self, measuring: Measuring) -> dict[float, Contest]:
        size = largest(measuring.device, measuring.effort)
        savings = SAVINGS[1::2] if measuring.effort.is_quick else SAVINGS
        features = self.features(measuring)
        return {
            saving: self._contest(
                measuring, size.tokens, without_part(features, saving), saving >= self.saving, len(savings)
            )
            for saving in savings
        }

    def _tokens(self, measuring: Measuring) -> dict[int, Contest]:
        numbers = TOKENS[measuring.device.type]
        if measuring.effort.is_quick:
            numbers = numbers[1::2]
        table = quarters(self.features(measuring))
        return {
            number: self._contest(measuring, ROUTES * number, table, number >= self.tokens, len(numbers))
            for number in numbers
        }

    def _contest(self, measuring: Measuring, tokens: int, table: Table, takes: bool, points: int) -> Contest:
        """Both forms at one of so many points, first the one that the shipped rule takes."""
        forms = {RECTANGLES: ALWAYS, WHOLE: NEVER} if takes else {WHOLE: NEVER, RECTANGLES: ALWAYS}
        return measuring.contest(self.trials(measuring, tokens, table, forms), points)


class Grouped(_Product):
    """From which share of the work on a product is grouped whose tokens the device alone has counted."""

    decides = (
        "from how much saved work on a backward groups its products, where the device alone knows the counts"
    )
    is_counted = False

    def __init__(self, product: str, device: torch.device, dtype: torch.dtype) -> None:
        self.saving = rule.min_grouped_saving(device, dtype)
        super().__init__("grouped", product, dtype, self.saving)

    def measure(self, measuring: Measuring) -> Outcome:
        """Both forms, over how much masks leave out."""
        size, outcome = largest(measuring.device, measuring.effort), Outcome()
        contests = {}
        savings = GROUPED_SAVINGS[1::2] if measuring.effort.is_quick else GROUPED_SAVINGS
        for saving in savings:
            forms = {GROUPED: 0.0, WHOLE: NEVER_SAVED}
            if saving < self.saving:
                forms = {WHOLE: NEVER_SAVED, GROUPED: 0.0}
            table = without_tiles(self.features(measuring), saving)
            contests[saving] = measuring.contest(
                self.trials(measuring, size.tokens, table, forms), len(savings)
            )
            outcome.add(contests[saving], f"{saving:.0%} saved: ")
        outcome.answer = threshold(
            contests, GROUPED, lambda saving: saving >= self.saving, self.saving, NEVER_SAVED
        )
        return outcome


class Run(_Product):
    """How many tokens a product takes at once on the CPU."""

    decides = (
        "how many tokens a backward takes at once, so that what lies between its products stays in the cache"
    )

    def __init__(self, product: str, dtype: torch.dtype) -> None:
        super().__init__("run", product, dtype, rule.RUN)

    def measure(self, measuring: Measuring) -> Outcome:
        """Runs of several lengths. A linear layer takes tokens in runs where its product is made as rectangles."""
        tokens = largest(measuring.device, measuring.effort).tokens
        runs = [rule.RUN, *(run for run in RUNS if run != rule.RUN and run <= tokens)]
        table = without_part(self.features(measuring), 0.5)
        contest = measuring.contest(
            self.trials(measuring, tokens, table, {f"{run} tokens": run for run in runs})
        )
        outcome = Outcome(int(ranking(contest.milliseconds)[0].split()[0]))
        outcome.add(contest)
        return outcome


def without_part(features: int, share: float) -> Table:
    """A table of ROUTES routes, each of which leaves another block of so large a share of the features out."""
    weights = torch.ones(ROUTES, features, dtype=torch.float32, device="cpu")
    left_out = max(1, round(share * features))
    for route in range(ROUTES):
        start = route * (features - left_out) // (ROUTES - 1)
        weights[route, start : start + left_out] = 0
    return Table(weights)


def without_tiles(features: int, share: float) -> Table:
    """A table of ROUTES routes, each of which leaves out so many neighbours of TILES tiles, from another on."""
    left_out = round(share * TILES)
    tile = torch.arange(features, device="cpu") * TILES // features
    first = torch.arange(ROUTES, device="cpu")[:, None] * TILES // ROUTES
    return Table(((tile - first) % TILES >= left_out).float())


def quarters(features: int) -> Table:
    """A table of ROUTES routes, each of which keeps a block of the features of its own."""
    route = torch.arange(features, device="cpu") * ROUTES // features
    return Table((route == torch.arange(ROUTES, device="cpu")[:, None]).float())


def rectangles(device: torch.device, dtype: torch.dtype) -> Iterator[Question]:
    """Those about rectangles."""
    return (Rectangles(product, device, dtype) for product in PRODUCTS)


def grouped(device: torch.device, dtype: torch.dtype) -> Iterator[Question]:
    """Those about grouped products, which on the CPU only compiled code makes, and on CUDA devices some."""
    is_possible = device.type == "cuda" and rule.why_not_grouped(device, dtype) is None
    return (Grouped(product, device, dtype) for product in (PRODUCTS if is_possible else ()))


def runs(device: torch.device, dtype: torch.dtype) -> Iterator[Question]:
    """Those about runs of tokens, which the CPU takes in wide dtypes alone."""
    in_runs = device.type == "cpu" and dtype in rule.RUN_DTYPES
    return (Run(product, dtype) for product in (PRODUCTS if in_runs else ()))
