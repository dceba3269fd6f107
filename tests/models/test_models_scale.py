"""Pipeline stages, context parallel, and experts under FSDP2: two gloo processes against one."""

import multiprocessing

import pytest
import torch

pytest.importorskip("transformers")
if not torch.distributed.is_available():
    pytest.skip("torch was built without torch.distributed", allow_module_level=True)

import distributed_worker
import scale_worker
from torch.distributed.tensor.experimental._context_parallel import _attention

import gradroute

GROUP = "scale"

# fp32, relative to a parameter's largest gradient: sums over tokens are taken in another order.
TOLERANCE = 1e-6

pytestmark = pytest.mark.slow  # it waits for two processes


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What came of every cell on each rank, from one launch of two processes."""
    multiprocessing.set_forkserver_preload(["scale_worker"])
    directory = str(tmp_path_factory.mktemp("scale"))
    torch.multiprocessing.start_processes(
        scale_worker.run, (directory, GROUP), distributed_worker.RANKS, start_method="forkserver"
    )
    return [torch.load(f"{directory}/{GROUP}.{rank}.pt") for rank in range(distributed_worker.RANKS)]


def passed(results, cell):
    found = [result[cell] for result in results]
    for result in found:
        assert isinstance(result, dict), result
    return found


@pytest.mark.setup("Pipeline stages", "a routed model split by hand, ScheduleGPipe and Schedule1F1B")
@pytest.mark.parametrize("schedule", list(scale_worker.SCHEDULES))
def test_pipeline_stages_have_the_gradients_of_one_process(results, schedule):
    """Every microbatch has its own ids, and each parameter is in one stage."""
    stages = passed(results, ("pipeline", schedule))
    for stage in stages:
        assert stage["worst"][0] <= TOLERANCE, stage
    assert sum(stage["parameters"] for stage in stages) == 21
    assert abs(stages[-1]["loss"]) <= TOLERANCE


@pytest.mark.setup("FSDP2", "routed mixtures of experts: training, ablate, evaluation")
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_experts_in_shards_are_those_of_one_process(results, name):
    for result in passed(results, ("experts", name)):
        assert result["sharded"]
        assert result["worst"][0] <= TOLERANCE, result
        assert any("experts" in key for key in result["ablated"])
        assert result["differing"] == []
        assert result["logits"] <= TOLERANCE


@pytest.mark.setup("Context parallel", "plans of updates, MLPs, norms, the embedding and the head")
def test_the_sequence_is_split_with_its_ids(results):
    """torch's context_parallel shards the batch; attention over all ranks' keys is the test's own."""
    for result in passed(results, ("context",)):
        assert result["width"] * distributed_worker.RANKS == scale_worker.SEQUENCE
        assert result["worst"][0] <= TOLERANCE, result
        assert abs(result["loss"]) <= TOLERANCE


@pytest.mark.setup(
    "Context parallel",
    "plans that mask inside attention",
    refused="gradroute's attention would see a rank's part of the sequence alone",
)
def test_attention_over_a_part_of_the_sequence_is_refused(results):
    """On the CPU torch's own attention is refused too, by torch: the model above has the test's."""
    for result in passed(results, ("context",)):
        ours, theirs = result["refusals"]
        assert ours.startswith("RuntimeError: routed_attention: got a call under torch's context_parallel")
        assert theirs.startswith(
            "NotImplementedError: Operator aten._scaled_dot_product_flash_attention_for_cpu"
        )


def test_attention_after_context_parallel_is_computed():
    """The refusal is for the time of the context alone; torch's module is imported by the worker."""
    q = torch.randn(1, 1, 3, 4)
    routes = gradroute.Routes.of(torch.tensor([[0, 1, 1]]), 2)
    sites = gradroute.AttentionSites(query=[[1.0], [0.0]])
    assert gradroute.routed_attention(q, q, q, routes, sites).shape == q.shape
    _attention._enable_cp_dtensor_dispatcher()
    try:
        with pytest.raises(RuntimeError, match="got a call under torch's context_parallel"):
            gradroute.routed_attention(q, q, q, routes, sites)
    finally:
        _attention._disable_cp_dtensor_dispatcher()
    assert gradroute.routed_attention(q, q, q, routes, sites).shape == q.shape
