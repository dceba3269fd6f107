"""Runs commands one after another within limits of time, and writes down what became of each.

A stage is a command with a limit. It runs in a process group of its own, which gets SIGINT at the limit, so that pytest
and the benchmark save what they have, and SIGKILL some seconds later. Its output goes to NAME.log and, as it comes, to
the terminal. A stage that fails costs no other one. Every begin and end is a line of stages.jsonl, written at once.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

RECORD = "stages.jsonl"
GRACE = 15.0  # seconds from SIGINT to SIGKILL
DRAIN = 5.0  # seconds for which output is awaited that children of an ended command may still write
INTERRUPTED = 130

#: What a line of RECORD says, under "event". KEPT and ANEW are of runs that go on with an earlier one.
CALL, BEGIN, END, NOT_BEGUN, KEPT, ANEW = "call", "begin", "end", "not begun", "kept", "anew"


@dataclass(frozen=True)
class Stage:
    """A command and its limits.

    Attributes:
        name: the name of its log, and what it is called in RECORD.
        command: the program and its arguments.
        seconds: its limit; None: none.
        least: with fewer seconds left it is not begun.
        environment: variables that are set for it.
        output: the file in the folder that its standard output goes to, in place of the log; "": the log.
        files: the files and folders that it leaves in the folder, which a run that goes on needs.
        resumes: whether it goes on with those files where it was cut short before.
        inputs: the folders of sources that its findings depend on.
        fine: the exit codes with which it has not failed.
        why_not: why it cannot run here; "": it can.
    """

    name: str
    command: Sequence[str]
    seconds: float | None = None
    least: float = 15.0
    environment: Mapping[str, str] = field(default_factory=dict)
    output: str = ""
    files: Sequence[str] = ()
    resumes: bool = False
    inputs: Sequence[str] = ()
    fine: Sequence[int] = (0,)
    why_not: str = ""


class Interrupted(Exception):
    """SIGINT or SIGTERM came for the runner itself."""


class Record:
    """The file of what happened in a folder: one JSON object a line, on the disk before the next thing happens."""

    def __init__(self, folder: Path):
        self.folder = folder

    def add(self, event: str, **fields: Any) -> None:
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        with open(self.folder / RECORD, "a", encoding="utf-8") as file:
            file.write(json.dumps({"event": event, "at": now} | fields) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read_record(folder: Path) -> list[dict[str, Any]]:
    """The lines of a folder's RECORD; a last one that a kill has torn is left out."""
    return read_lines(folder / RECORD)


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a file with one JSON object a line; none where there is no such file.

    A kill tears the line that is being written, and a run that goes on appends to it: what is no object is told on
    standard error, and left out.
    """
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            if line:
                print(f"{file}: line {number} is torn, and left out: {line[:80]!r}", file=sys.stderr)
    return found


def run_stages(
    stages: Sequence[Stage], folder: Path, total: float | None = None, grace: float = GRACE
) -> int:
    """Runs stages in their order.

    Args:
        stages: what to run.
        folder: where logs, RECORD and the stages' own files go; it exists.
        total: the seconds for all of them together; None: no limit. Time for stopping the last one is part of it.
        grace: the seconds from SIGINT to SIGKILL.

    Returns:
        0 if no stage failed; 1 if one did, or was cut short; 130 if this process was interrupted, and then the
        stages that were left have not begun.
    """
    record, start = Record(folder), time.monotonic()
    failed = False
    with stopping_on_signals():
        for number, stage in enumerate(stages):
            left = None if total is None else total - grace - (time.monotonic() - start)
            why = why_not_begun(stage, left)
            if why:
                record.add(NOT_BEGUN, stage=stage.name, why=why)
                say(f"{stage.name}: not begun, {why}")
                continue
            limit = min((value for value in (stage.seconds, left) if value is not None), default=None)
            try:
                failed |= run_stage(stage, limit, folder, record, grace)
            except Interrupted:
                for later in stages[number + 1 :]:
                    record.add(NOT_BEGUN, stage=later.name, why="the run was interrupted")
                return INTERRUPTED
    return int(failed)


def why_not_begun(stage: Stage, left: float | None) -> str:
    """Why a stage is not begun with so many seconds left; "": it is."""
    if stage.why_not:
        return stage.why_not
    if left is not None and left < stage.least:
        return f"{max(left, 0):.0f} s of the total are left, and it needs {stage.least:g} s"
    return ""


@contextlib.contextmanager
def stopping_on_signals() -> Iterator[None]:
    """Inside, SIGINT and SIGTERM raise Interrupted in the main thread."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted(signal.Signals(number).name)

    earlier = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def run_stage(stage: Stage, limit: float | None, folder: Path, record: Record, grace: float) -> bool:
    """Runs one stage; returns whether it failed: it was cut short, or its exit code is none of its fine ones.

    Raises:
        Interrupted: the runner was told to stop; the stage was stopped first.
    """
    within = "" if limit is None else f", at most {limit:.0f} s"
    say(f"{stage.name}{within}: {' '.join(stage.command)}")
    record.add(BEGIN, stage=stage.name, command=list(stage.command), limit=limit)
    start, cut_short, interrupted = time.monotonic(), False, False
    code: int | None = None
    with open(folder / f"{stage.name}.log", "ab") as log:
        try:
            with started(stage, folder, log) as process:
                try:
                    code = process.wait(limit)
                except subprocess.TimeoutExpired:
                    cut_short = True
                    code = stop(process, grace)
                except Interrupted:
                    cut_short = interrupted = True
                    code = stop(process, grace)
        except OSError as error:
            code = 127
            log.write(f"{error}\n".encode())
            say(f"{stage.name}: {error}")
    seconds = round(time.monotonic() - start, 1)
    failed = cut_short or code not in stage.fine
    record.add(END, stage=stage.name, exit=code, seconds=seconds, cut_short=cut_short, failed=failed)
    say(f"{stage.name}: {'cut short' if cut_short else 'ended'} after {seconds:.0f} s, exit code {code}")
    if interrupted:
        raise Interrupted
    return failed


@contextlib.contextmanager
def started(stage: Stage, folder: Path, log: BinaryIO) -> Iterator[subprocess.Popen[bytes]]:
    """The process of a stage, whose output is copied to the log and the terminal; its group is gone afterwards."""
    with contextlib.ExitStack() as stack:
        output = stack.enter_context(open(folder / stage.output, "wb")) if stage.output else None
        process = subprocess.Popen(
            stage.command,
            stdin=subprocess.DEVNULL,
            stdout=output or subprocess.PIPE,
            stderr=subprocess.PIPE if output else subprocess.STDOUT,
            env=os.environ | dict(stage.environment),
            start_new_session=True,
        )
        pipe = process.stderr if output else process.stdout
        assert pipe is not None
        copying = threading.Thread(target=copy, args=(pipe.fileno(), log), daemon=True)
        copying.start()
        try:
            yield process
        finally:
            kill(process, signal.SIGKILL)  # processes left behind would hold the device and the pipe
            process.wait()
            copying.join(DRAIN)
            if not copying.is_alive():
                pipe.close()


def copy(source: int, log: BinaryIO) -> None:
    """Copies what comes out of a pipe, as it comes."""
    while chunk := os.read(source, 1 << 16):
        log.write(chunk)
        log.flush()
        with contextlib.suppress(OSError):  # a terminal that is gone must not cost the log
            sys.stdout.buffer.write(chunk)
            sys.stdout.buffer.flush()


def stop(process: subprocess.Popen[bytes], grace: float) -> int:
    """Sends SIGINT to the group of a process, and SIGKILL if it has not ended after `grace` seconds."""
    kill(process, signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired, Interrupted):
        return process.wait(grace)
    kill(process, signal.SIGKILL)
    return process.wait()


def kill(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Sends a signal to the group that a process leads; its children may be there when it is not."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def say(text: str) -> None:
    print(f"[stages] {text}", flush=True)
