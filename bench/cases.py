"""What a suite is made of: cases of variants that are timed in the same rounds, and what must be reached."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Step = Callable[[], Any]

ADDED = "added"  # the quantity of a limit in microseconds
SECONDS = "seconds"  # and of one in seconds
FORWARD, BACKWARD, FULL, STEP = (
    "forward",
    "backward",
    "full",
    "step",
)  # Liger-Kernel's names of passes, and one more


class Limit(NamedTuple):
    """What must be reached: `variant` takes at most `most` times what `rival` takes.

    Attributes:
        variant, rival: names of variants.
        most: the largest ratio allowed; of "added" the microseconds, of "seconds" the seconds.
        quantity: "speed", "memory" or "saved"; "added": the time of a call beyond the rival's; "seconds": the variant's
            time itself, whatever any rival (which is "") takes.
        mode: the pass.
        added: of the time that is added to that of this variant; "": of all of it.
    """

    variant: str
    rival: str
    most: float
    quantity: str = "speed"
    mode: str = FULL
    added: str = ""


class Work(NamedTuple):
    """What a pass has to do.

    Attributes:
        dense_flops: of the unmasked op.
        useful_flops: what masks leave of them.
        moved_bytes: what must be read and written at the least, where that bounds the time; None: the FLOPs do.
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
        plan: what runs the call and why, if it says so.
        is_rival: whether it is others' code, whose failure is a finding and not a failure of the run.
        does_work: whether it does the work of its case; else it has no rates.
    """

    steps: Callable[[str], list[Step]]
    saved_bytes: Callable[[], int] | None = None
    memory_bytes: Callable[[str, Step], int | None] | None = None
    plan: Callable[[], dict[str, Any]] | None = None
    is_rival: bool = False
    does_work: bool = True


# By variant: {} where its numbers are right, else "wrong" or "error" with the reason; further entries are kept.
Findings = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """Variants that are timed in the same rounds, after `examine` has found their numbers right.

    Attributes:
        variants: by name.
        rivals: names of those whose times divide everyone's; the first is the base.
        examine: checks variants on the inputs that are timed.
        checked: how, in words.
        modes: the passes to time.
        limits: what must be reached.
        missing: variants that this machine lacks what they need for: why.
        work: by pass.
        tokens: of one pass, where tokens per second are of interest.
        held_bytes: what is there between passes and belongs to the peak; of models.
        calls: that a step makes, where the host's clock times many together; 0: the device's clock times a step.
        facts: what else is worth keeping.
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
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """A case that is not made yet: its tensors may fill a device.

    Attributes:
        suite: its suite.
        name: what it shows; unique in a run.
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
    """What a measurement found, or the error with which the machine refused it: the report is there to tell it."""
    try:
        return measure()
    except Exception as error:  # any: compilers and vendors' kernels refuse in many ways
        text = str(error).strip().splitlines()
        return {"error": f"{type(error).__name__}: {text[0] if text else ''}"}
