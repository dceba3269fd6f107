"""A report of what runs on this machine: `python -m gradroute [--json]`.

Versions, devices, what other tools do beside routing (docs/setups.md), how the native module was built, and every op on
every backend: either the reason why it cannot run here, or one masked backward on each device, checked against the fp64
reference within the tests' error budget. The exit code is 1 when one of them disagrees or fails.
"""

from __future__ import annotations

import json
import platform
import warnings
from pathlib import Path
from typing import Any

import torch

from .. import backends, testing
from ..backends import native
from ..backends.attention_plan import FA4
from . import verdicts
from .check.cases import why_not
from .identity import TOOLS, cpu, cuda, versions
from .records import TUNING, Record

AGREES = "ok"
# tools/setups.py writes it from the markers of the tests.
SETUPS = Path(__file__).parents[1] / "setups.json"


def main(as_json: bool) -> int:
    """Prints the report; 0 when every backend that can run agrees with the reference, otherwise 1."""
    found = report()
    print(json.dumps(found, indent=2) if as_json else as_text(found))
    return 0 if found["agrees"] else 1


def report() -> dict[str, Any]:
    """All of it, as `--json` prints it."""
    ops = {op: {name: check(op, name) for name in backends.BACKENDS} for op in backends.OPS}
    outcomes = [
        outcome for row in ops.values() for cell in row.values() for outcome in cell["checks"].values()
    ]
    return {
        "versions": versions(),
        "platform": platform.platform(),
        "cpu": cpu(),
        "cuda": cuda(),
        "native": {"error": native.loading.load_error}
        if native.loading.module is None
        else json.loads(native.loading.module.BUILD),
        "setups": setups(),
        "findings": findings(),
        "ops": ops,
        "agrees": all(outcome == AGREES for outcome in outcomes),
    }


def setups() -> list[dict[str, str]]:
    """The table of set-ups: `tool`, `setup`, why it is `refused` ("": it works), and its `test`."""
    rows: list[dict[str, str]] = json.loads(SETUPS.read_text(encoding="utf-8"))
    return rows


def findings() -> dict[str, dict[str, Any]]:
    """By device what was found here: `checks`, the last verdict on every backend, or None, and what was `tuned`."""
    number = torch.cuda.device_count() if torch.cuda.is_available() else 0
    found = {}
    for device in [torch.device("cpu"), *(torch.device("cuda", index) for index in range(number))]:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", ".*found it wrong", RuntimeWarning
            )  # the report has a line for it
            checks = verdicts.of(device)
        able = [name for name in backends.BACKENDS if name not in backends.unavailable_backends(None, device)]
        able += [FA4] * (why_not(FA4, device) is None)
        found[str(device)] = {
            "checks": {name: checks[name]._asdict() if name in checks else None for name in able},
            "tuned": sorted(Record(TUNING, device).read()),
        }
    return found


def check(op: str, backend: str) -> dict[str, Any]:
    """{"reason": why the backend cannot run the op here, or None; "checks": {device: AGREES or what is wrong}}."""
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    able = [device for device in devices if backend not in backends.unavailable_backends(op, device)]
    reason = backends.unavailable_backends(op).get(backend)
    return {"reason": reason, "checks": {device: masked_backward(op, backend, device) for device in able}}


def masked_backward(op: str, backend: str, device: str) -> str:
    """AGREES when a small fp32 call and its gradients keep the error budget, otherwise what is wrong."""
    tokens = (2, 19) if op == "routed_attention" else 37
    call = testing.sample(op, tokens=tokens, tables="blocks", strength="token", device=device)
    try:
        call.assert_within_budget(backend)
    except Exception as error:  # a kernel may fail in any way, and the report is there to tell it
        return f"{type(error).__name__}: {error}"
    return AGREES


def as_text(found: dict[str, Any]) -> str:
    """The report for people."""
    names = {
        name: number or "not installed"
        for name, number in found["versions"].items()
        if number or name not in TOOLS
    }
    lines = [
        ("versions", ", ".join(f"{name} {number}" for name, number in names.items())),
        ("platform", found["platform"]),
        ("cpu", cpu_text(found["cpu"])),
        ("cuda", cuda_text(found["cuda"])),
        ("native", native_text(found["native"])),
        ("set-ups", setups_text(found["setups"])),
        ("checked", checks_text(found["findings"])),
        ("tuned", tuned_text(found["findings"])),
    ]
    head = "\n".join(f"{name:<9} {text}" for name, text in lines)
    return f"{head}\n\n{table_text(found['ops'])}"


def cpu_text(found: dict[str, Any]) -> str:
    """One line."""
    instruction_set = found["instruction_set"] or "no native kernels"
    return f"{found['model']}, {found['threads']} threads, {instruction_set}"


def cuda_text(found: dict[str, Any]) -> str:
    """One line, and one more a device."""
    line = f"torch's runtime {found['runtime'] or 'none'}, driver {found['driver'] or 'none'}"
    for number, device in enumerate(found["devices"]):
        line += f"\n{'':<9} cuda:{number} {device['name']}, sm_{device['capability'].replace('.', '')}, "
        line += f"{device['memory_gib']} GiB"
    return line if found["devices"] else f"{line}, no device"


def native_text(found: dict[str, Any]) -> str:
    """One line: how the native module was built, or why there is none."""
    if "error" in found:
        return found["error"]
    openmp = f"OpenMP {found['openmp']}" if found["openmp"] else "no OpenMP"
    cuda = f"CUDA {found['cuda']} ({found['cuda_architectures']})" if found["cuda"] else "no CUDA"
    return f"{found['cxx']} ({found['instruction_sets']}), {openmp}, {cuda}, pybind11 {found['pybind11']}"


def setups_text(found: list[dict[str, str]]) -> str:
    """One line."""
    refused = sum(bool(row["refused"]) for row in found)
    return f"{len(found) - refused} work, {refused} are refused, each for a reason: --json lists them"


def checks_text(found: dict[str, dict[str, Any]]) -> str:
    """A line a device: the date of the last verdict on every backend, and which were wrong or never checked."""

    def said(name: str, verdict: dict[str, Any] | None) -> str:
        if verdict is None:
            return f"{name} never"
        date, unchecked = verdict["date"][:10], len(verdict["unchecked"])
        if not verdict["passed"]:
            return f"{name} {date} WRONG ({verdict['failures'][0]})"
        return f"{name} {date}" + (f" ({unchecked} not checked)" if unchecked else "")

    lines = [
        f"{device}: " + ", ".join(said(name, verdict) for name, verdict in of_device["checks"].items())
        for device, of_device in found.items()
    ]
    if any(None in of_device["checks"].values() for of_device in found.values()):
        lines.append("`python -m gradroute check` checks them")
    return f"\n{'':<9} ".join(lines)


def tuned_text(found: dict[str, dict[str, Any]]) -> str:
    """A line a device: how many questions were answered by measuring here."""
    lines = [
        f"{device}: {len(of_device['tuned'])} answers" if of_device["tuned"] else f"{device}: nothing"
        for device, of_device in found.items()
    ]
    return f"\n{'':<9} ".join(lines)


def table_text(ops: dict[str, dict[str, Any]]) -> str:
    """Op × backend: the devices where it agrees with the reference, and below the table whatever is not so."""
    notes: dict[str, int] = {}

    def note(text: str) -> str:
        return f"[{notes.setdefault(text, len(notes) + 1)}]"

    def cell(found: dict[str, Any]) -> str:
        if found["reason"]:
            return f"- {note(found['reason'])}"
        outcomes = found["checks"].items()
        return " ".join(d if outcome == AGREES else f"{d} WRONG {note(outcome)}" for d, outcome in outcomes)

    rows = [["agrees on", *backends.BACKENDS]]
    rows += [[op, *(cell(row[name]) for name in backends.BACKENDS)] for op, row in ops.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join(lines + [f"[{number}] {text}" for text, number in notes.items()])
