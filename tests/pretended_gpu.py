"""A GPU that is not there, for the collection of tests: pytest's plugin of test_rehearsal.py.

What the tests and the package ask at import finds a GPU. Other libraries find none: they would go on to ask for its
properties. With `--cases FILE` the collected cases are written there, a JSON object a line.
"""

import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
OURS = tuple(str(ROOT / folder) for folder in ("tests", "gradroute", "kernels", "bench"))

_is_available = torch.cuda.is_available


def _is_available_to_us():
    asking = sys._getframe(1).f_code.co_filename
    return asking.startswith(OURS) or _is_available()


torch.cuda.is_available = _is_available_to_us


def pytest_addoption(parser):
    parser.addoption("--cases", type=Path, help="the file that collected cases are written to")


def pytest_collection_finish(session):
    lines = [json.dumps(described(item)) for item in session.items]
    session.config.getoption("cases").write_text("\n".join(lines))


def described(item):
    """A case: its function, whether it needs a GPU, and its parameters but the device, in words."""
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return {
        "function": item.nodeid.partition("[")[0],
        "gpu": "gpu" in item.keywords,
        "parameters": {name: repr(value) for name, value in sorted(parameters.items()) if name != "device"},
    }
