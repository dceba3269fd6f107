"""Profiles with Nsight Compute the cases that missed their targets: `python tools/gpu_profile.py FOLDER SUITE`.

It reads FOLDER/SUITE.json, runs each such case once more under ncu, and leaves FOLDER/profile-N.csv with gradroute's
own kernels, and FOLDER/profiles.json, which says which case is which.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

MOST_CASES = 4
MOST_LAUNCHES = 60  # of a case: each is run again for every group of counters
OWN_KERNELS = "regex:_kernel|gradroute"
MISSED = "MISSED"  # the word of `python -m bench` for a target that was measured and not reached


def main(folder: str, suite: str, *options: str) -> int:
    results = Path(folder, f"{suite}.json")
    if not results.is_file():
        print(f"nothing to profile: there is no {results}")
        return 0
    names = missed(json.loads(results.read_text(encoding="utf-8")))
    Path(folder, "profiles.json").write_text(json.dumps(names, indent=1) + "\n", encoding="utf-8")
    print(f"{len(names)} cases missed a target: {'; '.join(names) or 'none'}", flush=True)
    codes = [
        subprocess.run(command(Path(folder), suite, options, number, name)).returncode
        for number, name in enumerate(names[:MOST_CASES], 1)
    ]
    return int(any(codes))


def missed(description: dict[str, Any]) -> list[str]:
    """The cases of a run that missed a target, in their order."""
    return [
        name
        for name, case in description["cases"].items()
        if any(limit["verdict"] == MISSED for limit in case["limits"])
    ]


def command(folder: Path, suite: str, options: tuple[str, ...], number: int, name: str) -> list[str]:
    """One case in one round under ncu; what the benchmark itself measures there says nothing."""
    profiler = ["ncu", "--target-processes", "all", "--set", "basic", "--csv"]
    profiler += ["--kernel-name", OWN_KERNELS, "--launch-count", str(MOST_LAUNCHES)]
    profiler += ["--log-file", str(folder / f"profile-{number}.csv")]
    run = ["bench", "run", suite, *options, "--case", name, "--rounds", "1", "--no-compiled", "--overwrite"]
    return [*profiler, sys.executable, "-m", *run, "--out", str(folder / "profiled")]


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
