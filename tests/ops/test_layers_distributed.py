"""Layers and their submodules under FSDP1, FSDP2 and torch's tensor parallelism: two gloo processes against one."""

import multiprocessing
import time

import pytest
import torch

if not torch.distributed.is_available():
    pytest.skip("torch was built without torch.distributed", allow_module_level=True)

import layers_worker

PATIENCE = 200  # seconds; twenty times what the cells take on two idle cores
TOLERANCE = 1e-12  # fp64, sums in another order

pytestmark = pytest.mark.slow  # every test waits for two processes


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The results of both ranks, by the name of a cell."""
    directory = tmp_path_factory.mktemp("layers")
    multiprocessing.set_forkserver_preload(["layers_worker"])
    context = torch.multiprocessing.start_processes(
        layers_worker.run, (str(directory),), layers_worker.RANKS, join=False, start_method="forkserver"
    )
    deadline = time.monotonic() + PATIENCE
    while not context.join(timeout=1):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            pytest.fail("the processes hang")
    return [torch.load(directory / f"{rank}.pt") for rank in range(layers_worker.RANKS)]


@pytest.mark.setup("FSDP1", "around gradroute's layers or their linear layers")
@pytest.mark.setup("FSDP2", "fully_shard of gradroute's layers or of their linear layers")
@pytest.mark.setup("Tensor parallelism", "ColwiseParallel and RowwiseParallel of RoutedLinear")
@pytest.mark.parametrize("cell", layers_worker.CELLS)
def test_gradients_are_those_of_one_process(results, cell):
    """Outputs and gradients, also of parameters that a rank has a part of, against the idiom or the whole layer."""
    for of_rank in results:
        assert not isinstance(of_rank[cell], str), of_rank[cell]
        assert of_rank[cell] <= TOLERANCE


@pytest.mark.setup(
    "FSDP1",
    "tables of parameters for linear layers that are wrapped one by one",
    refused="their gradients cannot be routed",
)
@pytest.mark.setup(
    "Tensor parallelism",
    "torch's own styles for norms, embeddings and tables by feature",
    refused="a rank would need its part of the tables",
)
@pytest.mark.parametrize("cell", layers_worker.REFUSALS)
def test_what_cannot_be_right_is_refused(results, cell):
    """The reason is named before a gradient exists, and where sharding is the reason, what shards models."""
    for of_rank in results:
        expected = "say who may update it" if "updates" in cell else "gradroute.models.tensor_parallel"
        assert expected in of_rank[cell]
