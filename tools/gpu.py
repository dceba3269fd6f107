"""Runs on a machine with a CUDA device what proves and measures gradroute there: `make gpu`, `gpu-1`, `gpu-2`, `gpu-3`.

The calls 1 to 3 take at most 8.5 minutes each and have the most valuable first; `all` is everything without limits.
What they leave in the folder `--out`, tools/gpu_report.py reads. `--earlier` names the folder of a call before: its
tests that passed, its measured cases and its stages that ended well are not repeated, unless the sources that they
depend on or the packages have changed. Nothing here needs more than Python; docs/gpu.md says how to use it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import stages  # noqa: E402
from stages import Stage  # noqa: E402

from bench import sources  # noqa: E402

TOTAL = 510.0  # seconds of a call, with the time for stopping its last stage
SUITES_TEST = "test_suites_run_on_a_gpu"  # minutes of one worker
MOST_SECONDS_OF_A_TEST = 120
WORDS = re.compile(r"\b(gpu|device|cuda)\b")  # one of them is in every file with a test for a device
MOST_SECONDS_OF_A_CASE = 30  # of the check
OWN_FIRST = (
    "triton",
    "cuda",
    "torch",
)  # of the check, which may be cut short: what only a GPU can show comes first
BEFORE = "before.jsonl"  # the outcomes of tests in earlier calls

#: What findings depend on: folders of sources, and the commit, which the benchmark compares.
PRODUCT = ("gradroute", "kernels", "csrc")
OF_TESTS = (*PRODUCT, "tests", "bench")
OF_BENCH = (*PRODUCT, "bench", "examples", "commit")
FOLDERS = (*PRODUCT, "tests", "bench", "examples")

#: Prints what this Python and this machine are; a run that goes on must find it unchanged.
PROBE = """
import importlib.metadata, importlib.util, json, platform, re, torch
def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
def first(file, pattern):
    try:
        match = re.search(pattern, open(file, encoding="utf-8", errors="replace").read())
    except OSError:
        return None
    return match and match[1]
there = torch.cuda.is_available()
print(json.dumps({
    "gpu": torch.cuda.get_device_name() if there else None,
    "driver": first("/proc/driver/nvidia/version", r"\\s(\\d+\\.\\d+(?:\\.\\d+)?)\\s"),
    "cpu": first("/proc/cpuinfo", r"model name\\s*: (.+)"),
    "threads": torch.get_num_threads(),
    "python": platform.python_version(),
    "torch": str(torch.__version__),
    **{name: version(name) for name in ("triton", "numpy", "transformers", "pytest")},
    "plugins": [name for name in ("xdist", "pytest_timeout") if importlib.util.find_spec(name)],
}))
"""


@dataclass(frozen=True)
class Settings:
    """The choices from which the stages of a call are made.

    Attributes:
        out: the folder for everything that comes out.
        passed: the logs of tests that need not run again, in the stage "again" and in stages that go on.
        workers: processes of pytest.
        plugins: those of PROBE's that are installed.
        device: the kind of device that is checked and tuned.
        marker, tests, bench: which tests and which suite, with its options; a rehearsal has others.
    """

    out: Path
    passed: tuple[Path, ...] = ()
    workers: str = "14"
    plugins: tuple[str, ...] = ()
    device: str = "cuda"
    marker: str = "gpu"
    tests: tuple[str, ...] = ("tests",)
    bench: tuple[str, ...] = ("h200",)


def python(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, *arguments)


def install(settings: Settings) -> Stage:
    return Stage("install", python("tools/gpu_carried.py", "install"), 200)


def report(settings: Settings) -> Stage:
    command = python("-m", "gradroute", "--json")
    return Stage("report", command, 60, output="report.json", files=("report.json",), inputs=PRODUCT)


def check(settings: Settings) -> Stage:
    """The sample that covers every value of every axis, on the device alone; the tests that follow have all."""
    command = python("-m", "gradroute", "check", "--quick", "--json", "--device", settings.device)
    for backend in OWN_FIRST:
        command += ("--backend", backend)
    command += ("--limit", str(MOST_SECONDS_OF_A_CASE))
    return with_own_findings(
        Stage("check", command, 90, output="check.json", files=("check.json",), inputs=PRODUCT), settings
    )


def whole_check(settings: Settings) -> Stage:
    command = python("-m", "gradroute", "check", "--json", "--device", settings.device)
    files = ("whole-check.json",)
    return with_own_findings(
        Stage("whole-check", command, 240, output=files[0], files=files, inputs=PRODUCT), settings
    )


def tune(settings: Settings) -> Stage:
    command = python("-m", "gradroute", "tune", "--quick", "--device", settings.device)
    return with_own_findings(Stage("tune", command, 120, resumes=True, inputs=PRODUCT), settings)


def with_own_findings(stage: Stage, settings: Settings) -> Stage:
    """The stage with a folder for what it finds out about the machine, which comes back and changes no other stage."""
    folder = f"{stage.name}-findings"
    environment = dict(stage.environment) | {"GRADROUTE_CACHE": str(settings.out / folder)}
    return replace(stage, environment=environment, files=(*stage.files, folder))


def pytest(
    settings: Settings,
    name: str,
    seconds: float,
    *choice: str,
    alone: bool = False,
    fine: Sequence[int] = (0,),
) -> Stage:
    """Tests that are chosen by `choice`; `alone`: one after another, in this one process.

    A test that ends its worker is lost with --dist worksteal; loadgroup gives it to the next worker, without end.
    """
    log = f"{name}.jsonl"
    command = [*python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "run_log"), *choice]
    # A file that cannot be collected costs its own tests, and the run log names it.
    command += [
        "--continue-on-collection-errors",
        "--run-log",
        str(settings.out / log),
        "--junitxml",
        str(settings.out / f"{name}.xml"),
    ]
    for file in settings.passed:
        command += ["--earlier", str(file)]
    if "xdist" in settings.plugins:
        command += ["-n", "0"] if alone else ["-n", settings.workers, "--dist", "worksteal"]
    if "pytest_timeout" in settings.plugins:
        command += ["--timeout", str(MOST_SECONDS_OF_A_TEST), "--timeout-method", "thread"]
    paths = os.pathsep.join(
        filter(None, (str(ROOT / "tests"), os.environ.get("PYTHONPATH")))
    )  # of the plugin
    environment = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1", "PYTHONPATH": paths}
    return Stage(
        name,
        tuple(command),
        seconds,
        environment=environment,
        files=(log,),
        resumes=True,
        inputs=OF_TESTS,
        fine=fine,
    )


def tests(settings: Settings) -> Stage:
    marker = f"({settings.marker}) and not memory"
    choice = (*settings.tests, "-m", marker, "-k", f"not {SUITES_TEST}")
    fine = (0, 5) if settings.passed else (0,)  # all may have passed before, which is pytest's code 5
    return pytest(settings, "tests", 380, *choice, fine=fine)


def again(settings: Settings) -> Stage:
    """Tests that did not pass in the call before, or were not reached; none may be left, which is pytest's code 5."""
    marker = f"({settings.marker}) and not memory"
    choice = (*settings.tests, "-m", marker, "-k", f"not {SUITES_TEST}")
    stage = pytest(settings, "again", 120, *choice, fine=(0, 5))
    return (
        stage if settings.passed else replace(stage, why_not="no folder of an earlier call says what failed")
    )


def memory(settings: Settings) -> Stage:
    """Tests of peaks, which other processes on the device would disturb."""
    marker = f"({settings.marker}) and memory"
    return pytest(settings, "memory", 60, *settings.tests, "-m", marker, alone=True, fine=(0, 5))


def suites(settings: Settings) -> Stage:
    choice = ("tests/bench/test_bench_command.py", "-m", settings.marker, "-k", SUITES_TEST)
    return pytest(settings, "suites", 200, *choice, alone=True, fine=(0, 5))


def short_bench(settings: Settings) -> Stage:
    """The first figures. They have a folder of their own: compiled rivals are missing, which `bench` would keep."""
    command = python(
        "-m", "bench", "run", *settings.bench, "--no-compiled", "--out", str(settings.out / "short")
    )
    command += ("--resume", *(("--case", "gated MLP") if settings.bench == ("h200",) else ()))
    return Stage(
        "short-bench", command, 110, files=result_files(settings, "short/"), resumes=True, inputs=OF_BENCH
    )


def bench(settings: Settings) -> Stage:
    command = python("-m", "bench", "run", *settings.bench, "--out", str(settings.out), "--resume")
    return Stage("bench", command, 300, files=result_files(settings), resumes=True, inputs=OF_BENCH)


def result_files(settings: Settings, folder: str = "") -> tuple[str, str]:
    return (f"{folder}{settings.bench[0]}.csv", f"{folder}{settings.bench[0]}.json")


def demo(settings: Settings) -> Stage:
    command = python("examples/demo.py", "--out", str(settings.out))
    return Stage("demo", command, 90, files=("demo.json", "demo.png"), inputs=OF_BENCH)


def sanitizer(settings: Settings) -> Stage:
    """Every op on every backend once, in small: compute-sanitizer is slow. Each tensor has an allocation of its own."""
    command = ("compute-sanitizer", "--error-exitcode", "86", *python("-m", "gradroute", "--json"))
    return Stage(
        "sanitizer",
        command,
        150,
        environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        output="sanitizer.json",
        inputs=PRODUCT,
        why_not=missing_tool("compute-sanitizer"),
    )


def profile(settings: Settings) -> Stage:
    command = python("tools/gpu_profile.py", str(settings.out), *settings.bench)
    return Stage("profile", command, 120, inputs=OF_BENCH, why_not=missing_tool("ncu"))


def missing_tool(name: str) -> str:
    return "" if shutil.which(name) else f"{name} is not on PATH"


CALLS: dict[str, tuple[Callable[[Settings], Stage], ...]] = {
    "1": (install, report, check, tests, short_bench),
    "2": (install, again, memory, bench),
    "3": (install, bench, suites, demo, sanitizer, profile, tune, whole_check),
    "all": (install, report, tests, memory, bench, suites, demo, sanitizer, profile, tune, whole_check),
}
ALWAYS = (
    "install",
    "again",
)  # they concern this machine, or a call before: an earlier folder does not spare them


class Refused(Exception):
    """A call that would mix results or lose them."""


def main(arguments: Sequence[str] | None = None) -> int:
    parsed = parser().parse_args(arguments)
    try:
        return run(parsed)
    except (Refused, ValueError, OSError) as error:
        print(f"make gpu: {error}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python tools/gpu.py", description=str(__doc__).splitlines()[0])
    made.add_argument("call", choices=list(CALLS))
    made.add_argument("--out", type=Path, required=True, help="folder for what comes out")
    made.add_argument("--earlier", type=Path, help="folder of a call before, which this one goes on with")
    made.add_argument("--workers", default="14", help="processes of pytest (%(default)s)")
    made.add_argument(
        "--total", type=float, help=f"seconds of the call; default: {TOTAL:.0f}, and none for all"
    )
    of_rehearsals = made.add_argument_group("rehearsals without a device")
    of_rehearsals.add_argument("--rehearse", action="store_true", help="run without a CUDA device")
    of_rehearsals.add_argument("--only", nargs="+", metavar="STAGE", help="only these stages of the call")
    of_rehearsals.add_argument("--marker", default="gpu", help="pytest's -m (%(default)s)")
    of_rehearsals.add_argument(
        "--tests", nargs="+", default=files_for_a_device(), metavar="PATH", help="tests"
    )
    of_rehearsals.add_argument(
        "--bench", default="h200", help="the suite, and options of `bench run` (%(default)s)"
    )
    return made


def run(parsed: argparse.Namespace) -> int:
    out, earlier = parsed.out.resolve(), parsed.earlier.resolve() if parsed.earlier else None
    machine = probe()
    if machine["gpu"] is None and not parsed.rehearse:
        raise Refused("no CUDA device")
    known = known_commit(machine)
    check_folders(out, earlier)
    before = None if earlier is None else earlier_call(earlier, machine)
    out.mkdir(parents=True, exist_ok=True)
    settings = Settings(
        out=out,
        workers=parsed.workers,
        plugins=tuple(machine["plugins"]),
        device="cpu" if machine["gpu"] is None else "cuda",
        marker=parsed.marker,
        tests=tuple(parsed.tests),
        bench=tuple(shlex.split(parsed.bench)),
    )
    planned = chosen(CALLS[parsed.call], settings, parsed.only)
    record = stages.Record(out)
    record.add(stages.CALL, call=parsed.call, earlier=earlier and str(earlier), **known)
    if earlier is not None and before is not None:
        planned = going_on(planned, settings, earlier, before, known, record)
    os.chdir(ROOT)
    total = parsed.total if parsed.total is not None or parsed.call == "all" else TOTAL
    if parsed.call == "all":
        planned = [replace(stage, seconds=None) for stage in planned]
    return stages.run_stages(planned, out, total)


def probe() -> dict[str, Any]:
    """The object that PROBE prints. A torch that cannot be imported ends the call, for nothing would work."""
    done = subprocess.run(python("-c", PROBE), capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise Refused(f"{sys.executable} cannot import torch: {said[-1]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def known_commit(machine: Mapping[str, Any]) -> dict[str, Any]:
    """The marks of a call: the machine, the commit, and the digest of every folder of sources."""
    known = sources.commit(ROOT)
    folders = {name: sources.combined(sources.digests((name,), ROOT)) for name in FOLDERS}
    commit = {name: known.get(name) for name in ("commit", "clean", "without_commit")}
    return {
        "machine": dict(machine),
        "inputs": folders | {"commit": [commit["commit"], commit["clean"]]},
    } | commit


def files_for_a_device() -> list[str]:
    """The files of tests that may have some for a device: every worker collects all, again after each that died."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(file.relative_to(ROOT)) for file in files if WORDS.search(file.read_text(encoding="utf-8"))]


def check_folders(out: Path, earlier: Path | None) -> None:
    """Keeps a call from adding to a folder that it was not told to go on with.

    Raises:
        Refused: the folder has a record already, or the earlier one has none.
    """
    if earlier is not None and not (earlier / stages.RECORD).is_file():
        raise Refused(
            f"EARLIER: got {earlier}, which has no {stages.RECORD}: expected the OUT of an earlier call"
        )
    if (out / stages.RECORD).is_file():
        raise Refused(
            f"OUT: {out} has a call already: name another folder, and EARLIER={out} to go on with it"
        )


def earlier_call(earlier: Path, machine: Mapping[str, Any]) -> dict[str, Any]:
    """The line of the earlier call that says what it ran on.

    Raises:
        Refused: it ran on another card.
    """
    calls = [line for line in stages.read_record(earlier) if line["event"] == stages.CALL]
    if not calls:
        raise Refused(f"EARLIER: {earlier / stages.RECORD} does not say what it ran on")
    found = calls[-1]
    if found["machine"]["gpu"] != machine["gpu"]:
        raise Refused(
            f"EARLIER: {earlier} was measured on {found['machine']['gpu']}, and this is {machine['gpu']}: results of "
            "two cards are not mixed; leave EARLIER out"
        )
    return found


def chosen(
    made: Sequence[Callable[[Settings], Stage]], settings: Settings, only: Sequence[str] | None
) -> list[Stage]:
    """The stages of a call, or those of them that were asked for."""
    planned = [make(settings) for make in made]
    names = [stage.name for stage in planned]
    strange = [name for name in only or () if name not in names]
    if strange:
        raise ValueError(f"only: got {', '.join(strange)}, expected some of {', '.join(names)}")
    return [stage for stage in planned if only is None or stage.name in only]


def going_on(
    planned: Sequence[Stage],
    settings: Settings,
    earlier: Path,
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    record: stages.Record,
) -> list[Stage]:
    """The stages that are left to do after an earlier call, with its files where they go on with them."""
    makers = {make(settings).name: make for of_call in CALLS.values() for make in of_call}
    done, left = ended_well(earlier), []
    for stage in planned:
        changed = what_changed(stage, before, now)
        if stage.name == "again":
            left.append(again(replace(settings, passed=gathered(earlier, settings.out))))
        elif stage.name in ALWAYS:
            left.append(stage)
        elif changed and known_there(earlier, stage):
            stages.say(f"{stage.name}: anew, nothing is taken from {earlier}, because {changed}")
            record.add(stages.ANEW, stage=stage.name, why=changed)
            left.append(stage)
        elif changed:
            left.append(stage)
        elif stage.name in done:
            copied(stage.files, earlier, settings.out)
            stages.say(f"{stage.name}: done in {earlier}, and nothing that it depends on has changed")
            record.add(stages.KEPT, stage=stage.name, earlier=str(earlier))
        else:
            logs_there = copied(stage.files if stage.resumes else (), earlier, settings.out)
            passed = tuple(file for file in logs_there if file.suffix == ".jsonl")
            left.append(makers[stage.name](replace(settings, passed=passed)))
    return left


def ended_well(folder: Path) -> set[str]:
    """The stages whose last event in a folder is an end without a failure, or that were taken from one before."""
    last = {line["stage"]: line for line in stages.read_record(folder) if "stage" in line}
    return {
        name
        for name, line in last.items()
        if line["event"] == stages.KEPT or (line["event"] == stages.END and not line["failed"])
    }


def known_there(folder: Path, stage: Stage) -> bool:
    """Whether an earlier folder has findings of a stage."""
    return any(line.get("stage") == stage.name for line in stages.read_record(folder))


def what_changed(stage: Stage, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The differences from the earlier call on which a stage's findings depend, in words; "" if there are none."""
    names = [name for name in now["machine"] if before["machine"].get(name) != now["machine"][name]]
    if names:
        return ", ".join(
            f"{name} was {before['machine'].get(name)}, is {now['machine'][name]}" for name in names
        )
    folders = [name for name in stage.inputs if before["inputs"].get(name) != now["inputs"][name]]
    return f"{', '.join(folders)} changed since" if folders else ""


def gathered(earlier: Path, out: Path) -> tuple[Path, ...]:
    """One log of all tests of an earlier folder and of those before it, in `out`; nothing where there is none."""
    files = [file for name in (BEFORE, "tests.jsonl", "again.jsonl") if (file := earlier / name).is_file()]
    if files:
        logs = (file.read_bytes() for file in files)
        (out / BEFORE).write_bytes(b"".join(log if log.endswith(b"\n") else log + b"\n" for log in logs))
    return (out / BEFORE,) if files else ()


def copied(files: Sequence[str], earlier: Path, out: Path) -> list[Path]:
    """Copies those of the files and folders that are there; returns their new places."""
    there = [name for name in files if (earlier / name).exists()]
    for name in there:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (earlier / name).is_dir() else shutil.copyfile
        copy(earlier / name, out / name)
    return [out / name for name in there]


if __name__ == "__main__":
    sys.exit(main())
