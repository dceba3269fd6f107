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
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from . import identity

#: The kinds of findings: what `check` found, and what `tune` measured.
CHECK, TUNING = "check", "tuning"


def folder() -> Path:
    """The cache folder: $GRADROUTE_CACHE, else $XDG_CACHE_HOME/gradroute, else ~/.cache/gradroute."""
    named = os.environ.get("GRADROUTE_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "gradroute"


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
            found = json.loads(self.file.read_text(encoding="utf-8"))
            if found["machine"] != self.machine:
                raise ValueError(f"it is about {found['machine']}, and this is {self.machine}")
            return dict(found["findings"])
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, ValueError, KeyError, TypeError) as error:
            warn_ignored(self.file, f"{type(error).__name__}: {error}")
            return {}

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


def warn_ignored(file: Path, why: str) -> None:
    """Says that what a file of findings holds is not used."""
    warnings.warn(
        f"{file} is ignored: {why}. `python -m gradroute {file.parent.name.replace(TUNING, 'tune')}` writes it anew",
        RuntimeWarning,
        stacklevel=2,
    )
