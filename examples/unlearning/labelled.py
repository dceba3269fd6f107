"""The data of the experiments on real text: documents of one row at most, of which a share may be unlabelled."""

import random
from collections.abc import Collection
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import LlamaForCausalLM

from gradroute.labels import with_errors
from gradroute.optim import RoutedAdamW, routed_param_groups

from .corpus import (
    FORGET,
    NO_LABEL,
    RETAIN,
    Batch,
    encode,
    load_corpus,
    order,
    pack,
    reshuffled,
    train_tokenizer,
)
from .training import BETAS, ROWS

LENGTH = 256
UNLABELLED = 2  # in the place of a route: a forget document whose label is missing


@dataclass(frozen=True)
class Texts:
    """Tokens, indexed by route: RETAIN, FORGET.

    Attributes:
        train: the documents, of `LENGTH` tokens at most.
        held_out: rows of other documents, `[N, LENGTH]`.
        relearning: rows of further forget documents, `[ROWS, LENGTH]`.
    """

    train: list[list[list[int]]]
    held_out: list[Batch]
    relearning: Batch


@dataclass(frozen=True)
class Documents:
    """The corpus in tokens, indexed by route: RETAIN, FORGET.

    Attributes:
        tokenizer: what made the tokens.
        train: the documents, of `LENGTH` tokens at most.
        held_out: others.
    """

    tokenizer: Tokenizer
    train: list[list[list[int]]]
    held_out: list[list[list[int]]]


def load_documents(vocabulary: int, seed: int) -> Documents:
    """The corpus, whose documents are cut to a row, as the papers do: no step is then of one document alone."""
    corpus = load_corpus(seed)
    tokenizer = train_tokenizer(corpus, vocabulary)
    train, held_out = (
        [[ids[:LENGTH] for ids in encode(tokenizer, texts)] for texts in parts]
        for parts in (corpus.train, corpus.held_out)
    )
    return Documents(tokenizer, train, held_out)


def load_texts(vocabulary: int, seed: int, held_out_rows: int) -> Texts:
    """The documents to train on, and rows of the others."""
    return texts_of(load_documents(vocabulary, seed), held_out_rows)


def texts_of(documents: Documents, held_out_rows: int) -> Texts:
    """The same of documents that were read before."""
    rows = [
        pack(((route, ids) for ids in of_route), held_out_rows + (ROWS if route == FORGET else 0), LENGTH)
        for route, of_route in enumerate(documents.held_out)
    ]
    relearning = rows[FORGET].rows(0, ROWS)
    rows[FORGET] = rows[FORGET].rows(ROWS, held_out_rows)
    return Texts(documents.train, rows, relearning)


def labelled_documents(count: int, share: float, seed: int) -> Tensor:
    """The forget documents that carry a label: bool [count], true for a `share` of them.

    Documents of a smaller share are among those of a larger one.
    """
    return with_errors(torch.ones(count, dtype=torch.bool), seed=seed, false_negative=1 - share)


def train_rows(
    documents: list[list[list[int]]], labelled: Tensor, forget_fraction: float, seed: int, rows: int
) -> Batch:
    """The mixture of a seed, [rows, LENGTH]; route_ids are RETAIN, FORGET where labelled [documents], or UNLABELLED."""

    def label(route: int, number: int) -> int:
        return route if route == RETAIN or labelled[number] else UNLABELLED

    chosen = order(documents, forget_fraction, seed)
    return pack(((label(route, n), documents[route][n]) for route, n in chosen), rows, LENGTH)


def as_retain(data: Batch) -> Batch:
    """Without a label a document is taken for a retain one."""
    return data._replace(route_ids=data.route_ids.masked_fill(data.route_ids == UNLABELLED, RETAIN))


def without(data: Batch, routes: Collection[int]) -> Batch:
    """The documents of these routes teach nothing: no loss is taken of them, and no other document sees them.

    Steps, rows and retain tokens stay what they are, so that methods differ in nothing else.
    """
    dropped = torch.isin(data.route_ids, torch.tensor(list(routes)))
    return data._replace(labels=data.labels.masked_fill(dropped, NO_LABEL))


def one_label_steps(documents: list[list[list[int]]], forget_fraction: float, seed: int, steps: int) -> Batch:
    """[steps * ROWS, LENGTH]: every ROWS rows, a step, are of one route, the steps in random order.

    Each route's documents come in the order in which `mixture` takes them, and its tokens are its share.
    """
    forget_steps = round(forget_fraction * steps)
    counts = (steps - forget_steps, forget_steps)
    parts = []
    for route, count in enumerate(counts):
        numbers = reshuffled(range(len(documents[route])), random.Random(seed + route))
        parts.append(pack(((route, documents[route][n]) for n in numbers), count * ROWS, LENGTH))
    joined = Batch(*(torch.cat(fields).unflatten(0, (steps, ROWS)) for fields in zip(*parts, strict=True)))
    shuffled = random.Random(seed).sample(range(steps), steps)
    return Batch(*(field[shuffled].flatten(0, 1) for field in joined))


def optimizer_of(model: LlamaForCausalLM, learning_rate: float) -> RoutedAdamW:
    """An optimizer that, as SGTM's code does, leaves alone the other label's part in a step of one label.

    The embeddings are joint, and one block. By rows those of tokens that a batch lacks would wait too: held-out losses
    of sgtm_mixed.py were then 0.1 nats higher with mixed batches, and 0.3 with one label a step.
    """
    embedding = model.get_input_embeddings().weight
    groups = routed_param_groups(model)
    for group in groups:
        group["params"] = [weight for weight in group["params"] if weight is not embedding]
    groups.append({"params": [embedding], "block_dim": None})
    return RoutedAdamW(groups, lr=learning_rate, betas=BETAS, weight_decay=0.0)
