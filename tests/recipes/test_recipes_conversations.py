"""Prompts and conversations as data: what of them is learnt, and counted in losses."""

import copy
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import recipe_cases
import torch
from torch.nn import functional as F

from gradroute.recipes import conversations, data, documents, evaluation, models, run
from gradroute.recipes.batches import Batches, GroupCollator, PairedBatches
from gradroute.recipes.config import ConfigError, load
from gradroute.recipes.evaluation.generation import openings
from gradroute.recipes.sections import Source
from gradroute.recipes.sources import check_source, texts

# As ChatML writes conversations, with the tokenizer's end token behind every message.
TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
# Thoughts of all messages but the last are left out.
FORGETFUL = TEMPLATE.replace(
    "{{ message.content }}",
    "{{ message.content if loop.last else message.content.split('</think>')[-1] }}",
)


def tokenizer_with(template=TEMPLATE):
    made = copy.deepcopy(recipe_cases.tokenizer())
    made.chat_template = template
    return made


def conversations_of(kind, count=40):
    """Two questions and two answers each."""
    said = recipe_cases.texts(kind, 4 * count, words=4)
    roles = ("user", "assistant", "user", "assistant")
    return [
        {
            "messages": [
                {"role": role, "content": content}
                for role, content in zip(roles, said[4 * n : 4 * n + 4], strict=True)
            ]
        }
        for n in range(count)
    ]


def prompts_of(kind, count=40):
    said = recipe_cases.texts(kind, 2 * count, words=6)
    return [{"question": said[2 * n], "text": " " + said[2 * n + 1]} for n in range(count)]


def config_of(recipe_config, rows, folder, **options):
    """A config whose forget source is of some rows."""
    folder.mkdir(exist_ok=True)
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe_config["data"]["sources"]["forget"] = {"path": str(path), **options}
    return recipe_config


def written(config, folder, tokenizer=None, changes=("data.length=200",)):
    """The documents of a config in a folder: the figures of its sources, and the rows of both splits."""
    folder.mkdir(exist_ok=True)
    figures = data.write(load(config, list(changes)), tokenizer or tokenizer_with(), folder)
    rows = [row for split in data.SPLITS for row in documents.load(folder / split)]
    return figures, rows


def learnt(row):
    """The tokens that are learnt, one text."""
    assert [b in (a, -100) for a, b in zip(row["input_ids"], row["labels"], strict=True)]
    return tokenizer_with().decode([label for label in row["labels"] if label != -100])


def test_of_a_prompt_and_its_text_the_text_is_learnt(recipe_config, tmp_path):
    wanted = prompts_of("forget")
    config = config_of(recipe_config, wanted, tmp_path / "texts", prompt="question")
    _, rows = written(config, tmp_path)
    forget = [row for row in rows if row["source"] == "forget"]
    expected = {row["question"] + row["text"]: row["text"] + recipe_cases.END for row in wanted}
    assert {row["text"]: learnt(row) for row in forget} == expected
    for row in rows:
        if row["source"] == "retain":
            assert row["labels"] == row["input_ids"]


def test_of_a_conversation_what_the_assistant_says_is_learnt(recipe_config, tmp_path):
    wanted = conversations_of("forget")
    config = config_of(recipe_config, wanted, tmp_path / "texts", messages="messages")
    _, rows = written(config, tmp_path)
    forget = [row for row in rows if row["source"] == "forget"]
    answers = {
        "".join(
            message["content"] + recipe_cases.END
            for message in row["messages"]
            if message["role"] == "assistant"
        )
        for row in wanted
    }
    assert {learnt(row) for row in forget} == answers
    for row in forget:
        assert row["text"].count(recipe_cases.END) == 4  # none behind the template's own
        assert tokenizer_with().decode(row["input_ids"]) == row["text"]


@pytest.mark.parametrize("options", [{"prompt": "question"}, {"messages": "messages"}], ids=str)
def test_all_may_be_learnt(recipe_config, tmp_path, options):
    rows = prompts_of("forget") if "prompt" in options else conversations_of("forget")
    config = config_of(recipe_config, rows, tmp_path / "texts", **options, learn="all")
    _, rows = written(config, tmp_path)
    assert all("labels" not in row for row in rows)


def test_documents_that_teach_nothing_are_left_out(recipe_config, tmp_path):
    wanted = [
        *conversations_of("forget"),
        {"messages": [{"role": "user", "content": "Nobody answers this."}]},
    ]
    config = config_of(recipe_config, wanted, tmp_path / "texts", messages="messages")
    figures, rows = written(config, tmp_path, changes=["data.length=8"])
    assert figures["forget"]["left_out"] == 1
    assert all(any(label != -100 for label in row["labels"][1:]) for row in rows)
    forget = [row for row in rows if row["source"] == "forget"]
    whole = written(config, tmp_path / "whole")[1]
    both = ([row for row in some if row["source"] == "forget"] for some in (forget, whole))
    counts = [sum(label != -100 for row in some for label in row["labels"]) for some in both]
    assert 0.9 * counts[1] < counts[0] <= counts[1]  # an answer's last token may be the first of a document
    assert max(len(row["input_ids"]) for row in rows) == 8


def test_texts_of_which_a_cut_leaves_nothing_to_learn_are_counted(recipe_config, tmp_path):
    rows = [{"question": "the old " * 40, "text": "garden"}, *prompts_of("forget")]
    config = config_of(recipe_config, rows, tmp_path / "texts", prompt="question")
    settings = ["data.length=48", "data.overlong=cut"]
    figures, _ = written(config, tmp_path, changes=settings)
    documents = figures["forget"]["train"] + figures["forget"]["heldout"]
    assert figures["forget"]["left_out"] >= 1
    assert documents + figures["forget"]["left_out"] == len(rows)


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "datasets"])
def test_every_format_gives_the_same_conversations(tmp_path, kind):
    wanted = conversations_of("forget", 3)
    wanted[0]["messages"][0]["name"] = "someone"  # the others have nulls there, where columns are typed
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in wanted))
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(wanted), path)
    else:
        datasets.Dataset.from_list(wanted).save_to_disk(path)
    found = list(texts("key", Source(str(path), messages="messages")))
    assert [list(text.messages) for text in found] == [row["messages"] for row in wanted]
    assert found[0].text == "\n\n".join(message["content"] for message in wanted[0]["messages"])


USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
WRONG = {
    "no list": ({"m": "a"}, {"messages": "m"}, "key.messages: got 'a', expected a list of {role, content}"),
    "no messages": ({"m": []}, {"messages": "m"}, r"key.messages: got \[\], expected a list"),
    "no role": ({"m": [{"content": "a"}]}, {"messages": "m"}, "both of them strings"),
    "no content": ({"m": [USER, ANSWER | {"content": None}]}, {"messages": "m"}, "both of them strings"),
    "no column": ({"m": [USER]}, {"messages": "n"}, "key.messages: got 'n', expected a column"),
    "no prompt": (
        {"text": "a", "p": 3},
        {"prompt": "p"},
        "key.prompt: got 3, expected a string in the column p",
    ),
    "no column of prompts": ({"text": "a"}, {"prompt": "p"}, "key.prompt: got 'p', expected a column"),
}


@pytest.mark.parametrize("case", WRONG)
def test_rows_that_are_no_conversations_are_refused(tmp_path, case):
    row, options, words = WRONG[case]
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    with pytest.raises(ConfigError, match=words):
        list(texts("key", Source(str(tmp_path / "a.jsonl"), **options)))


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("a.txt", {"prompt": "p"}, "key.prompt: got 'p', expected null, because a.txt is text"),
        ("a.txt", {"messages": "m"}, "key.messages: got 'm', expected null, because a.txt is text"),
        (
            "a.jsonl",
            {"messages": "m", "prompt": "p"},
            "key.prompt: got 'p', expected nothing beside messages",
        ),
        ("a.jsonl", {"messages": "m", "text": "t"}, "key.text: got 't', expected nothing beside messages"),
    ],
)
def test_columns_that_cannot_be_meant_are_refused(tmp_path, name, options, words):
    (tmp_path / name).write_text("{}")
    with pytest.raises(ConfigError, match=words):
        check_source("key", Source(str(tmp_path / name), **options))


def test_tokenizers_that_cannot_are_refused_before_the_first_stage(recipe_config, tmp_path):
    config = config_of(recipe_config, conversations_of("forget"), tmp_path / "texts", messages="messages")
    with pytest.raises(
        ConfigError, match=r"forget\.messages: got 'messages', expected null, because the token"
    ):
        data.check(load(config))
    tokenizer_with().save_pretrained(tmp_path / "tokenizer")
    config["model"]["tokenizer"] = str(tmp_path / "tokenizer")
    data.check(load(config))
    with pytest.raises(
        ConfigError, match=r"key\.prompt: got 'p', expected null, or learn: all, because the tok"
    ):
        conversations.check_offsets("key", "p", None, has_offsets=False)


def test_templates_that_change_what_they_wrote_are_refused():
    messages = [USER, ANSWER | {"content": "<think>hm</think>b"}, USER, ANSWER]
    with pytest.raises(
        ConfigError, match="key: got a chat template that writes the message 1 of here otherwise"
    ):
        conversations.written("key", messages, tokenizer_with(FORGETFUL), "here")
    text, spans = conversations.written("key", messages, tokenizer_with(FORGETFUL), "here", spans=False)
    assert "hm" not in text
    assert spans == []
    with pytest.raises(ConfigError, match=r"key: got the messages of here, expected some that .* \(no\)"):
        conversations.written("key", messages, tokenizer_with("{{ raise_exception('no') }}"), "here")


@pytest.mark.parametrize("kind", ["list", "dataset"])
def test_batches_have_the_labels_and_no_piece_without(kind):
    rows = [
        {"input_ids": [1, 2, 3, 4, 5, 6], "labels": [-100] * 4 + [5, 6], "route_ids": [1] * 6},
        {"input_ids": [7, 8], "labels": [7, -100], "route_ids": [0] * 2},
    ]
    rows = rows if kind == "list" else datasets.Dataset.from_list(rows)
    made = Batches(rows, tokens=4, count=3, seed=0)
    assert {(piece.row, piece.start) for group in made.groups for piece in group} == {(0, 4)}
    for batch in (made, PairedBatches(rows, rows, tokens=8, count=1, seed=0)):
        labels = GroupCollator(packed=True)([batch[0]])["labels"][0].tolist()
        assert {label for label in labels if label != -100} == {6}  # the first of a document has no loss
    with pytest.raises(ValueError, match=r"rows: got 1 documents, expected .* a label that is"):
        Batches([{"input_ids": [7, 8], "labels": [7, -100]}], tokens=4, count=1, seed=0)


def test_losses_are_of_what_is_learnt(recipe_files):
    model = models.load(recipe_files / "model", device="cpu")
    ids = torch.arange(2, 14)
    labels = torch.where(torch.arange(12) < 5, -100, ids)
    row = {"input_ids": ids, "labels": labels, "route_ids": torch.arange(12) % 2, "source": "a"}
    with torch.no_grad():
        logits = model(ids[None]).logits[0, :-1]
    every = F.cross_entropy(logits, labels[1:], reduction="none", ignore_index=-100)[4:]
    found = evaluation.losses(model, [row])["a"]
    assert found["tokens"] == 7
    assert found["loss"] == pytest.approx(float(every.mean()), rel=1e-5)
    by_route = evaluation.losses(model, [row], names=["even", "odd"])
    assert by_route["odd"]["loss"] == pytest.approx(float(every[::2].mean()), rel=1e-5)
    with pytest.raises(ValueError, match=r"rows\[0\]\.labels: got 3, expected one for each of 12 tokens"):
        evaluation.losses(model, [row | {"labels": labels[:3]}])


def test_generations_begin_with_a_documents_own_prompt(recipe_config, tmp_path):
    config = config_of(recipe_config, conversations_of("forget"), tmp_path / "texts", messages="messages")
    _, rows = written(config, tmp_path)
    found = openings(rows, tokenizer_with(), each=1, tokens=6, continuation=50)
    of = {entry["source"]: entry for entry in found}
    assert of["forget"]["prompt"].startswith("[user]")
    assert of["forget"]["prompt"].endswith(f"{recipe_cases.END}\n[assistant]")
    assert len(tokenizer_with()(of["retain"]["prompt"])["input_ids"]) == 6


@pytest.mark.slow
def test_adapters_learn_to_answer(recipe_config, tmp_path):
    """From conversations to a report: each route's adapter learns the answers of its own."""
    pytest.importorskip("peft")
    tokenizer_with().save_pretrained(tmp_path / "tokenizer")
    for name in ("forget", "retain"):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in conversations_of(name)))
        recipe_config["data"]["sources"][name] = {"path": str(path), "messages": "messages"}
    recipe_config["data"]["length"] = 120
    recipe_config["model"]["tokenizer"] = str(tmp_path / "tokenizer")
    recipe_config |= {
        "train": {
            "steps": 40,
            "batch_tokens": 512,
            "learning_rate": 2e-2,
            "precision": "fp32",
            "log_every": 10,
            "save_every": 0,
            "arguments": {"disable_tqdm": True},
        },
        "adapters": {"rank": 4},
        "coherence": {"steps": 0},
        "baselines": {"names": ["gradient_ascent"]},
        "relearning": {"steps": 2, "documents": 4},
        "evaluate": {"prompts_each": 1, "new_tokens": 4},
    }
    run("adapters", recipe_config, tmp_path / "run")
    report = json.loads((tmp_path / "run/report.json").read_text())
    losses = {name: {of: one["loss"] for of, one in each.items()} for name, each in report["losses"].items()}
    assert min(losses["base"][name] - losses["trained"][name] for name in ("retain", "forget")) > 0.3
    lost = {name: losses["unlearnt"][name] - losses["trained"][name] for name in ("retain", "forget")}
    assert lost["forget"] > 2 * lost["retain"]
    prompts = [entry["prompt"] for entry in report["generations"]]
    assert all(prompt.startswith("[user]") and prompt.endswith("[assistant]") for prompt in prompts)
