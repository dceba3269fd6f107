"""What is refused of FSDP2 before anything is loaded, and what recipes add to Trainer's arguments."""

import os
import types

import pytest
import tiny_models as tiny
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from gradroute.models import localize_mlp, route
from gradroute.recipes import baselines, run, running, sharding, trainer, training
from gradroute.recipes.reading import ConfigError
from gradroute.recipes.training import train
from gradroute.recipes.training_sections import RMU, Train

SHARDS = {"fsdp": True}


@pytest.mark.setup(
    "FSDP1",
    "fsdp_config.version 1 of recipes",
    refused="flat parameters have no rows and columns for RoutedAdamW",
)
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"version": 1}, r"fsdp_config\.version: got 1, expected 2: the flat parameters"),
        ({"fsdp_version": 1}, r"fsdp_config\.fsdp_version: got 1, expected 2"),
        (
            {"state_dict_type": "LOCAL_STATE_DICT"},
            r"state_dict_type: got 'LOCAL_STATE_DICT', expected SHARDED",
        ),
        ({"state_dict": "FULL_STATE_DICT"}, r"fsdp_config\.state_dict: .*\(did you mean state_dict_type\?\)"),
        (
            {"auto_wrap_policy": "SIZE_BASED_WRAP"},
            r"auto_wrap_policy: got 'SIZE_BASED_WRAP', expected TRANSF",
        ),
        ({"cpu_ram_efficient_loading": True}, r"cpu_ram_efficient_loading: got True, expected false"),
        (
            {"activation_checkpointing": True},
            r"activation_checkpointing: got True, expected it as train\.act",
        ),
        ("fsdp.json", r"train\.arguments\.fsdp_config: got 'fsdp\.json', expected a mapping"),
    ],
)
def test_options_that_cannot_be_meant(options, words):
    with pytest.raises(ConfigError, match=words):
        sharding.check_sharding({"fsdp": True, "fsdp_config": options})


def test_options_without_fsdp():
    with pytest.raises(ConfigError, match=r"fsdp_config: got .*, expected fsdp: true beside it"):
        sharding.check_sharding({"fsdp_config": {"version": 2}})
    sharding.check_sharding({"report_to": "none"})
    sharding.check_sharding({"fsdp": True, "fsdp_config": {"version": 2, "reshard_after_forward": False}})


def test_processes_and_devices():
    gpu = torch.device("cuda", 0)
    with pytest.raises(ConfigError, match=r"train\.arguments\.fsdp: got True, expected nothing in a single"):
        sharding.check_processes(SHARDS, 1, gpu)
    with pytest.raises(
        ConfigError, match=r"train\.arguments\.fsdp: got True, expected nothing here: on a cpu"
    ):
        sharding.check_processes(SHARDS, 2, torch.device("cpu"))
    sharding.check_processes(SHARDS, 2, gpu)
    sharding.check_processes({}, 1, torch.device("cpu"))


@pytest.mark.parametrize("recipe", ["unlearn", "adapters"])
def test_a_run_that_cannot_shard_is_refused_before_its_folder_is_made(recipe_config, tmp_path, recipe):
    config = {**recipe_config, "train": {"arguments": SHARDS}}
    config["model"]["device"] = "cpu"
    with pytest.raises(ConfigError, match=r"train\.arguments\.fsdp: got True, expected nothing here"):
        run(recipe, config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert all(state.word == "to do" for _, state in running.states(recipe, config, tmp_path / "run"))


@pytest.mark.parametrize(
    ("kind", "arguments", "words"),
    [
        (
            "MULTI_XLA",
            SHARDS,
            r"got True, expected nothing here: on these devices accelerate takes MULTI_XLA",
        ),
        ("FSDP", {}, r"got None, expected true, because ACCELERATE_USE_FSDP in the environment"),
    ],
)
def test_what_accelerate_takes_is_compared_with_what_was_asked_for(kind, arguments, words):
    accelerator = types.SimpleNamespace(distributed_type=types.SimpleNamespace(value=kind))
    made = types.SimpleNamespace(accelerator=accelerator)
    with pytest.raises(ConfigError, match=rf"train\.arguments\.fsdp: {words}"):
        training._refuse_other_shards(made, Train(arguments=arguments))


@pytest.mark.setup(
    "FSDP2",
    "train.arguments.fsdp of recipes on CPUs",
    refused="accelerate would make whole copies there",
)
def test_a_training_that_cannot_shard(tmp_path):
    model = route(tiny.llama(), localize_mlp([0], 4))
    with pytest.raises(ConfigError, match=r"train\.arguments\.fsdp: got True, expected nothing here"):
        train(model, [{"input_ids": [1, 2], "route_ids": 1}], Train(arguments=SHARDS), tmp_path)


@pytest.mark.setup(
    "FSDP2",
    "the baseline rmu of the recipes",
    refused="FSDP2 would overwrite the frozen weights of a forward",
)
def test_rmu_is_refused(recipe_config, tmp_path):
    config = {**recipe_config, "train": {"arguments": SHARDS}, "baselines": {"names": ["rmu"]}}
    words = (
        r"baselines\.names: got \['rmu'\], expected another beside train\.arguments\.fsdp: rmu puts frozen"
    )
    with pytest.raises(ConfigError, match=words):
        run("unlearn", config, tmp_path / "run")
    rows = [{"input_ids": [1, 2]}]
    with pytest.raises(ConfigError, match=words):
        baselines.rmu(tiny.llama(), rows, rows, Train(arguments=SHARDS), RMU(), tmp_path)


def test_what_recipes_add():
    given = {"reshard_after_forward": False, "fsdp_state_dict_type": "FULL_STATE_DICT"}
    added = sharding.sharded_arguments({"fsdp": True, "fsdp_config": given})
    expected = {"version": 2, "reshard_after_forward": False, "state_dict_type": "FULL_STATE_DICT"}
    assert added == {"fsdp_config": expected}
    for adapters, kind in ((False, "SHARDED_STATE_DICT"), (True, "FULL_STATE_DICT")):
        added = sharding.sharded_arguments(SHARDS, adapters=adapters)
        assert added == {"fsdp_config": {"version": 2, "state_dict_type": kind}}
    assert sharding.sharded_arguments({}) == {}


@pytest.mark.setup(
    "FSDP2",
    "sharded checkpoints of adapters, in the recipe adapters",
    refused="accelerate's shards have the first adapter alone",
)
def test_shards_of_adapters(recipe_config, tmp_path):
    pytest.importorskip("peft")
    arguments = {"fsdp": True, "fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}}
    words = r"fsdp_config\.state_dict_type: got 'SHARDED_STATE_DICT', expected FULL_STATE_DICT for adapters"
    with pytest.raises(ConfigError, match=words):
        run("adapters", {**recipe_config, "train": {"arguments": arguments}}, tmp_path / "run")
    with pytest.raises(ConfigError, match=words):
        sharding.sharded_arguments(arguments, adapters=True)


def test_the_environment_is_put_back(monkeypatch):
    monkeypatch.setenv("GRADROUTE_ONE", "1")
    monkeypatch.delenv("GRADROUTE_OTHER", raising=False)

    @sharding.as_before("GRADROUTE_ONE", "GRADROUTE_OTHER")
    def change():
        os.environ |= {"GRADROUTE_ONE": "2", "GRADROUTE_OTHER": "2"}

    for _ in range(2):
        change()
        assert os.environ["GRADROUTE_ONE"] == "1"
        assert "GRADROUTE_OTHER" not in os.environ


@pytest.mark.parametrize("layer", [0, 1])
def test_layers_that_are_not_routed_are_found_beside_routed_ones(layer):
    """By accelerate's own search: the first module whose class has the name."""
    from accelerate.utils.dataclasses import get_module_class_from_name

    model = route(tiny.llama(), localize_mlp([layer], 4))
    routed = type(model.model.layers[layer])
    with trainer._one_class_of_layers(model):
        found = get_module_class_from_name(model, "LlamaDecoderLayer")
        assert all(isinstance(one, found) for one in model.model.layers)
    assert routed.__name__ == "LlamaDecoderLayer"
