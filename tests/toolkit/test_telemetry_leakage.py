"""Telemetry: the leakage probe against gradients by hand, and that it leaves no trace."""

import copy
import math

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

import tiny_models as tiny
from telemetry_cases import (
    FORGET_HEADS,
    FORGET_UNITS,
    ROUTES,
    Net,
    assert_losses,
    assert_shares,
    batch_of,
    close,
    llama,
    llama_squares,
    llama_telemetry,
    losses_by_hand,
    norms_by_hand,
    step_of,
    without_ids,
)
from tiny_models import assert_gradients_equal, gradients

from gradroute.blocks import Block
from gradroute.telemetry import Telemetry


def test_a_plan_confines_what_it_says():
    _, telemetry = llama_telemetry()
    values = telemetry.leakage(batch_of())
    # Forget tokens teach exactly nothing outside of the forget part but what is joint, retain tokens nothing inside.
    assert values["leakage/outside_routed/forget"] == 0
    assert values["leakage/inside_routed/forget/forget"] == 1
    assert values["leakage/inside/forget/retain"] == values["leakage/inside_routed/forget/retain"] == 0
    assert values["leakage/protected/forget"] == 1
    # Embeddings, norms and the head are everybody's.
    assert 0.1 < values["leakage/outside/forget"] < 1


def test_mixed_contexts_leak():
    _, telemetry = llama_telemetry()
    batch = batch_of()
    batch["route_ids"] = tiny.mixed_ids(batch["input_ids"])
    assert telemetry.leakage(batch)["leakage/outside_routed/forget"] > 0.01


def test_leakage_without_routing_against_masks():
    model, telemetry = llama_telemetry()
    block = Block.units(model, FORGET_UNITS) | Block.heads(model, FORGET_HEADS)
    batch = batch_of()
    values = telemetry.leakage(without_ids(batch), batch["route_ids"])
    routed_names = block.masks(model).keys()
    for r, name in enumerate(ROUTES):
        twin = copy.deepcopy(model)
        labels = batch["labels"].masked_fill(batch["route_ids"] != r, -100)
        twin(batch["input_ids"], labels=labels).loss.backward()
        found = gradients(twin)
        routed = {name: gradient for name, gradient in found.items() if name in routed_names}
        for suffix, tensors in (("", found), ("_routed", routed)):
            inside, outside = norms_by_hand(block, model, tensors)
            total = torch.hypot(inside, outside)
            assert values[f"leakage/inside{suffix}/forget/{name}"] == close(inside / total)
            if name == "forget":
                assert values[f"leakage/outside{suffix}/forget"] == close(outside / total)
            if not suffix:
                assert values[f"leakage/grad_norm/{name}"] == close(total)
    assert values["leakage/outside_routed/forget"] > 0.5
    assert values["leakage/protected/forget"] == 0
    assert "leakage/outside/retain" not in values  # retain has no home


def test_leakage_with_a_loss_of_ones_own_and_two_blocks():
    model, ids = Net(), torch.tensor([0, 1, 1, 0, 0, 1, 0])
    x = torch.randn(7, 6)
    blocks = {"first": Block.units(model, 4, layers=[0]), "second": Block.units(model, 4, layers=[1])}
    telemetry = Telemetry(model, ROUTES, blocks, home={"forget": "second", "retain": "first"})

    def loss(model, batch):
        return model(batch["x"], batch["route_ids"]).square().sum(-1)

    values = telemetry.leakage({"x": x, "route_ids": ids}, loss=loss)
    for r, (name, own, other) in enumerate((("retain", "first", "second"), ("forget", "second", "first"))):
        twin = copy.deepcopy(model)
        twin(x, ids)[ids == r].square().sum(-1).mean().backward()
        found = gradients(twin)
        total = torch.cat([gradient.flatten() for gradient in found.values()]).norm()
        outside = norms_by_hand(blocks[own], model, found)[1]
        assert values[f"leakage/outside/{name}"] == close(outside / total)
        assert values[f"leakage/inside/{other}/{name}"] == close(
            norms_by_hand(blocks[other], model, found)[0] / total
        )
    assert values["leakage/outside_routed/forget"] == close(values["leakage/inside_routed/first/forget"])
    # Retain tokens take route 0 and train all units; forget tokens train the last units of both MLPs.
    assert values["leakage/protected/first"] == values["leakage/protected/second"] == 0


def test_a_route_without_tokens_does_not_leak():
    _, telemetry = llama_telemetry()
    values = telemetry.leakage(batch_of((0, 0)))
    assert math.isnan(values["leakage/grad_norm/forget"])
    assert math.isnan(values["leakage/outside/forget"])
    assert values["leakage/inside/forget/retain"] == 0
    assert values["leakage/protected/forget"] == 1


def test_a_route_without_tokens_takes_no_backward():
    model = Net()
    telemetry = Telemetry(model, ROUTES, {"forget": Block.units(model, 4)})
    backwards = []

    def loss(model, batch):
        losses = model(batch["x"], batch["route_ids"]).square().sum(-1)
        losses.register_hook(lambda gradient: backwards.append(gradient))
        return losses

    values = telemetry.leakage({"x": torch.randn(3, 6), "route_ids": torch.zeros(3).long()}, loss=loss)
    assert [gradient.tolist() for gradient in backwards] == [[pytest.approx(1 / 3)] * 3]
    assert math.isnan(values["leakage/grad_norm/forget"])
    assert values["leakage/grad_norm/retain"] > 0


def test_the_probe_leaves_the_model_as_it_was():
    model, block = llama()
    telemetry = Telemetry(model, ROUTES, {"forget": block})
    want = telemetry.leakage(batch_of())
    model.lm_head = nn.Sequential(nn.Dropout(0.5), model.lm_head)
    model.train().model.layers[0].eval()
    model(**batch_of()).loss.backward()
    found, modes = gradients(model), [module.training for module in model.modules()]
    assert telemetry.leakage(batch_of()) == want  # the probe runs without dropout
    assert [module.training for module in model.modules()] == modes
    assert_gradients_equal(gradients(model), found)


def test_the_probe_draws_no_random_numbers():
    model = Net()
    telemetry = Telemetry(model, ROUTES, {"forget": Block.units(model, 4)})
    batch = {"x": torch.randn(3, 6), "route_ids": torch.tensor([0, 1, 1])}
    state = torch.get_rng_state()
    telemetry.leakage(batch, loss=lambda model, batch: model(batch["x"] + torch.randn(3, 6)).sum(-1))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_probe_joins_the_record_of_a_measured_step():
    model, telemetry = llama_telemetry(every=2)
    measured = step_of(telemetry, model, batch_of())
    values = telemetry.leakage(batch_of())
    assert telemetry.latest == measured | values
    assert telemetry.latest["grad_share/all/forget"] == measured["grad_share/all/forget"]
    assert step_of(telemetry, model, batch_of()) is None
    telemetry.leakage(batch_of((0, 0)))
    assert telemetry.history[-1] == telemetry.history[0] == measured | values


def test_the_probe_is_not_watched():
    model, telemetry = llama_telemetry()
    squares, want = llama_squares(model, batch_of()), losses_by_hand(model, batch_of())
    with telemetry.step() as record:
        telemetry.leakage(batch_of((0, 0)))
        model(**batch_of()).loss.backward()
    assert_shares(record, squares)
    assert_losses(record, want)
    assert record["leakage/inside/forget/retain"] == 0
