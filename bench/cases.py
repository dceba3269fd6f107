"""The parts of a suite: cases of variants that are timed in the same rounds, and their targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Step = Callable[[], Any]

ADDED = "added"  # the quantity of a limit in microseconds
SECONDS = "seconds"  # the quantity of a limit in seconds
FORWARD, BACKWARD, FULL, STEP = "forward", "backward", "full", "step"  # three are Liger-Kernel's names

#: Every pass as a reader is told of it.
PASSES = {
    FORWARD: FORWARD,
    BACKWARD: BACKWARD,
    FULL: "full: forward and backward",
    STEP: "step: forward, backward and the optimizer's step",
}


class Limit(NamedTuple):
    """A target: `variant` takes at most `most` times as much as `rival`. It holds for its case alone.

    Attributes:
        variant, rival: names of variants.
        most: the largest ratio allowed; for "added" the microseconds, for "seconds" the seconds.
        quantity: "speed", "memory" or "saved"; "added": the time of a call beyond the rival's; "seconds": the variant's
            time itself, whatever any rival (which is "") takes.
        mode: the pass.
        added: a variant whose time is taken off both before they are compared; "": none.
    """

    variant: str
    rival: str
    most: float
    quantity: str = "speed"
    mode: str = FULL
    added: str = ""


class Work(NamedTuple):
    """The work of a pass.

    Attributes:
        dense_flops: the FLOPs of the unmasked op.
        useful_flops: those that masks leave.
        moved_bytes: the least that must be read and written, where that bounds the time; None: the FLOPs do.
    """

    dense_flops: float
    useful_flops: float
    moved_bytes: float | None = None


@dataclass(frozen=True)
class Variant:
    """One way to compute what a case asks for; everything in it is called only where it is needed.

    Attributes:
        steps: pass → the step on every set of inputs, which the rounds take in turn.
        saved_bytes: what autograd keeps between forward and backward; None: not asked for.
        memory_bytes: (pass, its first step) → the peak of extra memory; None: not measured on this machine.
        plan: the kernel that runs the call and why, if the variant can say so.
        is_rival: whether it is others' code, whose failure is a finding and not a failure of the run.
        does_work: whether it does the work of its case; else it has no rates.
    """

    steps: Callable[[str], list[Step]]
    saved_bytes: Callable[[], int] | None = None
    memory_bytes: Callable[[str, Step], int | None] | None = None
    plan: Callable[[], dict[str, Any]] | None = None
    is_rival: bool = False
    does_work: bool = True


# By variant {} where its numbers are right, else "wrong" or "error" with the reason; other entries are kept.
Findings = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """Variants that are timed in the same rounds, after `examine` has found their numbers right.

    Attributes:
        variants: the variants by name.
        rivals: names of those whose times divide everyone's; the first is the base.
        examine: checks variants on the inputs that are timed.
        checked: how they are checked, in words.
        modes: the passes to time.
        limits: the targets.
        missing: variants that this machine lacks a package or a device for, with the reason.
        work: the work by pass.
        tokens: the tokens of one pass, where tokens per second are of interest.
        held_bytes: a model's bytes that are there between passes and belong to the peak.
        calls: how many calls a step makes, where the host's clock times many together; 0: the device's clock times it.
        beside: what goes on while the rounds are timed, as a context manager; default: nothing.
        facts: other numbers that are worth keeping.
    """

    variants: dict[str, Variant]
    rivals: tuple[str, ...]
    examine: Callable[[Mapping[str, Variant]], Findings]
    checked: str
    modes: tuple[str, ...] = (FULL,)
    limits: tuple[Limit, ...] = ()
    missing: dict[str, str] = field(default_factory=dict)
    work: Mapping[str, Work] = field(default_factory=dict)
    tokens: int | None = None
    held_bytes: int = 0
    calls: int = 0
    beside: Callable[[], AbstractContextManager[Any]] = nullcontext
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """A case that is not made yet: its tensors may fill a device.

    Attributes:
        suite: its suite.
        name: its name, unique in a run.
        kernel: the op, or the model.
        axes: its values on the axes, and its sizes.
        make: makes it.
        x: the axis that a plot of it runs along.
    """

    suite: str
    name: str
    kernel: str
    axes: dict[str, Any]
    make: Callable[[], Case]
    x: str = "tokens"


def attempt(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The findings of a measurement, or the error with which the machine refused it, for the report to tell."""
    try:
        return measure()
    except Exception as error:  # compilers and vendors' kernels refuse with errors of many classes
        text = str(error).strip().splitlines()
        return {"error": f"{type(error).__name__}: {text[0] if text else ''}"}
