"""Texts in which one word is to be predicted, and the tokens that are its kin."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from steering.training import LICENCE_FRACTION, target_of
from unlearning.corpus import Batch, load_corpus, mixture, pack

Row = dict[str, Any]


class Data(NamedTuple):
    """Texts of a seed.

    Attributes:
        rows: documents to train on, with `input_ids` and `route_ids`, 1 at the word itself.
        seen: some of them again, packed, of which activations are compared.
        held_out: other documents, packed.
        target: the word after a space, one token.
        kin: the tokens of its kin.
    """

    rows: list[Row]
    seen: Batch
    held_out: Batch
    target: int
    kin: list[int]


def load(
    tokenizer: Any, seed: int, kin: Sequence[str], *, documents: int, seen: int, held_out: int, length: int
) -> Data:
    """Half of the tokens from licences, half from Python's documentation and sources; split before anything else.

    Args:
        tokenizer: a fast tokenizer of transformers.
        seed: of the order of texts.
        kin: as they are written; those that are not one token are left out.
        documents: how many of each half are trained on, at most, and as many are held out.
        seen: rows of documents that are trained on.
        held_out: rows of documents that are not.
        length: of these rows.

    Raises:
        ValueError: no kin is one token, or the word comes next nowhere in the rows.
    """
    corpus = load_corpus(seed)
    train, others = (
        [encode(tokenizer, texts[:documents]) for texts in part] for part in (corpus.train, corpus.held_out)
    )
    target = target_of(tokenizer)
    return Data(
        [
            {"input_ids": ids, "route_ids": [int(token == target) for token in ids]}
            for half in train
            for ids in half
        ],
        packed(train, seed, seen, length, target),
        packed(others, seed, held_out, length, target),
        target,
        single_tokens(tokenizer, kin),
    )


def encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    encoded = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)
    return [list(ids) for ids in encoded["input_ids"]]


def packed(halves: list[list[list[int]]], seed: int, rows: int, length: int, target: int) -> Batch:
    """Documents of both halves, end to end; the word comes next somewhere, as all measures need."""
    batch = pack(mixture(halves, LICENCE_FRACTION, seed), rows, length)
    if not (batch.labels[:, 2:] == target).any():
        raise ValueError(
            f"rows: got {rows} of {length} tokens, in which the word never comes next, expected more"
        )
    return batch


def single_tokens(tokenizer: Any, words: Sequence[str]) -> list[int]:
    """The words that are one token each."""
    found = [ids[0] for ids in encode(tokenizer, words) if len(ids) == 1]
    if not found:
        raise ValueError(f"kin: got {list(words)}, none of which is one token, expected some that are")
    return found
