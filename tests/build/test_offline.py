"""Every Triton kernel compiles, as shipped, for every architecture without spills and within its shared memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gradroute.kernels.configs import ARCHITECTURES, CONFIGS

OFFLINE = Path(__file__).parents[1] / "offline.py"
WHOLE = 90  # what every specialisation is compiled for; for the others a sample
SHARED_MEMORY = {80: 166912, 90: 232448, 100: 232448}  # bytes a block may use


@pytest.fixture(scope="module", params=ARCHITECTURES)
def reports(request, tmp_path_factory):
    """What a compilation says, in a process of its own, without the interpreter.

    All of them for every architecture, `python tests/offline.py ARCHITECTURE`, are five minutes of a core.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [
        sys.executable,
        OFFLINE,
        str(request.param),
        *(["--sampled"] if request.param != WHOLE else []),
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return request.param, [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_no_kernel_spills_or_exceeds_shared_memory(reports):
    architecture, compiled = reports
    wrong = [
        report
        for report in compiled
        if report["spilled"] > 0 or report["shared"] > SHARED_MEMORY[architecture] or report["registers"] < 1
    ]
    assert not wrong, "\n".join(map(str, wrong))
    assert all(report["as_the_runtime"] for report in compiled)
    assert {report["kernel"] for report in compiled} == {name.partition(".")[0] for name in CONFIGS}
