"""The folder of a run on disk: a process that is killed at any moment leaves a whole state, because changes are atomic.

A file is written beside its place, brought to the disk and renamed; a folder is renamed before it is deleted.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LOCK = "lock"
DISCARDED = ".discarded"
_PART = ".part"


class RunInUse(RuntimeError):
    """Another process runs a recipe in the same folder."""


def write_json(path: Path, values: Any) -> None:
    """Plain values as a JSON file, atomically."""
    write_text(path, json.dumps(values, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """A text file, atomically."""
    part = path.with_name(path.name + _PART)
    part.write_text(text, encoding="utf-8")
    sync(part)
    os.replace(part, path)
    sync(path.parent)


def copy_file(file: Path, path: Path) -> None:
    """A copy of a file, atomically."""
    part = path.with_name(path.name + _PART)
    shutil.copyfile(file, part)
    sync(part)
    os.replace(part, path)
    sync(path.parent)


def read_json(path: Path) -> Any:
    """What a JSON file says; None where there is none, or it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def sync(path: Path) -> None:
    """Brings a file, or the names in a folder, to the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def discard(folder: Path) -> None:
    """Takes a folder away; whoever comes later sees all of it or nothing."""
    if folder.exists():
        away = folder.with_name(f"{DISCARDED}-{folder.name}")
        shutil.rmtree(away, ignore_errors=True)
        os.replace(folder, away)
        sync(folder.parent)
        shutil.rmtree(away)


def sweep(folder: Path) -> None:
    """Takes away what a killed process was about to delete."""
    for left in folder.glob(f"{DISCARDED}-*"):
        shutil.rmtree(left)


def files_below(folder: Path) -> list[Path]:
    """The files below a folder, sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps other processes from running in a folder. The system takes the lock off a process that dies.

    Raises:
        RunInUse: another process has the lock.
    """
    with (folder / LOCK).open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise RunInUse(
                f"out: got {folder}, expected a folder that no other run uses: {holder} does"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
