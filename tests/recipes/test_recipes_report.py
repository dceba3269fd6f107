"""The report: figures with units and errors, of whatever there is, in a page that no text can break."""

import json
import math
import re
import xml.etree.ElementTree as ElementTree

import pytest

from gradroute.recipes import report
from gradroute.recipes.report import plots
from gradroute.recipes.report.text import duration, number, visible, with_error

#: Markup, quotes, controls, directions, emoji, a lone surrogate, formats of LaTeX and of templates.
ODD = (
    "</td></table><script>alert(1)</script>\"'&amp;]]>\x00\x1b\x7f\x85\u202egnp\u2066.\ufffe \ud800 👩\u200d🔬 "
    "שלום $x_$ {{ 7 * 7 }} {% raw %} <!-- \r\n\t end"
)


def loss(value, error=0.01):
    return {"loss": value, "standard_error": error, "tokens": 12345, "documents": 40}


STAGES = [
    {
        "name": "data",
        "seconds": 2.0,
        "skipped": True,
        "figures": {
            "sources": {
                "forget": {
                    "train": 9,
                    "train_tokens": 900,
                    "heldout": 1,
                    "heldout_tokens": 101,
                    "left_out": 15,
                }
            }
        },
    },
    {
        "name": "labels",
        "seconds": 1.0,
        "skipped": True,
        "figures": {"train": {"forget": {"retain": 77, "forget": 823}}},
    },
    {"name": "train", "seconds": 75.0, "skipped": False, "figures": {"steps": 20}},
]


def results():
    names = ("base", "trained", "unlearnt", "rmu")
    losses = {name: {"retain": loss(2 + n / 8), "forget": loss(2.5 + n)} for n, name in enumerate(names)}
    change = {"change": 1.25, "standard_error": 0.002, "tokens": 12345, "documents": 40}
    attacks = {
        name: [
            {"step": s, "tokens": 512 * s, "loss": {"forget": 4 - s / part, "retain": 2.0}}
            for s in (0, 10, 20)
        ]
        for name, part in (("unlearnt", 20), ("rmu", 10))
    }
    sources = {
        "before": 2.5,
        "after": 4.5,
        "difference": 2.0,
        "standard_error": 0.05,
        "tokens": 10,
        "documents": 2,
    }
    moved = {"before": 1.0, "after": 4.5, "difference": 3.5}
    return {
        "recipe": "unlearn",
        "config": {"model": {"path": ODD}},
        "command": "python -m gradroute.recipes unlearn",
        "versions": {"torch": "2.13.0"},
        "stages": STAGES,
        "losses": losses,
        "changes": {name: {"retain": change, "forget": change} for name in names[1:]},
        "curves": {
            "train": [{"step": s, "loss": {"retain": 3 / s, "forget": 4 / s}} for s in range(1, 9)],
            "relearning": attacks,
        },
        "generations": [
            {"prompt": ODD, "source": "forget", "text": ODD, "completions": {"base": ODD, "rmu": ODD}}
        ],
        "steering": {
            "losses": {scale: {"forget": loss(3 + float(scale) / 8)} for scale in ("0", "3")},
            "generations": [{"prompt": ODD, "completions": {"0": ODD, "3": ODD}}],
        },
        "differences": {
            "before": "base",
            "after": "unlearnt",
            "sources": {"forget": sources},
            "tokens": [{"token": 3, "text": ODD, "count": 5, "standard_error": 0.1, **moved}],
            "contexts": [
                {
                    "document": 1,
                    "position": 4,
                    "source": "forget",
                    "left": ODD,
                    "text": ODD,
                    "right": ODD,
                    **moved,
                }
            ],
            "documents": [{"document": 1, "source": ODD, "difference": 2.0, "tokens": 9}],
            "texts": [
                {
                    "document": 1,
                    "source": ODD,
                    "tokens": [ODD, "b"],
                    "differences": [3.5, -0.2],
                    "left_out": 7,
                }
            ],
            "histogram": {"edges": [-1, 0, 1], "counts": {"forget": [1, 9]}},
            "positions": {
                "edges": [1, 2, 4],
                "difference": [0.1, 0.2],
                "standard_error": [None, 0.1],
                "tokens": [2, 4],
            },
            "concentration": {"0.01": 0.25},
            "weights": {
                "layers": [0, 1],
                "modules": ["mlp.up_proj"],
                "change": [[0.1, None]],
                "outside": {"lm_head": 0.0},
                "reshaped": [],
                "missing": [],
            },
        },
        "harness": {"base": {"wmdp_bio": {"acc": 0.5, "acc_stderr": 0.02, "samples": 1273}}},
        "plan": {"parameters": {"model_bytes": 2_500_000}},
    }


def parsed(page):
    """The page as XML, which is stricter than HTML: an element that a text had ended would be an error."""
    return ElementTree.fromstring(page.replace("<!DOCTYPE html>", "", 1))


def words(page):
    return re.sub(r"\s+", " ", " ".join(parsed(page).itertext()))


def headings(page):
    return [element.text for element in parsed(page).iter("{http://www.w3.org/1999/xhtml}h2")]


@pytest.fixture(scope="module")
def page():
    pytest.importorskip("matplotlib")
    return report.render(results())


def test_every_part_is_on_the_page_with_its_unit_tokens_and_error(page):
    text = words(page)
    for expected in (
        "Held-out forget loss of unlearnt (after ablation): 4.500 nats a token, +1.250 ± 0.002",
        "retain (nats a token)",
        "2.250 ± 0.010",
        "retain: 12 345 tokens of 40 documents",
        "evaluated without routes",
        "baseline: RMU",
        "unlearnt (after ablation) 4.000 3.000 not in 20",  # steps until the base's loss of 2.5
        "arXiv 2403.03218)) 4.000 2.000 20 2.000",
        "3 3.375 ± 0.010",  # steered
        "wmdp_bio",
        "0.500 ± 0.020",
        "1 273",
        "2.5 MB",
        "1 min 15 s",
        "+3.500 ± 0.100",
        "has 25 % of all that moved",
        "With torch 2.13.0.",
    ):
        assert expected in text
    assert page.count("<svg") == 6  # losses, relearning, training, steering, histogram, weights


def test_no_text_breaks_the_page(page):
    tree = parsed(page)
    name = "{http://www.w3.org/1999/xhtml}"
    assert not tree.findall(f".//{name}script")
    said = [element for element in tree.iter(f"{name}bdi") if element.get("dir") == "auto"]
    assert len(said) == 4 + 3  # a prompt, the document itself, two completions; a prompt and two of steering
    for element in said:
        shown = element.text
        assert "</td></table><script>alert(1)</script>\"'&amp;]]>⟨U+0000⟩⟨U+001B⟩⟨U+007F⟩" in shown
        assert "⟨U+202E⟩gnp⟨U+2066⟩.⟨U+FFFE⟩" in shown
        assert "👩\u200d🔬 שלום $x_$ {{ 7 * 7 }} {% raw %} <!--" in shown
    ids = [element.get("id") for element in tree.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    links = re.findall(r'(?:href="#|url\(#)([^")]+)', page)
    assert links
    assert set(links) <= set(ids)
    loaded = re.findall(r'(?:src|href)\s*=\s*"(?!#|data:)([^"]*)"|@import|url\((?!#)', page)
    assert not loaded  # nothing outside of the file


def test_pages_of_one_part_alone_and_of_all_others(monkeypatch):
    monkeypatch.setattr(plots, "unavailable", lambda: "of no matter here")
    whole = headings(report.render(results()))
    for part in results():
        alone = headings(report.render({part: results()[part]}))
        others = headings(report.render({name: value for name, value in results().items() if name != part}))
        assert {*alone, *others} == set(whole), part
    assert headings(report.render({})) == ["How it was made"]


def test_names_may_be_odd_and_figures_missing_or_not_finite():
    losses = {
        ODD: {ODD: loss(math.nan, None), "$a_b$": loss(math.inf)},
        "rmu": {ODD: {"loss": None, "standard_error": None, "tokens": 0, "documents": 0}, "$a_b$": loss(1.0)},
    }
    points = [{"step": 0, "loss": {ODD: math.nan}}, {"step": 5, "loss": {ODD: 3.0}}]
    found = {
        "losses": losses,
        "curves": {"relearning": {ODD: points}, "train": [{"step": 1, "loss": math.inf}]},
    }
    text = words(report.render(found))
    assert "not a number" in text
    assert "∞" in text
    assert "$a_b$" in text  # no formula


def test_a_part_that_is_missing_says_why(tmp_path):
    text = words(report.render({"missing": {"harness": "lm_eval is not installed"}}))
    assert "lm_eval is not installed" in text
    assert "Tasks" not in text


def test_without_matplotlib_tables_stay_and_the_page_says_so(monkeypatch):
    monkeypatch.setattr(plots, "unavailable", lambda: "matplotlib is not installed")
    page = report.render(results())
    assert "<svg" not in page
    assert "plots matplotlib is not installed" in words(page)
    assert "2.250 ± 0.010" in words(page)


def test_both_files_are_written_whole_and_alike(tmp_path):
    found = results() | {"losses": {"base": {"text": loss(math.nan)}}, "title": ODD}
    html, figures = report.write(tmp_path / "new", found)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["report.html", "report.json"]
    again = json.loads(figures.read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert again["losses"]["base"]["text"]["loss"] == "nan"
    assert again["stages"] == found["stages"]
    assert html.read_text(encoding="utf-8") == report.render(
        again
    )  # the page can be made of the figures alone
    with pytest.raises(
        ValueError, match=r"results: got the parts \['loses'\], expected some of recipe, title"
    ):
        report.write(tmp_path, {"loses": {}})
    with pytest.raises(TypeError, match="results: got a object, expected plain JSON"):
        report.write(tmp_path, {"plan": {"a": object()}})
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_figures_in_words():
    assert [number(v) for v in (None, 0.0, -1.23456, 1e-7, 12345)] == [
        "–",
        "0.000",
        "−1.235",
        "1.0e−07",
        "12\u2009345",
    ]
    assert with_error(1.5, 0.25, change=True) == "+1.500 ± 0.250"
    assert with_error(1.5, None) == "1.500"
    assert (duration(7.25), duration(3_661)) == ("7.2 s", "1 h 01 min")
    assert visible("a\n\tb\r", lines=True) == "a\n\tb␍"


def test_what_the_sources_had_is_on_the_page():
    page = words(report.render(results()))
    assert "source documents tokens held out their tokens texts left out training tokens of retain" in page
    assert "forget 9 900 1 101 15 77 823" in page
