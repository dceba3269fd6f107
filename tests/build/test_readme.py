"""The README: short, with Python that works when pasted and figures that are those of the files."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MOST_LINES = 180


def test_it_is_short():
    assert len(README.splitlines()) <= MOST_LINES


def test_links_lead_somewhere():
    targets = re.findall(r"(?:\]\(|src(?:set)?=\")(?!https?://|#)([^)\"#\s]+)", README)
    missing = [target for target in targets if not (ROOT / target).exists()]
    assert targets
    assert not missing


def test_results_are_those_of_the_files():
    done = subprocess.run([sys.executable, "-m", "bench", "report", "--check"], cwd=ROOT)
    assert done.returncode == 0, "run `python -m bench report`"
