"""The stages evaluate and report, and the command compare, on two tiny checkpoints."""

import json

import pytest
import torch

pytest.importorskip("datasets")
pytest.importorskip("transformers")

import datasets
import tiny_models as tiny
from test_recipes_evaluation import Words, rows_of

from gradroute.recipes import compare, evaluation, models
from gradroute.recipes.config import ConfigError, load
from gradroute.recipes.evaluation import stage as evaluating
from gradroute.recipes.report import stage as reporting
from gradroute.recipes.stages import Context, Made


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Base and ablated checkpoints, and held-out documents."""
    monkeypatch.setattr(models, "load_tokenizer", lambda path: Words())
    monkeypatch.setattr(models, "tokenizer_of", lambda settings: Words())
    torch.manual_seed(0)
    model = tiny.llama()
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.neg_()
    model.save_pretrained(tmp_path / "ablate" / "model")
    rows = rows_of([12, 14, 9, 16])
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "labels" / "heldout")
    (tmp_path / "texts.txt").write_text("w3 w4 w5 w9")
    return tmp_path, rows


def config_of(path, **evaluate):
    sources = {name: {"path": str(path / "texts.txt")} for name in ("retain", "forget")}
    settings = {"prompt_tokens": 4, "new_tokens": 3, "prompts_each": 1, "top": 3, **evaluate}
    return load(
        {
            "model": {"path": str(path / "base"), "device": "cpu"},
            "data": {"sources": sources},
            "evaluate": settings,
        }
    )


def test_a_run_is_evaluated_and_reported(folders):
    path, rows = folders
    inputs = {name: Made(path / name, {}) for name in ("labels", "ablate")}
    for name in ("evaluate", "report"):
        (path / name).mkdir()
    config = config_of(path, prompts=["w3 w4"])
    figures = evaluating.STAGE.run(Context("unlearn", "evaluate", config, path / "evaluate", inputs, path))
    for name, folder in (("base", "base"), ("unlearnt", "ablate/model")):
        assert figures["losses"][name] == evaluation.losses(models.load(path / folder, device="cpu"), rows)
    change = figures["changes"]["unlearnt"]["forget"]["change"]
    losses = [figures["losses"][name]["forget"]["loss"] for name in ("base", "unlearnt")]
    assert change == pytest.approx(losses[1] - losses[0], rel=1e-6)
    assert set(figures["route_losses"]["base"]) == {
        "retain",
        "forget",
    }  # the tokens of a document differ in route
    assert [entry.get("source") for entry in figures["generations"]] == [None, "retain", "forget"]
    assert set(figures["generations"][0]["completions"]) == {"base", "unlearnt"}
    assert figures["differences"]["weights"]["change"][-1][1] == 0
    inputs["evaluate"] = Made(path / "evaluate", figures)
    out = path / "out"
    reporting.STAGE.run(Context("unlearn", "report", config, path / "report", inputs, out))
    written = json.loads((out / "report.json").read_text())
    assert written["losses"] == figures["losses"]
    assert "0" in written["missing"]["relearning"]
    assert (out / "report.html").read_text() == (path / "report" / "report.html").read_text()


def test_tasks_are_refused_before_anything_is_loaded(folders, monkeypatch):
    monkeypatch.setattr(evaluating, "harness_unavailable", lambda: "lm_eval is not installed")
    config = config_of(folders[0], tasks=["mmlu"])
    with pytest.raises(
        ConfigError, match=r"evaluate.tasks: got \['mmlu'\], expected none, because lm_eval is not"
    ):
        evaluating.STAGE.check(config)


def test_compare_writes_a_page_and_prints_the_difference(folders, capsys):
    path, _ = folders
    data = path / "held.jsonl"
    data.write_text("".join(json.dumps({"text": f"w{n} w{n + 3} w7 w9"}) + "\n" for n in range(1, 6)))
    datasets.Dataset.from_json(str(data), cache_dir=str(path / "cache")).to_parquet(path / "held.parquet")
    words = [
        str(path / "base"),
        str(path / "ablate" / "model"),
        "--data",
        f"forget={data}",
        "--data",
        f"parquet={path / 'held.parquet'}",
        "--out",
        str(path / "page"),
    ]
    assert compare.main([*words, "--device", "cpu"]) == 0
    written = json.loads((path / "page" / "report.json").read_text())
    found = written["differences"]["sources"]["forget"]
    assert (found["tokens"], found["documents"]) == (15, 5)
    of_parquet = written["differences"]["sources"]["parquet"]
    assert {name: of_parquet[name] for name in ("tokens", "documents")} == {"tokens": 15, "documents": 5}
    assert of_parquet["difference"] == pytest.approx(found["difference"])  # summed beside other documents
    assert f"{found['difference']:+.4f}" in capsys.readouterr().out
    assert compare.main([*words, "--data", str(path / "none.txt"), "--device", "cpu"]) == 2
    assert "expected JSONL, Parquet or text" in capsys.readouterr().err
