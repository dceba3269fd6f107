"""Where findings about this machine are kept: one JSON file a device and kind of finding, in the user's cache folder.

A file's name has a digest of all that its findings depend on (`identity.of`), which stands in it too: findings of
another GPU, driver or version are other files. Files are replaced whole, under a lock: processes that write at once
lose nothing, and a reader finds what was there before or after.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from . import identity

#: The kinds of findings: what `check` found, and what `tune` measured.
CHECK, TUNING = "check", "tuning"

#: What reading a file of findings, or making something of a finding, raises where it is damaged. JSON that is nested
#: too deep is a RecursionError, a whole number beyond all floats an OverflowError.
DAMAGED: tuple[type[Exception], ...] = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)


def folder() -> Path:
    """The cache folder: $GRADROUTE_CACHE, else $XDG_CACHE_HOME/gradroute, else ~/.cache/gradroute.

    GRADROUTE_CACHE may begin with ~, and a relative path counts from the working directory; a relative XDG_CACHE_HOME
    is ignored, as its specification says.
    """
    named = os.environ.get("GRADROUTE_CACHE")
    if named:
        return Path(os.path.abspath(os.path.expanduser(named)))
    shared = os.environ.get("XDG_CACHE_HOME", "")
    return Path(shared if os.path.isabs(shared) else os.path.expanduser("~/.cache")) / "gradroute"


class Record:
    """The findings of one kind about one device.

    Attributes:
        machine: all that they depend on.
        file: where they are kept.
    """

    def __init__(self, kind: str, device: torch.device) -> None:
        self.machine = identity.of(device, with_threads=kind == TUNING)
        text = json.dumps(self.machine, sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        name = re.sub(r"[^A-Za-z0-9]+", "-", self.machine["device"]).strip("-")
        self.file = folder() / kind / f"{name}-{digest}.json"

    def read(self) -> dict[str, Any]:
        """The findings by name; none where there is no file. Warns of a file that cannot be used, and ignores it."""
        try:
            return self._read()
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except DAMAGED as error:
            warn_ignored(self.file, error)
            return {}

    def _read(self) -> dict[str, Any]:
        if not stat.S_ISREG(self.file.stat().st_mode):
            raise ValueError("it is no regular file")  # to read a pipe would wait for somebody who writes
        found = json.loads(self.file.read_text(encoding="utf-8"))
        if found["machine"] != self.machine:
            raise ValueError(f"it is about {found['machine']}, and this is {self.machine}")
        findings = found["findings"]
        if not isinstance(findings, dict):
            raise TypeError(f"its findings are a {type(findings).__name__}, expected an object")
        return findings

    def update(self, findings: Mapping[str, Any]) -> None:
        """Adds findings, in place of earlier ones of the same names.

        Raises:
            OSError: the cache folder cannot be written.
        """
        self.change(lambda earlier: earlier | dict(findings))

    def change(self, changed: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        """Replaces the findings by what `changed` makes of them, while no other process can write.

        Raises:
            OSError: the cache folder cannot be written.
        """
        from filelock import FileLock  # torch needs it, so it is there

        self.file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.file.with_suffix(".lock")):
            text = json.dumps({"machine": self.machine, "findings": changed(self.read())}, indent=1)
            fresh = self.file.with_suffix(f".{os.getpid()}.new")
            fresh.write_text(text + "\n", encoding="utf-8")
            fresh.replace(self.file)


def warn_ignored(file: Path, error: Exception, finding: str | None = None) -> None:
    """Says that a file of findings, or one finding of it, is not used, and what mends it."""
    command = "tune" if file.parent.name == TUNING else CHECK
    if finding is None:
        what, mended = str(file), f"`python -m gradroute {command}` writes it anew"
    elif command == "tune":
        what = f"The answer to {finding} in {file}"
        mended = "The next `python -m gradroute tune` removes it, and asks again what is still asked"
    else:
        what = f"The verdict on {finding} in {file}"
        mended = "`python -m gradroute check` judges anew every backend that can run"
    why = f"{type(error).__name__}: {error}"
    warnings.warn(f"{what} is ignored: {why}. {mended}", RuntimeWarning, stacklevel=3)
