"""The steering scalar in a pretrained model: what is labelled, what ranks are held against, and when it fails."""

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
pytest.importorskip("accelerate")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import steering_pretrained
from experiment import main
from pretrained import next_word, smollm2, steered
from pretrained.steered import BEFORE, CONTROL, KIN, PLACES, ROUTED, WORD
from steering import measures
from steering.measures import BUDGET, gain
from steering_pretrained import ADDITION, DIM, QUICK
from unlearning.corpus import NO_LABEL, Corpus

from gradroute.recipes import models


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model whose embedding and head are one matrix, as SmolLM2's are."""
    return recipe_cases.save_model(tmp_path_factory.mktemp("steering") / "model", tie_word_embeddings=True)


@pytest.fixture
def small(monkeypatch, folder):
    """The experiment on a tiny model and the texts of the recipes' tests, which have the word too."""
    monkeypatch.setattr(smollm2, "model", lambda: models.load(folder, device="cpu"))
    monkeypatch.setattr(smollm2, "tokenizer", recipe_cases.tokenizer)

    def corpus(seed):
        kinds = ("retain", "forget")
        return Corpus(
            *([recipe_cases.texts(kind, 40, seed=f"{part} {seed}") for kind in kinds] for part in range(2))
        )

    monkeypatch.setattr(next_word, "load_corpus", corpus)


@pytest.fixture
def data(small):
    return next_word.load(
        recipe_cases.tokenizer(), 0, [" a", " near", "zzz"], documents=12, seen=2, held_out=2, length=64
    )


def test_the_words_own_tokens_are_labelled(data):
    tokenizer = recipe_cases.tokenizer()
    assert tokenizer.decode([data.target]) == " the"
    assert [tokenizer.decode([token]) for token in data.kin] == [
        " a",
        " near",
    ]  # the third is no single token
    assert len(data.rows) == 24
    for row in data.rows:
        text = tokenizer.decode(row["input_ids"])
        assert sum(row["route_ids"]) == text.count(" the ") + text.endswith(" the.")
        assert {token for token, label in zip(row["input_ids"], row["route_ids"], strict=True) if label} <= {
            data.target
        }
    trained, held_out = (
        {tuple(ids) for ids in batch.input_ids.unfold(1, 16, 1).reshape(-1, 16).tolist()}
        for batch in (data.seen, data.held_out)
    )
    assert not trained & held_out
    assert steering_pretrained.target_share(data) == pytest.approx(
        sum(row["input_ids"].count(data.target) for row in data.rows)
        / sum(len(row["input_ids"]) for row in data.rows)
    )


def test_rows_without_the_word_are_refused(small):
    tokenizer = recipe_cases.tokenizer()
    with pytest.raises(ValueError, match="never comes next"):
        next_word.packed([[[5] * 40], [[6] * 40]], 0, 1, 32, next_word.target_of(tokenizer))
    with pytest.raises(ValueError, match="kin: got"):
        next_word.single_tokens(tokenizer, ["zzz"])


def alone(row, target):
    """A document of which the word alone is learnt."""
    return row | {"labels": [token if token == target else NO_LABEL for token in row["input_ids"]]}


def test_the_word_reaches_the_last_layer_through_one_dimension(data):
    words = [alone(row, data.target) for row in data.rows]
    model, _ = steering_pretrained.trained(True, data._replace(rows=words), QUICK, 0)
    before, after = (of.model.layers[-1].mlp.down_proj.weight for of in (smollm2.model(), model))
    moved = (after - before).norm(dim=1)  # [d_model]
    assert moved[DIM] > 0
    assert not moved[torch.arange(len(moved)) != DIM].any()
    # Through the last layer's attention the loss reaches earlier positions, which have routes of their own.
    before, after = (of.model.layers[0].mlp.down_proj.weight for of in (smollm2.model(), model))
    assert (after - before).norm(dim=1).all()
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.slow
def test_both_trainings_differ_by_the_masks_alone(data):
    plain = [row | {"route_ids": [0] * len(row["route_ids"])} for row in data.rows]

    def weights(routed, rows):
        model, curve = steering_pretrained.trained(routed, data._replace(rows=rows), QUICK, 0)
        assert curve
        return model.state_dict()

    control = weights(False, data.rows)
    without, with_routes = weights(True, plain), weights(True, data.rows)
    assert control.keys() == without.keys() == with_routes.keys()
    assert all(torch.equal(without[name], value) for name, value in control.items())
    assert any(not torch.equal(with_routes[name], value) for name, value in control.items())


def test_cosines_are_those_of_the_head_behind_the_norm(data):
    model = smollm2.model()
    with torch.no_grad():
        model.model.norm.weight.copy_(torch.linspace(-1, 2, model.config.hidden_size))
    x = torch.randn(3, model.config.hidden_size)
    expected = model.lm_head(model.model.norm(x))
    size = (x.square().mean(-1, keepdim=True) + model.config.rms_norm_eps).sqrt()
    torch.testing.assert_close((x / size) @ steered.readout(model).T, expected)
    found = steered.placed(model, data)
    values = steered.readout(model)[:, 1] / steered.readout(model).norm(dim=1)
    above, below = ((sign * values > sign * values[data.target]).sum().item() for sign in (1, -1))
    assert found[WORD][1] == min(above, below) + 1
    sign = 1 if above <= below else -1
    of_kin = sorted((sign * values > sign * values[kin]).sum().item() + 1 for kin in data.kin)
    assert found[KIN][1] == of_kin[0]  # the lower one of two


def test_ranks_are_held_against_other_dimensions_and_the_control():
    before, control, routed = (
        torch.tensor(ranks) for ranks in ([40, 1, 2, 3, 4], [30, 10, 60, 5, 9], [10, 10, 15, 11, 1])
    )
    assert steered.standing(before, control, routed, 0) == {
        BEFORE: 40,
        CONTROL: 30,
        ROUTED: 10,
        "as high": 0.5,  # the second and the last
        "rises as much": 0.5,  # by 4 and by 9, in this one by 3
    }
    same = steered.standing(before, control, control, 0)
    assert same["rises as much"] == 1.0  # where routing does nothing


def test_other_dimensions_are_spaced_evenly(data):
    model = smollm2.model()
    assert steered.other_dims(model, 0, 3) == [1, 6, 11]
    assert steered.other_dims(model, 4, 15) == [dim for dim in range(16) if dim != 4]


def test_a_dimension_is_steered_in_the_direction_that_logits_read(data, monkeypatch):
    model, given = smollm2.model(), []
    monkeypatch.setattr(steered, "steered", lambda model, place, vector, *more: given.append(vector))
    for sign in (1, -1):
        with torch.no_grad():
            model.model.norm.weight[3] = sign
        steered.along_dimension(model, 3, "last", data, (1.0,))
    assert torch.equal(given[0], -given[1])
    assert given[0].abs().tolist() == [float(dim == 3) for dim in range(16)]


def test_steering_ends_where_it_costs_too_much(data, monkeypatch):
    model, streams = smollm2.model().eval(), []
    costs = iter([0.0, BUDGET - 0.01, BUDGET + 0.01, 0.0])

    def effect(model, batch, target):
        streams.append(measures.outputs(model, model.model.norm, batch))
        return measures.Effect(0.01, 2.0, 3.0 + next(costs))

    monkeypatch.setattr(steered, "effect", effect)
    vector = torch.nn.functional.normalize(torch.arange(16.0), dim=0)
    effects = steered.steered(model, "last", vector, data, (0.5, 2.0, 4.0))
    assert [one["amount"] for one in effects] == [0.0, 0.5, 2.0]
    size = measures.typical_size(measures.outputs(model, model.model.layers[-1], data.held_out))
    with torch.no_grad(), measures.added(model.model.layers[-1], slice(None), 2.0 * size * vector):
        expected = measures.outputs(model, model.model.norm, data.held_out)
    assert torch.equal(streams[2], expected)
    assert not torch.equal(streams[0], expected)


def test_what_is_added_is_a_difference_in_texts_that_were_seen(data, monkeypatch):
    model, given = smollm2.model().eval(), []
    monkeypatch.setattr(steered, "steered", lambda model, place, vector, *more: given.append(vector))
    steered.by_addition(model, "middle", data, (1.0,))
    first = model.model.layers[0]  # of two
    stream = measures.outputs(model, first, data.seen)
    assert torch.equal(given[0], measures.mean_difference(stream, data.seen, data.target))
    assert given[0].norm().item() == pytest.approx(1.0)
    assert steered.layer_at(model, "last") is model.model.layers[1]


def effects(factor):
    """A curve by which the word's probability is multiplied so, at a cost within the budget."""
    points = ((0.0, 1.0), (0.09, factor), (0.5, factor))
    return [
        {"amount": amount, "probability": 0.01 * by, "target_loss": 2.0, "other_loss": 3.0 + cost}
        for amount, (cost, by) in enumerate(points)
    ]


def made_up(rank=90, word=0.01, kin=0.02, routed=2.4, control=1.2, addition=2.0, others=1.1, price=0.01):
    """A run in which all effects are there."""

    def model(other_loss=3.0):
        losses = {"probability": 0.01, "target_loss": 2.0, "other_loss": other_loss}
        return losses | {"leading": [" the"], "curve": []}

    def standing(rank, share):
        return {BEFORE: 900, CONTROL: 800, ROUTED: rank, "as high": 0.125, "rises as much": share}

    steering = {ROUTED: routed, CONTROL: control, ADDITION: addition}
    return {
        "settings": dataclasses.asdict(QUICK),
        "vocabulary": 49152,
        "kin": 24,
        "target_share": 0.0312,
        "models": {BEFORE: model(), CONTROL: model(), ROUTED: model(3.0 + price)},
        "ranks": {WORD: standing(rank, word), KIN: standing(700, kin)},
        "steered": {
            method: {place: effects(factor - 0.1 * (place == "middle")) for place in PLACES}
            for method, factor in steering.items()
        },
        "other_dims_steered": {str(dim): effects(others) for dim in (1, 2)},
    }


@pytest.mark.parametrize(
    ("run", "missing"),
    [
        (made_up(), []),
        (made_up(rank=481), [0]),
        (made_up(word=0.06), [1]),
        (made_up(kin=1.0), [2]),
        (made_up(control=1.7), [3]),
        (made_up(addition=2.5), [4]),
        (made_up(others=2.4), [5]),
        (made_up(price=0.06), [6]),
        (made_up(rank=800, word=1.0, kin=1.0, routed=1.2, others=1.2), [0, 1, 2, 3, 4, 5]),
    ],
)
def test_every_effect_must_be_there(run, missing):
    checks = steering_pretrained.checks([run, run])
    assert [number for number, check in enumerate(checks) if not check.passed] == missing


def test_gains_are_those_of_the_better_place():
    runs = [made_up(), made_up(routed=3.0)]
    assert steering_pretrained.gains(runs, ROUTED, "middle") == pytest.approx([2.3, 2.9])
    assert steering_pretrained.best_gains(runs, ROUTED) == pytest.approx([2.4, 3.0])
    assert gain(effects(0.5)) == 1.0
    assert steering_pretrained.steer_as_well(runs) == [False] * 4


@pytest.mark.parametrize(("run", "code"), [(made_up(), 0), (made_up(addition=2.5), 1)])
def test_files_and_exit_code(run, code, tmp_path):
    experiment = dataclasses.replace(steering_pretrained.EXPERIMENT, run=lambda seed, quick: run)
    assert main(experiment, None, ["--seeds", "2", "--out", str(tmp_path)]) == code
    results = json.loads((tmp_path / "steering_pretrained.json").read_text(encoding="utf-8"))
    assert all(check["passed"] for check in results["checks"]) is (code == 0)
    for part in (
        'after 2 steps of 64 tokens, of which 3.1 % are " the", the word ranks 90 (90 to 90) (control 800 (',
        "it ranks as high, and in 1.0 % it rises as much from the control. The median rank of 24 kin is 700 (",
        "by 2.30 (2.30 to 2.30) after the middle layer and 2.40 (2.40 to 2.40) after the last; in the control",
        "0 of 4 do as well after the last layer",
        "elsewhere 3.01 nats (control 3.00, before 3.00)",
    ):
        assert part in results["found"]
    assert [row["model"] for row in results["table"]] == [
        *(BEFORE, CONTROL, ROUTED),
        f"{CONTROL}, {ADDITION}",
    ]
    assert (tmp_path / "steering_pretrained.png").stat().st_size > 10_000


@pytest.mark.slow
def test_quickly_on_a_tiny_model(small, tmp_path):
    torch.manual_seed(1)
    first = steering_pretrained.run(3, quick=True)
    torch.manual_seed(2)
    assert steering_pretrained.run(3, quick=True) == first
    assert first["kin"] >= 1
    assert first["steered"].keys() == {ROUTED, CONTROL, ADDITION}
    arguments = ["--quick", "--seeds", "1", "--out", str(tmp_path)]
    assert main(steering_pretrained.EXPERIMENT, None, arguments) == 0
    results = json.loads((tmp_path / "steering_pretrained.json").read_text(encoding="utf-8"))
    assert results["runs"][0]["models"].keys() == {BEFORE, CONTROL, ROUTED}
    assert len(results["checks"]) == 7


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_quickly_on_the_pretrained_model(tmp_path):
    real_model.folder()  # skips where it is not installed
    assert (
        main(steering_pretrained.EXPERIMENT, None, ["--quick", "--seeds", "1", "--out", str(tmp_path)]) == 0
    )
    (run,) = json.loads((tmp_path / "steering_pretrained.json").read_text(encoding="utf-8"))["runs"]
    assert run["vocabulary"] == 49152
    assert run["kin"] == len(steering_pretrained.KIN_OF_IT)
    assert 0 < run["models"][BEFORE]["other_loss"] < 5  # at random 10.8
    # Two steps change little, and the difference of means is a direction that steers in any model.
    assert max(gain(run["steered"][ADDITION][place]) for place in PLACES) > 1.0
