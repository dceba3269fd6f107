"""The ops: inputs, widths of sites, and the ordinary formula with its sites marked, one file a stem.

A file says in its `OPS` which ops it samples. Every file of this folder is found, so that a new op adds a file here and
changes no other.
"""

from __future__ import annotations

import importlib
import pkgutil

from ...backends import OPS as TABLE
from ..op import Op


def _found() -> dict[str, Op]:
    """The ops of every file in this folder, in the order of the table of backends; ops that it lacks come last."""
    found: dict[str, Op] = {}
    for module in pkgutil.iter_modules(__path__):
        found |= importlib.import_module(f"{__name__}.{module.name}").OPS
    return {name: found[name] for name in (*(name for name in TABLE if name in found), *found)}


#: Every op of `gradroute.backends.OPS`, as `sample` knows it.
OPS = _found()
