"""What is checked: cases, the same ones on every machine for the same seed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ... import backends, testing
from ...backends.attention_plan import FA4
from . import around_vendors, larger

#: The kinds of checks, and what each asks.
KINDS = {
    "numbers": "results are within the error budget of the fp64 reference",
    "determinism": "the same call gives the same bits again",
    "bounds": "nothing is read or written outside of the tensors",
    "strides": "rows may lie more than 2³¹ elements apart",
    "graphs": "a CUDA graph replays what a run computes",
    "streams": "another stream beside a busy one computes the same",
}
#: The kinds that there are on CUDA devices alone.
ON_CUDA = ("graphs", "streams")

#: The primitive of RoutedAdamW(fused=True), which is checked like an op.
STEP = "adamw_step"

DTYPES = ("float32", "bfloat16", "float16", "float64")
#: In how many different ways any two values of different axes meet, where that is cheap.
ROUNDS = 4
#: Wider and longer than the tiles of kernels, and no multiple of them.
WIDE: dict[str, Any] = {"sizes": testing.Sizes(d_model=131, d_ff=261, heads=4, kv_heads=2, head_dim=24)}
#: More tokens than kernels sum at once, and on CUDA enough a route that products are made as rectangles, where the
#: routes were counted on the host.
LONG: dict[str, Any] = {"tokens": 1101, "tables": "dense", "strength": "token"}
LONG_ON_CUDA: dict[str, Any] = {"tokens": 9001, "tables": "blocks", "on_host": True}


class Case(NamedTuple):
    """One check.

    Attributes:
        kind: a name of KINDS.
        op: a name of `gradroute.backends.OPS`, or STEP.
        dtype: a name of DTYPES.
        options: of the call, as `trials.made` takes them.
    """

    kind: str
    op: str
    dtype: str
    options: Mapping[str, Any]

    @property
    def is_large(self) -> bool:
        """Whether it has enough elements to be shared among the CPU's threads."""
        tokens, shape = self.options.get("tokens"), self.options.get("shape", ())
        return (type(tokens) is int and tokens > 130) or "sizes" in self.options or math.prod(shape) > 10_000

    def __str__(self) -> str:
        said = ", ".join(f"{name}={value}" for name, value in self.options.items() if value is not None)
        return f"{self.kind} of {self.op} in {self.dtype} ({said})"


class Selection(NamedTuple):
    """Which of the cases are wanted.

    Attributes:
        quick: the few that cover every axis, not every two of them.
        seed: of the covering and of all numbers.
        ops: only these ops; empty: all.
        dtypes: only these dtypes; empty: all.
        kinds: only these kinds; empty: all.
    """

    quick: bool = False
    seed: int = 0
    ops: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left out by name."""
        return not (self.ops or self.dtypes or self.kinds)

    def has(self, case: Case) -> bool:
        """Whether a case is wanted."""
        chosen = zip((self.ops, self.dtypes, self.kinds), (case.op, case.dtype, case.kind), strict=True)
        return all(not names or name in names for names, name in chosen)


def ops_of(backend: str) -> tuple[str, ...]:
    """The ops that a backend has, and the optimizer's step where it has primitives; FA4 has attention alone."""
    if backend == FA4:
        return (around_vendors.OP,)
    named = tuple(op for op, row in backends.OPS.items() if backend in row)
    return named if backend == "reference" else (*named, STEP)


def dtypes_of(backend: str, device: torch.device) -> tuple[str, ...]:
    """The dtypes that a backend takes on a device; none where it cannot run there."""
    return tuple(name for name in DTYPES if why_not(backend, device, name) is None)


def why_not(backend: str, device: torch.device, dtype: str | None = None) -> str | None:
    """Why a backend, or FA4, cannot run on a device in a dtype (None: in any); None where it can."""
    if backend == FA4:
        return around_vendors.why_not_fa4(device, getattr(torch, dtype or "bfloat16"))
    named = getattr(torch, dtype or "float32")
    try:
        backends.choose("route_grad", backend, torch.empty(0, dtype=named, device=device))
    except backends.BackendError as refusal:
        return str(refusal).partition("cannot run it: ")[2]
    return None


def cases(backend: str, device: torch.device, selection: Selection) -> list[Case]:
    """What is to be checked of a backend, or of FA4, on a device."""
    dtypes = dtypes_of(backend, device)
    # Triton compiles, or interprets, for a second a kernel; everything else takes milliseconds.
    rounds = ROUNDS if device.type == "cpu" and backend != "triton" else 1
    found: list[Case] = []
    for op in ops_of(backend) if dtypes else ():
        if op == STEP:
            every = _of_step(dtypes, device, selection)
        elif backend == FA4:
            every = _of_covers(op, around_vendors.covers_of_fa4(device), dtypes, selection)
        else:
            every = _of_op(op, dtypes, device, selection, rounds)
        found += [case for case in every if selection.has(case)]
        if (backend, op) == ("triton", around_vendors.OP):
            under = _of_covers(op, around_vendors.covers_under_vendors(device), dtypes, selection)
            found += [case for case in under if selection.has(case)]
    return found


def _of_covers(
    op: str, covers: Iterator[larger.Cover], dtypes: Sequence[str], selection: Selection
) -> Iterator[Case]:
    """The cases of covers; in a quick check every value is there."""
    for cover in covers:
        if selection.quick and not cover.is_quick:
            continue
        axes = {"dtype": dtypes} | dict(cover.axes)
        meeting = 1 if selection.quick else cover.meeting
        for options in testing.covering(axes, meeting, ROUNDS * selection.seed):
            yield Case(cover.kind, op, options.pop("dtype"), options | dict(cover.common))


def _of_op(
    op: str, dtypes: Sequence[str], device: torch.device, selection: Selection, rounds: int
) -> Iterator[Case]:
    """The cases of an op; every two values of different axes meet, in a quick check every value is there."""
    quick = selection.quick

    def covered(
        kind: str, axes: Mapping[str, Sequence[Any]], meeting: int = 1, number: int = 0, **common: Any
    ) -> Iterator[Case]:
        """Cases that cover the axes; `number` is that of the covering."""
        seed = ROUNDS * selection.seed + number
        for options in testing.covering({"dtype": dtypes} | dict(axes), meeting, seed):
            yield Case(kind, op, options.pop("dtype"), options | common)

    is_attention = op == "routed_attention"
    many = 70 if is_attention else 150
    variants = testing.variants(op)
    few = {"variant": variants, "tables": ("dense", "blocks"), "strength": ("token", None)}
    yield from covered(
        "numbers", {"variant": variants}, tokens=37
    )  # so that no dtype meets empty batches alone
    for number in range(1 if quick else rounds):
        yield from covered("numbers", _axes(op), 1 if quick else 2, number)
    if not quick:
        yield from covered("numbers", {"strength": ("token", None)}, tokens=many, **WIDE)
        if not is_attention:
            yield from covered("numbers", {}, **(LONG_ON_CUDA if device.type == "cuda" else LONG))
    yield from _of_covers(op, larger.covers(op, device), dtypes, selection)
    yield from covered("determinism", few, tokens=many)
    layouts = {"inputs": ("contiguous", "sliced", "transposed"), "gradient": ("contiguous", "sliced")}
    yield from covered("bounds", few | layouts | {"tokens": (37, 1, 130)[: 2 if is_attention else 3]})
    if not quick:
        yield from covered("bounds", {"strength": ("token", None)}, tokens=many, **WIDE)
    far = (*(name for name in testing.OPS[op].activations if name != "tokens"), "upstream")
    for case in covered("strides", {"far": far}, tokens=3, tables="dense", strength="token"):
        if case.dtype != "float64":
            yield case
    if device.type == "cuda":
        for kind in ON_CUDA:
            yield from covered(kind, {} if quick else few, tokens=many)


def _axes(op: str) -> dict[str, Sequence[Any]]:
    """What numbers may depend on."""
    return {
        "tables": testing.TABLE_KINDS,
        "strength": testing.STRENGTHS,
        "tokens": (37, 0, 1, (2, 19)) if op == "routed_attention" else (37, 0, 1, 130, (2, 19)),
        "gradient": testing.LAYOUTS,
        "inputs": ("contiguous", "sliced", "transposed"),
        "variant": testing.variants(op),
        "sites": ("all", *testing.site_names(op)),
        "bias": (True, False),
    }


def _of_step(dtypes: Sequence[str], device: torch.device, selection: Selection) -> Iterator[Case]:
    """The cases of a step of AdamW."""
    axes = {
        "dtype": dtypes,
        "shape": ((3, 70), (70, 5), (1, 1), (40, 40), (200, 301)),
        "blocks": ("rows", "columns", "one"),
        "amsgrad": (False, True),
        "transposed": (False, True),
        "maximize": (False, True),
    }
    for kind in KINDS:
        if kind == "strides" or (kind in ON_CUDA and device.type != "cuda"):
            continue
        strength = 2 if kind == "numbers" and not selection.quick else 1
        for options in testing.covering(axes, strength, selection.seed):
            yield Case(kind, STEP, options.pop("dtype"), options)
    for dtype in dtypes:
        if dtype != "float64":
            yield Case("strides", STEP, dtype, {"shape": (3, 70), "blocks": "rows", "far": "parameter"})
