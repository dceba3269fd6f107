"""`python -m gradroute tune`: measures what is fastest on this machine, and keeps it for the automatic choice.

The exit code is 0 where every question has its answer, 1 where one could not be answered, and 130 after Ctrl-C, which
keeps the answers before it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch

from ... import backends
from ...arguments import as_device
from .. import answers, identity
from .lines import Lines
from .measuring import QUICK, WHOLE
from .question import Question
from .questions import is_named, questions
from .session import Session

FAILED, INTERRUPTED = 1, 130


def main(arguments: list[str]) -> int:
    """Runs the command with these words of the command line, and returns the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    effort = QUICK if options.quick else WHOLE
    try:
        devices = devices_of(options.device)
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    asked = [questions(device, effort, options.only) for device in devices]
    unknown = [name for name in options.only if not any(_is_asked(name, each) for each in asked)]
    if unknown and unknown[0] in answers.KINDS:
        where = ", ".join(map(str, devices))
        parser.error(f"--only: got {unknown[0]!r}, a kind of which there is no question on {where}")
    if unknown:
        kinds = ", ".join(answers.KINDS)
        parser.error(f"--only: got {unknown[0]!r}, expected kinds ({kinds}) or questions that --list names")
    lines = Lines(sys.stderr if options.json else sys.stdout)
    sessions = [Session(device, effort, lines.write) for device in devices]
    if not answers.reads_files() and not options.list:
        lines.write("GRADROUTE_TUNING=0 is set: answers are written, and ignored until it is unset")
    try:
        with backends.use_backend(None):
            code = _run(list(zip(sessions, asked, strict=True)), options, lines)
            sys.stdout.flush()
            return code
    except BrokenPipeError:  # whoever read the output has enough of it, as `| head -1` has
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # so that the flush at exit does not fail
        return FAILED
    except OSError as error:
        lines.write(f"Answers cannot be kept: {error}. GRADROUTE_CACHE names another folder")
        return FAILED
    finally:
        backends.choose_anew()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m gradroute tune",
        description="Measures what is fastest on this machine. Every answer is written as it comes, and the automatic "
        "choice follows it from the next process on; what has an answer is not asked again.",
    )
    parser.add_argument(
        "--quick", action="store_true", help="ask less, about smaller inputs, in fewer rounds"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        action="extend",
        default=[],
        metavar="QUESTION",
        help=f"kinds of questions ({', '.join(answers.KINDS)}), or questions as --list names them",
    )
    parser.add_argument("--again", action="store_true", help="ask again what has an answer")
    parser.add_argument(
        "--list", action="store_true", help="list the questions and their answers, and ask none"
    )
    parser.add_argument("--device", help="a device alone; default: the current CUDA device and the CPU")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object; lines go to standard error"
    )
    return parser


def devices_of(named: str | None) -> list[torch.device]:
    """The devices to measure, CUDA devices by their numbers.

    Raises:
        ValueError: there is no such device, or nothing is measured there.
    """
    if named is None:
        found = ["cuda"] if torch.cuda.is_available() else []
        return [_numbered(torch.device(name)) for name in (*found, "cpu")]
    device = as_device("device", named)
    if not identity.keeps_findings(device):
        raise ValueError(f"device: got {named!r}, expected cpu, or a CUDA device that is there")
    if device.type == "cpu" and device.index:
        raise ValueError(f"device: got {named!r}, and there is one CPU: cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: got {named!r}, and there are {torch.cuda.device_count()} CUDA devices")
    return [_numbered(device)]


def _numbered(device: torch.device) -> torch.device:
    if device.type == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)


def _is_asked(name: str, asked: Sequence[Question]) -> bool:
    return any(is_named(question.name, [name]) for question in asked)


def _run(sessions: list[tuple[Session, list[Question]]], options: argparse.Namespace, lines: Lines) -> int:
    found: dict[str, Any] = {}
    is_interrupted = False
    for session, asked in sessions:
        if options.list:
            found[str(session.device)] = listed(session, asked)
            continue
        open_ones = asked if options.again else session.unanswered(asked)
        lines.write(
            f"{identity.name_of(session.device)} ({session.device}): {len(open_ones)} of {len(asked)} questions to ask"
        )
        session.remove_damaged()
        if open_ones:
            session.record.update({})  # before minutes of measuring: raises where answers cannot be kept
        try:
            for question in lines.one_by_one(open_ones):
                session.ask(question)
        except KeyboardInterrupt:
            is_interrupted = True
            same = "the same command without --again" if options.again else "the same command"
            lines.write(f"Interrupted. The answers before this are kept, and {same} goes on from here")
        lines.write(f"Answers are in {session.record.file}")
        found[str(session.device)] = written(session, asked)
        if is_interrupted:
            break
    if options.json:
        print(json.dumps(found, indent=1))
    elif options.list:
        for device, rows in found.items():
            print("\n".join([f"On {device}:", *(_row(row) for row in rows)]))
    if is_interrupted:
        return INTERRUPTED
    return FAILED if any(session.failed for session, _ in sessions) else 0


def listed(session: Session, asked: Sequence[Question]) -> list[dict[str, Any]]:
    """Of each question what it decides, its present answer, and what that rests on."""
    present = session.present() if answers.reads_files() else {}
    return [
        {
            "question": question.name,
            "decides": question.decides,
            "answer": present[question.name]["answer"] if question.name in present else question.shipped,
            "evidence": answers.MEASURED if question.name in present else answers.SHIPPED,
        }
        for question in asked
    ]


def _row(row: dict[str, Any]) -> str:
    return f"{row['question']}: {row['decides']}\n  {row['evidence']}: {json.dumps(row['answer'])}"


def written(session: Session, asked: Sequence[Question]) -> dict[str, Any]:
    """What the file of this machine says about the questions, and what could not be answered."""
    present = session.present()
    return {
        "machine": session.record.machine,
        "file": str(session.record.file),
        "findings": {question.name: present[question.name] for question in asked if question.name in present},
        "failed": session.failed,
    }
