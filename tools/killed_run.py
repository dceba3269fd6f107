"""Runs the shipped config on SmolLM2, kills it at three moments, and compares its report: `python tools/killed_run.py`.

The report to compare with is that of a run that nobody stopped, in examples/results/unlearn_smollm2. What comes out is
written beside it, for docs/recipes.md.
"""

import argparse
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "examples/results/unlearn_smollm2"
CONFIG = "package:gradroute/recipes/configs/unlearn_smollm2.yaml"

#: What of a report does not depend on the clock.
COMPARED = ("losses", "changes", "curves", "differences", "generations")


class Moment(NamedTuple):
    """So many seconds after a stage has begun."""

    stage: str
    seconds: float


MOMENTS = (Moment("train", 60), Moment("gradient_ascent", 30), Moment("evaluate", 30))


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the run's folder, which must not exist")
    folder = parser.parse_args().out
    if folder.exists():
        parser.error(f"--out: got {folder}, which exists, expected a new folder")
    words = [sys.executable, "-m", "gradroute.recipes", "unlearn", "--config", CONFIG, "--out", str(folder)]
    for moment in MOMENTS:
        killed(words, folder, moment)
    subprocess.run(words, cwd=ROOT, check=True)
    reports = [json.loads((place / "report.json").read_text(encoding="utf-8")) for place in (RESULTS, folder)]
    different = [part for part in COMPARED if reports[0][part] != reports[1][part]]
    found = {"killed": [moment._asdict() for moment in MOMENTS], "compared": COMPARED, "different": different}
    (RESULTS / "killed.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"different: {', '.join(different) or 'nothing'}")
    return int(bool(different))


def killed(words: list[str], folder: Path, moment: Moment) -> None:
    """Runs a command until a moment of one of its stages.

    Raises:
        RuntimeError: it ended before.
    """
    stage = folder / "stages" / moment.stage
    process = subprocess.Popen(words, cwd=ROOT)
    while process.poll() is None:
        time.sleep(1)
        if (stage / "started.json").exists() and not (stage / "done.json").exists():
            time.sleep(moment.seconds)
            process.send_signal(signal.SIGKILL)
            break
    if process.wait() != -signal.SIGKILL:
        raise RuntimeError(f"got exit code {process.returncode} before {moment}, expected a run to be killed")


if __name__ == "__main__":
    sys.exit(main())
