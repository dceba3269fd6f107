"""Stage `labels`: every way of labelling, fewer labels and wrong ones; held-out documents have the right ones."""

import numpy as np
import pytest
import recipe_cases
import torch

from gradroute import labels as toolkit
from gradroute.recipes import data, documents, labels
from gradroute.recipes.config import ConfigError, load
from gradroute.recipes.stages import Context, Made


@pytest.fixture
def labelled(recipe_config, tmp_path):
    """Runs the stage with settings: its figures, and its documents by split."""

    def run(settings, label_column=False, offsets=True):
        if label_column:
            recipe_config["data"]["sources"] = {
                "forget": recipe_config["data"]["sources"]["forget"] | {"label": "kind"}
            }
        config = load(recipe_config, [f"labels={settings}", "routes=[retain, forget, unknown]"])
        folders = tmp_path / "data", tmp_path / "labels"
        for folder in folders:
            folder.mkdir()
        tokenizer = recipe_cases.tokenizer()
        made = Made(folders[0], {"vocabulary": len(tokenizer)})
        data.write(config, tokenizer, folders[0])
        if not offsets:
            for split in data.SPLITS:
                rows = documents.load(folders[0] / split).remove_columns("offsets")
                rows.save_to_disk(folders[0] / "without" / split)
            made = Made(folders[0] / "without", made.figures)
        figures = labels.run(Context("unlearn", "labels", config, folders[1], {"data": made}))
        return figures, {split: documents.load(folders[1] / split) for split in data.SPLITS}

    return run


def routes_of(rows):
    return [set(ids) for ids in rows["route_ids"]]


UNKNOWN = "share: 0.5, unlabelled: unknown"


def test_sources_are_routes(labelled):
    figures, splits = labelled(f"{{{UNKNOWN}}}")
    held = splits["heldout"]
    assert routes_of(held) == [{int(source == "forget")} for source in held["source"]]
    train = splits["train"]
    unknown = [ids == {2} for ids in routes_of(train)]
    assert figures["labelled"] == len(train) - sum(unknown) == round(len(train) / 2)
    known = [row for row, not_known in zip(train, unknown, strict=True) if not not_known]
    assert routes_of({"route_ids": [row["route_ids"] for row in known]}) == [
        {int(row["source"] == "forget")} for row in known
    ]
    tokens = {name: sum(map(len, split["input_ids"])) for name, split in splits.items()}
    for name, count in tokens.items():
        assert sum(sum(of.values()) for of in figures[name].values()) == count


def test_a_label_without_a_route_is_refused_and_so_is_a_route_without_a_token(labelled, tmp_path):
    with pytest.raises(
        ConfigError, match=r"labels: got no training token of the route retain, expected some"
    ):
        labelled(f"{{by: column, {UNKNOWN}}}", label_column=True)


def test_a_value_of_a_column_that_no_route_has_is_refused(labelled, recipe_files, tmp_path, recipe_config):
    path = tmp_path / "forget.jsonl"
    text = (recipe_files / "texts/forget.jsonl").read_text()
    path.write_text(text.replace('"kind": "forget"', '"kind": "Forget"'))
    recipe_config["data"]["sources"]["forget"]["path"] = str(path)
    with pytest.raises(
        ConfigError, match=r"labels.routes: got \{\}, expected a route for the label 'Forget'"
    ):
        labelled(f"{{by: column, {UNKNOWN}}}", label_column=True)


@pytest.mark.parametrize(
    "way",
    ["by: words, words: {forget: [virus, toxin]}", r"by: regex, patterns: {forget: '\b(virus|toxin)\b'}"],
)
def test_words_and_patterns_mark_their_tokens_and_no_others(labelled, way):
    _, splits = labelled(f"{{{way}, unlabelled: unknown, share: 0.9}}")
    found = 0
    for row in splits["heldout"]:
        marked = np.zeros(len(row["text"]), dtype=bool)
        for (start, stop), route in zip(row["offsets"], row["route_ids"], strict=True):
            marked[start:stop] |= route == 1
        words = "".join(
            char if mark else "\n" for char, mark in zip(row["text"], marked, strict=True)
        ).split()
        assert {word.lower() for word in words} <= {"virus", "toxin"}
        assert len(words) == sum(row["text"].lower().count(word) for word in ("virus", "toxin"))
        found += len(words)
    assert found > 10


def test_words_are_looked_for_in_their_sources_alone(labelled):
    way = "by: words, words: {forget: [the, of]}, sources: [forget]"
    _, splits = labelled(f"{{{way}, unlabelled: unknown, share: 0.9}}")
    assert {1} <= set().union(
        *(
            ids
            for row, ids in zip(splits["heldout"], routes_of(splits["heldout"]), strict=True)
            if row["source"] == "forget"
        )
    )
    assert {0} == set().union(
        *(
            ids
            for row, ids in zip(splits["heldout"], routes_of(splits["heldout"]), strict=True)
            if row["source"] == "retain"
        )
    )


def test_words_that_no_document_has_are_named(labelled):
    words = "by: words, words: {forget: [virus, viruss, 'a  ToxinS', Toxin, zyx]}, ignore_case: true"
    with pytest.warns(RuntimeWarning) as warned:
        labelled(f"{{{words}, unlabelled: unknown, share: 0.9}}")
    expected = "labels.words.forget: got 'viruss', 'a  ToxinS', 'zyx', which no training document has"
    assert [str(one.message) for one in warned] == [expected]


def test_words_need_offsets(labelled):
    with pytest.raises(
        ConfigError, match=r"labels.by: got 'words', expected .*, because the tokenizer has no offsets"
    ):
        labelled("{by: words, words: {forget: [virus]}}", offsets=False)


@pytest.mark.parametrize("everywhere", [False, True])
def test_frequencies_are_the_papers_weights(labelled, everywhere):
    """The mask of the original parameters is 1 - strength = 1 - sigmoid(r - 1/r - 4), counted in training texts."""
    more = "everywhere: true" if everywhere else "everywhere: false"
    _, splits = labelled(
        f"{{by: frequency, frequency: {{{more}, smoothing: [1, 2]}}, share: 0.9, unlabelled: unknown}}"
    )
    vocabulary = len(recipe_cases.tokenizer())
    counts = {name: np.ones(vocabulary) * a for name, a in (("forget", 1), ("retain", 2))}
    for row in splits["train"]:
        np.add.at(counts[row["source"]], row["input_ids"], 1)
    ratio = (counts["forget"] / counts["forget"].sum()) / (counts["retain"] / counts["retain"].sum())
    strength = 1 / (1 + np.exp(-(ratio - 1 / ratio - 4)))
    assert strength.max() > 0.9 > 0.1 > strength.min()
    for row in splits["heldout"]:
        soft = everywhere or row["source"] == "forget"
        assert set(row["route_ids"]) == {int(soft)}
        expected = strength[row["input_ids"]] if soft else np.ones(len(row["input_ids"]))
        np.testing.assert_allclose(row["route_strength"], expected, atol=2e-6)
    without = [row for row in splits["train"] if row["source"] == "forget" and set(row["route_ids"]) != {1}]
    assert all(set(row["route_strength"]) == {1.0} for row in without)


@pytest.mark.parametrize("of", ["documents", "tokens"])
def test_errors_are_those_of_the_toolkit_in_training_alone(labelled, of):
    errors = f"errors: {{false_negative: 0.5, false_positive: 0.25, of: {of}}}"
    figures, splits = labelled(f"{{{errors}, share: 0.9, unlabelled: unknown}}")
    held = splits["heldout"]
    assert routes_of(held) == [{int(source == "forget")} for source in held["source"]]
    known = [row for row in splits["train"] if 2 not in row["route_ids"]]
    truth = [int(row["source"] == "forget") for row in known]
    if of == "documents":
        got = [row["route_ids"][0] for row in known]
        assert all(len(set(row["route_ids"])) == 1 for row in known)
    else:
        got = [route for row in known for route in row["route_ids"]]
        truth = [route for row, route in zip(known, truth, strict=True) for _ in row["route_ids"]]
    wrong = toolkit.with_errors(truth, seed=0, false_negative=0.5, false_positive=0.25)
    assert torch.equal(torch.as_tensor(got), wrong)
    lengths = [len(row["route_ids"]) for row in known] if of == "documents" else [1] * len(got)
    assert figures["mistaken_tokens"] == sum(n for n, a, b in zip(lengths, got, truth, strict=True) if a != b)


def test_a_route_that_no_document_keeps_is_refused(labelled):
    with pytest.raises(ConfigError, match="labels: got no training token of the route retain, expected some"):
        labelled("{share: 0.0, unlabelled: unknown}")
