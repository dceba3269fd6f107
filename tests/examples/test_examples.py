"""The harness of the experiments, on a made-up one: what it leaves, when it fails; and the page of its paragraphs."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import experiment
import report

EXAMPLES = Path(__file__).parents[2] / "examples"


def made_up(got=2.0, **options):
    return experiment.Experiment(
        name="made_up",
        title="Made up",
        paper="The paper found 3 (section 0).",
        run=lambda seed, quick: {"value": got + seed, "quick": quick},
        table=lambda runs: [{"seed": str(i), "value": f"{run['value']:.1f}"} for i, run in enumerate(runs)],
        checks=lambda runs: [
            experiment.Check("the value", experiment.median([r["value"] for r in runs]), 2.5)
        ],
        found=lambda runs: f"The values are {experiment.spread([run['value'] for run in runs])}.",
        plot=lambda runs, figure: figure.subplots().plot([run["value"] for run in runs]),
        **options,
    )


def test_what_a_run_leaves(tmp_path, capsys):
    assert experiment.main(made_up(), "Words.\nMore.", ["--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "made_up.json").read_text())
    assert [run["value"] for run in results["runs"]] == [2.0, 3.0, 4.0]
    assert results["command"] == "python examples/made_up.py"
    assert results["checks"][0]["got"] == 3.0
    assert results["checks"][0]["passed"]
    assert results["found"] == "The values are 3.00 (2.00 to 4.00)."
    assert results["environment"]["packages"]["torch"]
    table = (tmp_path / "made_up.md").read_text()
    assert "| seed | value |" in table
    assert "| 2 | 4.0 |" in table
    assert "holds: the value: 3 (≥ 2.5)" in table
    assert (tmp_path / "made_up.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "The values are 3.00" in printed
    assert "holds" in printed


def test_a_stopped_run_goes_on_with_the_next_seed(tmp_path, capsys):
    """And without being asked to, it begins anew."""
    ran = []

    def run(seed, quick, last):
        if seed == last:
            raise KeyboardInterrupt
        ran.append(seed)
        return {"value": 2.0 + seed, "quick": quick}

    def start(last, *arguments):
        of_run = dataclasses.replace(made_up(), run=lambda seed, quick: run(seed, quick, last))
        return experiment.main(of_run, None, ["--out", str(tmp_path), *arguments])

    with pytest.raises(KeyboardInterrupt):
        start(2)
    with pytest.raises(KeyboardInterrupt):
        start(1)
    assert ran == [0, 1, 0]
    assert start(None, "--resume") == 0
    assert ran == [0, 1, 0, 2]  # seed 1 was done the first time
    assert "seed 1 was run before" in capsys.readouterr().out
    assert not list(tmp_path.glob(".made_up*"))
    assert [one["value"] for one in json.loads((tmp_path / "made_up.json").read_text())["runs"]] == [2, 3, 4]


def test_a_failing_check_is_exit_code_1(tmp_path, capsys):
    assert experiment.main(made_up(1.0), None, ["--out", str(tmp_path), "--seeds", "1"]) == 1
    assert "FAILS" in capsys.readouterr().out
    results = json.loads((tmp_path / "made_up.json").read_text())
    assert not results["checks"][0]["passed"]
    assert results["command"].endswith("--seeds 1")
    quick = ["--out", str(tmp_path), "--quick"]
    assert experiment.main(made_up(1.0), None, quick) == 0  # nothing is claimed of a quick run
    assert json.loads((tmp_path / "made_up.json").read_text())["runs"][0]["quick"]


@pytest.mark.parametrize(
    ("got", "limit", "at_least", "passed"),
    [
        (1.0, 1.0, True, True),
        (0.9, 1.0, True, False),
        (0.9, 1.0, False, True),
        (1.1, 1.0, False, False),
        (float("nan"), 1.0, True, False),
        (float("nan"), 1.0, False, False),
    ],
)
def test_checks(got, limit, at_least, passed):
    assert experiment.Check("it", got, limit, at_least).passed is passed


def test_rows_of_other_columns_are_refused(tmp_path):
    strange = dataclasses.replace(made_up(), table=lambda runs: [{"a": "1"}, {"b": "2"}])
    with pytest.raises(ValueError, match=r"made_up.table: got rows of different columns"):
        experiment.main(strange, None, ["--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        experiment.main(made_up(), None, ["--seeds", "0"])


def test_the_page(tmp_path):
    experiment.main(made_up(1.0), None, ["--out", str(tmp_path)])
    result = json.loads((tmp_path / "made_up.json").read_text())
    page = f"before\n{report.BEGIN}\nstale\n{report.END}\nafter\n"
    new = report.with_experiments(page, [result], "../results")
    assert new.startswith("before\n")
    assert new.endswith("after\n")
    assert "stale" not in new
    assert "\n## Made up\n\n`python examples/made_up.py`: 3 seeds" in new
    assert "0 of 1 checks hold." in new
    assert "*In the paper*: The paper found 3 (section 0)." in new
    assert "The values are 2.00" in new
    assert "![Made up](../results/made_up.png)" in new
    assert report.with_experiments(new, [result], "../results") == new
    with pytest.raises(ValueError, match=r"page: got one without the lines"):
        report.with_experiments("nothing", [result], "results")


def test_quick_results_are_no_results(tmp_path):
    names = report.EXPERIMENTS.experiments
    for name in names:
        (tmp_path / f"{name}.json").write_text(json.dumps({"name": name, "quick": name == "oversight"}))
    with pytest.raises(ValueError, match="got quick runs of oversight, expected whole ones"):
        report.load(tmp_path, names)


def test_a_page_has_what_has_been_run(tmp_path):
    (tmp_path / "second.json").write_text(json.dumps({"name": "second", "quick": False}))
    assert [result["name"] for result in report.load(tmp_path, ("first", "second"))] == ["second"]
    for file in report.RESULTS.glob("[a-z]*.json"):
        assert file.stem in report.EXPERIMENTS.experiments + report.EVIDENCE.experiments


@pytest.mark.parametrize("page", [report.EXPERIMENTS, report.EVIDENCE], ids=["experiments", "evidence"])
def test_the_page_says_what_the_results_say(page):
    """And the results are of whole runs, whose files agree."""
    assert page.made() == page.path.read_text(encoding="utf-8")
    for result in report.load(report.RESULTS, page.experiments):
        name = result["name"]
        table = (report.RESULTS / f"{name}.md").read_text(encoding="utf-8")
        assert table == experiment.markdown(result)
        assert (report.RESULTS / f"{name}.png").exists()
