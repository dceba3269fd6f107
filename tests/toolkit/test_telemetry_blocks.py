"""Telemetry: gradients and updates of blocks against norms by hand, and which blocks stay untouched."""

import copy
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("transformers")

from telemetry_cases import (
    FORGET_HEADS,
    FORGET_UNITS,
    LEARNING_RATE,
    ROUTES,
    Net,
    batch_of,
    close,
    llama_telemetry,
    norms_by_hand,
    step_of,
    without_ids,
)
from tiny_models import gradients

from gradroute.blocks import Block
from gradroute.telemetry import Telemetry


def test_gradient_and_update_norms_of_sgd():
    model, telemetry = llama_telemetry()
    block = Block.units(model, FORGET_UNITS) | Block.heads(model, FORGET_HEADS)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    record = step_of(telemetry, model, batch_of())
    norms = {name: norms_by_hand(block, model, tensors) for name, tensors in {
        "block_grad_norm": gradients(model),
        "update_norm": {name: p.detach() - before[name] for name, p in model.named_parameters()},
        "before": before,
    }.items()}  # fmt: skip
    for name in ("block_grad_norm", "update_norm"):
        for part, want in zip(("forget", "rest"), norms[name], strict=True):
            assert want > 0
            assert record[f"{name}/{part}"] == close(want)
    for i, part in enumerate(("forget", "rest")):
        assert record[f"update_ratio/{part}"] == close(norms["update_norm"][i] / norms["before"][i])
        # The parameters' own rounding, 6e-8 of numbers of 1, is 1e-5 of updates of 5e-3.
        gradient_norm = record[f"block_grad_norm/{part}"]
        assert record[f"update_norm/{part}"] == pytest.approx(LEARNING_RATE * gradient_norm, rel=1e-4)


def test_an_untouched_block_has_an_update_of_exactly_zero():
    model, telemetry = llama_telemetry()
    record = step_of(telemetry, model, batch_of((0, 0, 0)))
    assert record["update_norm/forget"] == record["update_ratio/forget"] == 0
    assert record["update_norm/rest"] > 1e-3


def test_rest_may_be_left_out():
    model, telemetry = llama_telemetry(rest=False)
    twin, other = copy.deepcopy(model), None
    record = step_of(telemetry, model, batch_of())
    other = step_of(
        Telemetry(
            twin, ROUTES, {"forget": Block.units(twin, FORGET_UNITS) | Block.heads(twin, FORGET_HEADS)}
        ),
        twin,
        batch_of(),
    )
    assert "update_norm/rest" not in record
    assert record["update_norm/forget"] == other["update_norm/forget"] > 0


def test_several_optimizers_are_one_update():
    model = Net()
    block = Block.units(model, 4)
    optimizers = [
        torch.optim.SGD(part.parameters(), rate)
        for part, rate in ((model.first, 0.1), (model.second, 0.2), (model.head, 0.3))
    ]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    telemetry = Telemetry(model, ROUTES, {"forget": block})
    with telemetry.step(torch.zeros(3, dtype=torch.long), optimizer=optimizers) as record:
        model(torch.randn(3, 6)).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
    moved = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    inside, outside = norms_by_hand(block, model, moved)
    assert record["update_norm/forget"] == close(inside)
    assert record["update_norm/rest"] == close(outside)


def test_gradients_are_those_before_the_first_of_several_optimizers():
    model = Net()
    optimizers = [torch.optim.SGD(part.parameters(), 0.1) for part in (model.first, model.second, model.head)]
    telemetry = Telemetry(model, ROUTES, rest=False)
    with telemetry.step(torch.zeros(3, dtype=torch.long), optimizer=optimizers) as record:
        model(torch.randn(3, 6)).square().sum().backward()
        want = torch.cat([gradient.flatten() for gradient in gradients(model).values()]).norm()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert want > 0
    assert record["block_grad_norm/rest"] == close(want)
    assert not [key for key in record if key.startswith("update")]


class Cloned(TorchDispatchMode):
    """Counts the elements that are cloned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.clone.default:
            self.elements += args[0].numel()
        return func(*args, **(kwargs or {}))


def test_a_parameter_is_cloned_once():
    model = Net()
    telemetry = Telemetry(model, ROUTES, {"forget": Block.units(model, 4)})
    with telemetry.step(torch.zeros(3, dtype=torch.long)) as record:
        with Cloned() as cloned:
            telemetry.before_update()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1.0)
        telemetry.after_update()
    assert cloned.elements == sum(parameter.numel() for parameter in model.parameters())
    moved = {name: torch.ones_like(parameter) for name, parameter in model.named_parameters()}
    inside, outside = norms_by_hand(Block.units(model, 4), model, moved)
    assert record["update_norm/forget"] == close(inside)
    assert record["update_norm/rest"] == close(outside)


def test_updates_without_an_optimizer():
    model = Net()
    telemetry = Telemetry(model, ROUTES, {"forget": Block.units(model, 4)})
    with telemetry.step(torch.zeros(3, dtype=torch.long)) as record:
        model(torch.randn(3, 6)).square().sum().backward()
        telemetry.before_update()
        with torch.no_grad():
            model.head.weight.add_(1.0)
        telemetry.after_update()
    assert record["update_norm/rest"] == close(math.sqrt(model.head.weight.numel()))
    assert record["update_norm/forget"] == 0


@pytest.mark.parametrize(
    ("ids", "routed", "want"), [((0, 0, 0), True, 1), ((0, 0, 0), False, 0), ((0, 1, 0), True, math.nan)]
)
def test_protected(ids, routed, want):
    model, telemetry = llama_telemetry()
    batch = batch_of(ids)
    record = step_of(telemetry, model, batch if routed else without_ids(batch), ids=batch["route_ids"])
    assert record["protected/forget"] == close(want)
    assert (record["block_grad_norm/forget"] == 0) == (want == 1)


def test_protected_looks_at_all_batches_of_a_step():
    model, telemetry = llama_telemetry()
    record = step_of(telemetry, model, batch_of((0, 0, 0)), batch_of((1, 0), seed=1))
    assert math.isnan(record["protected/forget"])


@pytest.mark.parametrize("evaluation", [torch.no_grad, torch.inference_mode])
def test_an_evaluation_within_a_step_is_not_of_its_batch(evaluation):
    model, telemetry = llama_telemetry()
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    with telemetry.step(optimizer=optimizer) as record:
        loss = model(**batch_of((0, 0))).loss
        with evaluation():
            model(**batch_of((1, 1), seed=1))
        loss.backward()
        optimizer.step()
    assert record["protected/forget"] == 1
    assert record["tokens/forget"] == 0
