"""Every public name that users may have imported is where it was, and takes what it took.

public_names.json has the names of README, documentation and `__all__` before the package was laid out anew: for a
callable its parameters in order, `=` behind those that may be left out. A name that is public from now on may be added;
one goes only with a major version.
"""

import importlib
import inspect
import json
from pathlib import Path

import pytest

NAMES = json.loads(Path(__file__).with_name("public_names.json").read_text(encoding="utf-8"))


def found(path):
    """The object at a dotted path: its longest module is imported, the rest are attributes."""
    parts = path.split(".")
    for length in range(len(parts) - 1, 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError as error:
            if not path.startswith(str(error.name)):
                pytest.skip(f"{error.name} is not installed")
            continue
        for name in parts[length:]:
            value = getattr(value, name)
        return value
    raise AssertionError(f"{path}: no part of it is a module")


def is_optional(parameter):
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return parameter.default is not inspect.Parameter.empty or parameter.kind in variadic


@pytest.mark.parametrize("path", NAMES)
def test_a_public_name_is_where_it_was_and_takes_what_it_took(path):
    value, taken = found(path), NAMES[path]
    if taken is None:
        return
    before = taken.split()
    now = inspect.signature(value).parameters
    assert [name.rstrip("=") for name in before] == [
        name for name in now if name in {b.rstrip("=") for b in before}
    ]
    required = {name for name, parameter in now.items() if not is_optional(parameter)}
    assert required <= {name for name in before if not name.endswith("=")}
