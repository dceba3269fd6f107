"""Telemetry: arguments, ids and calls that are refused, and what a failed step leaves."""

import sys

import pytest
import torch

pytest.importorskip("transformers")

from telemetry_cases import (
    LEARNING_RATE,
    ROUTES,
    FakeWriter,
    Net,
    batch_of,
    expect,
    hooks_of,
    llama_telemetry,
    without_ids,
)

from gradroute.blocks import Block
from gradroute.telemetry import Telemetry, summary_writer


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"routes": "forget"}, TypeError, "routes: got 'forget', expected a sequence of names"),
        ({"routes": ()}, ValueError, "routes: got none"),
        ({"routes": ("a", "a")}, ValueError, "routes: got ['a', 'a'], expected different names"),
        ({"routes": ("a/b",)}, ValueError, "names without '/'"),
        ({"every": 0}, ValueError, "every: got 0, expected an int of 1 or more"),
        ({"align": "next"}, ValueError, "align: got 'next', expected one of 'position', 'next_token'"),
        ({"home": {"frget": "a"}}, ValueError, "home: got the route 'frget', expected one of retain, forget"),
        ({"home": {"forget": "b"}}, ValueError, "home: got the block 'b', expected one of a"),
        ({"blocks": {"rest": None}}, ValueError, "blocks: got ['rest'], expected different names"),
        (
            {"blocks": {"a": slice(4)}},
            TypeError,
            "blocks['a']: got a slice, expected a gradroute.blocks.Block",
        ),
        ({"modules": ["third"]}, ValueError, "modules: got 'third', expected names of the model's modules"),
        ({"modules": ["first.fc_in"]}, ValueError, "reads instead of calling it, expected the RoutedMLP"),
    ],
)
def test_arguments_are_checked(options, error, message):
    model = Net()
    defaults = {"routes": ROUTES, "blocks": {"a": Block.units(model, 4)}}
    with expect(error, message):
        Telemetry(model, **defaults | options)


def test_blocks_must_not_overlap():
    model = Net()
    with expect(ValueError, "blocks: got 'a' and 'b', which overlap"):
        Telemetry(model, ROUTES, {"a": Block.units(model, 4), "b": Block.units(model, 5)})


@pytest.mark.parametrize("name", ["model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"])
def test_parts_of_fused_modules_are_refused(name):
    with expect(ValueError, f"modules: got {name!r}, a part that a routed Llama"):
        llama_telemetry(modules=[name])


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        (torch.zeros(7), TypeError, "route_ids: got dtype torch.float32"),
        ([[0], [1, 0]], ValueError, "route_ids: got [[0], [1, 0]], expected integers in rows of one length"),
        (torch.full((7,), 2), ValueError, "route_ids: got ids from 2 to 2, expected 0 to 1"),
        (torch.zeros(6, dtype=torch.long), ValueError, "got shape [6], expected that of the tokens of head, [7]"),
        (None, ValueError, "route_ids: got none for head"),
    ],
)  # fmt: skip
def test_ids_are_checked(ids, error, message):
    model = Net()
    telemetry = Telemetry(model, ROUTES, modules=["head"])
    with expect(error, message), telemetry.step(ids):
        model(torch.randn(7, 6)).sum().backward()
    assert hooks_of(model) == 0
    assert telemetry.latest is None
    with telemetry.step(torch.zeros(7, dtype=torch.long)):  # it goes on
        model(torch.randn(7, 6)).sum().backward()
    assert telemetry.latest["grad_share/head/retain"] == 1


def test_a_step_that_fails_leaves_nothing():
    model, telemetry = llama_telemetry()
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE)
    with expect(KeyError, "of the loop's own"), telemetry.step(optimizer=optimizer):
        model(**batch_of()).loss.backward()
        raise KeyError("of the loop's own")
    assert hooks_of(model) + len(optimizer._optimizer_step_pre_hooks) == 0
    assert telemetry.latest is None
    assert telemetry.history == []


def test_calls_at_the_wrong_time():
    model, telemetry = llama_telemetry()
    logits, labels = torch.randn(2, 3, 4), torch.zeros(2, 3, dtype=torch.long)
    with expect(RuntimeError, "losses: got a call outside of a step"):
        telemetry.losses(logits, labels)
    for call in (telemetry.table, lambda: telemetry.log_to(FakeWriter(), 0)):
        with expect(RuntimeError, "got no measured step yet"):
            call()
    assert telemetry.latest is None
    assert str(telemetry) == "Telemetry: no step was measured yet"
    with telemetry.step() as record:
        model(**batch_of())
        with expect(RuntimeError, "got a step within another one"), telemetry.step():
            pass
        with expect(RuntimeError, "record: got a read before the step has ended"):
            record["step"]
        with expect(RuntimeError, "losses: got logits in a step that takes ids and losses"):
            telemetry.losses(logits, labels)
    assert record["tokens/retain"] == 10
    with expect(ValueError, "labels: got shape [2, 2], expected the logits' [2, 3]"), telemetry.step(labels):
        telemetry.losses(logits, labels[:, :2])
    with expect(RuntimeError, "step: got no call of layers.0, layers.1"), telemetry.step():
        pass
    with expect(TypeError, "optimizer: got a str"), telemetry.step(optimizer="sgd"):
        pass


def test_the_probe_checks_its_batch():
    _, telemetry = llama_telemetry()
    batch = batch_of()
    with expect(ValueError, "route_ids: got None and a batch without route_ids"):
        telemetry.leakage(without_ids(batch))
    with expect(ValueError, "batch: got no labels"):
        telemetry.leakage({"input_ids": batch["input_ids"], "route_ids": batch["route_ids"]})


@pytest.mark.parametrize(
    ("missing", "call", "message"),
    [
        (
            "rich.table",
            lambda telemetry: telemetry.table(),
            "table: got no package rich, expected it installed",
        ),
        ("torch.utils.tensorboard", lambda _: summary_writer(), "pip install 'gradroute[telemetry]'"),
        ("transformers", lambda telemetry: telemetry.callback(), "pip install 'gradroute[models]'"),
    ],
)
def test_missing_packages_are_named(missing, call, message, monkeypatch):
    telemetry = Telemetry(Net(), ROUTES)
    with telemetry.step(torch.zeros(1, dtype=torch.long)):
        pass
    monkeypatch.setitem(sys.modules, missing, None)
    with expect(ImportError, message):
        call(telemetry)
