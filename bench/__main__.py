"""`python -m bench`: times routed ops and models beside what one would use instead, after checking their numbers."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from . import compare, machine, plots, report, runner, suites
from .ops import Options
from .settings import ORDERS, SITES, TABLES

RESULTS = Path(__file__).parent / "results"
AXES = (
    "op",
    "tokens",
    "d_model",
    "d_ff",
    "dtype",
    "tables",
    "density",
    "share",
    "sites",
    "strength",
    "order",
)


def main(arguments: list[str] | None = None) -> int:
    parsed = parser().parse_args(arguments)
    try:
        return parsed.command(parsed)
    except (ValueError, FileNotFoundError) as error:
        print(f"python -m bench: {error}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m bench", description=(__doc__ or "").partition(": ")[2])
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    add_list(commands)
    add_run(commands)
    add_compare(commands)
    add_plot(commands)
    add_report(commands)
    return top


def add_list(commands: Any) -> None:
    command = commands.add_parser("list", help="the suites and their cases")
    command.add_argument("suite", nargs="?", help="one suite or group; default: the names of all")
    command.add_argument("--device", help="cpu or cuda; default: cuda where there is one")
    command.set_defaults(command=list_)


def add_run(commands: Any) -> None:
    command = commands.add_parser(
        "run",
        help="check and time a suite",
        description="Every case's numbers are checked before it is timed. Axes, where any is given, replace a suite's "
        "own cases by the product of their values (attention and labels have tokens alone, models none).",
    )
    command.add_argument("suite", help=f"{', '.join(suites.SUITES)}; or a group: {', '.join(suites.GROUPS)}")
    command.add_argument(
        "--rounds", type=positive, default=11, help="to time, each variant once a round (%(default)s)"
    )
    command.add_argument("--case", default="", help="only cases whose name has this text in it")
    command.add_argument("--device", help="cpu or cuda; default: cuda where there is one, a group's own kind")
    command.add_argument(
        "--out",
        type=Path,
        help="folder for SUITE.csv and SUITE.json; default: this machine's under bench/results, such as cpu-2-cores",
    )
    command.add_argument(
        "--resume", action="store_true", help="go on with the files there: what is in them is not timed again"
    )
    command.add_argument(
        "--no-compiled", action="store_true", help="leave out eager rivals under torch.compile"
    )
    axes = command.add_argument_group("axes, each with one value or several")
    for axis in ("tokens", "d-model", "d-ff"):
        axes.add_argument(f"--{axis}", type=positive, nargs="+")
    axes.add_argument("--op", nargs="+", help="of the suite's ops")
    axes.add_argument("--dtype", nargs="+", help="float32, bfloat16, float16, float64")
    axes.add_argument("--tables", nargs="+", choices=TABLES)
    axes.add_argument(
        "--density", type=float, nargs="+", help="of tables interval: the share of features of a route"
    )
    axes.add_argument(
        "--share", type=float, nargs="+", help="of tables block and refuse: the share of tokens of route 1"
    )
    axes.add_argument("--sites", nargs="+", choices=SITES)
    axes.add_argument("--strength", nargs="+", choices=("none", "token", "scalar"))
    axes.add_argument("--order", nargs="+", choices=ORDERS, help="of the tokens by route")
    command.set_defaults(command=run)


def add_compare(commands: Any) -> None:
    command = commands.add_parser("compare", help="two runs, or the runs in two folders, case by case")
    command.add_argument("a", type=Path, metavar="A", help="a file of a run, or a folder")
    command.add_argument("b", type=Path, metavar="B")
    command.add_argument(
        "--threshold", type=float, default=0.05, help="what counts as a change (%(default)s)"
    )
    command.set_defaults(command=lambda parsed: compare.main(parsed.a, parsed.b, parsed.threshold))


def add_plot(commands: Any) -> None:
    command = commands.add_parser(
        "plot", help="PNGs of runs: over density, over tokens, shares of the ceilings, times beside rivals"
    )
    command.add_argument("results", type=Path, nargs="*", help="folders of runs; default: every machine's")
    command.add_argument("--out", type=Path, help="folder for the PNGs; default: beside the runs")
    command.set_defaults(command=plot)


def add_report(commands: Any) -> None:
    command = commands.add_parser(
        "report", help="write the README's table and bench/results/README.md from the runs"
    )
    command.add_argument("--check", action="store_true", help="change nothing; exit code 1 where they differ")
    command.set_defaults(command=lambda parsed: report.main(parsed.check))


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"got {text}, expected at least 1")
    return number


def list_(parsed: argparse.Namespace) -> int:
    if parsed.suite is None:
        for name in (*suites.SUITES, *suites.GROUPS):
            why = suites.why_missing(name)
            print(name + (f" (missing here: {why})" if why else ""))
        return 0
    options = Options(device_of(parsed))
    for plan in suites.available(parsed.suite, options):
        print(f"{plan.suite:<12} {plan.name}")
    return 0


def device_of(parsed: argparse.Namespace) -> torch.device:
    device = suites.device_of(parsed.suite, parsed.device)
    if str(device) not in ("cpu", "cuda"):  # CUDA_VISIBLE_DEVICES says which one
        raise ValueError(f"device: got {str(device)!r}, expected cpu or cuda")
    return device


def run(parsed: argparse.Namespace) -> int:
    device = device_of(parsed)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: {parsed.suite} is for cuda, and torch sees no CUDA device here")
    plans = plans_of(parsed, Options(device, not parsed.no_compiled))
    command = "python -m bench " + " ".join(sys.argv[1:])
    folder = parsed.out or RESULTS / machine.folder(device)
    missing = {plan.suite: why for plan in plans if (why := suites.why_missing(plan.suite)) is not None}
    able = [plan for plan in plans if plan.suite not in missing]
    done = runner.run(parsed.suite, able, parsed.rounds, device, folder, parsed.resume, command, missing)
    print(
        f"\n{folder / parsed.suite}.csv and .json"
        + (", interrupted" if done.description["interrupted"] else "")
    )
    for suite, why in done.description["missing"].items():
        print(f"{suite} is missing: {why}")
    for text in done.missed():
        print(f"MISSED  {text}")
    failures = done.failures()
    for text in failures:
        print(f"FAILED  {text}", file=sys.stderr)
    return 130 if done.description["interrupted"] else int(bool(failures))


def plans_of(parsed: argparse.Namespace, options: Options) -> list[Any]:
    """The cases that were asked for."""
    why = suites.why_missing(parsed.suite)
    if why:
        raise ValueError(f"suite: {parsed.suite} cannot run here: {why}")
    axes = {axis: values for axis in AXES if (values := getattr(parsed, axis)) is not None}
    if "strength" in axes:
        axes["strength"] = [None if value == "none" else value for value in axes["strength"]]
    if axes and parsed.suite in suites.GROUPS:
        raise ValueError(f"{', '.join(axes)}: the group {parsed.suite} has cases of its own, and no axes")
    plans = (
        suites.suite_plans(parsed.suite, options, axes) if axes else suites.available(parsed.suite, options)
    )
    plans = [plan for plan in plans if parsed.case in plan.name]
    if not plans:
        raise ValueError(f"case: got {parsed.case!r}, which no case of {parsed.suite} has in its name")
    return plans


def plot(parsed: argparse.Namespace) -> int:
    for file in plots.main(parsed.results, parsed.out):
        print(file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
