"""Files that a config names: where they are, and what their contents are."""

from __future__ import annotations

import glob
import hashlib
import importlib.metadata
import importlib.util
from pathlib import Path

from .progress import bar

_PACKAGE = "package:"
_DISTRIBUTION = "distribution:"
_PIECE = 1 << 22  # bytes read at once


def absolute(path: str, folder: Path) -> str:
    """A path of a config that starts at a folder; one inside what is installed stays as it is."""
    return path if path.startswith((_PACKAGE, _DISTRIBUTION)) else str(folder / Path(path).expanduser())


def located(path: str) -> Path:
    """Where a path option of a config is: what is inside an installed package is found without importing it.

    Raises:
        FileNotFoundError: no such package; a pattern in distributions that not exactly one file matches.
    """
    if path.startswith(_DISTRIBUTION):
        found = _of_distributions(path)
        if len(found) != 1:
            raise FileNotFoundError(f"{len(found)} files match, and one is needed")
        return found[0]
    if not path.startswith(_PACKAGE):
        return Path(path)
    name, _, file = path.removeprefix(_PACKAGE).partition("/")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"no package {name} is installed")
    return Path(spec.submodule_search_locations[0]) / file


def matched(path: str) -> list[Path]:
    """The files and folders that a path option names, sorted: itself, or what matches its pattern; maybe none.

    Raises:
        FileNotFoundError: no such package or distribution.
    """
    if path.startswith(_DISTRIBUTION):
        return _of_distributions(path)
    place = located(path)
    if place.exists():
        return [place]
    return sorted(map(Path, glob.glob(str(place), recursive=True)))


def _of_distributions(path: str) -> list[Path]:
    """The files of `distribution:NAME,NAME/PATTERN`: what pip installed for these projects and the pattern matches.

    The order is that of the names, and inside a project that of its files' names, which no folder of an environment
    is part of.
    """
    names, _, pattern = path.removeprefix(_DISTRIBUTION).partition("/")
    found: list[Path] = []
    for name in filter(None, map(str.strip, names.split(","))):
        try:
            files = importlib.metadata.files(name) or []
        except importlib.metadata.PackageNotFoundError:
            raise FileNotFoundError(f"no distribution {name} is installed") from None
        chosen = sorted(file for file in files if pattern and file.match(pattern))
        found += [place for file in chosen if (place := Path(str(file.locate()))).is_file()]
    return found


def digest(path: str) -> str:
    """A hash of all that a path option names: contents of files, and names below the folder or pattern."""
    found = matched(path)
    of_all = hashlib.sha256()
    files = [(top, file) for top in found for file in _files(top)]
    for top, file in bar(files, what=f"reading {Path(path).name}", unit=" files", quick=True):
        name = str(file.relative_to(top)) if file != top else file.name if len(found) > 1 else file.suffix
        of_all.update(f"{name}\0{_digest_of(file)}\n".encode())
    return of_all.hexdigest()


def _files(top: Path) -> list[Path]:
    """The files below a folder, without what Python leaves beside its own; or the file itself."""
    if not top.is_dir():
        return [top]
    return sorted(path for path in top.rglob("*") if path.is_file() and "__pycache__" not in path.parts)


def _digest_of(file: Path) -> str:
    contents = hashlib.sha256()
    with file.open("rb") as opened:
        while piece := opened.read(_PIECE):
            contents.update(piece)
    return contents.hexdigest()
