"""gradroute.era on models that FSDP2 shards: two gloo processes against one, bit for bit."""

import multiprocessing

import pytest
import torch

pytest.importorskip("transformers")
if not torch.distributed.is_available():
    pytest.skip("torch was built without torch.distributed", allow_module_level=True)

import distributed_worker
import era_worker

GROUP = "era"

pytestmark = pytest.mark.slow  # it waits for two processes


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    multiprocessing.set_forkserver_preload(["era_worker"])
    directory = str(tmp_path_factory.mktemp("era"))
    torch.multiprocessing.start_processes(
        era_worker.run, (directory, GROUP), distributed_worker.RANKS, start_method="forkserver"
    )
    return [torch.load(f"{directory}/{GROUP}.{rank}.pt") for rank in range(distributed_worker.RANKS)]


@pytest.mark.parametrize("cell", ["steps", "plain", "routed"])
def test_shards_are_those_of_one_process(results, cell):
    for result in results:
        assert isinstance(result[cell], dict), result[cell]
        assert result[cell]
        assert not any(result[cell].values()), result[cell]
