"""Unlearning by ERA: who is labelled, what each method trains on, what is left after contraction, checks can fail."""

import copy
import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import era_unlearning
from era_unlearning import ERA, FILTERING, NO_ROUTING, PURE, SHARES, Training, chosen
from experiment import main
from unlearning import labelled
from unlearning.corpus import FORGET, NO_LABEL, RETAIN, pack
from unlearning.labelled import UNLABELLED, Texts, as_retain, labelled_documents, train_rows, without
from unlearning.model import Shape, build, loss_of
from unlearning.training import evaluate, predicted

from gradroute import era as expansion
from gradroute.models import route, unroute

SETTINGS = era_unlearning.Settings(
    Shape(vocabulary=300, d_model=16, layers=2, heads=2, d_ff=24, forget_units=8),
    steps=3,
    tuning_steps=2,
    ascent_steps=3,
    relearning=(0, 2),
    held_out_rows=4,
)


def documents(number, first):
    """Each of 5 to 9 tokens: the first is the document's own, the others are random."""
    generator = torch.Generator().manual_seed(first)
    lengths = torch.randint(4, 9, (number,), generator=generator).tolist()
    return [
        [first + i, *torch.randint(100, (n,), generator=generator).tolist()] for i, n in enumerate(lengths)
    ]


TRAIN = [documents(60, 100), documents(40, 200)]  # first tokens 100 to 159, and 200 to 239


@pytest.fixture
def short_rows(monkeypatch):
    monkeypatch.setattr(labelled, "LENGTH", 16)
    monkeypatch.setattr(era_unlearning, "LENGTH", 16)


@pytest.fixture
def training(short_rows):
    held_out = [pack(((r, ids) for ids in TRAIN[r]), 4, 16) for r in (RETAIN, FORGET)]
    texts = Texts(TRAIN, held_out, held_out[FORGET])
    return Training(SETTINGS, texts, pack(((RETAIN, ids) for ids in TRAIN[RETAIN]), 8, 16), seed=0)


@pytest.fixture(scope="module")
def run():
    return era_unlearning.run(0, quick=True)


def first_tokens(data, route):
    begins = (data.position_ids == 0) & (data.route_ids == route)
    return set(data.input_ids[begins].tolist())


@pytest.mark.parametrize(("share", "number"), [(1.0, 371), (0.5, 185), (0.1, 37)])
def test_so_many_documents_are_labelled(share, number):
    of_share = labelled_documents(371, share, seed=3)
    assert abs(int(of_share.sum()) - share * 371) <= 0.5
    assert int(of_share.sum()) in (number, number + 1)  # a half may be rounded either way
    assert torch.equal(of_share, labelled_documents(371, share, seed=3))
    assert share == 1 or not torch.equal(of_share, labelled_documents(371, share, seed=4))
    assert not (of_share & ~labelled_documents(371, 1.0, seed=3)).any()


def test_documents_of_a_smaller_share_are_among_those_of_a_larger_one():
    tenth, half = (labelled_documents(40, share, seed=0) for share in (0.1, 0.5))
    assert tenth.sum() == 4
    assert not (tenth & ~half).any()


def test_rows_say_by_document_who_is_labelled(short_rows):
    of_half = labelled_documents(40, 0.5, seed=0)
    data = train_rows(TRAIN, of_half, 0.4, seed=0, rows=80)
    marked = {200 + n for n in of_half.nonzero().flatten().tolist()}
    assert first_tokens(data, FORGET) == marked
    assert first_tokens(data, UNLABELLED) == set(range(200, 240)) - marked
    assert first_tokens(data, RETAIN) <= set(range(100, 160))
    everything = train_rows(TRAIN, labelled_documents(40, 1.0, seed=0), 0.4, seed=0, rows=80)
    assert torch.equal(everything.input_ids, data.input_ids)  # the label changes nothing else
    assert (everything.route_ids > 0).float().mean().item() == pytest.approx(0.4, abs=9 / 1280)  # a document
    assert torch.equal(everything.route_ids == RETAIN, data.route_ids == RETAIN)
    assert torch.equal(as_retain(data).route_ids == FORGET, data.route_ids == FORGET)
    assert as_retain(data).route_ids.max() == FORGET


def test_filtering_drops_labelled_documents_only(short_rows):
    data = train_rows(TRAIN, labelled_documents(40, 0.5, seed=0), 0.4, seed=0, rows=40)
    filtered, pure = without(data, [FORGET]), without(data, [FORGET, UNLABELLED])
    for kept, is_dropped in (
        (filtered, data.route_ids == FORGET),
        (pure, data.route_ids != RETAIN),
    ):
        assert (kept.labels[is_dropped] == NO_LABEL).all()
        assert torch.equal(kept.labels[~is_dropped], data.labels[~is_dropped])
        assert torch.equal(kept.input_ids, data.input_ids)
    assert predicted(pure) < predicted(filtered) < predicted(data)


def test_what_is_dropped_teaches_nothing(short_rows):
    """Other tokens in dropped documents give the same gradient."""
    data = train_rows(TRAIN, labelled_documents(40, 1.0, seed=0), 0.4, seed=0, rows=4)
    other = data._replace(input_ids=torch.where(data.route_ids == FORGET, 7, data.input_ids))
    assert not torch.equal(other.input_ids, data.input_ids)
    torch.manual_seed(0)
    model = build(SETTINGS.shape)
    gradients = []
    for batch in (data, other):
        model.zero_grad()
        loss_of(model, without(batch, [FORGET]), routed=False).backward()
        gradients.append([weight.grad for weight in model.parameters()])
    for one, two in zip(*gradients, strict=True):
        assert torch.equal(one, two)


def test_the_contracted_model_is_the_routed_one_without_the_block(training):
    model = build(SETTINGS.shape)
    shapes = {name: weight.shape for name, weight in model.named_parameters()}
    block = expansion.expand(model, SETTINGS.shape.forget_units, zero_output=False)
    route(model, era_unlearning.plan(SETTINGS.shape.forget_units))
    data = as_retain(train_rows(TRAIN, labelled_documents(40, 0.5, 0), 0.4, 0, 12))
    training.train(model, data, True, "test")
    held_out = training.texts.held_out[FORGET]
    hidden = copy.deepcopy(model)
    for layer in hidden.model.layers:
        visible = torch.arange(SETTINGS.shape.d_ff + SETTINGS.shape.forget_units) < SETTINGS.shape.d_ff
        layer.mlp.down_proj.weight.data *= visible
    unroute(model)
    with torch.no_grad():
        expected, before = loss_of(hidden, held_out, True), loss_of(model, held_out, False)
        expansion.ablate(model, block, how="slice")
        assert {name: weight.shape for name, weight in model.named_parameters()} == shapes
        torch.testing.assert_close(loss_of(model, held_out, False), expected)
        assert not torch.equal(before, expected)
    assert model.config.intermediate_size == SETTINGS.shape.d_ff


def test_labelled_documents_push_the_original_units_the_other_way():
    model = build(SETTINGS.shape)
    expansion.expand(model, SETTINGS.shape.forget_units, zero_output=False)
    # In the last layer alone nothing else changes what arrives at the hidden units.
    plain = copy.deepcopy(model)
    route(model, era_unlearning.plan(SETTINGS.shape.forget_units))
    data = pack(((FORGET, ids) for ids in TRAIN[FORGET]), 4, 16)
    loss_of(model, data, True).backward()
    loss_of(plain, data, False).backward()
    got, expected = (one.model.layers[-1].mlp.up_proj.weight.grad for one in (model, plain))
    added = slice(SETTINGS.shape.d_ff, None)
    torch.testing.assert_close(got[added], expected[added])
    original = slice(SETTINGS.shape.d_ff)
    torch.testing.assert_close(got[original], era_unlearning.ORIGINAL_WEIGHT * expected[original])
    assert (model.lm_head.weight.grad == 0).all()
    assert (plain.lm_head.weight.grad != 0).any()


def test_ascent_raises_the_forget_loss_up_to_a_target(training):
    data = train_rows(TRAIN, labelled_documents(40, 1.0, 0), 0.4, 0, 12)
    model = training.plain(data, NO_ROUTING)
    forget = training.labelled_rows(labelled_documents(40, 1.0, 0))
    assert set(forget.route_ids.flatten().tolist()) == {FORGET}
    before = evaluate(model, training.texts.held_out, False)["forget"]
    assert evaluate(training.ascent(model, forget, 99.0), training.texts.held_out, False)["forget"] > before
    unchanged = training.ascent(model, forget, 0.0)
    assert evaluate(unchanged, training.texts.held_out, False)["forget"] == before


@pytest.mark.slow
def test_a_quick_run_has_every_model(run):
    names = [(model["name"], model["share"]) for model in run["models"]]
    assert len(set(names)) == len(names) == 8
    for share, count in zip(SHARES, run["labelled"], strict=True):
        assert abs(count - share * run["documents"][FORGET]) <= 0.5
    for model in run["models"]:
        assert len(model["relearning"]) == len(era_unlearning.QUICK.relearning)
        assert model["relearning"][0] == model["losses"]["forget"]
    assert set(chosen(run, ERA, 0.5)["stages"]) == {"before ablation", "after ablation"}
    assert era_unlearning.effect(run, NO_ROUTING) == 0
    assert era_unlearning.effect(run, PURE) == 1
    assert chosen(run, FILTERING, 1.0) is chosen(run, PURE)


def made_up(run, era, filtering, ascent=4.0, retain=4.0):
    """A run of forget losses 4 without routing, 6 of the pure model, and as given by share; ERA has a retain loss."""
    run = copy.deepcopy(run)
    losses = {
        NO_ROUTING: dict.fromkeys([None], 4.0),
        PURE: dict.fromkeys([None], 6.0),
        ERA: dict(zip(SHARES, era, strict=True)),
        FILTERING: dict(zip(SHARES[1:], filtering, strict=True)),
        era_unlearning.ASCENT: {1.0: ascent},
    }
    for model in run["models"]:
        loss = losses[model["name"]][model["share"]]
        model["losses"] = {"retain": retain if model["name"] == ERA else 4.0, "forget": loss}
        model["relearning"] = [loss, loss - 0.1]
    return run


@pytest.mark.parametrize(
    ("era", "filtering", "ascent", "retain", "failing"),
    [
        ((6.0, 5.5, 4.2), (5.0, 4.2), 4.4, 4.0, []),
        ((5.5, 5.5, 4.2), (5.0, 4.2), 4.4, 4.0, [1]),
        ((6.0, 4.9, 4.2), (5.0, 4.2), 4.4, 4.0, [2]),
        ((6.0, 5.5, 4.2), (5.0, 4.2), 5.9, 4.0, [3]),
        ((6.0, 5.5, 4.2), (5.0, 4.2), 4.4, 4.2, [4]),
    ],
)
def test_checks_can_fail(run, era, filtering, ascent, retain, failing):
    checks = era_unlearning.checks([made_up(run, era, filtering, ascent, retain)])
    assert [index for index, check in enumerate(checks) if not check.passed] == failing


def test_found_says_what_the_numbers_say(run):
    text = era_unlearning.found([made_up(run, (6.0, 5.5, 4.2), (5.0, 4.2), 4.4)])
    assert "2.00 nats above" in text
    assert "ERA reaches 100 % of it with all labels, 75 % with half of them and 10 % with a tenth" in text
    assert "data filtering 100 %, 50 % and 10 %" in text
    assert "no better than filtering" in text


@pytest.mark.slow
def test_what_a_quick_run_leaves(run, tmp_path, capsys):
    recorded = dataclasses.replace(era_unlearning.EXPERIMENT, run=lambda seed, quick: run)
    arguments = ["--out", str(tmp_path), "--seeds", "2"]
    assert main(recorded, None, [*arguments, "--quick"]) == 0
    assert main(recorded, None, arguments) == 1  # four steps unlearn nothing
    results = json.loads((tmp_path / "era_unlearning.json").read_text())
    assert [row["method"] for row in results["table"]] == [model["name"] for model in run["models"]]
    assert not results["checks"][0]["passed"]
    assert results["runs"][0]["models"][0]["losses"]["retain"] == chosen(run, NO_ROUTING)["losses"]["retain"]
    assert "| no routing | - |" in (tmp_path / "era_unlearning.md").read_text()
    assert (tmp_path / "era_unlearning.png").read_bytes().startswith(b"\x89PNG")
    assert "FAILS" in capsys.readouterr().out
