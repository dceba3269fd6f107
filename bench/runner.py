"""Checks, times and saves cases, one after the other; what is done is saved before the next begins."""

from __future__ import annotations

import datetime
import gc
import json
import time
import traceback
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from . import machine, timing
from .cases import ADDED, SECONDS, Case, Findings, Limit, Plan, Step, Variant, attempt
from .results import (
    MISSED,
    NOT_MEASURED,
    REACHED,
    RELATIVE,
    Figure,
    Row,
    Run,
    liger_version,
    machine_name,
    unit,
)

Milliseconds = Mapping[str, Sequence[float]]  # by variant, of every round
ByMode = dict[str, dict[str, Any]]  # mode → variant → what was measured


def run(
    name: str,
    plans: Sequence[Plan],
    rounds: int,
    device: torch.device,
    folder: Path,
    resume: bool = False,
    command: str = "",
    missing: Mapping[str, str] | None = None,
) -> Run:
    """Checks and times the cases of a suite, and leaves their files in a folder.

    An interrupt ends the run after what is done; the description's "interrupted" says so.

    Args:
        name: of the suite or group, and of the files.
        plans: its cases.
        rounds: to time, each variant once a round.
        device: where.
        folder: for NAME.csv and NAME.json.
        resume: go on with the files that are there: cases in them are not timed again.
        command: how the run was asked for.
        missing: suites that this machine lacks what they need for, with the reason.

    Raises:
        ValueError: `resume`, and the files are of another environment.
    """
    done = begin(name, plans, rounds, device, folder, resume, command)
    done.description["missing"] = dict(missing or {})
    remaining = [plan for plan in plans if not _is_done(plan, done)]
    clock = timing.clock_of(device)
    done.description["interrupted"] = False
    try:
        for plan in tqdm(remaining, desc=name, unit="case", disable=None):
            start = time.perf_counter()
            try:
                entry, rows = measure(plan, rounds, device, clock, done)
            except Exception as error:  # one case must not cost the others
                entry, rows = failed(plan, error), []
            entry["seconds"] = round(time.perf_counter() - start, 1)
            done.replace(plan.name, entry, rows)
            done.save(folder)
            tqdm.write("\n".join(["", *lines(done, plan.name)]))
            release(device)
    except KeyboardInterrupt:
        done.description["interrupted"] = True
    done.save(folder)
    return done


def begin(
    name: str,
    plans: Sequence[Plan],
    rounds: int,
    device: torch.device,
    folder: Path,
    resume: bool,
    command: str,
) -> Run:
    """A run without cases, or the one to go on with."""
    environment = machine.environment(device)
    file = folder / f"{name}.json"
    if resume and file.exists():
        done = Run.load(file)
        before = done.description["environment"]
        changed = [key for key in environment if before.get(key) != environment[key]]
        if done.description["rounds"] != rounds:
            raise ValueError(
                f"resume: {file} has {done.description['rounds']} rounds, and these are {rounds}"
            )
        if changed:
            was, is_ = ({key: of.get(key) for key in changed} for of in (before, environment))
            raise ValueError(
                f"resume: {file} was measured with {was}, and this is {is_}: run without --resume"
            )
        return done
    dtypes = {plan.axes["dtype"] for plan in plans if "dtype" in plan.axes}
    description = {
        "name": name,
        "command": command,
        "rounds": rounds,
        "environment": environment,
        "ceilings": machine.ceilings(device, dtypes),
        "method": timing.METHOD,
        "interrupted": False,
        "missing": {},
        "cases": {},
    }
    return Run(name, description)


def _is_done(plan: Plan, done: Run) -> bool:
    case = done.cases.get(plan.name)
    return case is not None and "error" not in case and case["axes"] == json.loads(json.dumps(plan.axes))


def release(device: torch.device) -> None:
    """Gives back what a case has held: its tensors, and what was compiled for it."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# --------------------------------------------------------------------------------------------------------------------


def measure(
    plan: Plan, rounds: int, device: torch.device, clock: timing.Clock, done: Run
) -> tuple[dict[str, Any], list[Row]]:
    """Makes a case, checks its variants, times those that are right, and measures their memory."""
    case = plan.make()
    findings = case.examine(case.variants)
    for name, variant in case.variants.items():
        if variant.plan is not None:
            findings[name] |= attempt(variant.plan)
    bytes_, times = {}, {}
    for mode in case.modes:
        steps = _right_steps(case, mode, findings)
        bytes_[mode] = {
            name: _bytes(case, case.variants[name], mode, own, findings[name]) for name, own in steps.items()
        }
        steps = {name: own for name, own in steps.items() if _is_right(findings[name])}
        title = f"{plan.name}, {mode}"
        if case.calls:
            together = timing.interleaved(steps, rounds, title, timing.host_clock(device))
            times[mode] = {name: [one / case.calls for one in own] for name, own in together.items()}
        else:
            times[mode] = timing.interleaved(steps, rounds, title, clock)
    rows = [
        row
        for mode in case.modes
        for variant, own in times[mode].items()
        for row in _rows(plan, case, mode, variant, own, times[mode], bytes_[mode][variant], done)
    ]
    return describe(plan, case, findings, times, bytes_), rows


def failed(plan: Plan, error: Exception) -> dict[str, Any]:
    """A case that could not be made or checked, in the description of a run."""
    traceback.print_exception(error)
    return {
        "suite": plan.suite,
        "kernel": plan.kernel,
        "axes": plan.axes,
        "x": plan.x,
        "error": f"{type(error).__name__}: {error}",
        **dict.fromkeys(("base", "checked"), ""),
        **{name: [] for name in ("rivals", "modes", "limits")},
        **{name: {} for name in ("facts", "variants")},
    }


def _right_steps(case: Case, mode: str, findings: Findings) -> dict[str, Sequence[Step]]:
    """The steps of the variants that are right, after one run of each: what does not run is told, not timed."""
    steps = {}
    for name, variant in case.variants.items():
        if _is_right(findings[name]):
            found = attempt(partial(_tried_steps, variant, mode))
            if found.get("steps"):
                steps[name] = found["steps"]
            findings[name] |= {key: value for key, value in found.items() if key == "error"}
    return steps


def _tried_steps(variant: Variant, mode: str) -> dict[str, Any]:
    steps = variant.steps(mode)
    for step in steps:
        step()
    return {"steps": steps}


def _is_right(finding: Mapping[str, Any]) -> bool:
    return "wrong" not in finding and "error" not in finding


def _bytes(
    case: Case, variant: Variant, mode: str, steps: Sequence[Any], finding: dict[str, Any]
) -> dict[str, float]:
    """MB of the peak ("memory") and kept for backward ("saved"), where they are asked for."""
    found: dict[str, float] = {}
    if variant.memory_bytes is not None:
        size = attempt(lambda: {"bytes": variant.memory_bytes(mode, steps[0])})
        finding |= {key: value for key, value in size.items() if key == "error"}
        if size.get("bytes") is not None:
            found["memory"] = (case.held_bytes + size["bytes"]) / 1e6
    if variant.saved_bytes is not None and mode == case.modes[-1]:
        size = attempt(lambda: {"bytes": variant.saved_bytes()})
        finding |= {key: value for key, value in size.items() if key == "error"}
        if "bytes" in size:
            found["saved"] = size["bytes"] / 1e6
    return found


def _rows(
    plan: Plan,
    case: Case,
    mode: str,
    variant: str,
    own: Sequence[float],
    times: Milliseconds,
    bytes_: Mapping[str, float],
    done: Run,
) -> list[Row]:
    """Every figure of a variant in one pass."""
    speed = timing.figure(own)
    figures = {"speed": speed}
    figures |= {RELATIVE + rival: timing.ratio(own, times[rival]) for rival in case.rivals if rival in times}
    if case.variants[variant].does_work:
        figures |= _rates(case, mode, speed)
    figures |= {metric: Figure.single(size) for metric, size in bytes_.items()}
    return [_row(plan, mode, variant, metric, found, done) for metric, found in figures.items()]


def _rates(case: Case, mode: str, speed: Figure) -> dict[str, Figure]:
    """What was done a second."""
    found = {}
    work = case.work.get(mode)
    if work is not None and work.dense_flops:
        found["dense-equivalent rate"] = _per_second(work.dense_flops / 1e9, speed)
        found["useful rate"] = _per_second(work.useful_flops / 1e9, speed)
    if work is not None and work.moved_bytes:
        found["bandwidth"] = _per_second(work.moved_bytes / 1e6, speed)
    if case.tokens is not None:
        found["tokens"] = _per_second(1e3 * case.tokens, speed)
    return found


def _per_second(amount: float, speed: Figure) -> Figure:
    """An amount a millisecond; what is slow has a low rate."""
    return Figure(amount / speed.p50, amount / speed.p80, amount / speed.p20)


def _row(plan: Plan, mode: str, variant: str, metric: str, figure: Figure, done: Run) -> Row:
    config = {"suite": plan.suite, "case": plan.name} | plan.axes
    return Row(
        kernel_name=plan.kernel,
        kernel_provider=variant,
        kernel_operation_mode=mode,
        metric_name=metric,
        metric_unit=unit(metric),
        gpu_name=machine_name(done.description["environment"]),
        x_name=plan.x,
        x_label=plan.x,
        x_value=float(plan.axes[plan.x]),
        y_value_50=figure.p50,
        y_value_20=figure.p20,
        y_value_80=figure.p80,
        extra_benchmark_config_str=json.dumps(config),
        timestamp=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M:%S"),
        liger_version=liger_version(),
    )


def describe(
    plan: Plan,
    case: Case,
    findings: Mapping[str, dict[str, Any]],
    times: Mapping[str, Milliseconds],
    bytes_: Mapping[str, Mapping[str, Mapping[str, float]]],
) -> dict[str, Any]:
    """A case in the description of a run."""
    variants = {name: {"is_rival": one.is_rival} | findings[name] for name, one in case.variants.items()}
    absent = {name: {"is_rival": True, "missing": why} for name, why in case.missing.items()}
    return {
        "suite": plan.suite,
        "kernel": plan.kernel,
        "axes": plan.axes,
        "x": plan.x,
        "base": case.rivals[0],
        "rivals": list(case.rivals),
        "modes": list(case.modes),
        "checked": case.checked,
        "limits": [
            verdict(limit, times.get(limit.mode, {}), bytes_.get(limit.mode, {})) for limit in case.limits
        ],
        "facts": case.facts,
        "variants": variants | absent,
    }


def verdict(limit: Limit, times: Milliseconds, bytes_: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """The limit, what was got, and whether that is enough."""
    got = _got(limit, times, bytes_)
    words = NOT_MEASURED if got is None else REACHED if got <= limit.most else MISSED
    return limit._asdict() | {"got": got, "verdict": words}


def _got(limit: Limit, times: Milliseconds, bytes_: Mapping[str, Mapping[str, float]]) -> float | None:
    if limit.quantity == SECONDS:
        own_times = times.get(limit.variant)
        return None if own_times is None else timing.figure(own_times).p50 / 1e3
    if limit.quantity == ADDED and {limit.variant, limit.rival} <= times.keys():
        rounds = zip(times[limit.variant], times[limit.rival], strict=True)
        return timing.figure([1e3 * (own - rival) for own, rival in rounds]).p50
    if limit.quantity != "speed":
        own, rival = (bytes_.get(name, {}).get(limit.quantity) for name in (limit.variant, limit.rival))
        return None if own is None or not rival else own / rival
    wanted = [limit.variant, limit.rival, *([limit.added] if limit.added else [])]
    if any(name not in times for name in wanted):
        return None
    own_times, rival_times, *rest = (times[name] for name in wanted)
    base = rest[0] if rest else [0.0] * len(own_times)
    rounds = zip(own_times, rival_times, base, strict=True)
    return timing.figure([(own - floor) / (rival - floor) for own, rival, floor in rounds]).p50


# --------------------------------------------------------------------------------------------------------------------


def lines(run: Run, name: str) -> list[str]:
    """A case as text."""
    from .results import limit_text

    case = run.cases[name]
    text = [name] + ([f"  error: {case['error']}"] if "error" in case else [])
    for mode in case["modes"]:
        text.append(f"  {mode}")
        text += [
            f"    {variant:<26} {_measured_text(run, name, variant, mode, entry)}"
            for variant, entry in case["variants"].items()
            if not _is_right(entry) or "missing" in entry or run.figure(name, variant, mode) is not None
        ]
    return text + [f"  {limit_text(limit)}" for limit in case["limits"]]


def _measured_text(run: Run, case: str, variant: str, mode: str, entry: Mapping[str, Any]) -> str:
    for reason in ("missing", "error", "wrong"):
        if reason in entry:
            return f"{reason}: {entry[reason]}"
    speed = run.figure(case, variant, mode)
    assert speed is not None
    text = f"{speed.p50:9.3f} ms ({speed.p20:.3f}–{speed.p80:.3f})"
    for metric, form in {
        "useful rate": "{:8.3f} TFLOP/s",
        "bandwidth": "{:8.1f} GB/s",
        "tokens": "{:9.0f} tokens/s",
    }.items():
        found = run.figure(case, variant, mode, metric)
        text += "" if found is None else form.format(found.p50)
    for metric in ("memory", "saved"):
        found = run.figure(case, variant, mode, metric)
        text += "" if found is None else f"   {metric} {found.p50:.1f} MB"
    for rival in run.cases[case]["rivals"]:
        found = run.figure(case, variant, mode, RELATIVE + rival)
        text += "" if found is None or rival == variant else f"   {found.p50:.3f} x {rival}"
    return text
