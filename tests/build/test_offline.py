"""Every Triton kernel compiles, as shipped, for every architecture without spills and within its shared memory."""

import importlib.metadata
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gradroute.kernels.candidates import ALTERNATIVES, candidates
from gradroute.kernels.configs import ARCHITECTURES, CONFIGS
from gradroute.kernels.launch import record, shipped_config

TESTS = Path(__file__).parents[1]
OPTIONS = {"num_warps", "num_stages", "maxnreg", "enable_fp_fusion"}
# Another Triton than that of constraints.txt compiles samples alone: all that two of them make would take too long.
IS_PINNED = importlib.metadata.version("triton").startswith("3.7.")
SHARED_MEMORY = {80: 166912, 90: 232448, 100: 232448}  # bytes a block may use


def printed(script, *arguments, cache):
    """The lines that a script of tests/ prints in a process of its own, without Triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(TESTS.parent)}
    command = [sys.executable, TESTS / script, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def reports(request, tmp_path_factory):
    """The reports of one architecture's compilations, of a sample of its specialisations."""
    cache = tmp_path_factory.mktemp("triton")
    return request.param, printed("offline.py", str(request.param), "--sampled", cache=cache)


def assert_fit(compiled, architecture):
    """Nothing spills, or takes more shared memory than a block may use."""
    wrong = [
        report
        for report in compiled
        if report["spilled"] > 0 or report["shared"] > SHARED_MEMORY[architecture] or report["registers"] < 1
    ]
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.slow
def test_no_kernel_spills_or_exceeds_shared_memory(reports):
    architecture, compiled = reports
    assert_fit(compiled, architecture)
    assert all(report["as_the_runtime"] for report in compiled)
    assert {report["kernel"] for report in compiled} == {name.partition(".")[0] for name in CONFIGS}


@pytest.mark.slow
@pytest.mark.skipif(
    not IS_PINNED, reason="another Triton than that of constraints.txt compiles samples alone"
)
def test_every_specialisation_for_hopper_fits(tmp_path):
    """Ten minutes of a core: `make test-long` has it."""
    assert_fit(printed("offline.py", "90", cache=tmp_path), 90)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_candidates_compile_like_what_is_shipped(tmp_path, architecture):
    compiled = printed("offline.py", str(architecture), "--candidates", cache=tmp_path)
    assert_fit(compiled, architecture)
    others = (name for name in ALTERNATIVES[architecture] if len(candidates(name, architecture)) > 1)
    assert {report["kernel"] for report in compiled} == {name.partition(".")[0] for name in others}


def test_the_shipped_configuration_is_the_first_candidate():
    for entry, architecture in itertools.product(CONFIGS, ARCHITECTURES):
        shipped, *others = candidates(entry, architecture)
        with record(architecture):
            assert shipped is shipped_config(entry, torch.device("cpu"))
        assert shipped not in others
        assert all({*other} - OPTIONS == {*shipped} - OPTIONS for other in others)
    assert len(candidates("attention_fwd_kernel.128", 90)) == 4
    assert all(entries.keys() <= CONFIGS.keys() for entries in ALTERNATIVES.values())


@pytest.mark.slow
def test_tuples_keep_the_width_of_accesses(tmp_path):
    """A kernel that takes tuples reads and writes global memory as its twin with flat arguments does."""
    found = printed("offline_tuples.py", cache=tmp_path)
    for report in found:
        assert report["tuples"] == report["flat"], report
    wide = {report["features"]: "st.global.v4.b32" in report["tuples"]["accesses"] for report in found}
    assert wide == {256: True, 131: False}
