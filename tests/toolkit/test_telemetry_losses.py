"""Telemetry: the losses of each route's tokens against losses by hand."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("transformers")

import tiny_models as tiny
from telemetry_cases import (
    ROUTES,
    assert_losses,
    batch_of,
    close,
    expect,
    llama,
    llama_telemetry,
    losses_by_hand,
    step_of,
)

from gradroute.telemetry import Telemetry


@pytest.mark.parametrize("align", ["position", "next_token"])
def test_losses_by_route(align):
    model, telemetry = llama_telemetry(align=align)
    batch = batch_of()
    batch["route_ids"] = tiny.mixed_ids(batch["input_ids"])
    want = losses_by_hand(model, batch, align=align)
    assert want[0][1] + want[1][1] == 19  # 4 rows predict 5 labels each, one of which is -100
    with telemetry.step(batch["route_ids"]) as record:
        telemetry.losses(model(**batch).logits, batch["labels"])
    assert_losses(record, want)
    with telemetry.step() as record:  # losses come from the model's forward
        model(**batch)
    assert_losses(record, want)


def test_alignments_differ():
    model, _ = llama()
    batch = batch_of()
    batch["route_ids"] = tiny.mixed_ids(batch["input_ids"])
    position, next_token = (losses_by_hand(model, batch, align=a) for a in ("position", "next_token"))
    assert position[0][0] != close(next_token[0][0])


def test_losses_of_accumulated_batches_are_means_over_tokens():
    model, telemetry = llama_telemetry()
    batches = [batch_of((0, 1, 1, 1)), batch_of((0, 0, 1), seed=1)]
    parts = [losses_by_hand(model, batch) for batch in batches]
    want = []
    for of_route in zip(*parts, strict=True):
        tokens = sum(n for _, n in of_route)
        want.append((sum(loss * n for loss, n in of_route) / tokens, tokens))
    assert_losses(step_of(telemetry, model, *batches), want)


def test_losses_without_a_shift_and_of_any_kind():
    model, ids = nn.Linear(4, 3), torch.tensor([0, 1, 1, 0, 1])
    labels = torch.tensor([2, 0, 1, -100, 2])
    telemetry = Telemetry(model, ROUTES)
    with telemetry.step(ids) as record:
        logits = model(torch.randn(5, 4))
        telemetry.losses(logits, labels, shift=False)
    assert_losses(
        record,
        [
            (F.cross_entropy(logits[:1], labels[:1]), 1),
            (F.cross_entropy(logits[[1, 2, 4]], labels[[1, 2, 4]]), 3),
        ],
    )
    with telemetry.step(ids) as record:
        telemetry.token_losses(torch.tensor([1.0, 2.0, 4.0, 7.0, 9.0]), torch.tensor([1, 1, 1, 1, 0]) > 0)
    assert_losses(record, [(4.0, 2), (3.0, 2)])


@pytest.mark.parametrize(
    ("counted", "error", "message"),
    [
        (torch.tensor(True), ValueError, "counted: got shape [], expected that of losses, [5]"),
        (torch.ones(1, dtype=torch.bool), ValueError, "counted: got shape [1], expected that of losses, [5]"),
        (torch.ones(5, dtype=torch.int64), TypeError, "counted: got dtype torch.int64, expected a tensor of"),
        ([True] * 5, TypeError, "counted: got a list, expected a tensor of dtype torch.bool"),
    ],
)
def test_what_counts_is_checked(counted, error, message):
    telemetry = Telemetry(nn.Linear(4, 3), ROUTES)
    with telemetry.step(torch.tensor([0, 1, 1, 0, 1])) as record:
        telemetry.token_losses(torch.ones(5))
        with expect(error, message):
            telemetry.token_losses(torch.full((5,), 9.0), counted)
    assert_losses(record, [(1.0, 2), (1.0, 3)])


def test_a_route_without_tokens_has_no_loss():
    model, telemetry = llama_telemetry()
    record = step_of(telemetry, model, batch_of((0, 0)))
    assert math.isnan(record["loss/forget"])
    assert record["tokens/forget"] == 0
    assert record["grad_share/layers.0/forget"] == 0
    assert record["grad_share/layers.0/retain"] == 1
