"""A package that is not installed is named before anything is loaded."""

import importlib.util

import pytest
import torch

from gradroute import BackendError
from gradroute.optim import options
from gradroute.recipes import needs, optimizers, training
from gradroute.recipes.config import ConfigError, load
from gradroute.recipes.training_sections import Train


@pytest.fixture
def without(monkeypatch):
    find = importlib.util.find_spec

    def hide(*names):
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in names else find(name))

    return hide


def test_what_every_recipe_needs(without):
    without("datasets", "tqdm")
    with pytest.raises(ConfigError, match=r"without tqdm, datasets, expected the extra recipes: pip install"):
        load({})


def test_a_module_that_a_key_needs(without):
    needs.check_module("adapters.adapters", ["a"], "peft", "peft")
    without("peft")
    with pytest.raises(ConfigError, match=r"adapters.adapters: got \['a'\], expected peft to be installed"):
        needs.check_module("adapters.adapters", ["a"], "peft", "peft")


@pytest.mark.parametrize("value", ["wandb", ["none", "wandb"]])
def test_a_tracker(without, value):
    without("wandb")
    needs.check_trackers("train.arguments.report_to", ["none"])
    with pytest.raises(ConfigError, match=r"train.arguments.report_to: got 'wandb', expected wandb"):
        needs.check_trackers("train.arguments.report_to", value)


@pytest.mark.parametrize("config", [3, ["a"]])
def test_a_config_of_another_type(config):
    with pytest.raises(ConfigError, match=r"config: got .*expected a YAML or JSON file, a mapping, or None"):
        load(config)


def test_moments_of_one_byte(without):
    training.check_arguments(Train(states="8bit"))
    without("torchao")
    training.check_arguments(Train(states="bfloat16"))
    with pytest.raises(ConfigError, match=r"train.states: got '8bit', expected torchao to be installed"):
        training.check_arguments(Train(states="8bit"))


def test_steps_without_a_kernel_are_said(monkeypatch):
    def refuse(*kind):
        raise BackendError("RoutedAdamW: no backend can run it: cpu: the native module was not compiled")

    model = torch.nn.Linear(2, 2)
    assert optimizers.routed_adamw(model, Train()).defaults["fused"]
    monkeypatch.setattr(options, "fused_backend", refuse)
    with pytest.warns(RuntimeWarning, match="a dozen operations instead of one kernel.*was not compiled"):
        slow = optimizers.routed_adamw(model, Train())
    assert not slow.defaults["fused"]
