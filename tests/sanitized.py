"""Runs tests on a native module whose CPU kernels are checked by AddressSanitizer and UndefinedBehaviorSanitizer.

`python tests/sanitized.py MODULE [pytest's arguments]`: MODULE is the shared library of a build with
-DGRADROUTE_SANITIZE=ON. The sanitizer's runtime must be preloaded; `make sanitize` does all of it.
"""

import importlib.util
import sys

import pytest
import torch  # noqa: F401  (its OpenMP runtime comes first, as in gradroute)


def use(path):
    """Makes the library at `path` the one that gradroute will import."""
    spec = importlib.util.spec_from_file_location("gradroute._native", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["gradroute._native"] = module


if __name__ == "__main__":
    use(sys.argv[1])
    raise SystemExit(pytest.main(sys.argv[2:]))
