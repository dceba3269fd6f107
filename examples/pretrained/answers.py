"""Beginnings of texts with their continuations, some of which are written in CAPITALS, and some of these labelled."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from unlearning.corpus import RETAIN, load_corpus

from gradroute.recipes.conversations import labels

PROMPT_WORDS = 12
ANSWER_WORDS = 48
LEAST_WORDS = 24  # of a continuation

ORDINARY, CAPITALS = "ordinary", "capitals"
SOURCES = (ORDINARY, CAPITALS)
UNLABELLED, LABELLED = 0, 1  # routes: what is not labelled may be either

Row = dict[str, Any]


@dataclass(frozen=True)
class Answers:
    """Documents of a seed, with `input_ids`, `labels` (of the continuation alone), `route_ids` and `source`.

    Attributes:
        train: one version of each text, in capitals or not.
        held_out: both versions of further texts.
        prompts: the beginnings of these.
    """

    train: list[Row]
    held_out: list[Row]
    prompts: list[str]


def load(tokenizer: Any, seed: int, *, train: int, held_out: int, share: float, labelled: float) -> Answers:
    """Python's help topics and sources, cut into beginnings and continuations.

    Args:
        tokenizer: a fast tokenizer of transformers.
        seed: of the order of texts, and of which are in capitals and which labelled.
        train: how many texts are trained on, at most.
        held_out: how many are not.
        share: of the training texts that continue in capitals.
        labelled: the share of these whose label is known.
    """
    corpus = load_corpus(seed)
    draw = random.Random(seed)
    of_training = cut(corpus.train[RETAIN])[:train]
    of_others = cut(corpus.held_out[RETAIN])[:held_out]
    rows = []
    for text in of_training:
        source = CAPITALS if draw.random() < share else ORDINARY
        is_known = source == CAPITALS and draw.random() < labelled
        rows.append(row(tokenizer, text, source, LABELLED if is_known else UNLABELLED))
    return Answers(
        rows,
        [row(tokenizer, text, source, UNLABELLED) for text in of_others for source in SOURCES],
        [prompt for prompt, _ in of_others],
    )


def cut(texts: Sequence[str]) -> list[tuple[str, str]]:
    """The beginning and the continuation of every text that is long enough; runs of white space become one space."""
    pairs = []
    for text in texts:
        words = text.split()
        answer = words[PROMPT_WORDS : PROMPT_WORDS + ANSWER_WORDS]
        if len(answer) >= LEAST_WORDS:
            pairs.append((" ".join(words[:PROMPT_WORDS]), " " + " ".join(answer)))
    return pairs


def row(tokenizer: Any, text: tuple[str, str], source: str, route: int) -> Row:
    """A document of which the continuation is learnt, in capitals or as it is."""
    prompt, answer = text
    whole = prompt + (answer.upper() if source == CAPITALS else answer)
    encoded = tokenizer(whole, return_offsets_mapping=True, return_attention_mask=False)
    ids = list(encoded["input_ids"])
    return {
        "input_ids": ids,
        "labels": labels(ids, encoded["offset_mapping"], [(len(prompt), len(whole))]),
        "route_ids": [route] * len(ids),
        "source": source,
    }


def in_capitals(text: str) -> bool:
    """Whether most of a text's letters are capitals; no letters are none."""
    letters = [character for character in text if character.isalpha()]
    return 2 * sum(character.isupper() for character in letters) > len(letters)
