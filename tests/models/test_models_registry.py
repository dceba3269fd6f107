"""docs/models_registry.md is what tools/model_registry.py says of the transformers that is installed."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_table_of_models_is_that_of_the_script():
    """The same page for the same version of transformers; for another one no model is routed no longer."""
    done = subprocess.run([sys.executable, "-m", "tools.model_registry", "--check"], cwd=ROOT)
    assert done.returncode == 0, "run `python -m tools.model_registry`"
