"""Checks, times and saves cases, each of them before the next begins."""

from __future__ import annotations

import datetime
import gc
import json
import time
import traceback
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import machine, progress, timing
from .cases import ADDED, PASSES, SECONDS, Case, Findings, Limit, Plan, Step, Variant, attempt
from .results import (
    MISSED,
    NOT_MEASURED,
    REACHED,
    RELATIVE,
    CaseFound,
    Figure,
    LimitFound,
    Row,
    Run,
    liger_version,
    limit_text,
    machine_name,
    unit,
)

Milliseconds = Mapping[str, Sequence[float]]  # variant → the milliseconds of every round


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

    An interrupt ends the run after the cases that are done; the description's "interrupted" says so.

    Args:
        name: the name of the suite or group, and of the files.
        plans: its cases.
        rounds: the number of rounds to time, each variant once a round.
        device: where the cases run.
        folder: the folder for NAME.csv and NAME.json; without `resume` they replace those that are there.
        resume: go on with the files that are there: cases in them are not timed again.
        command: the command that asked for the run.
        missing: suites that cannot run on this machine, with the reason.

    Raises:
        ValueError: `resume`, and the files are of another environment.
    """
    done = begin(name, plans, rounds, device, folder, resume, command)
    done.description["missing"] = dict(missing or {})
    done.description["interrupted"] = False
    try:
        measure_all(remaining(plans, done), rounds, device, folder, done)
    except KeyboardInterrupt:
        done.description["interrupted"] = True
    progress.clear()
    if done.cases or not done.description["interrupted"]:
        done.save(folder)
    return done


def measure_all(plans: Sequence[Plan], rounds: int, device: torch.device, folder: Path, done: Run) -> None:
    """Measures cases that are not done, saves the run after each, and prints it."""
    dtypes = {plan.axes["dtype"] for plan in plans if "dtype" in plan.axes}
    _raise_ceilings(device, dtypes, done)
    clock = timing.clock_of(device)
    for number, plan in enumerate(plans, 1):
        progress.case(plan.name, number, len(plans))
        start = time.perf_counter()
        try:
            entry, rows = measure(plan, rounds, device, clock, done)
        except Exception as error:  # one case must not cost the others
            entry, rows = failed(plan, error), []
        entry["seconds"] = round(time.perf_counter() - start, 1)
        done.replace(plan.name, entry, rows)
        done.save(folder)
        progress.clear()
        print("\n".join([*lines(done, plan.name), ""]), flush=True)
        release(device)
    _raise_ceilings(device, dtypes, done)


def _raise_ceilings(device: torch.device, dtypes: Collection[str], done: Run) -> None:
    """Measures the ceilings, before the cases and after them: the higher ones count."""
    if dtypes or "ceilings" not in done.description:
        found, before = machine.ceilings(device, dtypes), done.description.get("ceilings")
        done.description["ceilings"] = machine.higher(found, before) if before else found


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
                f"resume: {file} was measured with {was}, and this is {is_}: run with --overwrite or another --out"
            )
        return done
    description = {
        "name": name,
        "command": command,
        "rounds": rounds,
        "environment": environment,
        "method": timing.METHOD,
        "interrupted": False,
        "missing": {},
        "cases": {},
    }
    return Run(name, description)


def remaining(plans: Sequence[Plan], done: Run) -> list[Plan]:
    """The cases that a run lacks."""
    return [plan for plan in plans if not _is_done(plan, done)]


def _is_done(plan: Plan, done: Run) -> bool:
    case = done.cases.get(plan.name)
    return case is not None and "error" not in case and case["axes"] == json.loads(json.dumps(plan.axes))


def release(device: torch.device) -> None:
    """Gives back the tensors of a case, and what was compiled for it."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure(
    plan: Plan, rounds: int, device: torch.device, clock: timing.Clock, done: Run
) -> tuple[CaseFound, list[Row]]:
    """Makes a case, checks its variants, times those that are right, and measures their memory."""
    progress.stage("making the inputs")
    case = plan.make()
    progress.stage("checking the numbers of every variant")
    findings = case.examine(case.variants)
    for name, variant in case.variants.items():
        if variant.plan is not None:
            findings[name] |= attempt(variant.plan)
    bytes_, times = {}, {}
    for mode in case.modes:
        progress.stage(f"running {mode} of every variant once, which compiles some")
        steps = _right_steps(case, mode, findings)
        progress.stage(f"measuring the memory of {mode}")
        bytes_[mode] = {name: _bytes(case, name, mode, own, findings[name]) for name, own in steps.items()}
        steps = {name: own for name, own in steps.items() if _is_right(findings[name])}
        with case.beside():
            times[mode] = _times(case, steps, rounds, mode, device, clock)
    rows = [
        row
        for mode in case.modes
        for variant, own in times[mode].items()
        for row in _rows(plan, case, mode, variant, own, times[mode], bytes_[mode][variant], done)
    ]
    return describe(plan, case, findings, times, bytes_), rows


def _times(
    case: Case,
    steps: Mapping[str, Sequence[Step]],
    rounds: int,
    mode: str,
    device: torch.device,
    clock: timing.Clock,
) -> dict[str, list[float]]:
    """Milliseconds of a call in each round, by variant."""
    if not case.calls:
        return timing.interleaved(steps, rounds, mode, clock)
    together = timing.interleaved(steps, rounds, mode, timing.host_clock(device))
    return {name: [one / case.calls for one in own] for name, own in together.items()}


def failed(plan: Plan, error: Exception) -> CaseFound:
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
    """The steps of the variants that are right, after one run of each, in which those that fail are found."""
    steps = {}
    for name, variant in case.variants.items():
        if _is_right(findings[name]):
            progress.step(f"running {mode} once: {name}")
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
    case: Case, name: str, mode: str, steps: Sequence[Step], finding: dict[str, Any]
) -> dict[str, float]:
    """MB of the peak ("memory") and kept for backward ("saved"), where they are asked for."""
    variant = case.variants[name]
    progress.step(f"measuring the memory of {mode}: {name}")
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
    """The rates: FLOPs, bytes and tokens in each second."""
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
    """An amount a millisecond; the slow percentile has the low rate."""
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
) -> CaseFound:
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


def verdict(limit: Limit, times: Milliseconds, bytes_: Mapping[str, Mapping[str, float]]) -> LimitFound:
    """The limit, the figure measured, and whether that is enough."""
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


def lines(run: Run, name: str) -> list[str]:
    """A case as text."""
    case = run.cases[name]
    text = [name] + ([f"  error: {case['error']}"] if "error" in case else [])
    for mode in case["modes"]:
        text.append(f"  {PASSES[mode]}")
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
        "useful rate": "   {:.3g} useful TFLOP/s",
        "bandwidth": "   {:.3g} GB/s",
        "tokens": "   {:.0f} tokens/s",
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
