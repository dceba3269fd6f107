"""Telemetry: keys, files, tables, writers, and transformers' Trainer."""

import copy
import io
import json
import re

import pytest
import torch

pytest.importorskip("transformers")

import tiny_models as tiny
from telemetry_cases import (
    LEARNING_RATE,
    ROUTES,
    FakeWriter,
    batch_of,
    close,
    hooks_of,
    llama,
    llama_telemetry,
    step_of,
)
from transformers import Trainer, TrainingArguments

from gradroute.models import RouteCollator
from gradroute.telemetry import Telemetry, summary_writer


def test_keys_are_stable():
    model, telemetry = llama_telemetry()
    record = step_of(telemetry, model, batch_of())
    by_route = (
        "loss",
        "tokens",
        *(f"grad_{kind}/{m}" for m in ("layers.0", "layers.1", "all") for kind in ("norm", "share")),
    )
    want = ["step", *(f"{name}/{route_name}" for name in by_route for route_name in ROUTES)]
    want += ["block_grad_norm/forget", "block_grad_norm/rest", "protected/forget"]
    want += [f"{name}/{part}" for name in ("update_norm", "update_ratio") for part in ("forget", "rest")]
    assert list(record) == want
    assert all(type(value) is float for value in record.values())
    assert list(step_of(telemetry, model, batch_of((0, 0)))) == want


def test_json_lines(tmp_path):
    model, telemetry = llama_telemetry()
    for ids in ((0, 0), (0, 1)):
        step_of(telemetry, model, batch_of(ids))
    telemetry.to_json_lines(tmp_path / "history.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert lines[0]["loss/forget"] is None
    assert lines[1] == {**telemetry.history[1], "protected/forget": None}
    telemetry.clear()
    assert telemetry.history == []


def test_log_to_anything_with_add_scalar():
    model, telemetry = llama_telemetry(every=2)
    writer = FakeWriter()
    for step in range(2):
        step_of(telemetry, model, batch_of((0, 0)))
        telemetry.log_to(writer, 10 + step)
    record = telemetry.history[0]
    want = [
        (f"telemetry/{key}", value, 10) for key, value in record.items() if key != "step" and value == value
    ]
    assert writer.scalars == want
    assert ("telemetry/grad_share/layers.0/retain", 1.0, 10) in want
    assert "telemetry/loss/forget" not in [tag for tag, *_ in want]


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    model, telemetry = llama_telemetry()
    with summary_writer(tmp_path) as writer:
        for step in range(2):
            step_of(telemetry, model, batch_of())
            telemetry.log_to(writer, step)
    events = EventAccumulator(str(tmp_path)).Reload()
    for step, record in enumerate(telemetry.history):
        for key in ("loss/forget", "grad_share/layers.1/retain", "update_norm/rest"):
            event = events.Scalars(f"telemetry/{key}")[step]
            assert (event.step, event.value) == (step, close(record[key]))


def rendered(table):
    import rich.console

    stream = io.StringIO()
    rich.console.Console(file=stream, width=200).print(table)
    return stream.getvalue()


def test_tables_contain_the_numbers():
    pytest.importorskip("rich")
    model, telemetry = llama_telemetry()
    step_of(telemetry, model, batch_of((0, 0, 1)))
    telemetry.leakage(batch_of())
    record = telemetry.latest
    for text in (rendered(telemetry.table()), str(telemetry)):
        assert "step 0" in text
        lines = {
            words[0]: words[1:] for line in text.splitlines() if (words := re.findall(r"[\w./–+-]+", line))
        }
        for name in ("loss", "tokens", "grad_share/layers.1", "grad_norm/all", "leakage/inside/forget"):
            assert lines[name] == [f"{record[f'{name}/{route_name}']:.4g}" for route_name in ROUTES]
        for name in ("update_norm", "block_grad_norm"):
            assert lines[name] == [f"{record[f'{name}/{part}']:.4g}" for part in ("forget", "rest")]
        assert lines["protected"] == ["–"]
        assert lines["leakage/outside_routed"] == ["0"]


def test_trainer(tmp_path):
    model, block = llama()
    collator = RouteCollator(pad_token_id=0)
    documents = [
        {"input_ids": tiny.tokens(1, 6, seed=i)[0].tolist(), "route_ids": i % 2 if i < 8 else 0}
        for i in range(12)
    ]
    twin = copy.deepcopy(model)
    telemetry = Telemetry(model, ROUTES, {"forget": block}, every=2)
    writer = FakeWriter()
    arguments = TrainingArguments(
        tmp_path,
        max_steps=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        train_sampling_strategy="sequential",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        report_to="none",
        use_cpu=True,
    )
    callbacks = [telemetry.callback(writer)]
    Trainer(model, arguments, data_collator=collator, train_dataset=documents, callbacks=callbacks).train()

    other = Telemetry(twin, ROUTES, {"forget": block}, every=2)
    optimizer = torch.optim.SGD(twin.parameters(), LEARNING_RATE)
    for step in range(3):
        with other.step(optimizer=optimizer):
            for i in (4 * step, 4 * step + 2):
                (twin.train()(**collator(documents[i : i + 2])).loss / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert [record["step"] for record in telemetry.history] == [0, 2]
    for record, want in zip(telemetry.history, other.history, strict=True):
        assert record.keys() == want.keys()
        for key, value in want.items():
            # The division of the loss is elsewhere, and the weights have moved by then: some hundred roundings.
            assert record[key] == pytest.approx(value, rel=1e-4, nan_ok=True), key
    assert telemetry.history[1]["protected/forget"] == 1  # the last step's documents are all of route 0
    assert {step for *_, step in writer.scalars} == {1, 3}
    assert hooks_of(model) == 0
