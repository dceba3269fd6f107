"""Stage `data`: texts of every format become tokenised documents, and the held-out ones are chosen by their text."""

import copy
import gzip
import json
import re

import pytest
import recipe_cases

from gradroute.recipes import data, documents
from gradroute.recipes.config import ConfigError, load
from gradroute.recipes.sections import Source
from gradroute.recipes.sources import check_source, texts

EXAMPLES = ["The first text.", "A second, in two\nlines.", "Ünïcode ✓ and 🙂."]


def written_as(kind, folder):
    """A path with EXAMPLES in a format, and the source that reads it."""
    rows = [{"text": text, "kind": index} for index, text in enumerate(EXAMPLES)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    if kind == "jsonl":
        (folder / "a.jsonl").write_text(lines)
    elif kind == "a list in JSON":
        (folder / "a.json").write_text(json.dumps(rows))
    elif kind == "packed by gzip":
        with gzip.open(folder / "a.jsonl.gz", "wt", encoding="utf-8") as file:
            file.write(lines)
    elif kind == "parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "a.parquet")
    elif kind == "datasets":
        import datasets

        datasets.Dataset.from_list(rows).save_to_disk(folder / "a")
    elif kind == "files":
        for index, text in enumerate(EXAMPLES):
            (folder / f"{index}.txt").write_text(text, encoding="utf-8")
        return Source(str(folder)), False
    elif kind == "a pattern":
        for index, text in enumerate(EXAMPLES):
            (folder / f"{index}.log").write_text(text, encoding="utf-8")
        return Source(str(folder / "*.log"), format="text"), False
    elif kind == "blank lines":
        (folder / "a.txt").write_text("\n\n \n\n".join(EXAMPLES), encoding="utf-8")
        return Source(str(folder / "a.txt"), split="blank_lines"), False
    path = str(next(folder.iterdir()))
    return Source(path, label="kind"), True


KINDS = [
    "jsonl",
    "a list in JSON",
    "packed by gzip",
    "parquet",
    "datasets",
    "files",
    "a pattern",
    "blank lines",
]


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_the_same_texts(tmp_path, kind):
    source, has_labels = written_as(kind, tmp_path)
    found = list(texts("key", source))
    assert [text.text for text in found] == EXAMPLES
    assert [text.label for text in found] == (["0", "1", "2"] if has_labels else [None] * 3)
    assert [text.text for text in texts("key", Source(**vars(source) | {"most": 2}))] == EXAMPLES[:2]


def test_paragraphs_are_put_together_whole_and_those_that_repeat_are_dropped(tmp_path):
    first, second, third = (" ".join(f"{name}{i}" for i in range(12)) for name in "abc")
    (tmp_path / "1.txt").write_text(f"{first}\n \n    {second}\n\n\n{first.upper()} again\n\n{third}")
    (tmp_path / "2.txt").write_text(f"new\n\n{third}, and little else\n\nlast")
    source = Source(str(tmp_path), split="paragraphs", characters=60)
    found = [text.text for text in texts("key", Source(**vars(source) | {"repeats": "drop"}))]
    assert found == [f"{first}\n\n    {second}", third, "new\n\nlast"]  # a file's last document may be short
    assert len("".join(text.text for text in texts("key", source))) > len("".join(found)) + 2 * len(first)


def test_characters_cut_a_text_without_losing_any(tmp_path):
    (tmp_path / "a.txt").write_text("".join(EXAMPLES), encoding="utf-8")
    source = Source(str(tmp_path / "a.txt"), split="characters", characters=10)
    pieces = [text.text for text in texts("key", source)]
    assert "".join(pieces) == "".join(EXAMPLES)
    assert {len(piece) for piece in pieces[:-1]} == {10}


WRONG = {
    "no json": ("a.jsonl", '{"text": "a"}\nnothing\n', {}, "a.jsonl, line 2.*expected JSON"),
    "no object": ("a.jsonl", "[1]\n", {}, "got a int in .*object 0, expected an object"),
    "no column": ("a.jsonl", '{"txt": "a"}\n', {}, r"key.text: got 'text'.*: txt \(did you mean txt\?\)"),
    "no string": ("a.jsonl", '{"text": 3}\n', {}, "key.text: got 3, expected a string"),
    "no label": ("a.jsonl", '{"text": "a", "k": null}\n', {"label": "k"}, "key.label: got None"),
    "no parquet": ("a.parquet", "text", {}, "expected a Parquet file"),
    "no utf-8": ("a.txt", b"\xff\xfe\x00", {}, "expected a file that can be read"),
    "no gzip": ("a.jsonl.gz", "text", {}, "expected a file that can be read"),
    "no format": ("a.bin", "text", {}, "key.format: got 'auto', expected one of jsonl"),
}


@pytest.mark.parametrize("case", WRONG)
def test_files_that_are_something_else_are_refused_by_their_place(tmp_path, case):
    name, content, options, message = WRONG[case]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=message):
        list(texts("key", Source(str(tmp_path / name), **options)))


def test_a_folder_of_several_formats_needs_one(tmp_path):
    """A data set's README is no text of it."""
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "README.md").write_text("What this is.")
    with pytest.raises(
        ConfigError, match=r"key.format: got 'auto', expected one of jsonl, text, because the fol"
    ):
        list(texts("key", Source(str(tmp_path))))
    found = texts("key", Source(str(tmp_path), format="jsonl"))
    assert [text.text for text in found] == ["one"]


def test_of_several_splits_one_is_named(tmp_path):
    datasets = pytest.importorskip("datasets")
    split = datasets.Dataset.from_dict({"text": EXAMPLES})
    datasets.DatasetDict({"train": split, "test": split}).save_to_disk(tmp_path / "both")
    with pytest.raises(
        ConfigError, match=r"key.path: got .*both', expected the folder of one of its splits, train"
    ):
        check_source("key", Source(str(tmp_path / "both")))
    check_source("key", Source(str(tmp_path / "both/train")))
    assert [text.text for text in texts("key", Source(str(tmp_path / "both/train")))] == EXAMPLES


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(
        ConfigError, match=r"key.path: got .*, expected a folder of datasets, or one with files of"
    ):
        list(texts("key", Source(str(tmp_path))))


@pytest.fixture
def made(recipe_config, tmp_path):
    """The documents of the tiny texts, some of which are longer than a document may be."""
    config = load(recipe_config, ["data.length=20"])
    figures = data.write(config, recipe_cases.tokenizer(), tmp_path)
    return figures, {split: documents.load(tmp_path / split) for split in data.SPLITS}


def test_documents_have_their_texts_tokens_and_offsets(made):
    figures, splits = made
    end = recipe_cases.tokenizer().eos_token_id
    joined = {split: "".join(rows["text"]) for split, rows in splits.items()}
    for kind in ("forget", "retain"):
        for text in recipe_cases.texts(kind, 40):
            split = "heldout" if data.is_heldout(text, 0.25) else "train"
            assert text.replace(" ", "") in re.sub(r"\s", "", joined[split])
    for split, rows in splits.items():
        assert max(map(len, rows["input_ids"])) == 20
        assert sum(ids[-1] == end for ids in rows["input_ids"]) <= 80
        for row in rows:
            assert len(row["input_ids"]) == len(row["offsets"])
            pieces = "".join(row["text"][start:stop] for start, stop in row["offsets"])
            assert pieces == row["text"]
        assert [list(rows["source"]).count(kind) for kind in figures] == [
            figures[kind][split] for kind in figures
        ]
        assert sum(map(len, rows["input_ids"])) == sum(of[f"{split}_tokens"] for of in figures.values())
    assert sum(ids[-1] == end for rows in splits.values() for ids in rows["input_ids"]) == 80


def test_what_is_held_out_does_not_depend_on_other_texts():
    held = {
        share: {text for text in map(str, range(4000)) if data.is_heldout(text, share)}
        for share in (0.1, 0.3)
    }
    assert held[0.1] < held[0.3]
    assert len(held[0.1]) == pytest.approx(400, abs=60)  # 3 standard deviations
    assert len(held[0.3]) == pytest.approx(1200, abs=90)


def test_cut_texts_lose_what_is_beyond(recipe_config, tmp_path):
    config = load(recipe_config, ["data.length=20", "data.overlong=cut"])
    figures = data.write(config, recipe_cases.tokenizer(), tmp_path)
    assert sum(of["train"] + of["heldout"] for of in figures.values()) == 80


def test_a_tokenizer_without_an_end_token_is_refused_before_the_first_stage(recipe_config, tmp_path):
    tokenizer = copy.deepcopy(recipe_cases.tokenizer())
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    recipe_config["model"]["tokenizer"] = str(tmp_path)
    with pytest.raises(
        ConfigError, match=r"data\.end_token: got True, expected false, because the tokenizer"
    ):
        data.check(load(recipe_config))
    data.check(load(recipe_config, ["data.end_token=false"]))


def test_a_source_of_too_few_texts_is_refused(recipe_config, tmp_path):
    recipe_config["data"]["sources"]["forget"]["most"] = 1
    with pytest.raises(
        ConfigError, match=r"data.sources.forget: got 1 documents .*, expected so many that some are"
    ):
        data.write(load(recipe_config), recipe_cases.tokenizer(), tmp_path)


def test_a_text_that_says_too_little_is_left_out(recipe_config, tmp_path, capsys):
    path = tmp_path / "forget.jsonl"
    rows = [{"text": text} for text in [*recipe_cases.texts("forget", 40), "", " \n", "a"]]
    path.write_text("\n".join(map(json.dumps, rows)))
    recipe_config["data"]["sources"]["forget"]["path"] = str(path)
    figures = data.write(load(recipe_config), recipe_cases.tokenizer(), tmp_path)
    assert figures["forget"]["left_out"] == 3
    assert figures["retain"]["left_out"] == 0
    said = capsys.readouterr().err
    assert "data.sources.forget: 3 texts are left out: empty, too short" in said
    assert "data.sources.retain:" not in said
