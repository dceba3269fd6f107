"""Recipes in two gloo processes, sharded by FSDP2 through Trainer, against one process.

accelerate shards nothing on CPUs by itself: the worker says how it is made to.
"""

import multiprocessing
import os
import socket
from pathlib import Path

import pytest
import torch

pytest.importorskip("datasets")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")
if not torch.distributed.is_available():
    pytest.skip("torch was built without torch.distributed", allow_module_level=True)

import recipe_worker as worker
import safetensors.torch

from gradroute.recipes import models

pytestmark = pytest.mark.slow  # it waits for two processes

# fp64, sums taken in another order. An element whose gradient is all rounding is moved by the learning rate times that
# over AdamW's eps: 1e-2 * 1e-17 / 1e-8 a step.
TOLERANCE = 1e-9

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def results(directory, recipe_files, monkeypatch_module):
    """What came of every cell in each process, from one launch."""
    # The forkserver finds the module by this, and not by the path of this process.
    monkeypatch_module.setenv("PYTHONPATH", str(Path(worker.__file__).parent), prepend=os.pathsep)
    multiprocessing.set_forkserver_preload(["recipe_worker"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = str(directory), str(recipe_files), port
    torch.multiprocessing.start_processes(worker.run, arguments, worker.RANKS, start_method="forkserver")
    return [torch.load(directory / f"{rank}.pt", weights_only=False) for rank in range(worker.RANKS)]


def passed(results, cell):
    found = [result[cell] for result in results]
    for result in found:
        assert isinstance(result, dict), result
    return found


@pytest.fixture(scope="module")
def one_process(directory):
    """The same training in this process."""
    return worker.fit("untied", directory / "one", 1, save_to=directory / "saved by one")


def assert_same_training(got, expected, tolerance=TOLERANCE):
    assert got["weights"].keys() == expected["weights"].keys()
    assert got["steps"].keys() == expected["steps"].keys()
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(got["weights"][name], weight, rtol=0, atol=tolerance, msg=name)
    for name, steps in expected["steps"].items():
        assert torch.equal(got["steps"][name], steps), name
    figures, exact = got["figures"], expected["figures"]
    assert (figures["steps"], figures["tokens"]) == (exact["steps"], exact["tokens"])
    tolerances = {"loss": 1e-6}  # Trainer adds losses up in fp32
    for point, other in zip(figures["curve"], exact["curve"], strict=True):
        for name, value in point.items():
            assert value == pytest.approx(other[name], rel=tolerances.get(name, tolerance)), name


@pytest.mark.setup("DDP", "the recipes' trainer: clipping, accumulation, RoutedAdamW")
def test_whole_copies_train_as_one_process(results, one_process):
    for result in passed(results, "ddp"):
        assert not result["sharded"]
        assert_same_training(result, one_process)


@pytest.mark.setup("FSDP2", "Trainer(fsdp=True) of the recipes: clipping, accumulation, RoutedAdamW")
def test_shards_train_as_one_process(results, one_process):
    for result in passed(results, "sharded"):
        assert result["sharded"]
        assert result["layers"] == [True, True]
        assert_same_training(result, one_process)
        norms = [point["grad_norm"] for point in result["figures"]["curve"]]
        assert min(norms) > 2 * worker.MOST_NORM  # every step's gradients were clipped
    uneven = [name for name, steps in one_process["steps"].items() if steps.unique().numel() > 1]
    assert any("up_proj" in name for name in uneven)
    assert any("down_proj" in name for name in uneven)


@pytest.mark.setup(
    "FSDP2", "Trainer's checkpoints of the recipes by torch.distributed.checkpoint, and whole ones"
)
@pytest.mark.parametrize(
    ("cell", "whole"),
    [("resumed", "sharded"), ("resumed, full", "sharded"), ("adapters resumed", "adapters")],
)
def test_a_training_that_was_stopped_goes_on_to_the_same_weights(results, cell, whole):
    if whole == "adapters":
        pytest.importorskip("peft")
    for result, expected in zip(passed(results, cell), passed(results, whole), strict=True):
        for part in ("weights", "steps", "moments"):
            for name, value in expected[part].items():
                assert torch.equal(result[part][name], value), (part, name)
        assert result["figures"] == expected["figures"]
        files = result["files"]
        shards = {f"{part}/.metadata" for part in ("pytorch_model_fsdp_0", "optimizer_0")}
        gathered = {"pytorch_model_fsdp.bin", "optimizer.bin"}
        assert (shards if cell == "resumed" else gathered) <= files
        assert {"whole", "rng_state_0.pth", "rng_state_1.pth", "scheduler.pt", "trainer_state.json"} <= files


@pytest.mark.setup("FSDP2", "the recipe adapters: an adapter for each route, with checkpoints that are whole")
def test_adapters_train_as_in_one_process(results, directory):
    pytest.importorskip("peft")
    expected = worker.fit("adapters", directory / "one of adapters", 1, save_to=directory / "adapters by one")
    for result in passed(results, "adapters"):
        assert result["layers"] == [True, True]
        assert_same_training(result, expected)
    for name in worker.ADAPTERS.adapters:
        files = (directory / f"adapters by {by}/{name}/adapter_model.safetensors" for by in ("two", "one"))
        saved, exact = map(safetensors.torch.load_file, files)
        torch.testing.assert_close(saved, exact, rtol=0, atol=TOLERANCE)


def test_a_checkpoint_is_marked_when_the_last_process_has_written_it(results):
    last = passed(results, "resumed")[-1]
    assert last["marked"] == [False] * 3  # those of steps 2 and 4, and of 6 when it went on


def test_the_model_is_saved_whole(results, one_process, directory):
    result = passed(results, "sharded")[0]
    saved = models.load(directory / "saved", dtype="auto", device="cpu")
    assert saved.config.architectures == ["LlamaForCausalLM"]
    weights = dict(saved.named_parameters())
    assert weights.keys() == result["weights"].keys()
    for name, weight in weights.items():
        assert torch.equal(weight, result["weights"][name]), name
    exact = models.load(directory / "saved by one", dtype="auto", device="cpu").state_dict()
    torch.testing.assert_close(saved.state_dict(), exact, rtol=0, atol=TOLERANCE)


def test_tied_embeddings_layers_that_are_not_routed_and_recomputation(results, directory):
    options = {"save_every": 0}
    expected = worker.fit("tied", directory / "one tied", 1, **options)
    for result in passed(results, "tied"):
        assert result["sharded"]
        assert result["layers"] == [True, True]
        assert_same_training(result, expected)
    assert "lm_head.weight" not in expected["weights"]


@pytest.mark.parametrize("precision", list(DTYPES))
def test_in_less_precision_the_parameters_and_the_loss_stay_in_fp32(results, precision):
    """Losses are those of fp64 to the rounding of bf16, and are not rounded to the narrow dtype themselves."""
    for result, exact in zip(passed(results, precision), passed(results, "sharded"), strict=True):
        assert result["dtypes"] == {torch.float32}
        for name, steps in exact["steps"].items():
            assert torch.equal(result["steps"][name], steps), name  # masked gradients are zeros
        losses = [[point["loss"] for point in one["figures"]["curve"]] for one in (result, exact)]
        assert losses[0] == pytest.approx(losses[1], rel=2**-8)
        assert losses[0] != torch.tensor(losses[0]).to(DTYPES[precision]).tolist()


def test_the_environment_is_as_before(results):
    for result in passed(results, "environment"):
        assert "ACCELERATE_USE_FSDP" not in result


@pytest.mark.setup(
    "FSDP2", "the recipe unlearn from texts to a report, with a baseline and the relearning attack"
)
def test_a_recipe_ends_in_the_same_report(results, recipe_files, directory):
    """fp32: what six steps of AdamW make of another order of sums."""
    expected = worker.reported(recipe_files, directory / "recipe of one", 1, {})
    for result in passed(results, "recipe"):
        assert result["losses"].keys() == expected["losses"].keys()
        for checkpoint, sources in expected["losses"].items():
            for source, figures in sources.items():
                got = result["losses"][checkpoint][source]["loss"]
                assert got == pytest.approx(figures["loss"], rel=1e-5), (checkpoint, source)
        for name, curve in expected["curves"]["relearning"].items():
            for point, other in zip(result["curves"]["relearning"][name], curve, strict=True):
                assert point["tokens"] == other["tokens"]
                assert point["loss"] == pytest.approx(other["loss"], rel=1e-5), name
