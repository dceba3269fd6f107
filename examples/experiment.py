"""The frame that all experiments share: the command line, seeds, the table, the checks, and the files that they leave.

An experiment says how one seed is run and what its runs show. `main` runs the seeds, prints the table and the checks,
saves NAME.json, NAME.md and NAME.png, and returns the exit code: 1 when a check fails. `examples/report.py` makes
examples/README.md of the JSON files, so that no figure there is typed by hand.
"""

from __future__ import annotations

import os

# Threads that spin at a barrier take the cores from the thread they wait for; read when torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import importlib.metadata
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
QUICK_RESULTS = Path("demo-results")
PACKAGES = ("gradroute", "torch", "numpy", "transformers", "peft", "trl", "scikit-learn", "gymnasium")

Run = dict[str, Any]  # the results of one seed, as JSON takes them
Row = dict[str, str]  # column → cell of a row of the table


@dataclass(frozen=True)
class Check:
    """One effect that must be there.

    Attributes:
        claim: what is claimed, and where the limit comes from.
        got: the figure.
        limit: the figure that it is held against.
        at_least: whether it must be the limit or more; else the limit or less.
    """

    claim: str
    got: float
    limit: float
    at_least: bool = True

    @property
    def passed(self) -> bool:
        """Whether the figure keeps the limit; a NaN does not."""
        return self.got >= self.limit if self.at_least else self.got <= self.limit

    def __str__(self) -> str:
        sign = "≥" if self.at_least else "≤"
        return f"{self.claim}: {self.got:.3g} ({sign} {self.limit:.3g})"


@dataclass(frozen=True)
class Experiment:
    """One experiment.

    Attributes:
        name: the name of its files and of its script.
        title: the heading of its section.
        paper: the finding of the paper, with the section.
        run: runs one seed; quickly, the same code takes seconds and nothing is claimed of it.
        table: the rows of all seeds' runs, all of the same columns.
        checks: the effects that must be there.
        found: the findings, in sentences whose figures are formatted from the runs.
        plot: draws the runs.
        seeds: how many there are, counted from 0.
    """

    name: str
    title: str
    paper: str
    run: Callable[[int, bool], Run]
    table: Callable[[list[Run]], list[Row]]
    checks: Callable[[list[Run]], list[Check]]
    found: Callable[[list[Run]], str]
    plot: Callable[[list[Run], Figure], None]
    seeds: int = 3


def main(experiment: Experiment, description: str | None, arguments: Sequence[str] | None = None) -> int:
    """Runs an experiment as its command line says; returns the exit code."""
    options = parse(experiment, description, arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    done = [one_seed(experiment, seed, options) for seed in range(options.seeds)]
    runs = [one["run"] for one in done]
    results = summary(experiment, runs, options, sum(one["seconds"] for one in done))
    show(results)
    save(experiment, runs, results, options.out)
    for seed in range(options.seeds):
        file_of(experiment, seed, options).unlink(missing_ok=True)
    return 0 if options.quick or all(check["passed"] for check in results["checks"]) else 1


def one_seed(experiment: Experiment, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """The run of a seed with the seconds that it took; it is kept until all seeds' files are written."""
    file = file_of(experiment, seed, options)
    if options.resume and file.exists():
        print(f"{experiment.title}: seed {seed} was run before", flush=True)
        kept: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return kept
    print(f"{experiment.title}: seed {seed}", flush=True)
    torch.manual_seed(seed)
    start = time.perf_counter()
    done = {"run": experiment.run(seed, options.quick), "seconds": time.perf_counter() - start}
    unfinished = file.with_suffix(".part")
    unfinished.write_text(json.dumps(done), encoding="utf-8")
    unfinished.replace(file)
    return done


def file_of(experiment: Experiment, seed: int, options: argparse.Namespace) -> Path:
    """Where the run of a seed is kept while others are not done."""
    kind = "quick" if options.quick else "whole"
    return Path(options.out) / f".{experiment.name}-{kind}-{seed}.json"


def parse(
    experiment: Experiment, description: str | None, arguments: Sequence[str] | None
) -> argparse.Namespace:
    first_line = (description or experiment.title).splitlines()[0]
    parser = argparse.ArgumentParser(description=first_line)
    parser.add_argument(
        "--out",
        type=Path,
        help=f"folder of the files; default: {RESULTS.name}, of quick runs {QUICK_RESULTS}",
    )
    parser.add_argument("--seeds", type=positive, default=experiment.seeds, help="how many, counted from 0")
    parser.add_argument(
        "--quick", action="store_true", help="in seconds, to see that it runs: proves nothing"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="take over the seeds that a run in this folder has finished before it was stopped",
    )
    options = parser.parse_args(arguments)
    options.out = options.out or (QUICK_RESULTS if options.quick else RESULTS)
    return options


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"got {text}, expected 1 or more")
    return number


def summary(
    experiment: Experiment, runs: list[Run], options: argparse.Namespace, seconds: float
) -> dict[str, Any]:
    """Everything that is saved of an experiment."""
    rows = experiment.table(runs)
    if any(row.keys() != rows[0].keys() for row in rows):
        raise ValueError(f"{experiment.name}.table: got rows of different columns, expected the same in all")
    flags = f" --seeds {options.seeds}" * (options.seeds != experiment.seeds) + " --quick" * options.quick
    return {
        "name": experiment.name,
        "title": experiment.title,
        "command": f"python examples/{experiment.name}.py{flags}",
        "quick": options.quick,
        "seeds": options.seeds,
        "seconds": round(seconds, 1),
        "environment": environment(),
        "paper": experiment.paper,
        "found": experiment.found(runs),
        "checks": [
            asdict(check) | {"passed": check.passed, "text": str(check)} for check in experiment.checks(runs)
        ],
        "table": rows,
        "runs": runs,
    }


def environment() -> dict[str, Any]:
    """The versions and the machine, on which figures depend besides the commit."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "packages": versions,
    }


def show(results: dict[str, Any]) -> None:
    """Prints the table, the findings and the checks."""
    console = Console()
    table = Table(*results["table"][0], title=results["title"])
    for row in results["table"]:
        table.add_row(*row.values())
    console.print(table)
    console.print(results["found"], markup=False, highlight=False)
    for check in results["checks"]:
        verdict = "[green]holds[/]" if check["passed"] else "[red]FAILS[/]"
        console.print(verdict, end=" ")
        console.print(check["text"], markup=False, highlight=False)


def save(experiment: Experiment, runs: list[Run], results: dict[str, Any], folder: Path) -> None:
    """Writes NAME.json, NAME.md and NAME.png."""
    text = json.dumps(results, indent=1, allow_nan=False, ensure_ascii=False)
    (folder / f"{experiment.name}.json").write_text(text + "\n", encoding="utf-8")
    (folder / f"{experiment.name}.md").write_text(markdown(results), encoding="utf-8")
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    experiment.plot(runs, figure)
    figure.savefig(folder / f"{experiment.name}.png", dpi=120)
    for suffix in ("json", "md", "png"):
        print(f"saved {folder / experiment.name}.{suffix}")


def markdown(results: dict[str, Any]) -> str:
    """The table and the checks, as text."""
    columns = list(results["table"][0])
    lines = [
        f"# {results['title']}",
        "",
        f"`{results['command']}`, {results['seeds']} seeds, {results['seconds']:.0f} s",
        "",
        *map(markdown_row, (columns, ["---"] * len(columns))),
        *(markdown_row(row.values()) for row in results["table"]),
        "",
        f"In the paper: {results['paper']}",
        "",
        f"Here: {results['found']}",
        "",
        *(f"- {'holds' if check['passed'] else '**FAILS**'}: {check['text']}" for check in results["checks"]),
    ]
    return "\n".join(lines) + "\n"


def markdown_row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def median(values: Sequence[float]) -> float:
    """The median of the seeds."""
    return float(statistics.median(values))


def spread(values: Sequence[float], digits: int = 2) -> str:
    """The seeds' median, with the smallest and the largest where there are several."""
    middle = f"{median(values):.{digits}f}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.{digits}f} to {max(values):.{digits}f})"
