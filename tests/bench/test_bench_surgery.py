"""`python -m bench surgery`: memory is counted, and never more than the model and its largest parameter."""

import json

import pytest
import torch

from bench import report, surgery
from bench.command import main

transformers = pytest.importorskip("transformers")

FLOOR = 100_000  # names, indices, headers: what does not grow with the model


@pytest.fixture
def folder(tmp_path):
    """A tiny model as save_pretrained leaves it."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_each_step_needs_the_model_and_one_parameter(folder, tmp_path, capsys):
    assert main(["surgery", "--model", str(folder), "--units", "16", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / surgery.NAME).read_text())
    steps = found["steps"]
    assert list(steps) == ["expand", "ablate, resample", "ablate, zero", "export, safetensors", "contract"]
    for name, step in steps.items():
        assert 0 <= step["peak"] <= step["largest_parameter"] + FLOOR, name
    added = 6 * 3 * 16 * 128 * 4 * 3  # layers, matrices, units, d_model, bytes, parameter and both moments
    assert steps["expand"]["after"] - steps["expand"]["before"] == pytest.approx(added, rel=0.05)
    assert steps["contract"]["after"] == steps["expand"]["before"]
    table = report.surgery_table(tmp_path / surgery.NAME)
    assert all(f"| {name} " in table for name in steps)


def test_a_model_that_is_not_there_is_named(tmp_path, capsys):
    assert main(["surgery", "--model", str(tmp_path / "none"), "--out", str(tmp_path)]) == 2
    assert "which does not exist" in capsys.readouterr().err
    assert not (tmp_path / surgery.NAME).exists()
