"""Arguments of kinds that pass a first look: tensors of other layouts, numbers that a library below would refuse."""

import re

import pytest
import tiny_models as tiny
import torch

from gradroute import MLPSites, Routes, Table, labels, models
from gradroute.blocks import Units
from gradroute.optim import RoutedAdamW
from gradroute.tables import localize
from gradroute.telemetry import summary_writer

ONES = torch.ones(2, 3)


def expect(error, message):
    return pytest.raises(error, match=re.escape(message))


@pytest.mark.filterwarnings(
    "ignore:.*prototype stage:UserWarning",
    "ignore:Sparse CSR:UserWarning",
    "ignore:.*quantized tensor:UserWarning",
)
@pytest.mark.parametrize("make", ["sparse", "compressed", "nested", "jagged", "quantised"])
def test_tensors_of_other_layouts(make):
    """Nothing reads them, so each is refused by name and not by whatever torch has no kernel for."""
    parts = [torch.ones(2), torch.ones(3)]
    tensor = {
        "sparse": ONES.to_sparse,
        "compressed": ONES.to_sparse_csr,
        "nested": lambda: torch.nested.nested_tensor(parts),
        "jagged": lambda: torch.nested.nested_tensor(parts, layout=torch.jagged),
        "quantised": lambda: torch.quantize_per_tensor(ONES, 0.1, 0, torch.qint8),
    }[make]()
    ids = torch.zeros(2, 3, dtype=torch.int64)
    for name, call in {
        "": lambda: Table(tensor),
        "ids: ": lambda: Routes.of(tensor, 2),
        "MLPSites.hidden: ": lambda: MLPSites(hidden=tensor),
        "strength: ": lambda: Routes.of(ids, 2, strength=tensor),
        "labels: ": lambda: labels.next_token(tensor),
        "input_ids: ": lambda: labels.match_tokens(tensor, [1]),
        "forget_counts: ": lambda: labels.frequency_ratio(tensor, tensor),
    }.items():
        with pytest.raises(
            TypeError, match=rf"^{re.escape(name)}got (a .*tensor.* expected .*dense tensor|dtype)"
        ):
            call()


def test_numbers_that_torch_would_refuse():
    parameters = [torch.nn.Parameter(torch.ones(2))]
    for lr in (float("nan"), -1.0):
        with expect(ValueError, f"lr: got {lr}, expected a finite number"):
            RoutedAdamW(parameters, lr=torch.tensor(lr))
    with expect(ValueError, f"seed: got {2**70}, expected an int from"):
        labels.with_errors([0, 1], seed=2**70)


def test_things_of_another_kind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with expect(TypeError, "tokenizer: got 'gpt2', expected a tokenizer of transformers"):
        labels.token_sequences("gpt2", ["tree"])
    with expect(TypeError, "log_dir: got a int, expected the path of a folder, or None"):
        summary_writer(5)
    with expect(TypeError, "outputs: got 5, expected a list of paths"):
        Units(["0"], 5)
    assert not list(tmp_path.iterdir())


def test_what_a_summary_would_ignore():
    with expect(ValueError, "tokenizer: got one without input_ids, expected None"):
        labels.summarize([0, 1], 2, tokenizer=object())
    with expect(ValueError, "cu_seqlens: got one without input_ids, expected None"):
        labels.summarize([0, 1], 2, cu_seqlens=[0, 2])
    with expect(ValueError, "routes: got ['a', 'a'], expected different names"):
        labels.summarize([0, 1], ["a", "a"])


def test_functions_and_arguments_of_a_model():
    hidden = MLPSites(hidden=localize(2, tiny.D_FF, {1: [0]}))
    for function in (lambda: hidden, lambda layer, shape, more: hidden, lambda *, layer: hidden):
        with expect(TypeError, "RoutingPlan.mlp: got a function of ("):
            models.route(tiny.llama(), models.RoutingPlan(2, mlp=function))
    for function in (lambda layer: hidden, lambda layer, shape: hidden, lambda *both: hidden):
        models.route(tiny.llama(), models.RoutingPlan(2, mlp=function))
    model = models.route(tiny.llama(), models.RoutingPlan(2, mlp=hidden))
    with expect(TypeError, "forward() got an unexpected keyword argument 'routing'"):
        model(torch.zeros(1, 3, dtype=torch.int64), routing=torch.zeros(1, 3, dtype=torch.int64))
