"""Whether a product of a backward is made whole, as rectangles or grouped: conditions in one place, with reasons."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..machine import answers
from ..routes import Routes
from ..tracing import constant_when_traced

if TYPE_CHECKING:
    from .parts import Groups, Product

#: The forms of a product: of all tokens and features; of the tokens of a route × the features with its gradient, one
#: product each, where the host knows how many tokens a route has; the same in one call, where the device alone does.
WHOLE, RECTANGLES, GROUPED = "whole", "rectangles", "grouped"

#: The products that have measured rules of their own, by the op whose backward they are.
PRODUCTS: dict[str, str] = {
    "linear": "routed_linear",
    "mlp": "routed_mlp",
    "gated_mlp": "routed_gated_mlp",
}

# How many tokens a run has in fp32 and fp64. In half precision the product of a run would be rounded, and could
# overflow, before it is summed. Threads meet at the end of every product, and where another process takes one of the
# cores they wait there: the shorter the runs, the more often. A gated MLP, forward and backward, against the ordinary
# one (8192 tokens, medians of 5 to 9 paired rounds, 2 cores of an AMD EPYC):
#   tokens a run                     1024  2048  4096  8192
#   128 × 512, alone                 0.70  0.73  0.76  0.91
#   128 × 512, beside one process    2.68  1.61  0.83  0.67
#   256 × 1024, alone                0.64  0.64  0.65  0.85
#   256 × 1024, beside one process   1.54  0.86  0.82  0.73
RUN = 4096
RUN_DTYPES = (torch.float32, torch.float64)

# Sorting pays from this share of skipped work on: rows must be gathered and put back. On CUDA an estimate from bytes,
# not yet measured: with 16384 tokens of 4096 × 14336 gathering and putting back move 0.4 ms' worth of a backward of
# 14 ms.
MIN_SAVING = {"cpu": 0.05, "cuda": 0.1}

# In bf16 the CPU's products are so fast that gathering, and adding up what routes have in common, count for more. With
# a quarter of the work left out a gated MLP's backward took 1.07 times as long, with 44 % of it 0.95 times (1024 tokens
# of 256 × 1024, 2 cores).
MIN_SAVING_BF16 = 0.35

# Grouped products pay from this share on, of batches whose routes have as many tokens. On CUDA an estimate, not yet
# measured: torch's grouped product is taken to reach 0.88 of the speed of cuBLAS, and the gathers beside it 0.04 of a
# backward, so that both are even where 0.84 of the work is left. On the CPU, compiled: with a quarter of the work left
# out 0.92 times as long, in bf16 with 44 % of it 1.2 times and with three quarters 0.52 times (the same shape).
MIN_GROUPED_SAVING = {"cpu": 0.15, "cuda": 0.2}
MIN_GROUPED_SAVING_BF16 = 0.5

# The compute capabilities on which torch's grouped product reads the sizes of groups on the device. On others it waits
# for the device to learn them, like for dtypes other than bf16.
GROUPED_CAPABILITIES = (9, 10)

# More routes than this, or fewer tokens a rectangle, are taken as they come. On CUDA an estimate too: 2048 × 3584
# elements are 224 tiles of 128 × 256, for 132 multiprocessors.
MAX_ROUTES = 64
MIN_TOKENS = {"cpu": 64, "cuda": 2048}

# Why a product has its form; the fields are those that `Decision.reason` knows.
ELSEWHERE = "rectangles are made on the CPU and on CUDA devices alone"
EMPTY = "there are no tokens"
UNCOUNTED = (
    "the device alone knows how many tokens each route has, and {refusal}; ids that the host made are counted, and "
    "Routes.to keeps the counts"
)
TRACED = "under torch.compile no code may depend on how many tokens a route has, and {refusal}"
NOT_BF16 = "torch's grouped product does not wait for CUDA devices with bf16 alone"
NOT_HOPPER = "torch's grouped product waits for this device: it needs compute capability 9.x or 10.x"
NOT_ALIGNED = "torch's grouped product on CUDA takes widths that are multiples of 8"
BLENDED = "a strength blends the rows of the tables, so that no part is sure to vanish"
MANY_ROUTES = f"there are more than {MAX_ROUTES} routes"
LITTLE_SAVED = "masks leave {left:.1%} of the work, and rectangles pay from {most:.1%} down"
NEVER_PAYS = "masks leave {left:.1%} of the work, and rectangles never pay"
GROUPING_NEVER_PAYS = "masks leave {left:.1%} of the work, and grouping never pays"
FEW_TOKENS = "rectangles would have {tokens} tokens on average, and they pay from {min_tokens} on"
PAYS = "masks leave {left:.1%} of the work, with {tokens} tokens a rectangle on average"
LITTLE_GROUPED = (
    "masks leave {left:.1%} of the work where routes have as many tokens, and grouping pays from {most:.1%} "
    "down"
)
GROUPING_PAYS = (
    "masks leave {left:.1%} of the work where routes have as many tokens; how many, the device alone knows"
)


class Rule(NamedTuple):
    """When a product is made as rectangles, and how many tokens it takes at once.

    Attributes:
        min_saving: the least share of the work that rectangles must leave out.
        min_tokens: the fewest tokens a rectangle, on average.
        run: how many tokens are taken at once; None: all.
        evidence: what min_saving and min_tokens rest on: "measured here" or "shipped estimate".
        run_evidence: likewise what run rests on; None where there is none.
    """

    min_saving: float
    min_tokens: int
    run: int | None
    evidence: str
    run_evidence: str | None = None


class Decision(NamedTuple):
    """What the rule says about a product for one batch.

    Attributes:
        form: WHOLE, RECTANGLES or GROUPED.
        cause: why, with the names of fields for figures.
        rule: the rule; None where the product is whole whatever it says.
        left: the share of the work that masks leave: the batch's, or that of any batch where no batch could have
            rectangles, or that of routes with as many tokens where the device alone counts them; 1 where it is not
            known.
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
    def evidence(self) -> str:
        """What the form rests on: what the rule's thresholds do, where they were asked."""
        if self.rule is None or self.cause in (BLENDED, MANY_ROUTES):
            return answers.SHIPPED
        return self.rule.evidence

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


def min_saving(device: torch.device, dtype: torch.dtype) -> float:
    """From which share of skipped work on rectangles pay, as shipped."""
    return MIN_SAVING_BF16 if _is_bf16_on_cpu(device, dtype) else MIN_SAVING[device.type]


def min_grouped_saving(device: torch.device, dtype: torch.dtype) -> float:
    """From which share of skipped work on grouped products pay, as shipped."""
    return MIN_GROUPED_SAVING_BF16 if _is_bf16_on_cpu(device, dtype) else MIN_GROUPED_SAVING[device.type]


def _is_bf16_on_cpu(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cpu" and dtype == torch.bfloat16


def rule_of(name: str, device: torch.device, dtype: torch.dtype) -> Rule:
    """The rule for the products that are called `name` in PRODUCTS, on the CPU or a CUDA device.

    Made once: to ask for its parts took 2.6 of the 50 µs of a small linear layer's backward, for dx and for dW.
    """
    return answers.derived((name, device, dtype), lambda: _rule_of(name, device, dtype))


def _rule_of(name: str, device: torch.device, dtype: torch.dtype) -> Rule:
    in_runs = device.type == "cpu" and dtype in RUN_DTYPES
    rectangles = answers.rectangles(name, device, dtype)
    run = answers.run(name, device, dtype) if in_runs else None
    return Rule(
        *(rectangles or (min_saving(device, dtype), MIN_TOKENS[device.type])),
        (run or RUN) if in_runs else None,
        _evidence(rectangles),
        _evidence(run) if in_runs else None,
    )


def _evidence(measured: Any) -> str:
    """What a part of a rule rests on whose answer, or None, this is."""
    return answers.SHIPPED if measured is None else answers.MEASURED


@constant_when_traced
def grouped_rule_of(name: str, device: torch.device, dtype: torch.dtype) -> Rule:
    """The rule for grouped products that are called `name` in PRODUCTS, on the CPU or a CUDA device."""
    return answers.derived(("grouped", name, device, dtype), lambda: _grouped_rule_of(name, device, dtype))


def _grouped_rule_of(name: str, device: torch.device, dtype: torch.dtype) -> Rule:
    measured = answers.grouped(name, device, dtype)
    saving = min_grouped_saving(device, dtype) if measured is None else measured
    return Rule(saving, 0, None, _evidence(measured))


@constant_when_traced
def why_not_grouped(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a grouped product would make the host wait for the device; None where it does not."""
    if device.type == "cpu":
        return None
    if dtype != torch.bfloat16:
        return NOT_BF16
    return None if torch.cuda.get_device_capability(device)[0] in GROUPED_CAPABILITIES else NOT_HOPPER


def groups_products(device: torch.device) -> bool:
    """Whether products are grouped on a device in any dtype; not on a CUDA device that is not there, but pretended."""
    if device.type == "cuda" and torch.cuda.is_available():
        return why_not_grouped(device, torch.bfloat16) is None
    return device.type == "cpu"


def decide(name: str, product: Product[Any], routes: Routes, dtype: torch.dtype) -> Decision:
    """The form of a product for a batch.

    Args:
        name: what its rule is called, one of PRODUCTS.
        product: the product, with the sites that mask it.
        routes: the batch's routes.
        dtype: that of the product.
    """
    if routes.device.type not in MIN_TOKENS:
        return Decision(WHOLE, ELSEWHERE)
    if torch.compiler.is_compiling() or routes.host_counts is None:
        return _decide_without_counts(name, product, routes, dtype)
    if len(routes) == 0:
        return Decision(WHOLE, EMPTY)
    rule = rule_of(name, routes.device, dtype)
    if routes.strength is not None:
        return Decision(WHOLE, BLENDED, rule)
    if routes.num_routes > MAX_ROUTES:
        return Decision(WHOLE, MANY_ROUTES, rule)
    groups = product.groups_of(routes.num_routes)
    if groups.least_cost > 1 - rule.min_saving:
        return Decision(WHOLE, _too_little(rule), rule, groups.least_cost)
    return routes.derived((groups, rule), lambda: _decide_by_counts(groups, routes, rule))


def _decide_without_counts(name: str, product: Product[Any], routes: Routes, dtype: torch.dtype) -> Decision:
    """The form of a product for a batch whose tokens the device alone has counted."""
    rule = grouped_rule_of(name, routes.device, dtype)
    if routes.strength is not None:
        return Decision(WHOLE, BLENDED, rule)
    if routes.num_routes > MAX_ROUTES:
        return Decision(WHOLE, MANY_ROUTES, rule)
    refusal = why_not_grouped(routes.device, dtype)
    if refusal is None and routes.device.type == "cuda" and not product.is_aligned:
        refusal = NOT_ALIGNED
    if refusal is not None:
        cause = TRACED if torch.compiler.is_compiling() else UNCOUNTED
        return Decision(WHOLE, cause.format(refusal=refusal))
    left = product.grouped_work
    if left == 1 or left > 1 - rule.min_saving:
        return Decision(WHOLE, GROUPING_NEVER_PAYS if rule.min_saving > 1 else LITTLE_GROUPED, rule, left)
    return Decision(GROUPED, GROUPING_PAYS, rule, left)


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


def _read_grouped(what: answers.What, value: Any) -> float:
    answers.check_what(what, PRODUCTS, answers.DTYPES)
    return answers.number(value)


def _read_run(what: answers.What, value: Any) -> int:
    answers.check_what(what, PRODUCTS, RUN_DTYPES)
    return answers.count(value)


answers.read_by("rectangles", _read_rectangles)
answers.read_by("grouped", _read_grouped)
answers.read_by("run", _read_run)
