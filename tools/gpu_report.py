"""Says what came back from a GPU machine: `python tools/gpu_report.py FOLDER...`, the OUT of calls, oldest first.

It lists failures by cause, with counts and the tests' names; slow tests; what failed, was cut short, was not begun or
is missing. `--write NAME` also copies the results of the benchmark and the demo, as they are, to bench/results/NAME and
makes README's table of them.
"""

from __future__ import annotations

import argparse
import collections
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import stages

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path("bench/results")
LOGS = ("before", "tests", "again", "memory", "suites")
NOT_FINE = ("failed", "error", "crashed", "xpassed", "began")
SLOW_TESTS, SLOW_SECONDS = 15, 5.0
MOST_NAMES = 8
MOST_MESSAGE = 200

#: What differs from one failure of a cause to the next, and what stands for it.
VARYING = (
    (re.compile(r"0x[0-9a-fA-F]+"), "<address>"),
    (re.compile(r"[-+]?\d+(\.\d+)?([eE][-+]?\d+)?"), "N"),
    (re.compile(r"\bgw\w+"), "gwN"),
    (re.compile(r"\s+"), " "),
)


@dataclass
class Cause:
    """Failures of one kind.

    Attributes:
        kind: the error's type, or what became of the tests.
        message: the error's message with figures left out.
        place: the last line of the project that it went through.
        tests: the names of the tests.
        example: the end of one failure's text.
    """

    kind: str
    message: str
    place: str
    tests: list[str] = field(default_factory=list)
    example: str = ""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python tools/gpu_report.py", description=str(__doc__).splitlines()[0]
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="a call's OUT; oldest first")
    parser.add_argument(
        "--write", metavar="NAME", help="copy results to bench/results/NAME and make README's table"
    )
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    parsed = parser.parse_args(arguments)
    try:
        check(parsed.folders)
        print("\n".join(report(parsed.folders)))
        if parsed.write:
            write(parsed.folders, parsed.root, parsed.write)
    except (ValueError, OSError) as error:
        print(f"gpu_report: {error}", file=sys.stderr)
        return 2
    return 0


def check(folders: Iterable[Path]) -> None:
    """Raises:
    ValueError: a folder has no record of stages, or they are of several cards.
    """
    cards: dict[str | None, Path] = {}
    for folder in folders:
        calls = [line for line in stages.read_record(folder) if line["event"] == stages.CALL]
        if not calls:
            raise ValueError(
                f"{folder}: got no {stages.RECORD} that names a call, expected the OUT of make gpu-1"
            )
        cards |= {call["machine"]["gpu"]: folder for call in calls}
    if len(cards) > 1:
        found = ", ".join(f"{card} in {folder}" for card, folder in cards.items())
        raise ValueError(f"folders: got several cards, {found}: results of two cards are not mixed")


def report(folders: Sequence[Path]) -> Iterator[str]:
    """The lines of the report, as Markdown."""
    yield from header(folders)
    yield from stages_part(folders)
    entries = last_entries(folders)
    yield from tests_part(entries)
    yield from slow_part(entries)
    yield from missing_part(folders)


def header(folders: Sequence[Path]) -> Iterator[str]:
    for folder in folders:
        for line in stages.read_record(folder):
            if line["event"] == stages.CALL:
                machine = line["machine"]
                commit = line["commit"] or f"unknown commit ({line['without_commit']})"
                state = {True: "clean", False: "changed since", None: ""}[line["clean"]]
                yield (
                    f"{folder.name}: call {line['call']} at {line['at']} on {machine['gpu'] or 'no GPU'}, torch "
                    f"{machine['torch']}, Triton {machine['triton']}, {commit[:12]} {state}".rstrip()
                )


def stages_part(folders: Sequence[Path]) -> Iterator[str]:
    """The end of every stage; those that began and did not end are listed too."""
    yield "\n## Stages\n"
    for folder in folders:
        begun: dict[str, Mapping[str, Any]] = {}
        for line in stages.read_record(folder):
            event = line["event"]
            if event == stages.BEGIN:
                begun[line["stage"]] = line
            elif event == stages.END:
                begun.pop(line["stage"], None)
                state = "CUT SHORT" if line["cut_short"] else "FAILED" if line["failed"] else "ended"
                yield f"- {folder.name} {line['stage']}: {state}, exit code {line['exit']}, {line['seconds']} s"
            elif event == stages.NOT_BEGUN:
                yield f"- {folder.name} {line['stage']}: NOT BEGUN, {line['why']}"
            elif event == stages.KEPT:
                yield f"- {folder.name} {line['stage']}: taken from {Path(line['earlier']).name}"
            elif event == stages.ANEW:
                yield f"- {folder.name} {line['stage']}: anew, because {line['why']}"
        for name in begun:
            yield f"- {folder.name} {name}: KILLED, it began and its end was not recorded"


def last_entries(folders: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """The last line of every test that began, in any folder and log."""
    found: dict[str, dict[str, Any]] = {}
    for folder in folders:
        for name in LOGS:
            for entry in stages.read_lines(folder / f"{name}.jsonl"):
                found[entry["test"]] = entry
    return found


def tests_part(entries: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    counts = collections.Counter(entry["outcome"] for entry in entries.values())
    yield "\n## Tests\n"
    yield ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common()) or "none ran"
    for cause in causes(entries.values()):
        count = len(cause.tests)
        yield f"\n### {count} {'test' if count == 1 else 'tests'}: {cause.kind}: {cause.message}\n"
        yield f"at {cause.place or 'an unknown place'}\n"
        yield from (f"- {name}" for name in cause.tests[:MOST_NAMES])
        if count > MOST_NAMES:
            yield f"- and {count - MOST_NAMES} more"
        if cause.example:
            yield f"\n```text\n{cause.example}\n```"
    skips = collections.Counter(
        normalised(entry.get("reason", "")) for entry in entries.values() if entry["outcome"] == "skipped"
    )
    if skips:
        yield "\nSkipped:\n"
        yield from (f"- {count}: {reason}" for reason, count in skips.most_common())


def causes(entries: Iterable[Mapping[str, Any]]) -> list[Cause]:
    """The failures by cause, the most frequent first."""
    found: dict[tuple[str, str, str], Cause] = {}
    for entry in entries:
        if entry["outcome"] in NOT_FINE:
            kind, message, place = cause_of(entry)
            cause = found.setdefault((kind, message, place), Cause(kind, message, place))
            cause.tests.append(entry["test"])
            cause.example = cause.example or entry.get("text", "")[-1500:]
    return sorted(found.values(), key=lambda cause: -len(cause.tests))


def cause_of(entry: Mapping[str, Any]) -> tuple[str, str, str]:
    """The type, the message without figures, and the place without its line: what failures of one cause share."""
    cause = entry.get("cause")
    if cause:
        file, _, rest = (cause["place"] or cause["frame"]).partition(":")
        place = f"{file} {rest.partition(' ')[2]}".rstrip()
        return cause["type"], normalised(cause["message"]), place
    if entry["outcome"] == "began":
        return "began", "it had not ended when the run did: it hung, or time was up", ""
    lines = [line for line in entry.get("text", "").splitlines() if line.strip()]
    message = lines[-1].partition(" while running ")[0] if lines else ""
    return entry["outcome"], normalised(message), ""


def normalised(message: str) -> str:
    """The first paragraph of a message without what differs between failures of one cause."""
    text = message.strip().partition("\n\n")[0]
    for pattern, instead in VARYING:
        text = pattern.sub(instead, text)
    return text[:MOST_MESSAGE].strip()


def slow_part(entries: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    timed = [entry for entry in entries.values() if entry.get("seconds", 0) >= SLOW_SECONDS]
    timed.sort(key=lambda entry: -entry["seconds"])
    if timed:
        yield f"\n## Tests of {SLOW_SECONDS:g} s and more: {len(timed)}, {sum(e['seconds'] for e in timed):.0f} s\n"
        yield from (f"- {entry['seconds']:.1f} s {entry['test']}" for entry in timed[:SLOW_TESTS])


def missing_part(folders: Sequence[Path]) -> Iterator[str]:
    """The stages that no folder has with a good end, and what the benchmark says is missing, wrong or missed."""
    good = set()
    named = []
    for folder in folders:
        for line in stages.read_record(folder):
            if "stage" in line:
                named.append(line["stage"])
                if line["event"] == stages.KEPT or (line["event"] == stages.END and not line["failed"]):
                    good.add(line["stage"])
    left = [name for name in dict.fromkeys(named) if name not in good]
    yield "\n## Left to do\n"
    yield f"Stages: {', '.join(left) or 'none'}"
    for file in results(folders).values():
        yield from run_lines(file)


def run_lines(file: Path) -> Iterator[str]:
    """The cases of a run of the benchmark, its targets, and what is wrong in it."""
    run = json.loads(file.read_text(encoding="utf-8"))
    verdicts = collections.Counter(
        limit["verdict"] for case in run["cases"].values() for limit in case["limits"]
    )
    interrupted = ", interrupted" if run.get("interrupted") else ""
    said = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items()) or "none"
    yield f"\n{file}: {len(run['cases'])} cases{interrupted}; targets: {said}"
    for suite, why in run.get("missing", {}).items():
        yield f"- {suite} is missing: {why}"
    for name, case in run["cases"].items():
        if "error" in case:
            yield f"- {name} failed: {case['error']}"
        for variant, entry in case["variants"].items():
            why = entry.get("wrong") or entry.get("error")
            if why and not entry["is_rival"]:
                yield f"- {name}, {variant}: {why}"


def results(folders: Sequence[Path]) -> dict[str, Path]:
    """The JSON file of the fullest run of every suite; the later one of two that are as full."""
    found: dict[str, tuple[int, Path]] = {}
    for folder in folders:
        for file in [*sorted(folder.glob("short/*.json")), *sorted(folder.glob("*.json"))]:
            if file.with_suffix(".csv").is_file():
                cases = len(json.loads(file.read_text(encoding="utf-8"))["cases"])
                if cases >= found.get(file.name, (0, file))[0]:
                    found[file.name] = (cases, file)
    return {name: file for name, (_, file) in found.items()}


def write(folders: Sequence[Path], root: Path, name: str) -> None:
    """Copies results as they were written to the folder of a machine, and makes README's table of them.

    Raises:
        ValueError: there are none, or the name is no folder's.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name) or name == "local":
        raise ValueError(f"write: got {name!r}, expected the name of a folder, such as h200")
    files = [place for file in results(folders).values() for place in (file, file.with_suffix(".csv"))]
    files += [
        file for folder in folders for end in ("json", "png") if (file := folder / f"demo.{end}").is_file()
    ]
    if not files:
        raise ValueError("write: the folders have no results of the benchmark or the demo")
    target = root / RESULTS / name
    target.mkdir(parents=True, exist_ok=True)
    for file in files:
        shutil.copyfile(file, target / file.name)
        print(f"{RESULTS / name / file.name} from {file}")
    command = [sys.executable, "-c", "import sys; from pathlib import Path; from bench import report; "]
    command[-1] += "sys.exit(report.main(False, Path(sys.argv[1])))"
    subprocess.run([*command, str(root)], check=True, cwd=ROOT)


if __name__ == "__main__":
    sys.exit(main())
