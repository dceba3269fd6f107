"""The checkout is usable as it lies: its package imports from the root, and its folders hide nobody else's packages."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# As after `pip install .` from another folder: without the editable installation that the tests use.
PLAIN = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
"""


def run(code):
    """Runs the code in a Python started in the checkout's root, and returns its output."""
    done = subprocess.run(
        [sys.executable, "-c", PLAIN + code],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout.strip()


def test_the_package_imports_from_the_root():
    pytest.importorskip("triton")
    code = "import gradroute, gradroute.kernels.linear as linear; print(gradroute.__file__, linear.__file__, sep='\\n')"
    package, linear = map(Path, run(code).splitlines())
    assert package == ROOT / "gradroute" / "__init__.py"
    assert linear.resolve() == ROOT / "kernels" / "linear.py"


def test_transformers_does_not_take_the_folder_kernels_for_the_hub_s_package():
    pytest.importorskip("transformers")
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = """
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import is_kernels_available
config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
LlamaForCausalLM(config)
print(is_kernels_available())
"""
    assert (
        run(code).split()[-1] == "False"
    )  # other packages, which transformers imports, may say things before
