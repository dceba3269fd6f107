"""Constants of gradroute are the same, and as usable, whatever state surrounds the call that makes them."""

import ast
import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from gradroute import LinearSites, MLPSites, RoutedLinear, Routes, Table, route_grad
from gradroute.blocks import Block
from gradroute.era import Units, expand
from gradroute.labels import documents, frequency_strength, soft_weights
from gradroute.models import Shape, era, localize_mlp, sgtm, steering
from gradroute.tables import concatenate, heads, localize
from gradroute.telemetry.batches import BatchRoutes

ROOT = Path(__file__).resolve().parents[2]


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device():
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


STATES = {
    "bf16": lambda: default_dtype(torch.bfloat16),
    "fp16": lambda: default_dtype(torch.float16),
    "fp64": lambda: default_dtype(torch.float64),
    "meta": lambda: torch.device("meta"),
    "default device": default_device,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "deterministic": deterministic,
    "fake tensors": FakeTensorMode,
}

WEIGHTS = [[1.0, 1.0, 0.3], [0.001, 1e-8, -5e-8]]
SHAPE = Shape(2, 8, 16, 4, 2, 2)


def tables():
    """Tables by every way to make one."""
    localized = localize(2, 4, {1: [0]}, off=0.001)
    sites = MLPSites(hidden=WEIGHTS, forward=np.array(WEIGHTS))
    plans = (
        sgtm(SHAPE, 1, 3),
        localize_mlp([1], 3, off=0.001),
        steering([0], [1, 2], off=-0.3),
        era([1], 2, off=0.1),
    )
    planned = [
        table
        for plan in plans
        for layer in plan.layers(SHAPE)
        for of_layer in layer
        if of_layer is not None
        for table in of_layer.tables.values()
    ]
    return [
        Table(WEIGHTS),
        Table(np.array(WEIGHTS)),
        localized,
        heads([[0.3, 1.0], [0.001, 1e-8]], 3),
        concatenate([localized, None], [4, 2]),
        *sites.tables.values(),
        *planned,
    ]


@pytest.mark.parametrize("state", STATES)
def test_tables_are_the_fp32_of_what_was_written(state):
    """Bits, kinds and values of tables, and that they are no fake, meta or inference tensors."""
    expected = tables()
    with STATES[state]():
        made = tables()
    assert made[0].weights.tolist() == np.array(WEIGHTS, np.float32).tolist()
    for one, other in zip(made, expected, strict=True):
        assert type(one.weights) is torch.Tensor
        assert not one.weights.is_inference()
        assert torch.equal(one.weights, other.weights)
        assert (one.kind, one.segments, one.values, one.density) == (
            other.kind,
            other.segments,
            other.values,
            other.density,
        )


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap])
def test_tables_of_a_transform_outlive_it(transform):
    made = []

    def function(x):
        made.append(Table(WEIGHTS))
        return x.sum()

    transform(function)(torch.ones(2, 2) if transform is torch.func.vmap else torch.ones(2))
    assert not torch._C._functorch.is_functorch_wrapped_tensor(made[0].weights)
    assert torch.equal(made[0].weights, Table(WEIGHTS).weights)


@pytest.mark.parametrize("state", ["bf16", "meta", "inference mode", "fake tensors"])
def test_a_table_from_there_trains(state):
    """The gradients of a layer whose table was made under a state are those of one made without."""

    def gradients(table):
        torch.manual_seed(0)
        layer = RoutedLinear(3, 3, sites=LinearSites(output=table, update_rows=table))
        x = torch.randn(4, 3, requires_grad=True)
        layer(x, Routes.of([0, 1, 1, 0], 2)).sum().backward()
        return [x.grad, layer.weight.grad, layer.bias.grad]

    with STATES[state]():
        table = Table(WEIGHTS)
    for got, expected in zip(gradients(table), gradients(Table(WEIGHTS)), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("state", ["bf16", "fp16", "meta", "default device", "deterministic"])
def test_routes_labels_and_counts_are_those_of_no_state(state):
    """Python's numbers become the same tensors: strengths, labels, ids of telemetry, indices of blocks."""
    model = nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 2))

    def made():
        routes = Routes.of([0, 1, 1], 2, strength=[0.1, 0.2, 0.3])
        return [
            routes.ids,
            routes.strength,
            soft_weights([0.1, 4.3]),
            frequency_strength([1, 2, 0.3], [3, 0.1, 4]),
            documents([0.1, 0.3], [2, 3]),
            BatchRoutes([0, 1], 2).counts(),
            *(piece.index for piece in Block.of(model, {"0.weight": (0, [1, 3])}).pieces),
        ]

    expected = made()
    with STATES[state]():
        found = made()
    for got, wanted in zip(found, expected, strict=True):
        assert got.device == wanted.device
        assert got.dtype == wanted.dtype
        assert torch.equal(got, wanted)


def test_values_that_do_not_exist_are_refused():
    """A table of fake tensors, or of a sample that vmap stands for, has no weights."""
    with FakeTensorMode(), pytest.raises(ValueError, match="weights of a FakeTensorMode"):
        Table(torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"weights inside a transform of torch\.func"):
        torch.func.vmap(lambda weights: weights * Table(weights).density)(torch.ones(2, 2, 2))


def test_a_model_loaded_in_bf16_has_fp32_tables(tmp_path):
    """transformers builds a model under the dtype it is loaded in."""
    from transformers import PretrainedConfig, PreTrainedModel

    class Configuration(PretrainedConfig):
        model_type = "routed_linear"

    class Model(PreTrainedModel):
        config_class = Configuration

        def __init__(self, config):
            super().__init__(config)
            table = localize(2, 4, {1: [0]}, off=0.001)
            self.linear = RoutedLinear(4, 4, sites=LinearSites(output=table))
            self.post_init()

        def _init_weights(self, module):
            pass

    Model(Configuration()).save_pretrained(tmp_path)
    loaded = Model.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.linear.weight.dtype == torch.bfloat16
    assert loaded.linear.sites.output.weights[1, 3] == torch.tensor(0.001, dtype=torch.float32)


def test_a_model_expanded_in_inference_mode_trains():
    """New parameters and indices of blocks are ordinary tensors, which a backward may save."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.inference_mode():
        block = expand(model, 2, between=Units(["0"], ["2"]))
        routes = Routes.of([0, 1], 2, strength=0.5)
    x = torch.ones(2, 3, requires_grad=True)
    route_grad(model(x), routes, [[1.0], [0.5]]).sum().backward()
    assert model[0].weight.grad.shape == (6, 3)
    assert not any(piece.index.is_inference() for piece in block.pieces)


FLOATING = {"ones", "zeros", "full", "empty", "rand", "randn", "eye", "linspace", "tensor", "as_tensor"}
INTEGER = {"arange", "randint", "randperm"}  # of ints: no default dtype has a part in them


def factory_calls():
    """Where gradroute makes tensors of nothing, as (place, function, names of keywords)."""
    for file in sorted(path for root in ("gradroute", "kernels") for path in (ROOT / root).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            name = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if name.startswith("torch.") and name[6:] in FLOATING | INTEGER:
                keywords = {keyword.arg for keyword in node.keywords}
                yield f"{file.relative_to(ROOT)}:{node.lineno}", name[6:], keywords


def test_no_tensor_is_made_with_the_default_dtype_or_device():
    calls = list(factory_calls())
    assert len(calls) > 40
    without_device = [place for place, _, keywords in calls if "device" not in keywords]
    without_dtype = [place for place, name, keywords in calls if name in FLOATING and "dtype" not in keywords]
    assert without_device == []
    assert without_dtype == []
