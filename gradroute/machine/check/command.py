"""The command `python -m gradroute check`: proves every backend that can run here, and keeps the verdicts."""

from __future__ import annotations

import argparse
import json
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import Any, NamedTuple

import torch

from ... import backends
from ...backends.attention_plan import FA4
from .. import identity
from ..progress import Progress
from ..records import CHECK, Record
from .around_vendors import CHECKED
from .cases import DTYPES, KINDS, STEP, Case, Selection, cases, why_not
from .findings import Findings
from .keeping import against, verdict
from .workers import ENDING, LostProcesses, Plan, outcomes

# Seconds that a case may take: Triton compiles a kernel in one or two, and milliseconds are usual.
LIMIT = 300.0
# Samples seed torch, which takes 64 bits, with up to a hundred seeds for one.
LARGEST_SEED = 2**32 - 1
INTERRUPTED = 130  # what shells return for a command that Ctrl-C ended


class Job(NamedTuple):
    """A backend to check on a device."""

    plan: Plan
    cases: list[Case]


def main(arguments: Sequence[str]) -> int:
    """Runs the command; 0: all was right, 1: something was not, or could not be finished, 130: interrupted."""
    parser = _parser()
    options = parser.parse_args(arguments)
    selection = Selection(
        options.quick,
        options.seed,
        tuple(options.op or ()),
        tuple(options.dtype or ()),
        tuple(options.kind or ()),
    )
    try:
        jobs = _jobs(options, selection)
        # A folder that cannot be written is known now, and not after minutes.
        for device in {job.plan.device: None for job in jobs}:
            Record(CHECK, device).update({})
    except (ValueError, OSError) as error:
        parser.error(str(error))
    found = []
    with ended_like_ctrl_c():
        for job in jobs:
            findings = _checked(job, selection)
            found.append((findings, _keep(findings)))
            if not options.json:
                print(_as_text(*found[-1]), flush=True)
            if findings.trouble == "interrupted":
                break
    backends.choose_anew()
    if options.json:
        print(json.dumps(_as_json(found), indent=2))
    if found[-1][0].trouble == "interrupted":
        return INTERRUPTED
    return int(not all(findings.is_right for findings, _ in found))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m gradroute check",
        description="Proves every backend on this machine against the reference. One that is found wrong is left out "
        "of the automatic choice here until a check passes. Exit code 1: something is wrong or was not finished.",
        epilog="; ".join(f"{kind}: {what}" for kind, what in KINDS.items()) + ".",
    )
    several: dict[str, Any] = {"action": "append", "metavar": "NAME"}
    parser.add_argument(
        "--device",
        **several,
        help="cpu, cuda or cuda:N; may be repeated; default: the CPU and every model of GPU",
    )
    parser.add_argument("--backend", **several, choices=CHECKED, help=", ".join(CHECKED))
    parser.add_argument("--op", **several, choices=(*backends.OPS, STEP), help="one op; clears nothing")
    parser.add_argument("--dtype", **several, choices=DTYPES, help=f"{', '.join(DTYPES)}; clears nothing")
    parser.add_argument("--kind", **several, choices=tuple(KINDS), help=f"{', '.join(KINDS)}; clears nothing")
    parser.add_argument("--quick", action="store_true", help="cover every value of every axis, not every two")
    parser.add_argument("--seed", type=int, default=0, help="of all numbers; default 0")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--limit",
        type=float,
        default=LIMIT,
        help="seconds that one case may take; inf: no limit; default %(default)s",
    )
    parser.add_argument(
        "--processes",
        type=int,
        help="how many at once; default 1, and for triton and fa4 on a GPU half of the cores, up to 8",
    )
    return parser


def _jobs(options: argparse.Namespace, selection: Selection) -> list[Job]:
    """What is to be checked.

    Raises:
        ValueError: nothing is, or an option is out of its range.
    """
    if not options.limit > 0:
        raise ValueError(f"limit: got {options.limit}, expected a number of seconds above 0")
    if not 0 <= selection.seed <= LARGEST_SEED:
        raise ValueError(f"seed: got {selection.seed}, expected 0 to {LARGEST_SEED}")
    if options.processes is not None and options.processes < 1:
        raise ValueError(f"processes: got {options.processes}, expected 1 or more")
    jobs, reasons = [], []
    for device in _devices(options.device):
        for backend in options.backend or CHECKED:
            reason = why_not(backend, device)
            if reason is not None:
                reasons.append(f"{backend} on {device}: {reason}")
                continue
            processes = options.processes or _processes(backend, device)
            plan = Plan(backend, device, selection.seed, processes, options.limit)
            jobs.append(Job(plan, cases(backend, device, selection)))
    jobs = [job for job in jobs if job.cases]
    if not jobs:
        raise ValueError("there is nothing to check: " + ("; ".join(reasons) or "no backend has such a case"))
    return jobs


def _devices(named: Sequence[str] | None) -> list[torch.device]:
    """The devices: those that are named, else the CPU and one of every model of GPU.

    Raises:
        ValueError: there is no such device.
    """
    number = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = [torch.device("cuda", index) for index in range(number)]
    models = list({Record(CHECK, device).file: device for device in reversed(gpus)}.values())[::-1]
    known = {"cpu": [torch.device("cpu")], "cuda": models} | {str(device): [device] for device in gpus}
    found: dict[torch.device, None] = {}
    for name in named or ("cpu", "cuda"):
        if name not in known or (named and not known[name]):
            there = ", ".join(name for name, devices in known.items() if devices)
            raise ValueError(f"device: got {name!r}, expected one that is there: {there}")
        found |= dict.fromkeys(known[name])
    return list(found)


def _processes(backend: str, device: torch.device) -> int:
    """Triton and FlashAttention-4 compile for minutes in one process; everything else is quick."""
    if backend not in ("triton", FA4) or device.type != "cuda":
        return 1
    return max(1, min(8, (os.cpu_count() or 1) // 2))


@contextmanager
def ended_like_ctrl_c() -> Iterator[None]:
    """Within it what ends jobs of a cluster, or closes a terminal, does what Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():  # Python lets it alone handle signals
        yield
        return
    handled = [number for number in ENDING if signal.getsignal(number) is not signal.SIG_IGN]  # as by nohup
    before = {number: signal.signal(number, signal.default_int_handler) for number in handled}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _checked(job: Job, selection: Selection) -> Findings:
    """Runs a backend's cases; Ctrl-C ends it with what was found until then."""
    findings = Findings(job.plan, selection, len(job.cases))
    progress = Progress(len(job.cases), "check", f"{job.plan.backend} on {job.plan.device}", lines=10)
    running = outcomes(job.cases, job.plan)
    try:
        for case, outcome in running:
            findings.add(case, outcome)
            progress.step()
    except LostProcesses as error:
        findings.trouble = str(error)
    except KeyboardInterrupt:
        findings.trouble = "interrupted"
    finally:
        running.close()
        progress.close()
    return findings


def _keep(findings: Findings) -> dict[str, Any]:
    """Keeps the verdict, beside those of runs that end at the same time; returns the one that holds now."""
    backend, run = findings.plan.backend, findings.run(_now())
    holds: dict[str, Any] = {}

    def changed(kept: dict[str, Any]) -> dict[str, Any]:
        new = verdict(kept.get(backend), run)
        if new is not None:
            kept = kept | {backend: new}
        holds.update(kept.get(backend) or {})
        return kept

    try:
        Record(CHECK, findings.plan.device).change(changed)
    except OSError as error:
        findings.trouble = f"the verdict cannot be kept: {error}"
    return holds


def _now() -> str:
    return datetime.now(timezone.utc).replace(microsecond=0, tzinfo=None).isoformat()


def _as_text(findings: Findings, holds: dict[str, Any]) -> str:
    """What was found about a backend, and what holds now."""
    plan = findings.plan
    head = f"{plan.backend} on {plan.device} ({identity.name_of(plan.device)})"
    return f"{head}\n{findings.as_text()}\n{plan.backend} on {plan.device}: {_conclusion(findings, holds)}\n"


def _conclusion(findings: Findings, holds: dict[str, Any]) -> str:
    """Whether it passed, and what that means for the automatic choice."""
    said = f"{findings.done} of {findings.total} checks" if findings.trouble else f"{findings.done} checks"
    said += f", {len(findings.failures)} WRONG" if findings.failures else ", none wrong"
    if findings.trouble:
        said += f"; {findings.trouble}"
    elif not findings.is_finished:
        said += "; some could not be checked"
    if findings.is_whole and holds.get("passed"):
        return f"passed ({said})"
    if holds.get("passed") is False:
        said += f"; it is left out of the automatic choice until these pass: {_to_pass(findings, holds)}"
    elif not findings.is_whole:
        said += "; this was not the whole check, so that it changes no verdict"
    return said


def _to_pass(findings: Findings, holds: dict[str, Any]) -> str:
    """The commands that have to pass."""
    commands = []
    for one in against(holds):
        selection = Selection(quick=one["quick"], seed=one["seed"])
        commands.append(f"`{Findings(findings.plan, selection, 0).command()}`")
    return ", ".join(commands)


def _as_json(found: Sequence[tuple[Findings, dict[str, Any]]]) -> dict[str, Any]:
    """Everything for machines."""
    return {
        "checks": [
            {
                "backend": findings.plan.backend,
                "device": str(findings.plan.device),
                "machine": Record(CHECK, findings.plan.device).machine,
                "file": str(Record(CHECK, findings.plan.device).file),
                **findings.as_json(),
                "verdict": holds or None,
            }
            for findings, holds in found
        ],
        "right": all(findings.is_right for findings, _ in found),
    }
