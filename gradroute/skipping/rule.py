"""Whether a product of a backward is made whole or as rectangles: the conditions in one place, each with its reason."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..machine import answers
from ..routes import Routes

if TYPE_CHECKING:
    from .parts import Groups, Product

#: The forms of a product: of all tokens and features, or of the tokens of a route × the features with its gradient.
WHOLE, RECTANGLES = "whole", "rectangles"

#: The products that have measured rules of their own, by the op whose backward they are.
PRODUCTS: dict[str, str] = {
    "linear": "routed_linear",
    "mlp": "routed_mlp",
    "gated_mlp": "routed_gated_mlp",
}

# How many tokens a run has in fp32 and fp64. In half precision the product of a run would be rounded, and could
# overflow, before it is summed. With runs of 320 tokens, whose matrices stay in the second-level cache, a gated MLP of
# 128 × 512 took 1.18 times as long in backward, with 128 tokens 1.45 times.
RUN = 1024
RUN_DTYPES = (torch.float32, torch.float64)

# Sorting pays from this share of skipped work on: rows must be gathered and put back. On CUDA an estimate from bytes,
# not yet measured: with 16384 tokens of 4096 × 14336 gathering and putting back move 0.4 ms' worth of a backward of
# 14 ms.
MIN_SAVING = {"cpu": 0.05, "cuda": 0.1}

# More routes than this, or fewer tokens a rectangle, are taken as they come. On CUDA an estimate too: 2048 × 3584
# elements are 224 tiles of 128 × 256, for 132 multiprocessors.
MAX_ROUTES = 64
MIN_TOKENS = {"cpu": 64, "cuda": 2048}

# Why a product has its form; the fields are those that `Decision.reason` knows.
TRACED = "under torch.compile no code may depend on how many tokens a route has"
ELSEWHERE = "rectangles are made on the CPU and on CUDA devices alone"
EMPTY = "there are no tokens"
UNCOUNTED = (
    "the host does not know how many tokens each route has: ids that it made are counted, and Routes.to keeps the "
    "counts"
)
BLENDED = "a strength blends the rows of the tables, so that no part is sure to vanish"
MANY_ROUTES = f"there are more than {MAX_ROUTES} routes"
LITTLE_SAVED = "masks leave {left:.1%} of the work, and rectangles pay from {most:.1%} down"
NEVER_PAYS = "masks leave {left:.1%} of the work, and rectangles never pay"
FEW_TOKENS = "rectangles would have {tokens} tokens on average, and they pay from {min_tokens} on"
PAYS = "masks leave {left:.1%} of the work, with {tokens} tokens a rectangle on average"


class Rule(NamedTuple):
    """When a product is made as rectangles, and how many tokens it takes at once.

    Attributes:
        min_saving: the least share of the work that rectangles must leave out.
        min_tokens: the fewest tokens a rectangle, on average.
        run: how many tokens are taken at once; None: all.
        evidence: what it rests on: "measured here" where any of it was measured, else "shipped estimate".
    """

    min_saving: float
    min_tokens: int
    run: int | None
    evidence: str


class Decision(NamedTuple):
    """What the rule says about a product for one batch.

    Attributes:
        form: WHOLE or RECTANGLES.
        cause: why, with the names of fields for figures.
        rule: the rule; None where the product is whole whatever it says.
        left: the share of the work that masks leave: the batch's, or that of any batch where no batch could have
            rectangles; 1 where it is not known.
        rectangles: how many the batch has.
        tokens: how many tokens the batch has.
    """

    form: str
    cause: str
    rule: Rule | None = None
    left: float = 1.0
    rectangles: int = 0
    tokens: int = 0

    @property
    def run(self) -> int | None:
        """How many tokens are taken at once; None: all."""
        return None if self.rule is None else self.rule.run

    @property
    def reason(self) -> str:
        """Why the product has its form, as a sentence with figures."""
        if self.rule is None:
            return self.cause
        return self.cause.format(
            left=self.left,
            most=1 - self.rule.min_saving,
            tokens=self.tokens // max(self.rectangles, 1),
            min_tokens=self.rule.min_tokens,
        )


def rule_of(name: str, device: torch.device, dtype: torch.dtype) -> Rule:
    """The rule for the products that are called `name` in PRODUCTS, on the CPU or a CUDA device.

    Made once: to ask for its parts took 2.6 of the 50 µs of a small linear layer's backward, for dx and for dW.
    """
    return answers.derived((name, device, dtype), lambda: _rule_of(name, device, dtype))


def _rule_of(name: str, device: torch.device, dtype: torch.dtype) -> Rule:
    in_runs = device.type == "cpu" and dtype in RUN_DTYPES
    rectangles = answers.rectangles(name, device, dtype)
    run = answers.run(name, device, dtype) if in_runs else None
    is_measured = rectangles is not None or run is not None
    return Rule(
        *(rectangles or (MIN_SAVING[device.type], MIN_TOKENS[device.type])),
        (run or RUN) if in_runs else None,
        answers.MEASURED if is_measured else answers.SHIPPED,
    )


def decide(name: str, product: Product[Any], routes: Routes, dtype: torch.dtype) -> Decision:
    """The form of a product for a batch.

    Args:
        name: what its rule is called, one of PRODUCTS.
        product: the product, with the sites that mask it.
        routes: the batch's routes.
        dtype: that of the product.
    """
    if torch.compiler.is_compiling():
        return Decision(WHOLE, TRACED)
    if routes.device.type not in MIN_TOKENS:
        return Decision(WHOLE, ELSEWHERE)
    if len(routes) == 0:
        return Decision(WHOLE, EMPTY)
    if routes.host_counts is None:
        return Decision(WHOLE, UNCOUNTED)
    rule = rule_of(name, routes.device, dtype)
    if routes.strength is not None:
        return Decision(WHOLE, BLENDED, rule)
    if routes.num_routes > MAX_ROUTES:
        return Decision(WHOLE, MANY_ROUTES, rule)
    groups = product.groups_of(routes.num_routes)
    if groups.least_cost > 1 - rule.min_saving:
        return Decision(WHOLE, _too_little(rule), rule, groups.least_cost)
    return routes.derived((groups, rule), lambda: _decide_by_counts(groups, routes, rule))


def _too_little(rule: Rule) -> str:
    """Why a product is whole whose masks leave out less than the rule asks for; some rules ask for more than all."""
    return NEVER_PAYS if rule.min_saving > 1 else LITTLE_SAVED


def _decide_by_counts(groups: Groups[Any], routes: Routes, rule: Rule) -> Decision:
    """The form of a product for a batch whose tokens are counted on the host."""
    counts, tokens = groups.counts(routes), len(routes)
    left = sum(count * group.cost for count, group in zip(counts, groups.groups, strict=True)) / tokens
    number = sum(len(group.spans) for count, group in zip(counts, groups.groups, strict=True) if count)
    if left > 1 - rule.min_saving:
        return Decision(WHOLE, _too_little(rule), rule, left, number, tokens)
    if number * rule.min_tokens > tokens:
        return Decision(WHOLE, FEW_TOKENS, rule, left, number, tokens)
    return Decision(RECTANGLES, PAYS, rule, left, number, tokens)


def _read_rectangles(what: answers.What, value: Any) -> answers.Rectangles:
    answers.check_what(what, PRODUCTS, answers.DTYPES)
    return answers.Rectangles(answers.number(value["min_saving"]), answers.count(value["min_tokens"]))


def _read_run(what: answers.What, value: Any) -> int:
    answers.check_what(what, PRODUCTS, RUN_DTYPES)
    return answers.count(value)


answers.read_by("rectangles", _read_rectangles)
answers.read_by("run", _read_run)
