"""The sources that figures depend on: their digest, and their commit, also where a copy without git runs.

`make gpu-prepare` writes the commit of a checkout into CARRIED, together with the digests of its files. Where there is
no git, that commit counts if the files there are the same. Nothing here needs more than Python.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("gradroute", "kernels", "csrc", "bench", "examples")
CARRIED = Path("build/gpu/commit.json")  # relative to the root of a checkout
NOT_SOURCES = {"__pycache__", "results"}
BUILT = {".so", ".pyd", ".pyc", ".pyo"}


def commit(root: Path = ROOT) -> dict[str, Any]:
    """The commit of a checkout, and whether its sources are unchanged since.

    Returns:
        "commit" and "clean"; both None where neither git nor a carried file knows, with the reason in "without_commit".
        "sources" is the digest of all sources, so that runs of different ones are told apart even then.
    """
    found = digests(FOLDERS, root)
    hashed = {"sources": combined(found)}
    changes = git("status", "--porcelain", "--", *FOLDERS, ":!bench/results", root=root)
    head = git("rev-parse", "HEAD", root=root)
    if head is not None and changes is not None:
        return {"commit": head, "clean": changes == ""} | hashed
    known, reason = carried(found, root)
    return {"commit": known.get("commit"), "clean": known.get("clean")} | reason | hashed


def carried(found: dict[str, str], root: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The content of CARRIED if it is of these files; otherwise nothing, and the reason as "without_commit"."""
    file = root / CARRIED
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
        files = known["files"]
    except OSError:
        return {}, {"without_commit": f"there is neither git nor {CARRIED}, which make gpu-prepare writes"}
    except (ValueError, KeyError, TypeError):
        return {}, {"without_commit": f"{CARRIED} is damaged"}
    differing = sorted(path for path in files.keys() | found.keys() if files.get(path) != found.get(path))
    if differing:
        return {}, {
            "without_commit": f"{CARRIED} is of other sources: {len(differing)} files differ, first {differing[0]}"
        }
    return known, {}


def description(root: Path = ROOT) -> dict[str, Any]:
    """The content of CARRIED: the commit, whether its sources are unchanged, its short name, every file's digest.

    Raises:
        ValueError: there is no git, or `root` is not its checkout.
    """
    top = git("rev-parse", "--show-toplevel", root=root)
    if top is None or Path(top).resolve() != root.resolve():
        raise ValueError(f"{root} is not the top of a git checkout, so that its commit is not known")
    known = commit(root)
    return {
        "commit": known["commit"],
        "clean": known["clean"],
        "described": git("describe", "--always", root=root),
        "files": digests(FOLDERS, root),
    }


def digests(folders: Iterable[str], root: Path = ROOT) -> dict[str, str]:
    """The digest of every file in the folders, by its path, without results and what was built."""
    return {
        file.relative_to(root).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()[:16]
        for folder in folders
        for file in _files(root / folder)
    }


def _files(folder: Path) -> Iterator[Path]:
    """The files in a folder; links to folders are not followed, for what they lead to is a folder of its own."""
    for entry in sorted(folder.iterdir()) if folder.is_dir() else ():
        if entry.is_dir():
            if entry.name not in NOT_SOURCES and not entry.is_symlink():
                yield from _files(entry)
        elif entry.suffix not in BUILT:
            yield entry


def combined(found: dict[str, str]) -> str:
    """One digest for those of several files."""
    return hashlib.sha256(json.dumps(sorted(found.items())).encode()).hexdigest()[:16]


def git(*arguments: str, root: Path = ROOT) -> str | None:
    """The output of a git command on a checkout; None outside of one."""
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
