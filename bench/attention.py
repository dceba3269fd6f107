"""The suite `attention`: routed_attention beside unmasked attention and other ways to mask it, on CUDA or the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from gradroute import testing
from gradroute.backends.attention_plan import remaining_work

from . import attention_check, memory, progress
from .attention_cases import CASES, DTYPES, SHAPES, Entry, Shape, Way, calls, warm_step_on_cpu
from .cases import FORWARD, FULL, Case, Findings, Plan, Step, Variant, Work, attempt
from .ops import assert_rival_is_right

#: By case the variants that are not timed, with the reason.
NOT_TIMED = {
    "both edges": {
        "detach": "edges by hand need [S, S] matrices in every head, as the reference has, which is timed"
    },
}
MODES = {"cpu": (FULL,), "cuda": (FORWARD, FULL)}


def plans(device: torch.device, lengths: tuple[int, ...] = (), with_compiled: bool = True) -> list[Plan]:
    """Every case of a device at its shape, or without targets at other sequence lengths.

    Raises:
        ValueError: a sequence of one token, which attends to itself alone, so that q and k have no gradient.
    """
    if lengths and min(lengths) < 2:
        raise ValueError(f"tokens: got {min(lengths)}, expected at least 2 for the suite attention")
    shape = SHAPES[device.type]
    shapes = [shape._replace(length=length) for length in lengths] or [shape]
    dtype = str(DTYPES[device.type]).removeprefix("torch.")
    return [
        Plan(
            "attention",
            f"attention, {name}" + (f", length {one.length}" if lengths else ""),
            "routed_attention",
            one._asdict() | {"dtype": dtype, "tables": name},
            partial(case, name, one, device, with_compiled),
            x="length",
        )
        for one in shapes
        for name in CASES[device.type]
    ]


def case(name: str, shape: Shape, device: torch.device, with_compiled: bool = True) -> Case:
    entry = CASES[device.type][name](calls(shape, device))
    has_limits = shape == SHAPES[device.type]  # targets were set for this shape alone
    missing = entry.missing
    ways = {
        way: one
        for way, one in entry.ways.items()
        if way not in missing and (with_compiled or not way.endswith("compiled"))
    }
    return Case(
        variants={way: variant(name, shape, device, way, one) for way, one in ways.items()},
        rivals=tuple(name for name in entry.rivals if name not in missing),
        examine=partial(examine, entry),
        checked=attention_check.HOW,
        modes=MODES[device.type],
        limits=entry.limits if has_limits else (),
        missing=NOT_TIMED.get(name, {}) | missing,
        work=work(shape, ways),
    )


def work(shape: Shape, ways: Mapping[str, Way]) -> dict[str, Work]:
    """The FLOPs of causal attention: 2 B H S² D forward, and 2.5 times that backward, where masks leave a share."""
    forward = 2.0 * shape.batch * shape.heads * shape.length**2 * shape.head_dim
    shares = [
        remaining_work(way.call.routes, way.call.sites.effective) for way in ways.values() if way.call.routes
    ]
    useful = forward * (1 + 2.5 * min(shares, default=1.0))
    return {FORWARD: Work(forward, forward), FULL: Work(3.5 * forward, useful)}


def variant(name: str, shape: Shape, device: torch.device, way_name: str, way: Way) -> Variant:
    explain = way.explain
    return Variant(
        steps=way.steps,
        saved_bytes=way.saved_bytes,
        memory_bytes=None
        if device.type == "cpu" and way_name.endswith("compiled")
        else partial(memory_bytes, device, shape, name, way_name),
        plan=None if explain is None else lambda: {"plan": explain()._asdict()},
        is_rival=explain is None,
    )


def memory_bytes(
    device: torch.device, shape: Shape, case_name: str, way: str, mode: str, step: Step
) -> int | None:
    """The peak of a pass's memory beyond its inputs; on the CPU it is measured in another process."""
    if device.type == "cuda":
        return memory.on_device(step)
    return memory.on_cpu(partial(warm_step_on_cpu, shape, case_name, way))


def examine(entry: Entry, variants: Mapping[str, Any]) -> Findings:
    """Checks the numbers of every way on the inputs that are timed."""
    found: Findings = {name: {} for name in variants}
    by_call: dict[int, list[str]] = {}
    for name in variants:
        by_call.setdefault(id(entry.ways[name].call), []).append(name)
    for names in by_call.values():
        progress.step("computing the reference in fp64")
        exact, plain = attention_check.exact_and_plain(entry.ways[names[0]].call)
        for name in names:
            progress.step(f"checking {name}")
            found[name] = attempt(partial(_examine, name, entry.ways[name], exact, plain))
    return found


def _examine(name: str, way: Way, exact: testing.Result, plain: testing.Result) -> dict[str, Any]:
    got = attention_check.result(way.call, way.forward)
    check = testing.assert_result_within_budget if way.explain is not None else assert_rival_is_right
    try:
        check(got, exact, plain, name)
    except AssertionError as error:
        return {"wrong": str(error)}
    return {}
