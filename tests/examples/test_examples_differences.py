"""Where two checkpoints differ: which tokens moved most, where they stand, what is compared, checks can fail."""

import copy
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import checkpoint_differences
from checkpoint_differences import AFTER, ALL, BEFORE, MOST, OTHER, PAIRS, TENTH, TUNED, Comparison, moved
from experiment import main
from unlearning.labelled import Documents
from unlearning.model import Shape, build

from gradroute.recipes.evaluation.rows import as_rows


class Letters:
    """A tokenizer whose tokens are letters."""

    def decode(self, ids):
        return "".join(chr(ord("a") + token % 26) for token in ids)


def rows(lengths):
    """Documents of these (source, number of tokens)."""
    return as_rows({"input_ids": list(range(1, length + 1)), "source": source} for source, length in lengths)


def test_rows_are_the_first_held_out_documents_of_both_sets():
    documents = Documents(Letters(), [[], []], [[[1, 2]] * 5, [[3, 4]] * 2])
    found = checkpoint_differences.rows_of(documents, 3)
    assert [row.source for row in found] == ["retain"] * 3 + ["forget"] * 2
    assert found[-1].tokens.tolist() == [3, 4]


def test_what_moved_most_stands_where_it_stands():
    """Of 200 tokens two moved by much, in licences; of the next 18 a third are there, and became easier."""
    before = [np.zeros(100, np.float32), np.zeros(100, np.float32)]
    after = [np.full(100, 0.01, np.float32), np.full(100, 0.01, np.float32)]
    after[1][:2] = 9.0, -8.0
    after[0][:12] = 1.0
    after[1][2:8] = -1.0
    found = moved(before, after, rows([("retain", 101), ("forget", 101)]))
    assert found == {
        "0.01": {"forget": 1.0, "harder": 0.5},
        "0.1": {"forget": 8 / 20, "harder": 13 / 20},
        "1.0": {"forget": 0.5, "harder": 193 / 200},
    }


def test_a_comparison_is_after_less_before():
    torch.manual_seed(0)
    shape = Shape(vocabulary=60, d_model=16, layers=2, heads=2, d_ff=24, forget_units=8)
    control = build(shape)
    routed = copy.deepcopy(control)
    routed.model.layers[1].mlp.down_proj.weight.data *= 3.0
    comparison = Comparison(rows([("retain", 20), ("forget", 30)]), Letters(), checkpoint_differences.QUICK)
    found = comparison.of(control, routed)
    there, back = found["sources"]["forget"], comparison.of(routed, control)["sources"]["forget"]
    assert there["difference"] == pytest.approx(there["after"] - there["before"], abs=1e-9)
    assert there["difference"] == -back["difference"] != 0
    assert there["tokens"] == 29
    run = {"pairs": {TUNED: found}}
    ratios = checkpoint_differences.weights(run, TUNED)
    assert ratios["mlp.down_proj"] == pytest.approx(1.0)  # 0 in the first of two layers, 2 in the other
    assert all(ratio == 0 for name, ratio in ratios.items() if name != "mlp.down_proj")
    assert checkpoint_differences.in_licences(run, TUNED, ALL) == pytest.approx(29 / 48)


def figures(forget=0.0, retain=0.0, tenth=0.5, ratio=0.3):
    """What is compared of one pair: differences by set, and where the tenth stands of which a half is chance."""
    entry = {"text": " `x", "difference": forget, "left": "of\n", "right": "|", "source": "forget"}
    return {
        "sources": {"forget": {"difference": forget}, "retain": {"difference": retain}},
        "tokens": [entry],
        "contexts": [entry],
        "histogram": {"edges": [-1.0, 0.0, 1.0], "counts": {"retain": [5, 1], "forget": [1, 5]}},
        "concentration": {"0.01": 0.05, "0.1": 0.3, "0.5": 0.8},
        "moved": {
            str(share): {"forget": of_share, "harder": 0.5}
            for share, of_share in ((MOST, 0.9), (TENTH, tenth), (ALL, 0.5))
        },
        "weights": {
            "layers": [0, 1],
            "modules": ["mlp.up_proj", "self_attn.q_proj"],
            "change": [[ratio, ratio], [None, 0.1]],
            "outside": {"lm_head": 2 * ratio},
        },
    }


GOOD = {
    BEFORE: {"forget": 1.0, "retain": 0.3},
    AFTER: {"forget": 2.0, "retain": 0.6},
    TUNED: {"forget": 1.6, "retain": 0.4, "tenth": 0.9},
    OTHER: {"forget": 0.01, "retain": -0.01, "tenth": 0.55, "ratio": 0.7},
}


def made_up(changes=None):
    """A run of these figures; of one pair some are changed."""
    changes = changes or {}
    return {"pairs": {pair: figures(**{**GOOD[pair], **changes.get(pair, {})}) for pair in PAIRS}}


@pytest.mark.parametrize(
    ("changes", "failing"),
    [
        ({}, []),
        ({AFTER: {"retain": 1.6}}, [0]),
        ({BEFORE: {"forget": 1.6}}, [1]),
        ({TUNED: {"tenth": 0.7}}, [2]),
        ({OTHER: {"tenth": 0.65}}, [3]),
    ],
)
def test_checks_can_fail(changes, failing):
    checks = checkpoint_differences.checks([made_up(changes)])
    assert [index for index, check in enumerate(checks) if not check.passed] == failing


def test_found_says_what_the_numbers_say():
    text = checkpoint_differences.found([made_up()])
    assert "+1.00 nats a token on licences and +0.30 on the rest; +2.00 and +0.60 once" in text
    assert "have 5 % of all absolute difference, and the 10 % 30 %; 90 % and 90 % of them stand" in text
    assert "where 50 % of all tokens stand" in text
    assert "most surely are `␣’x` (+1.6)" in text
    assert "moved most `of⏎▸ ’x◂|` (forget, +1.6)" in text
    assert "differ most in lm_head 0.60, mlp.up_proj 0.30, self_attn.q_proj 0.10, and least in" in text
    assert "those of two controls by 0.10 to 1.40" in text


def test_what_a_run_leaves(tmp_path, capsys):
    for made, code in ((made_up(), 0), (made_up({TUNED: {"tenth": 0.7}}), 1)):
        recorded = dataclasses.replace(
            checkpoint_differences.EXPERIMENT, run=lambda seed, quick, made=made: made
        )
        assert main(recorded, None, ["--out", str(tmp_path), "--seeds", "2"]) == code
    results = json.loads((tmp_path / "checkpoint_differences.json").read_text(encoding="utf-8"))
    assert [row["beside the control"] for row in results["table"]] == list(PAIRS)
    assert results["table"][2]["10 % of tokens: in licences"] == "0.70 (0.70 to 0.70)"
    assert (tmp_path / "checkpoint_differences.png").read_bytes().startswith(b"\x89PNG")
    assert "FAILS" in capsys.readouterr().out


def test_quickly(tmp_path):
    """Before tuning both routed checkpoints are compared with the same control, and ablation moved the losses."""
    assert (
        main(checkpoint_differences.EXPERIMENT, None, ["--quick", "--seeds", "1", "--out", str(tmp_path)])
        == 0
    )
    results = json.loads((tmp_path / "checkpoint_differences.json").read_text(encoding="utf-8"))
    (run,) = results["runs"]
    assert run["documents"] == [3, 3]
    pairs = run["pairs"]
    assert list(pairs) == list(PAIRS)
    for of_set in ("retain", "forget"):
        losses = {pair: found["sources"][of_set] for pair, found in pairs.items()}
        assert losses[BEFORE]["before"] == losses[AFTER]["before"] != losses[TUNED]["before"]
        assert losses[TUNED]["before"] == losses[OTHER]["before"]
        assert losses[BEFORE]["after"] != losses[AFTER]["after"]
    assert pairs[BEFORE]["weights"]["reshaped"]
    assert not pairs[AFTER]["weights"]["reshaped"]
