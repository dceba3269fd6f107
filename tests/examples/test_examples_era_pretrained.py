"""ERA on a pretrained model: what is counted of the recipe's figures, and when the experiment fails."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import real_model
import recipe_cases

pytest.importorskip("transformers")
pytest.importorskip("datasets")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import era_pretrained
from era_pretrained import BASELINES, PARTLY, PLANS, PUBLISHED, STRONG
from experiment import main
from pretrained import runs


def outcome(rise, price=0.05, kept=0.5):
    """What a method did, of whose rise an attack leaves a share."""
    changes = {"licences": rise, "manuals": price, "code": price}
    attack = [{"step": 0, "loss": 2.0 + rise}, {"step": 6, "loss": 2.0 + rise * kept}]
    return {"losses": {}, "changes": changes, "errors": {}, "attack": attack}


def made_up(ours=1.0, published=0.1, ascent=0.6, price=0.05):
    plans = {plan: outcome(published) for plan in PLANS} | {STRONG: outcome(ours, price)}
    return {
        "plans": plans,
        "partly": {plan: {"0.5": outcome(ours / 2), "0.1": outcome(0.0)} for plan in PARTLY},
        "base": {"licences": 2.0, "manuals": 2.0, "code": 2.0},
        "baselines": {name: outcome(ascent) for name in BASELINES},
    }


def test_figures_are_those_of_the_recipe():
    losses = {name: {"loss": 1.0, "standard_error": 0.1} for name in ("licences", "manuals", "code")}
    changes = {
        name: {"change": value, "standard_error": 0.1}
        for name, value in (("licences", 0.8), ("manuals", 0.1), ("code", 0.3))
    }
    attack = [{"step": step, "loss": {"licences": value}} for step, value in ((0, 3.0), (6, 2.5))]
    made = {
        "losses": {"coherent": losses},
        "changes": {"coherent": changes},
        "curves": {"relearning": {"coherent": attack}},
    }
    found = era_pretrained.outcome(made, "coherent")
    assert era_pretrained.rise(found) == 0.8
    assert era_pretrained.price(found) == pytest.approx(0.2)
    assert era_pretrained.left(found) == pytest.approx(0.3)


def test_the_best_plan_is_one_that_costs_about_as_much():
    assert era_pretrained.best([made_up()]) == STRONG
    assert era_pretrained.best([made_up(price=0.3)]) != STRONG


@pytest.mark.parametrize(
    ("run", "code"),
    [(made_up(), 0), (made_up(ours=0.2), 1), (made_up(ascent=2.5), 1), (made_up(price=0.3), 1)],
    ids=["better", "no better", "worse than ascent", "too dear"],
)
def test_files_and_exit_code(run, code, tmp_path):
    experiment = dataclasses.replace(era_pretrained.EXPERIMENT, run=lambda seed, quick: run)
    assert main(experiment, None, ["--out", str(tmp_path)]) == code
    results = json.loads((tmp_path / "era_pretrained.json").read_text(encoding="utf-8"))
    assert all(check["passed"] for check in results["checks"]) is (code == 0)
    assert f"the published recipe ({PUBLISHED}) changes losses by +0.10 nats on licences" in results["found"]
    assert (tmp_path / "era_pretrained.png").stat().st_size > 10_000


def test_a_run_that_was_made_is_not_made_again(tmp_path, monkeypatch):
    made, parts = [], ("losses", "changes", "curves", "generations")

    def run(recipe, config, folder, *, settings):
        made.append(settings)
        (folder / "stages").mkdir(parents=True)
        (folder / "report.json").write_text(json.dumps({part: {} for part in parts}))

    monkeypatch.setattr(runs, "run", run)
    monkeypatch.setattr(runs, "load", lambda config, settings: settings)
    monkeypatch.setattr(runs, "to_yaml", lambda settings: " ".join(settings))
    for settings in (["seed=0"], ["seed=0"], ["seed=1"]):
        assert runs.figures("unlearn", settings, tmp_path / "run")["config"] == settings[0]
        assert [file.name for file in tmp_path.glob("**/*") if file.is_file()] == ["figures.json"]
    assert made == [["seed=0"], ["seed=1"]]


@pytest.mark.slow
def test_quickly_on_a_tiny_model(tmp_path, monkeypatch):
    recipe_cases.save_model(tmp_path / "model", num_hidden_layers=8)
    sources = {}
    for name, kind in (("licences", "forget"), ("manuals", "retain"), ("code", "retain")):
        path = tmp_path / f"{name}.txt"
        path.write_text("\n\n".join(recipe_cases.texts(kind, 40, seed=name)))
        sources[name] = {"path": str(path), "split": "blank_lines"}
    config = {
        "model": {"path": str(tmp_path / "model"), "device": "cpu"},
        "data": {"sources": sources, "heldout": 0.25, "length": 32},
        "labels": {"routes": {"licences": "forget", "*": "retain"}},
        "train": {"precision": "fp32", "arguments": {"disable_tqdm": True}},
        "baselines": {"names": list(BASELINES)},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(runs, "CONFIG", str(tmp_path / "config.json"))
    check_quick_run(tmp_path, monkeypatch)


def check_quick_run(folder, monkeypatch):
    """A quick run has all figures that whole ones have, and is not made again."""
    monkeypatch.setattr(era_pretrained, "QUICK_FOLDER", folder / "runs")
    arguments = ["--quick", "--seeds", "1", "--out", str(folder)]
    assert main(era_pretrained.EXPERIMENT, None, arguments) == 0
    first = json.loads((folder / "era_pretrained.json").read_text(encoding="utf-8"))
    assert first["runs"][0]["plans"].keys() == {PUBLISHED, STRONG}
    assert first["runs"][0]["baselines"].keys() == set(BASELINES)
    monkeypatch.setattr(runs, "run", lambda *args, **options: pytest.fail("a run was made again"))
    assert main(era_pretrained.EXPERIMENT, None, arguments) == 0
    assert json.loads((folder / "era_pretrained.json").read_text(encoding="utf-8"))["runs"] == first["runs"]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_quickly_on_the_pretrained_model(tmp_path, monkeypatch):
    real_model.folder()  # skips where it is not installed
    check_quick_run(tmp_path, monkeypatch)
