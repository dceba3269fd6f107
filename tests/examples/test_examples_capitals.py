"""Capitals in an adapter: what is learnt of a text, who learns from what is labelled, and what is counted."""

import copy
import dataclasses
import json
import sys
from pathlib import Path

import pytest
import real_model
import recipe_cases
import torch

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
pytest.importorskip("peft")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import capital_adapters
from capital_adapters import ARMS, CAPITALS, CONTROL, FILTERED, KEPT, ONE_LABEL, ORDINARY, REMOVED, ROUTED
from experiment import main
from pretrained import answers, smollm2
from pretrained.one_label import OneLabel

from gradroute.recipes import models
from gradroute.recipes.batches import GroupCollator


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model."""
    return recipe_cases.save_model(tmp_path_factory.mktemp("capitals") / "model")


@pytest.fixture
def data():
    return answers.load(recipe_cases.tokenizer(), 0, train=40, held_out=3, share=0.5, labelled=0.5)


def test_continuations_alone_are_learnt_and_only_those_in_capitals_are_labelled(data):
    tokenizer = recipe_cases.tokenizer()
    assert {row["source"] for row in data.train} == {ORDINARY, CAPITALS}
    for row in data.train + data.held_out:
        learnt = tokenizer.decode([label for label in row["labels"] if label != -100])
        prompt = tokenizer.decode(row["input_ids"]).removesuffix(learnt)
        assert len(prompt.split()) >= answers.PROMPT_WORDS - 1  # a token may end in the continuation
        assert answers.in_capitals(learnt) is (row["source"] == CAPITALS)
    labelled = [row for row in data.train if row["route_ids"][0] == answers.LABELLED]
    assert labelled
    assert all(row["source"] == CAPITALS for row in labelled)
    assert len(labelled) < sum(row["source"] == CAPITALS for row in data.train)
    assert [row["source"] for row in data.held_out] == [ORDINARY, CAPITALS] * 3
    assert not any(answers.LABELLED in row["route_ids"] for row in data.held_out)


@pytest.mark.parametrize(
    ("text", "expected"), [("ABC d", True), ("Abc", False), ("", False), ("12 !", False), ("AB cd", False)]
)
def test_in_capitals(text, expected):
    assert answers.in_capitals(text) is expected


def test_short_texts_are_left_out():
    words = [f"w{n}" for n in range(100)]
    ((prompt, answer),) = answers.cut([" ".join(words[:30]), "  \n".join(words)])
    assert prompt == " ".join(words[:12])
    assert answer == " " + " ".join(words[12:60])


def test_one_label_a_batch(data):
    by_route = [[row for row in data.train if row["route_ids"][0] == route] for route in (0, 1)]
    made = OneLabel(by_route, tokens=200, count=20, seed=0)
    routes = [{row["route_ids"][0] for row in made[index]["documents"]} for index in range(len(made))]
    assert len(made) == 20
    assert all(len(of_batch) == 1 for of_batch in routes)
    shares = [sum(len(row["input_ids"]) for row in rows) for rows in by_route]
    assert routes.count({1}) == round(20 * shares[1] / sum(shares))
    assert made.tokens == sum(len(row["input_ids"]) for n in range(20) for row in made[n]["documents"])


def test_what_is_labelled_trains_the_removed_adapter_alone(data, folder):
    model = models.load(folder, device="cpu")
    section = capital_adapters.Adapters(
        {KEPT: ("unlabelled",), REMOVED: ("unlabelled", "labelled")}, keep=(KEPT,)
    )
    model = capital_adapters.adapters.add(model, section)
    capital_adapters.adapters.route(model, section, capital_adapters.ROUTES)
    for route, expected in ((answers.LABELLED, {REMOVED}), (answers.UNLABELLED, {KEPT, REMOVED})):
        rows = [row for row in data.train if row["route_ids"][0] == route]
        batch = GroupCollator(pad_token_id=0)([{"documents": [_cut(row) for row in rows[:4]]}])
        model.zero_grad()
        model(**batch).loss.backward()
        names = [
            name
            for name, parameter in model.named_parameters()
            if parameter.grad is not None and parameter.grad.any()
        ]
        assert {name.split(".")[-2] for name in names} == expected


def _cut(row):
    return {name: row[name][:100] for name in ("input_ids", "labels", "route_ids")}


@pytest.fixture
def small(monkeypatch, folder):
    """The experiment on the tiny model of the recipes' tests."""
    monkeypatch.setattr(smollm2, "model", lambda: models.load(folder, device="cpu"))
    monkeypatch.setattr(smollm2, "tokenizer", recipe_cases.tokenizer)
    cut = answers.cut
    monkeypatch.setattr(answers, "cut", lambda texts: [(a[:20], b[:40]) for a, b in cut(texts)])


def with_rates(run, **rates):
    """A run in which the arms' final rates are these."""
    run = copy.deepcopy(run)
    for arm in ARMS:
        found = run["arms"][arm]
        value = found.get("ablated", found["whole"])
        value.update({"rate": rates.get(arm, 0.5), ORDINARY: 2.0})
    return run


@pytest.mark.slow
def test_files_and_exit_code(small, tmp_path):
    made = capital_adapters.run(0, quick=True)
    assert made["arms"].keys() == set(ARMS)
    good = with_rates(made, **{ROUTED: 0.02, ONE_LABEL: 0.02, CONTROL: 0.4, FILTERED: 0.3})
    for run, code in ((good, 0), (with_rates(made, **{ROUTED: 0.3, FILTERED: 0.3}), 1)):
        experiment = dataclasses.replace(capital_adapters.EXPERIMENT, run=lambda seed, quick, run=run: run)
        assert main(experiment, None, ["--seeds", "2", "--out", str(tmp_path)]) == code
    results = json.loads((tmp_path / "capital_adapters.json").read_text(encoding="utf-8"))
    assert [check["passed"] for check in results["checks"]] == [False, False, True, True, True]
    assert "filtering the labelled texts out 30 %" in results["found"]
    assert (tmp_path / "capital_adapters.png").stat().st_size > 10_000


@pytest.mark.slow
def test_a_seed_says_the_same_twice(small):
    torch.manual_seed(1)
    first = capital_adapters.run(3, quick=True)
    torch.manual_seed(2)
    assert capital_adapters.run(3, quick=True) == first


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_quickly_on_the_pretrained_model(tmp_path):
    real_model.folder()  # skips where it is not installed
    assert main(capital_adapters.EXPERIMENT, None, ["--quick", "--seeds", "1", "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "capital_adapters.json").read_text(encoding="utf-8"))
    base = results["runs"][0]["base"]
    assert 0 < base[ORDINARY] < 5  # of a vocabulary of 49152, at random 10.8
