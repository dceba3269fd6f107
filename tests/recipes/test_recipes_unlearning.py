"""The parts of the recipe unlearn, called without the engine: batches, training, ablation, baselines, the attack."""

import dataclasses

import pytest
import torch

pytest.importorskip("datasets")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import datasets
import transformers
import unlearning_cases as cases

from gradroute.recipes import baselines, evaluation, models, plans, relearning, selection, unlearn
from gradroute.recipes.batches import Batches, GroupCollator
from gradroute.recipes.reading import ConfigError
from gradroute.recipes.training import train
from gradroute.recipes.training_sections import RMU, Ablate, Expand, GradientAscent, Route, Train

SETTINGS = Train(
    steps=30,
    batch_tokens=224,
    learning_rate=2e-2,
    precision="fp32",
    save_every=0,
    log_every=10,
    arguments={"disable_tqdm": True},
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a model that knows nothing, and one that has learnt both kinds of documents."""
    made = tmp_path_factory.mktemp("unlearning")
    cases.save_model(made / "base")
    model = models.load(made / "base", device="cpu")
    train(model, cases.documents(40), SETTINGS, made / "training", save_to=made / "both")
    return made


def held_out(model):
    """The held-out loss of each kind."""
    found = evaluation.losses(model, cases.documents(10, seed=1))
    return {name: found[name]["loss"] for name in cases.NAMES}


def kind(source):
    return [row for row in cases.documents(40) if row["source"] == source]


@pytest.mark.parametrize("preset", ["era", "sgtm"])
def test_what_was_confined_is_taken_out(folder, tmp_path, preset):
    model = models.load(folder / "base", device="cpu")
    expand = Expand(units=16)
    unlearn.expand(model, expand)
    options = {"joint_head": False, "joint_embedding": False} if preset == "sgtm" else {}
    route = plans.settled(Route(preset=preset, **options), expand, "unlearn")
    unlearn.route(model, route, cases.NAMES)
    figures = train(model, cases.documents(40), SETTINGS, tmp_path / "t", save_to=tmp_path / "trained")
    assert figures["steps"] == 30
    assert [point["step"] for point in figures["curve"]] == [10, 20, 30]
    trained = models.load(tmp_path / "trained", device="cpu")
    assert trained.config.intermediate_size == 40
    before = held_out(trained)
    unlearn.ablate(trained, route, cases.NAMES, Ablate(), contract=True)
    after = held_out(trained)
    assert trained.config.intermediate_size == 24
    assert after["forget"] - before["forget"] > 0.3
    assert after["forget"] - before["forget"] > 2 * (after["retain"] - before["retain"])
    assert after["retain"] < 2.0  # of ln 16 = 2.77 nats for a model that knows the kind alone


@pytest.mark.parametrize("states", ["same", "bfloat16", "8bit"])
def test_a_training_that_was_stopped_goes_on_to_the_same_weights(folder, tmp_path, states):
    if states == "8bit":
        pytest.importorskip("torchao")
    settings = dataclasses.replace(SETTINGS, steps=6, log_every=1, save_every=2, states=states)

    def fit(name, callbacks=()):
        model = models.load(folder / "base", device="cpu")
        unlearn.expand(model, Expand(units=8))
        unlearn.route(model, plans.settled(Route(), Expand(units=8), "unlearn"), cases.NAMES)
        return model, train(model, cases.documents(40), settings, tmp_path / name, callbacks=callbacks)

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise KeyboardInterrupt

    whole, figures = fit("whole")
    with pytest.raises(KeyboardInterrupt):
        fit("stopped", [Stop()])
    (tmp_path / "stopped" / "checkpoint-6").mkdir()  # one that a crash cut off is not gone on from
    resumed, again = fit("stopped")
    assert figures == again
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_training_of_one_step_trains(folder, tmp_path):
    model = models.load(folder / "base", device="cpu")
    before = [parameter.clone() for parameter in model.parameters()]
    train(model, cases.documents(4), dataclasses.replace(SETTINGS, steps=1, log_every=1), tmp_path)
    assert not all(map(torch.equal, before, model.parameters()))


def test_filtering_never_learns_what_it_never_sees(folder, tmp_path):
    model = models.load(folder / "base", device="cpu")
    retain = selection.retained(cases.documents(40), (), "baselines.retain")
    assert {row["source"] for row in retain} == {"retain"}
    baselines.filtering(model, retain, SETTINGS, tmp_path)
    losses = held_out(model)
    assert losses["forget"] > losses["retain"] + 1.5


def test_gradient_ascent_forgets(folder, tmp_path):
    model = models.load(folder / "both", device="cpu")
    before = held_out(model)
    options = GradientAscent(steps=8, learning_rate=3e-3)
    figures = baselines.gradient_ascent(model, kind("forget"), kind("retain"), SETTINGS, options, tmp_path)
    after = held_out(model)
    assert figures["steps"] == 8
    assert after["forget"] > before["forget"] + 0.2
    assert after["retain"] < before["retain"] + 0.1


def test_gradient_ascent_ends_where_it_is_told_to(folder, tmp_path):
    """A batch whose forget loss is beyond the limit adds no gradient, so without a retain loss nothing moves."""
    model = models.load(folder / "both", device="cpu")
    before = [parameter.clone() for parameter in model.parameters()]
    options = GradientAscent(steps=2, retain_weight=0.0, most=1e-3)
    baselines.gradient_ascent(model, kind("forget"), kind("retain"), SETTINGS, options, tmp_path)
    assert all(map(torch.equal, before, model.parameters()))


def test_rmu_steers_what_is_forgotten_and_keeps_the_rest(folder, tmp_path):
    model = models.load(folder / "both", device="cpu")
    states = {name: parameter.clone() for name, parameter in model.named_parameters()}
    hidden = {source: _hidden(model, source) for source in cases.NAMES}
    options = RMU(steps=20, learning_rate=2e-2, layer=1, retain_weight=10.0)
    figures = baselines.rmu(model, kind("forget"), kind("retain"), SETTINGS, options, tmp_path)
    moved = {source: (_hidden(model, source) - hidden[source]).norm(dim=-1).mean() for source in cases.NAMES}
    changed = {
        name for name, parameter in model.named_parameters() if not torch.equal(parameter, states[name])
    }
    assert figures["layer"] == 1
    assert figures["coefficient"] > 0
    assert changed == {f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1)}
    assert moved["forget"] > 3 * moved["retain"]
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(
        "Misdirection" in hook.__qualname__ for hook in model.model.layers[1]._forward_hooks.values()
    )
    with pytest.raises(ValueError, match="layer: got 2, expected one of a model of 2 layers"):
        baselines.rmu(model, kind("forget"), kind("retain"), SETTINGS, RMU(layer=2), tmp_path)


@torch.no_grad()
def _hidden(model, source):
    rows = [row["input_ids"] for row in cases.documents(10, seed=1) if row["source"] == source]
    return model(torch.tensor(rows), output_hidden_states=True).hidden_states[2]


def test_the_attack_relearns_and_its_curve_says_so(folder, tmp_path):
    model = models.load(folder / "base", device="cpu")
    baselines.filtering(model, kind("retain"), SETTINGS, tmp_path)
    rows = selection.drawn(selection.forgotten(cases.documents(40), (), "relearning.sources"), 8, seed=0)
    assert len(rows) == 8
    assert {row["source"] for row in rows} == {"forget"}
    measure = relearning.held_out_losses(cases.documents(10, seed=1), 512)
    settings = dataclasses.replace(SETTINGS, steps=5)
    curve = relearning.relearn(model, rows, settings, tmp_path, measure=measure, every=2)
    assert [point["step"] for point in curve] == [0, 2, 4, 5]
    assert [point["tokens"] for point in curve] == [0, 224, 448, 560]  # 8 documents of 14 tokens a step
    assert curve[-1]["loss"]["forget"] < curve[0]["loss"]["forget"] - 0.5
    assert curve[-1]["loss"] == held_out(model)


@pytest.mark.parametrize("kind_of_rows", ["list", "dataset"])
def test_batches_are_whole_documents_of_bounded_size(kind_of_rows):
    rows = [{"input_ids": list(range(n)), "route_ids": [n % 2] * n, "source": "a"} for n in range(1, 40)]
    rows = rows if kind_of_rows == "list" else datasets.Dataset.from_list(rows)
    made = Batches(rows, tokens=32, count=60, seed=0)
    sizes = [sum(piece.end - piece.start for piece in group) for group in made.groups]
    assert len(made) == 60
    assert max(sizes) <= 32
    assert made.tokens == sum(sizes)
    first_epoch = [piece for group in made.groups[:30] for piece in group]
    seen = {(piece.row, piece.start, piece.end) for piece in first_epoch}
    assert (0, 0, 1) not in seen  # one token predicts nothing
    assert {(38, 0, 32), (38, 32, 39)} <= seen
    assert Batches(rows, tokens=32, count=60, seed=0).groups == made.groups
    assert Batches(rows, tokens=32, count=60, seed=1).groups != made.groups
    padded = Batches(rows, tokens=32, count=60, seed=0, packed=False)
    for group in padded.groups:
        assert len(group) == 1 or len(group) * max(piece.end - piece.start for piece in group) <= 32
    documents = made[0]["documents"]
    batch = GroupCollator(packed=True)([made[0]])
    assert batch["input_ids"][0].tolist() == [token for one in documents for token in one["input_ids"]]
    assert batch["route_ids"][0].tolist() == [route for one in documents for route in one["route_ids"]]
    assert "route_ids" not in GroupCollator(packed=True, routed=False)([made[0]])


def test_documents_without_two_tokens_are_no_training():
    with pytest.raises(ValueError, match="rows: got 2 documents, expected at least one of two tokens"):
        Batches([{"input_ids": [1]}, {"input_ids": []}], tokens=8, count=1, seed=0)


def test_what_no_document_is_of_is_refused_by_its_key():
    rows = kind("forget")
    with pytest.raises(ConfigError, match=r"coherence\.sources: got \[\], expected the sources by name"):
        selection.retained(rows, (), "coherence.sources")
    with pytest.raises(ConfigError, match=r"relearning\.sources: got \['other'\], expected sources with"):
        selection.forgotten(rows, ["other"], "relearning.sources")
    assert len(selection.most_of_each(cases.documents(5), 2)) == 4


def test_arguments_that_are_none_of_transformers_are_refused(folder, tmp_path):
    model = models.load(folder / "base", device="cpu")
    settings = dataclasses.replace(SETTINGS, arguments={"learning_rat": 1})
    with pytest.raises(ConfigError, match=r"train\.arguments\.learning_rat: got 1, expected a name of"):
        train(model, kind("retain"), settings, tmp_path)
    with pytest.raises(ConfigError, match=r"arguments\.learning_rate: got 1, expected it as learning_rate"):
        dataclasses.replace(SETTINGS, arguments={"learning_rate": 1})


@pytest.mark.parametrize(
    ("route", "expand", "words"),
    [
        (Route(), Expand(units=0), r"expand\.units: got 0, expected at least 1 for the preset era"),
        (Route(units=9), Expand(units=8), r"route\.units: got 9, expected at most expand\.units = 8"),
        (Route(), Expand(heads=2), r"expand\.heads: got 2, expected 0 for the preset era"),
        (Route(heads=1), Expand(), r"route\.heads: got 1, expected none, because the preset era"),
        (Route(preset="sgtm"), Expand(units=0), r"route\.units: got 0 units and 0 heads"),
        (Route(preset="steering"), Expand(), r"route\.preset: got 'steering', expected one of era, sgtm"),
    ],
)
def test_plans_that_have_no_part_for_the_texts_are_refused(route, expand, words):
    with pytest.raises(ConfigError, match=words):
        plans.settled(route, expand, "unlearn")


def test_models_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"path: got .*absent', which does not exist, expected a folder"):
        models.load(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"which has no config\.json, expected a folder of save_pretrained"):
        models.load(tmp_path)
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"expected one of its files: a\.gguf, b\.gguf"):
        models.load(tmp_path)
    with pytest.raises(ValueError, match="no package no_such_package is installed"):
        models.load("package:no_such_package")
    (tmp_path / "config.json").touch()
    with pytest.raises(ValueError, match="device: got 'cuda:99', expected a device of this machine"):
        models.load(tmp_path, device="cuda:99")
    with pytest.raises(ValueError, match="dtype: got 'float8', expected one of"):
        models.load(tmp_path, dtype="float8")
