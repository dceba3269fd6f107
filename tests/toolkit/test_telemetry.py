"""Telemetry: gradients of activations against sums by hand, and that measuring changes nothing."""

import copy
import math

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

pytest.importorskip("transformers")

import tiny_models as tiny
from telemetry_cases import (
    LEARNING_RATE,
    ROUTES,
    Net,
    assert_losses,
    assert_shares,
    batch_of,
    close,
    expect,
    hooks_of,
    llama,
    llama_squares,
    llama_telemetry,
    losses_by_hand,
    squares_by_hand,
    step_of,
    without_ids,
)
from tiny_models import assert_gradients_equal, gradients

from gradroute import Routes
from gradroute.blocks import Block
from gradroute.models.gated_mlp import GatedMLP
from gradroute.telemetry import Telemetry


def test_shares_of_decoder_layers():
    model, telemetry = llama_telemetry()
    squares = llama_squares(model, batch_of())
    assert_shares(step_of(telemetry, model, batch_of()), squares)


def test_shares_of_named_modules_of_any_model():
    model, x, ids = Net(), torch.randn(7, 6), torch.tensor([0, 1, 1, 0, 0, 1, 0])
    names = ("first", "head")
    twin = copy.deepcopy(model)
    squares = squares_by_hand(
        twin,
        {name: twin.get_submodule(name) for name in names},
        [x],
        lambda x: ids,
        lambda m, x: m(x, ids).square().sum(),
    )
    telemetry = Telemetry(model, ROUTES, modules=names)
    with telemetry.step(ids) as record:
        model(x, ids).square().sum().backward()
    assert_shares(record, squares)


def test_accumulated_batches_bring_their_own_ids():
    batches = [batch_of((0, 1, 0, 1)), batch_of((1, 1, 1, 0, 1), seed=1)]
    model, telemetry = llama_telemetry()
    squares = llama_squares(model, *batches)
    assert_shares(step_of(telemetry, model, *batches), squares)


@pytest.mark.parametrize("first", [True, False])
def test_accumulated_batches_with_ids_by_hand(first):
    batches = [batch_of((0, 1, 0, 1)), batch_of((1, 1, 1, 0, 1), seed=1)]
    model, telemetry = llama_telemetry()
    squares = llama_squares(model, *batches)
    with telemetry.step(batches[0]["route_ids"] if first else None) as record:
        for batch in batches:
            telemetry.batch(batch["route_ids"])
            logits = model(**without_ids(batch), routes=Routes.of(batch["route_ids"], 2)).logits
            telemetry.losses(logits, batch["labels"])
            model.loss_function(logits, batch["labels"], tiny.VOCABULARY).backward()
    assert_shares(record, squares)
    assert record["tokens/retain"] + record["tokens/forget"] == 19 + 24


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpoint_is_not_counted_twice(use_reentrant):
    """Hooks of transformers' layers stand outside of their checkpoints, those of attention inside: these run twice."""
    model, block = llama()
    names = ["model.layers.0.self_attn", "model.layers.1.mlp", "model.layers.1"]
    squares, want = llama_squares(model, batch_of(), modules=names), losses_by_hand(model, batch_of())
    telemetry = Telemetry(model, ROUTES, {"forget": block}, modules=names)
    tiny.checkpoint_layers(model, use_reentrant)
    calls = []
    handle = model.get_submodule(names[0]).register_forward_hook(lambda *_: calls.append(1))
    record = step_of(telemetry, model.train(), batch_of())
    handle.remove()
    assert len(calls) == 2
    assert_shares(record, squares)
    assert_losses(record, want)


def test_a_checkpoint_of_the_whole_model_is_not_counted_twice():
    model, telemetry = llama_telemetry()
    batch = batch_of()
    squares, want = llama_squares(model, batch), losses_by_hand(model, batch)
    with telemetry.step() as record:
        with set_checkpoint_early_stop(False):  # so that the second forward runs to its end
            loss = checkpoint(lambda: model(**batch).loss, use_reentrant=False)
        loss.backward()
    assert_shares(record, squares)
    assert_losses(record, want)


def test_norms_of_bf16_gradients_are_of_fp32():
    model, block = llama()
    model = model.to(torch.bfloat16)
    squares = llama_squares(model, batch_of())
    telemetry = Telemetry(model, ROUTES, {"forget": block})
    assert_shares(step_of(telemetry, model, batch_of()), squares)


def test_shares_of_no_gradient_are_not_defined():
    model, telemetry = llama_telemetry()
    with telemetry.step() as record:
        model(**batch_of())
    assert record["grad_norm/all/retain"] == 0
    assert math.isnan(record["grad_share/layers.0/retain"])
    assert not any(key.startswith("update") for key in record)


def test_an_id_of_a_sample_is_that_of_its_tokens():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    x, ids = torch.randn(3, 5, 4), torch.tensor([0, 1, 0])
    gradient = torch.randn(3, 5, 4)
    telemetry = Telemetry(model, ROUTES, modules=["0"])
    with telemetry.step(ids) as record:
        model[0](x).backward(gradient)
    assert record["grad_norm/0/forget"] == close(gradient[1].norm())
    assert record["grad_norm/0/retain"] == close(gradient[[0, 2]].norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_bit_equal(dtype):
    model, block = llama()
    model = model.to(dtype)
    twin = copy.deepcopy(model)
    twin(**batch_of()).loss.backward()
    telemetry = Telemetry(model, ROUTES, {"forget": block})
    with telemetry.step():
        model(**batch_of()).loss.backward()
        telemetry.leakage(batch_of())
    assert_gradients_equal(gradients(model), gradients(twin))


@pytest.mark.parametrize("modules", [None, ["model.layers.0.mlp", "model.layers.1.self_attn", "lm_head"]])
def test_routed_mlps_stay_fused(modules, monkeypatch):
    fused = []
    original = GatedMLP._fused
    monkeypatch.setattr(GatedMLP, "_fused", lambda *args: fused.append(1) or original(*args))
    model, telemetry = llama_telemetry(modules=modules)
    record = step_of(telemetry, model, batch_of())
    assert len(fused) == tiny.LAYERS
    assert record["grad_share/all/retain"] + record["grad_share/all/forget"] == close(1)


def test_steps_between_have_no_hooks_and_no_record():
    model, telemetry = llama_telemetry(every=3)
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    hooks, latest = [], []
    for _ in range(5):
        with telemetry.step(optimizer=optimizer) as record:
            hooks.append(hooks_of(model) + len(optimizer._optimizer_step_pre_hooks))
            model(**batch_of()).loss.backward()
            optimizer.step()
            assert (record is None) == (hooks[-1] == 0)
        latest.append(telemetry.latest)
        assert hooks_of(model) + len(optimizer._optimizer_step_post_hooks) == 0
    # There are hooks of two layers, of the model's forward before and after, and of the optimizer.
    assert hooks == [5, 0, 0, 5, 0]
    assert [record and record["step"] for record in latest] == [0.0, None, None, 3.0, None]
    assert [record["step"] for record in telemetry.history] == [0.0, 3.0]


@pytest.fixture
def compiled():
    """A compiled Net, and the counter of its graphs."""
    torch._dynamo.reset()
    graphs = CompileCounter()
    yield torch.compile(Net(), backend=graphs, fullgraph=True), graphs
    torch._dynamo.reset()


def test_modules_of_a_compiled_model_cannot_be_watched(compiled):
    model, _ = compiled
    telemetry = Telemetry(model._orig_mod, ROUTES, modules=["head"])
    with expect(RuntimeError, "with a compiled model give Telemetry modules=()"), telemetry.step([0, 1, 1]):
        model(torch.randn(3, 6)).sum().backward()


def test_a_compiled_model_is_compiled_once(compiled):
    model, graphs = compiled
    x, ids = torch.randn(7, 6), torch.tensor([0, 1, 1, 0, 0, 1, 0])
    telemetry = Telemetry(model._orig_mod, ROUTES, modules=(), every=2)
    for _ in range(3):
        with telemetry.step(ids):
            logits = model(x)
            telemetry.losses(logits, ids, shift=False)
    assert_losses(
        telemetry.latest, [(F.cross_entropy(logits[m], ids[m]), m.sum()) for m in (ids == 0, ids == 1)]
    )
    assert graphs.frame_count == 1


class NoReads(TorchDispatchMode):
    """Raises where a number is read of a tensor, or sizes depend on numbers: on a GPU that waits."""

    reads = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket.__name__ not in self.reads, f"{function} waits for the device"
        return function(*args, **(kwargs or {}))


def refuse(*_):
    raise AssertionError("waits for the device")


def test_nothing_is_read_before_somebody_asks(monkeypatch):
    model, x, ids = Net(), torch.randn(7, 6), torch.tensor([0, 1, 1, 0, 0, 1, 0])
    block = Block.units(model, 4)
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    telemetry = Telemetry(model, ROUTES, {"forget": block}, modules=["head"])
    step = telemetry.step(ids, optimizer=optimizer)
    record = step.__enter__()
    with NoReads(), monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "tolist", refuse)  # no operation is seen on the CPU
        logits = model(x)
        telemetry.losses(logits, ids, shift=False)
        logits.sum().backward()
        optimizer.step()
        step.__exit__(None, None, None)
        with expect(AssertionError, "waits for the device"):
            telemetry.latest["loss/retain"]
    assert record["tokens/retain"] == 4
    assert record["loss/retain"] == close(F.cross_entropy(logits[ids == 0], ids[ids == 0]))
