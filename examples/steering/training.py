"""A small language model on Python's documentation and licences, in which one word owns a residual dimension."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import LlamaForCausalLM
from unlearning.corpus import Batch, Corpus, encode, load_corpus, mixture, pack, train_tokenizer
from unlearning.model import Shape, build

from gradroute.labels import match_tokens, next_token, token_sequences
from gradroute.models import route, steering, unroute

WORD = "the"
DIM = 0
LICENCE_FRACTION = 0.5
ROWS, LENGTH = 4, 256
LEARNING_RATE, WARMUP_STEPS = 2e-3, 20


@dataclass(frozen=True)
class Size:
    """Sizes of a run: the training, and the text that is read."""

    shape: Shape
    steps: int
    documents: int | None  # the most of each set; None: all
    held_out_rows: int


class Data(NamedTuple):
    tokenizer: Tokenizer
    train: Batch  # [steps * ROWS, LENGTH]
    held_out: Batch  # [held_out_rows, LENGTH]
    target: int  # the token whose loss is routed


def load(size: Size, seed: int) -> Data:
    """Half of the tokens from licences, half from documentation and library sources; split before anything else."""
    corpus = load_corpus(seed)
    corpus = Corpus(
        *([texts[: size.documents] for texts in part] for part in (corpus.train, corpus.held_out))
    )
    tokenizer = train_tokenizer(corpus, size.shape.vocabulary)
    train, held_out = (
        pack(mixture([encode(tokenizer, texts) for texts in part], LICENCE_FRACTION, seed), rows, LENGTH)
        for part, rows in (
            (corpus.train, size.steps * ROWS),
            (corpus.held_out, size.held_out_rows),
        )
    )
    return Data(tokenizer, train, held_out, target_of(tokenizer))


def target_of(tokenizer: Tokenizer) -> int:
    """The word after a space, which must be one token."""
    (sequence,) = token_sequences(tokenizer, [" " + WORD], case_variants=False, leading_space=False)
    if len(sequence) != 1:
        raise ValueError(f"WORD: got {WORD!r}, which is {len(sequence)} tokens, expected one")
    return sequence[0]


def routes_of(batch: Batch, target: int) -> Tensor:
    """[B, S] int64: 1 at the positions whose loss is that of predicting the target, else 0.

    Labels are those of the tokens themselves, -100 where a document begins: no position predicts its first token.
    """
    return next_token(match_tokens(batch.labels, [target])).long()


def trained(size: Size, data: Data, seed: int, routed: bool) -> LlamaForCausalLM:
    """An ordinary model; models of one seed start from the same weights and see the same batches."""
    torch.manual_seed(seed)
    model = build(size.shape)
    if routed:
        # The outputs of all layers: of three layers the first two alone changed nothing, for the last one learnt
        # the word without them. (The paper routes layers 6 to 18 of 20.)
        route(model, steering(range(size.shape.layers), DIM))
    fit(model, data, size.steps, routed)
    if routed:
        unroute(model)
    return model.eval()


def fit(model: LlamaForCausalLM, data: Data, steps: int, routed: bool) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, steps))
    for step in range(steps):
        batch = data.train.rows(step * ROWS, ROWS)
        routes = {"route_ids": routes_of(batch, data.target)} if routed else {}
        loss = model(
            batch.input_ids, labels=batch.labels, position_ids=batch.position_ids, use_cache=False, **routes
        ).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()


def warmup_cosine(step: int, steps: int) -> float:
    warmup = min(1.0, (step + 1) / WARMUP_STEPS)
    return warmup * (0.55 + 0.45 * math.cos(math.pi * step / steps))
