"""The files of a run: NAME.csv has every figure, in Liger-Kernel's columns, and NAME.json what figures depend on.

One row of the CSV is one quantity of one variant: the median of the rounds, and their 20th and 80th percentiles. Which
case it belongs to, and the case's axes, stand in `extra_benchmark_config_str`, as JSON. The JSON file has the
environment, the ceilings of the machine, how all was measured, and by case its limits with their verdicts, and why a
variant was not timed.
"""

from __future__ import annotations

import csv
import importlib.metadata
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from .cases import ADDED, SECONDS

#: The units of a figure, by what was measured.
UNITS = {
    "speed": "ms",
    "memory": "MB",  # the peak beyond what was there before the pass; models include what they hold between steps
    "saved": "MB",  # bytes that autograd keeps for the backward, parameters aside
    "useful rate": "TFLOP/s",  # counts the FLOPs that no mask makes unnecessary
    "dense-equivalent rate": "TFLOP/s",  # counts the FLOPs of the unmasked op, whatever a variant leaves out
    "bandwidth": "GB/s",  # counts the bytes that must be read and written
    "tokens": "1/s",
}
RELATIVE = "speed relative to "  # a rival's name follows; the median of the ratios of the same rounds


class Figure(NamedTuple):
    """The median over the rounds, the 20th and the 80th percentile."""

    p50: float
    p20: float
    p80: float

    @classmethod
    def single(cls, value: float) -> Figure:
        """A figure that was measured once."""
        return cls(value, value, value)


class Row(NamedTuple):
    """A line of the CSV, with Liger-Kernel's names in its order (benchmark/scripts/utils.py there).

    Attributes:
        kernel_name: the op, or the model.
        kernel_provider: the variant.
        kernel_operation_mode: "forward", "backward", "full" (both) or "step" (with the optimizer's).
        metric_name, metric_unit: one of UNITS; or RELATIVE and a rival, "x".
        gpu_name: the name of the GPU, or of the CPU where there is none.
        x_name, x_label, x_value: the axis that a plot of such rows runs along, and the case's value on it.
        y_value_50, y_value_20, y_value_80: a Figure.
        extra_benchmark_config_str: JSON: "suite", "case", and the case's axes.
        timestamp: when the case was measured, UTC.
        liger_version: of Liger-Kernel on that machine; empty: not installed.
    """

    kernel_name: str
    kernel_provider: str
    kernel_operation_mode: str
    metric_name: str
    metric_unit: str
    gpu_name: str
    x_name: str
    x_label: str
    x_value: float
    y_value_50: float
    y_value_20: float
    y_value_80: float
    extra_benchmark_config_str: str
    timestamp: str
    liger_version: str

    @property
    def config(self) -> dict[str, Any]:
        return json.loads(self.extra_benchmark_config_str)

    @property
    def case(self) -> str:
        return self.config["case"]

    @property
    def figure(self) -> Figure:
        return Figure(self.y_value_50, self.y_value_20, self.y_value_80)

    @classmethod
    def of_text(cls, columns: dict[str, str]) -> Row:
        """A row from a line as csv.DictReader gives it."""
        numbers = {
            name: float(columns[name]) for name in cls._fields if name.startswith(("x_value", "y_value"))
        }
        return cls(**(columns | numbers))


def unit(metric: str) -> str:
    return "x" if metric.startswith(RELATIVE) else UNITS[metric]


def liger_version() -> str:
    try:
        return importlib.metadata.version("liger_kernel")
    except importlib.metadata.PackageNotFoundError:
        return ""


class LimitFound(TypedDict):
    """A target in the description of a run: the fields of a Limit, the figure measured, if one was, and the verdict."""

    variant: str
    rival: str
    most: float
    quantity: str
    mode: str
    added: str
    got: float | None
    verdict: str


class VariantFound(TypedDict, total=False):
    """A variant in the description of a run: whether it is a rival, and why it was not timed, if it was not."""

    is_rival: bool
    missing: str
    wrong: str
    error: str


class CaseFound(TypedDict, total=False):
    """A case in the description of a run; "error" where it could not be made or checked."""

    suite: str
    kernel: str
    axes: dict[str, Any]
    x: str
    base: str
    rivals: list[str]
    modes: list[str]
    checked: str
    limits: list[LimitFound]
    facts: dict[str, Any]
    variants: dict[str, VariantFound]
    seconds: float
    error: str


@dataclass
class Run:
    """The findings of `python -m bench run NAME` on a machine.

    Attributes:
        name: the name of the suite or group of suites.
        description: the command, "rounds", the "environment", the machine's "ceilings", the "method", and by case under
            "cases" its "suite", "axes", "base", "rivals", "limits" and "variants".
        rows: every figure, in the order of the cases.
    """

    name: str
    description: dict[str, Any]
    rows: list[Row] = field(default_factory=list)

    @property
    def cases(self) -> dict[str, CaseFound]:
        return self.description["cases"]

    @property
    def machine(self) -> str:
        """The GPU, or the CPU with its threads."""
        return machine_name(self.description["environment"])

    def figure(self, case: str, variant: str, mode: str, metric: str = "speed") -> Figure | None:
        """A figure of the run; None where it was not measured."""
        return self._figures().get((case, variant, mode, metric))

    def _figures(self) -> dict[tuple[str, str, str, str], Figure]:
        if self._indexed is not self.rows:
            self._indexed = self.rows
            self._index = {
                (row.case, row.kernel_provider, row.kernel_operation_mode, row.metric_name): row.figure
                for row in self.rows
            }
        return self._index

    _index: dict[tuple[str, str, str, str], Figure] = field(default_factory=dict, repr=False)
    _indexed: list[Row] | None = field(default=None, repr=False)

    def modes(self, case: str) -> list[str]:
        """The passes of a case that were timed, in their order."""
        return list(dict.fromkeys(mode for name, _, mode, _ in self._figures() if name == case))

    def headlines(self, suite: str) -> list[str]:
        """A suite's cases that have a target which is a ratio."""
        return [
            name
            for name, case in self.cases.items()
            if case["suite"] == suite
            and any(limit["quantity"] not in (ADDED, SECONDS) for limit in case["limits"])
        ]

    def replace(self, name: str, case: CaseFound, rows: list[Row]) -> None:
        """Enters a case in place of an earlier one of that name."""
        self.rows = [row for row in self.rows if row.case != name] + rows
        self.cases[name] = case

    def failures(self) -> list[str]:
        """The cases and variants that are wrong or do not run, rivals aside."""
        found = [f"{name}: {case['error']}" for name, case in self.cases.items() if "error" in case]
        for name, case in self.cases.items():
            found += [
                f"{name}, {variant}: {entry.get('wrong') or entry.get('error')}"
                for variant, entry in case["variants"].items()
                if not entry["is_rival"] and ("wrong" in entry or "error" in entry)
            ]
        return found

    def missed(self) -> list[str]:
        """The targets that were measured and not reached, in words."""
        return [
            f"{name}: {limit_text(limit)}"
            for name, case in self.cases.items()
            for limit in case["limits"]
            if limit["verdict"] == MISSED
        ]

    def save(self, folder: Path) -> None:
        """Writes both files, each in one step, so that an interrupt leaves whole ones."""
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / f".{self.name}.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(Row._fields)
            writer.writerows(self.rows)
        text = json.dumps(self.description, indent=2) + "\n"
        (folder / f".{self.name}.json").write_text(text, encoding="utf-8")
        for suffix in ("csv", "json"):
            (folder / f".{self.name}.{suffix}").replace(folder / f"{self.name}.{suffix}")

    @classmethod
    def load(cls, file: Path) -> Run:
        """A run from its JSON file or its CSV file, with the other beside it.

        Raises:
            FileNotFoundError: one of them is missing.
            ValueError: the CSV has other columns.
        """
        description = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
        with open(file.with_suffix(".csv"), newline="", encoding="utf-8") as lines:
            reader = csv.DictReader(lines)
            if tuple(reader.fieldnames or ()) != Row._fields:
                raise ValueError(
                    f"{file.with_suffix('.csv')}: got columns {reader.fieldnames}, expected {Row._fields}"
                )
            rows = [Row.of_text(columns) for columns in reader]
        return cls(file.stem, description, rows)


REACHED, MISSED, NOT_MEASURED = "reached", "MISSED", "not measured"


def limit_text(limit: LimitFound) -> str:
    """A target with the figure and the verdict: "cpu at most 0.95 x unmasked in speed, full: 0.84, reached"."""
    got = "" if limit["got"] is None else f" {limit['got']:.3f},"
    if limit["quantity"] == SECONDS:
        return f"{limit['variant']} at most {limit['most']:g} s, {limit['mode']}:{got} {limit['verdict']}"
    if limit["quantity"] == ADDED:
        return (
            f"{limit['variant']} at most {limit['most']:g} µs more than {limit['rival']}, {limit['mode']}:{got} "
            f"{limit['verdict']}"
        )
    added = f", what is added to {limit['added']}" if limit["added"] else ""
    return (
        f"{limit['variant']} at most {limit['most']:.4g} x {limit['rival']} in {limit['quantity']}{added}, "
        f"{limit['mode']}:{got} {limit['verdict']}"
    )


def machine_name(environment: dict[str, Any]) -> str:
    if environment.get("gpu"):
        return environment["gpu"]
    return f"{environment['model']}, {environment['threads']} threads, {environment['instruction_set']}"


def runs(results: Path) -> Iterator[tuple[str, Run]]:
    """Every run under a folder of results, with the name of its machine's folder, in the order of their names."""
    for file in sorted(results.glob("*/*.csv")):
        yield file.parent.name, Run.load(file)
