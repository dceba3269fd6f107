"""The commands of `python -m bench`: what they take, and what they refuse before anything runs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from . import compare, plots, report, runner, suites, surgery
from .cases import Plan
from .ops import Options
from .results import Run
from .settings import DTYPES, ORDERS, SITES, STRENGTHS, TABLES, Axes

RESULTS = Path(__file__).parent / "results" / report.LOCAL
DESCRIPTION = "times routed ops and models beside what one would use instead, after checking their numbers"
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

Commands = argparse._SubParsersAction


def main(arguments: list[str] | None = None) -> int:
    parsed = parser().parse_args(arguments)
    try:
        return parsed.command(parsed)
    except (ValueError, OSError) as error:
        print(f"python -m bench: {error}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m bench", description=DESCRIPTION)
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    add_list(commands)
    add_run(commands)
    add_compare(commands)
    add_plot(commands)
    add_report(commands)
    add_static(commands)
    add_surgery(commands)
    return top


def add_list(commands: Commands) -> None:
    command = commands.add_parser("list", help="the suites and their cases")
    command.add_argument("suite", nargs="?", help="one suite or group; default: the names of all")
    command.add_argument("--device", help="cpu or cuda; default: cuda where there is one")
    command.set_defaults(command=list_)


def add_run(commands: Commands) -> None:
    command = commands.add_parser(
        "run",
        help="check and time a suite",
        description="Checks every case's numbers, then times it. Axes, where any is given, replace a suite's own\n"
        "cases by the product of their values (attention and labels have tokens alone, models none).\n"
        "Targets hold for a suite's own cases and for no other values.",
        epilog=explained(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
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
        default=RESULTS,
        help="folder for SUITE.csv and SUITE.json; default: bench/results/local",
    )
    kept = command.add_mutually_exclusive_group()
    kept.add_argument(
        "--resume", action="store_true", help="go on with the files there: what is in them is not timed again"
    )
    kept.add_argument("--overwrite", action="store_true", help="begin anew in place of the files there")
    command.add_argument(
        "--no-compiled", action="store_true", help="leave out eager rivals under torch.compile"
    )
    add_axes(command)
    command.set_defaults(command=run)


def add_axes(command: argparse.ArgumentParser) -> None:
    axes = command.add_argument_group("axes, each with one value or several")
    for axis in ("tokens", "d-model", "d-ff"):
        axes.add_argument(f"--{axis}", type=positive, nargs="+", metavar="N")
    axes.add_argument("--op", nargs="+", help="ops of the suite")
    axes.add_argument("--dtype", nargs="+", help=", ".join(DTYPES))
    axes.add_argument("--tables", nargs="+", metavar="KIND", help="see below")
    axes.add_argument(
        "--density", type=float, nargs="+", help="the share of features of a route, with tables interval"
    )
    axes.add_argument(
        "--share", type=float, nargs="+", help="the share of tokens of route 1, with tables block and refuse"
    )
    axes.add_argument("--sites", nargs="+", metavar="SITES", help="see below")
    axes.add_argument("--strength", nargs="+", metavar="KIND", help="see below")
    axes.add_argument("--order", nargs="+", metavar="ORDER", help="see below")


def explained() -> str:
    """Every value of the axes that are words, once, with its meaning."""
    parts = {"tables": TABLES, "sites": SITES, "strength": STRENGTHS, "order": ORDERS}
    lines = []
    for axis, values in parts.items():
        lines += [f"--{axis}:", *(f"  {value:<11} {meaning}" for value, meaning in values.items())]
    return "\n".join(lines)


def add_compare(commands: Commands) -> None:
    command = commands.add_parser("compare", help="two runs, or the runs in two folders, case by case")
    command.add_argument("a", type=Path, metavar="A", help="a file of a run, or a folder")
    command.add_argument("b", type=Path, metavar="B")
    command.add_argument(
        "--threshold", type=share, default=0.05, help="the least change that counts (%(default)s)"
    )
    command.set_defaults(command=lambda parsed: compare.main(parsed.a, parsed.b, parsed.threshold))


def add_plot(commands: Commands) -> None:
    command = commands.add_parser(
        "plot", help="PNGs of runs: over density, over tokens, shares of the ceilings, times beside rivals"
    )
    command.add_argument("results", type=Path, nargs="*", help="folders of runs; default: every machine's")
    command.add_argument("--out", type=Path, help="folder for the PNGs; default: beside the runs")
    command.set_defaults(command=plot)


def add_report(commands: Commands) -> None:
    command = commands.add_parser(
        "report",
        help="write the README's table and bench/results/README.md from the runs, bench/results/local aside",
    )
    command.add_argument("--check", action="store_true", help="change nothing; exit code 1 where they differ")
    command.set_defaults(command=lambda parsed: report.main(parsed.check))


def add_static(commands: Commands) -> None:
    command = commands.add_parser(
        "static",
        help="compile every kernel at its target shape without a GPU, and predict its speed from the machine code",
        description="Writes NAME.json and NAME.md: registers, spills, widths of accesses and clocks of every kernel\n"
        "as machine code has them, and what is predicted from them. Nothing runs, nothing is measured.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--name", default="local", help="of the files (%(default)s)")
    command.add_argument(
        "--architecture", type=positive, nargs="+", default=[], metavar="N", help="80, 90, 100; default: all"
    )
    command.add_argument("--kernel", default="", help="only kernels or cases with this text in the name")
    command.add_argument(
        "--out", type=Path, default=RESULTS, help="folder for the files; default: bench/results/local"
    )
    command.add_argument(
        "--cuda", action="store_true", help="compile csrc/*.cu by nvcc and read its kernels too"
    )
    command.set_defaults(command=static)


def static(parsed: argparse.Namespace) -> int:
    from .static import command  # Triton's compiler is loaded for this command alone

    return command.main(parsed.name, parsed.architecture, parsed.kernel, parsed.out, parsed.cuda)


def add_surgery(commands: Commands) -> None:
    command = commands.add_parser(
        "surgery",
        help="the memory that expand, ablate, contract and export take of a pretrained model",
        description="Counts what torch's allocator for the CPU gives out, and writes OUT/surgery.json.",
    )
    command.add_argument("--model", default=surgery.MODEL, help="as recipes take it (%(default)s)")
    command.add_argument(
        "--units", type=positive, default=surgery.UNITS, help="added to every MLP (%(default)s)"
    )
    command.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    command.add_argument(
        "--out", type=Path, default=RESULTS, help="folder for the file; default: bench/results/local"
    )
    command.set_defaults(
        command=lambda parsed: surgery.main(parsed.model, parsed.units, parsed.dtype, parsed.out)
    )


def positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number of at least 1")
    return number


def share(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number of at least 0, such as 0.05")
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
    if parsed.device not in (None, "cpu", "cuda"):  # CUDA_VISIBLE_DEVICES chooses among several
        raise ValueError(f"device: got {parsed.device!r}, expected cpu or cuda")
    return suites.device_of(parsed.suite, parsed.device)


def run(parsed: argparse.Namespace) -> int:
    device = device_of(parsed)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: {parsed.suite} is for cuda, and torch sees no CUDA device here")
    plans = plans_of(parsed, Options(device, not parsed.no_compiled))
    check_folder(parsed.out)
    missing = {plan.suite: why for plan in plans if (why := suites.why_missing(plan.suite)) is not None}
    able = [plan for plan in plans if plan.suite not in missing]
    check_kept(parsed, able)
    command = "python -m bench " + " ".join(sys.argv[1:])
    try:
        done = runner.run(
            parsed.suite, able, parsed.rounds, device, parsed.out, parsed.resume, command, missing
        )
    except KeyboardInterrupt:
        done = None
    if done is None or (done.description["interrupted"] and not done.cases):
        print("\ninterrupted before the first case was done: nothing is kept", file=sys.stderr)
        return 130
    return conclude(parsed, able, done)


def check_folder(folder: Path) -> None:
    """Makes the folder for the results, or says why it cannot be written."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out: got {folder}, which is a file, expected a folder")
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise ValueError(f"out: got {folder}, which cannot be written")


def check_kept(parsed: argparse.Namespace, plans: Sequence[Plan]) -> None:
    """Keeps cases that were measured before from being lost, and says where nothing is left to do.

    Raises:
        ValueError: there are some, and the command does not say what becomes of them.
    """
    file = parsed.out / f"{parsed.suite}.json"
    if not file.exists() or parsed.overwrite:
        return
    kept = Run.load(file)
    if not parsed.resume:
        raise ValueError(
            f"out: {file} has {counted(len(kept.cases))} already: --resume goes on with them, --overwrite replaces "
            "them, and another --out leaves them"
        )
    left = runner.remaining(plans, kept)
    done = len(plans) - len(left)
    if left:
        print(f"{file} has {done} of {counted(len(plans))}: {len(left)} to go", file=sys.stderr)
    else:
        print(f"{file} has all of {counted(len(plans))}: nothing is left to time", file=sys.stderr)


def counted(cases: int) -> str:
    return "1 case" if cases == 1 else f"{cases} cases"


def conclude(parsed: argparse.Namespace, plans: Sequence[Plan], done: Run) -> int:
    """Says where the results are, what is missing, missed and failed; returns the exit code."""
    print(f"{parsed.out / parsed.suite}.csv and .json")
    for suite, why in done.description["missing"].items():
        print(f"{suite} is missing: {why}")
    if not any(case["limits"] for case in done.cases.values()) and axes_of(parsed):
        print(
            f"No targets: they are set for the cases that `python -m bench list {parsed.suite}` names, "
            "and hold for no other values"
        )
    for text in done.missed():
        print(f"MISSED  {text}")
    failures = done.failures()
    for text in failures:
        print(f"FAILED  {text}", file=sys.stderr)
    if done.description["interrupted"]:
        left = len(runner.remaining(plans, done))
        print(
            f"interrupted: {len(plans) - left} of {counted(len(plans))} are kept; the same command with --resume goes "
            "on with the others",
            file=sys.stderr,
        )
        return 130
    return int(bool(failures))


def axes_of(parsed: argparse.Namespace) -> Axes:
    """The axes that the command names, with their values."""
    return {axis: values for axis in AXES if (values := getattr(parsed, axis)) is not None}


def plans_of(parsed: argparse.Namespace, options: Options) -> list[Plan]:
    """The cases that were asked for."""
    why = suites.why_missing(parsed.suite)
    if why:
        raise ValueError(f"suite: {parsed.suite} cannot run here: {why}")
    axes = axes_of(parsed)
    if axes and parsed.suite in suites.GROUPS:
        raise ValueError(f"{', '.join(axes)}: the group {parsed.suite} has cases of its own, and no axes")
    plans = suites.available(parsed.suite, options, axes)
    plans = [plan for plan in plans if parsed.case in plan.name]
    if not plans:
        raise ValueError(f"case: got {parsed.case!r}, which no case of {parsed.suite} has in its name")
    return plans


def plot(parsed: argparse.Namespace) -> int:
    written, empty = plots.main(parsed.results, parsed.out)
    for file in written:
        print(file)
    for text in empty:
        print(text, file=sys.stderr)
    return 0 if written else 1
