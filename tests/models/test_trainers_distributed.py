"""Routed trainers in two processes (DDP): the step of one process on all documents."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")

import tiny_models as tiny
import trainers_worker
import trl_cases as cases

from gradroute.models import route

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What both processes saved, by trainer and rank."""
    folder = tmp_path_factory.mktemp("trainers")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, *command, str(ROOT / "tests/trainers_worker.py"), str(folder)],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return {path.stem: torch.load(path) for path in folder.glob("*.pt")}


@pytest.mark.parametrize("name", ["Trainer", "SFTTrainer"])
@pytest.mark.setup("DDP", "routed_trainer of Trainer and SFTTrainer, two processes")
def test_a_step_is_that_of_one_process(results, name):
    model = tiny.llama()
    model.load_state_dict(results[f"{name}-0"]["before"])
    route(model, cases.hidden_plan())
    expected = cases.stepped_on(model, trainers_worker.DOCUMENTS)
    for rank in range(2):
        cases.assert_close(results[f"{name}-{rank}"]["after"], expected)


def test_rollouts_are_routed_in_each_process(results):
    """The worker asserts what its route_fn is given; the weights of both processes stay the same."""
    first, second = (results[f"GRPOTrainer-{rank}"] for rank in range(2))
    cases.assert_close(first["after"], second["after"])
    cases.assert_routed(first["after"], first["before"])
