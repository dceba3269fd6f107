"""RoutedAdamW under DDP, FSDP2 and tensor parallelism: two gloo processes against one."""

import multiprocessing
import time

import pytest
import torch

pytest.importorskip("transformers")
if not torch.distributed.is_available():
    pytest.skip("torch was built without torch.distributed", allow_module_level=True)

import distributed_worker
import optim_worker

GROUP = "optim"
PATIENCE = 300  # seconds; ten times what the cells take on two idle cores

# Share of a parameter's largest change, over four steps whose gradients are sums in another order. Measured: 6e-6, a
# unit in the last place of the weight of a norm.
TOLERANCE = 1e-4

pytestmark = pytest.mark.slow  # every test waits for two processes


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The results of both ranks, by the name of a cell."""
    multiprocessing.set_forkserver_preload(["optim_worker"])
    directory = tmp_path_factory.mktemp("optim")
    context = torch.multiprocessing.start_processes(
        optim_worker.run,
        (str(directory), GROUP),
        distributed_worker.RANKS,
        join=False,
        start_method="forkserver",
    )
    deadline = time.monotonic() + PATIENCE
    while not context.join(timeout=1):
        if time.monotonic() > deadline:
            for process in context.processes:
                process.kill()
            running = {path.read_text() for path in directory.glob(f"{GROUP}.*.running")}
            pytest.fail(f"hangs in {running}")
    ranks = [torch.load(directory / f"{GROUP}.{rank}.pt") for rank in range(distributed_worker.RANKS)]
    return {name: [of_rank[name] for of_rank in ranks] for name in ranks[0]}


def passed(results, name):
    errors = [result for result in results[name] if isinstance(result, str)]
    assert not errors, f"{name}: {errors[0]}"
    return results[name]


@pytest.mark.parametrize(
    "name", [name for name in optim_worker.CELLS if "block_dim" in name or "clipped" in name]
)
def test_shards_are_those_of_one_process(results, name):
    """Shards agree bit for bit; ranks talk only where they share blocks, and then once."""
    how, _, block_dim = name.partition(" block_dim=")
    shares = (how, block_dim) in {("rows", "1"), ("columns", "0"), ("rows, then columns", "0")}
    shares |= (how, block_dim) == ("rows, whole columns", "1") or (block_dim == "None" and how != "whole")
    for result in passed(results, name):
        assert result["wrong"] == []
        if "clipped" not in name:
            assert result["collectives"] == (1 if shares else 0)


@pytest.mark.parametrize("name", [name for name in optim_worker.CELLS if name.startswith("fused")])
def test_shards_that_kernels_update_are_those_of_one_process(results, name):
    for result in passed(results, name):
        assert result["wrong"] == []


needs_torchao = pytest.mark.skipif(not optim_worker.HAS_TORCHAO, reason="the extra torchao is not installed")


@needs_torchao
@pytest.mark.setup("FSDP2", "RoutedAdamW with moments in 8 bits")
@pytest.mark.setup("Tensor parallelism", "RoutedAdamW with moments in 8 bits")
@pytest.mark.parametrize("how", ["rows", "columns", "whole"])
@pytest.mark.parametrize("block_dim", [0, 1, None])
def test_shards_of_codes_are_those_of_one_process(results, how, block_dim):
    name = f"codes {how} {block_dim}"
    for result in passed(results, name) + (
        passed(results, f"{name} fused") if f"{name} fused" in results else []
    ):
        assert result["wrong"] == []
        assert result["coded"] >= 2
        whole, sharded = result["refusals"]
        assert "state_dict: got exp_avg in an ordinary tensor, expected a DTensor of (" in whole
        assert "state_dict: got exp_avg in a DTensor of (" in sharded


def test_partial_gradients_are_summed_first(results):
    assert passed(results, "partial") == [[1, 1, 0, 0]] * 2


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_norm_that_is_not_finite_touches_nothing_else(results, value):
    """One rank has the entry that is not finite; the other rank's half of the row belongs to the same block."""
    for result in passed(results, value):
        torch.testing.assert_close(result["norm"], torch.tensor(float(value)), equal_nan=True)
        assert (result["columns"][[0, 2]] == 0).all()
        assert torch.isnan(result["columns"][1]).tolist() == [True] + [value == "nan"] * 3
        assert (result["plain"] == 0).all()


@pytest.mark.setup("DDP", "RoutedAdamW")
@pytest.mark.setup("FSDP2", "RoutedAdamW")
@pytest.mark.setup("Tensor parallelism", "RoutedAdamW")
@pytest.mark.parametrize("parallel", ["ddp", "fsdp", "tp", "2d", "tp of gpt_neox", "tp of gpt2"])
def test_training_is_that_of_one_process(results, parallel):
    """The third batch has tokens that may train everything on one rank alone."""
    for result in passed(results, f"trained {parallel}"):
        assert result["block_dims"]
        assert result["steps"] == []
        assert result["uneven"] > 10  # many parameters have blocks that were trained more often than others
        assert result["error"] <= TOLERANCE
        assert result["norms"] <= 1e-5


@pytest.mark.parametrize("kind", ["sharded", "full"])
@pytest.mark.parametrize("what", ["checkpoint", pytest.param("checkpoint of codes", marks=needs_torchao)])
def test_checkpoints(results, what, kind):
    for result in passed(results, f"{what}, {kind}"):
        assert (result.pop("coded") > 0) == (what != "checkpoint")
        assert result == {"loaded": [], "went on": []}


def test_making_a_state_moves_nothing(results):
    for result in passed(results, "initialised"):
        assert result == {"wrong": [], "steps": 0, "lr": {1e-2}}
