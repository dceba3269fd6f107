"""The suite `labels`: the time to decide the route of each of ten million tokens."""

from __future__ import annotations

import collections
import itertools
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gradroute import labels

from . import progress
from .cases import FORWARD, SECONDS, Case, Findings, Limit, Plan, Variant, attempt

OWN = "gradroute"
TOKENS = 10_000_000
LEAST_TOKENS = 100
MOST_SECONDS = 2.0  # the target for TOKENS tokens on two cores
VOCABULARY = 50_257
WANTED = 1_000  # token ids that are looked up
NGRAMS = 1_000  # sequences of 1 to LONGEST tokens that are looked for
LONGEST = 8
DOCUMENT = (64, 1024)  # the fewest and the most tokens of a document
FORGET_SHARE = 0.1  # share of documents that are to be forgotten
TOPIC_SHARE = 0.2  # share of wanted tokens in forget documents
WORDS = 100  # words that are looked for in the text
SAMPLE = 20_000  # tokens at least that the slow way labels too: those of the last documents

CHECKED = (
    f"on the inputs that are timed: the labels of the last documents, of {SAMPLE} tokens or a few more, exactly those "
    "of a loop over tokens in Python; counts against numpy's, strengths within 2^-24"
)


class Corpus(NamedTuple):
    """Tokens of one packed row, and the data that label them.

    Attributes:
        input_ids: `[T]` int64; small ids are the frequent ones.
        cu_seqlens: `[D + 1]` int64, on the CPU.
        forget: `[D]` bool, true for the documents of the forget corpus.
        wanted: token ids, `[WANTED]`, on the CPU.
        ngrams: token sequences, from the text.
        sample: the first document that the slow way labels, and its first token.
        text: the tokens as text. A line is a document; a fourth of the tokens goes on with the word before it.
        offsets: `[T, 2]` int64, on the CPU, where each token is in the text, with the white space before it.
        words: words of the text, `WORDS` of them.
    """

    input_ids: Tensor
    cu_seqlens: Tensor
    forget: Tensor
    wanted: Tensor
    ngrams: list[tuple[int, ...]]
    sample: tuple[int, int]
    text: str
    offsets: Tensor
    words: list[str]


# The labels by output, for all tokens or for those of the sample.
Labels = dict[str, Tensor]


class Entry(NamedTuple):
    """A case: the ways to label a corpus, gradroute's first, and the slow way, which labels the sample alone."""

    ways: dict[str, Callable[[Corpus], Labels]]
    slow: Callable[[Corpus], Labels]


def corpus(tokens: int, device: torch.device) -> Corpus:
    """The corpus of so many tokens, always the same one."""
    generator = torch.Generator().manual_seed(0)
    input_ids = (VOCABULARY * torch.rand(tokens, generator=generator) ** 4).long()
    shortest, longest = DOCUMENT
    lengths = torch.randint(shortest, longest + 1, (tokens // shortest + 1,), generator=generator)
    ends = lengths.cumsum(0)
    ends = torch.cat((ends[ends < tokens], torch.tensor([tokens])))
    cu_seqlens = torch.nn.functional.pad(ends, (1, 0))
    forget = torch.rand(len(ends), generator=generator) < FORGET_SHARE
    wanted = torch.randperm(VOCABULARY, generator=generator)[:WANTED]
    topic = wanted[torch.randint(WANTED, (tokens,), generator=generator)]
    of_topic = torch.rand(tokens, generator=generator) < TOPIC_SHARE
    input_ids = torch.where(of_topic & forget.repeat_interleave(cu_seqlens.diff()), topic, input_ids)
    begins = torch.randint(0, tokens - LONGEST, (NGRAMS,), generator=generator).tolist()
    of_length = torch.randint(1, LONGEST + 1, (NGRAMS,), generator=generator).tolist()
    first = int((cu_seqlens <= max(tokens - SAMPLE, 0)).sum()) - 1
    text, offsets = written(input_ids, cu_seqlens)
    return Corpus(
        input_ids.to(device),
        cu_seqlens,
        forget.to(device),
        wanted,
        [tuple(input_ids[at : at + n].tolist()) for at, n in zip(begins, of_length, strict=True)],
        (first, int(cu_seqlens[first])),
        text,
        offsets,
        [letters(token) for token in wanted.tolist() if not goes_on(token)][:WORDS],
    )


def letters(token: int) -> str:
    """A token's number in letters from a to p."""
    return "".join(chr(ord("a") + int(digit, 16)) for digit in f"{token:x}")


def goes_on(token: int) -> bool:
    return token % 4 == 3


def written(input_ids: Tensor, cu_seqlens: Tensor) -> tuple[str, Tensor]:
    """Tokens as text, and where each is in it."""
    pieces = [letters(token) if goes_on(token) else " " + letters(token) for token in range(VOCABULARY)]
    texts = [pieces[token] for token in input_ids.tolist()]
    for start in cu_seqlens[:-1].tolist():
        texts[start] = "\n" + texts[start].lstrip()
    ends = torch.tensor(list(map(len, texts))).cumsum(0)
    return "".join(texts), torch.stack((torch.nn.functional.pad(ends[:-1], (1, 0)), ends), dim=1)


def lookup(of: Corpus) -> Labels:
    return {"mask": labels.match_tokens(of.input_ids, of.wanted)}


def lookup_torch(of: Corpus) -> Labels:
    return {"mask": torch.isin(of.input_ids, of.wanted.to(of.input_ids.device))}


def lookup_numpy(of: Corpus) -> Labels:
    return {"mask": torch.from_numpy(np.isin(of.input_ids.cpu().numpy(), of.wanted.numpy()))}


def lookup_slow(of: Corpus) -> Labels:
    wanted = set(of.wanted.tolist())
    return {"mask": torch.tensor([token in wanted for token in sampled(of)])}


def ngrams(of: Corpus) -> Labels:
    return {"mask": labels.match_ngrams(of.input_ids, of.ngrams, cu_seqlens=of.cu_seqlens)}


def ngrams_slow(of: Corpus) -> Labels:
    wanted = set(of.ngrams)
    mask = []
    for document in sampled_documents(of):
        found = [False] * len(document)
        for start in range(len(document)):
            for stop in range(start + 1, min(start + LONGEST, len(document)) + 1):
                if tuple(document[start:stop]) in wanted:
                    found[start:stop] = [True] * (stop - start)
        mask += found
    return {"mask": torch.tensor(mask)}


def spans(of: Corpus) -> Labels:
    return {"mask": labels.match_spans(of.text, of.offsets, of.words)}


def spans_slow(of: Corpus) -> Labels:
    """Character by character: where words begin and end, and which tokens have characters of them."""
    wanted = set(of.words)
    offsets = of.offsets[of.sample[1] :].tolist()
    at = offsets[0][0]
    inside = set()
    word = ""
    for place, char in enumerate(of.text[at:] + "\n", at):
        if char.isspace():
            if word in wanted:
                inside.update(range(place - len(word), place))
            word = ""
        else:
            word += char
    return {"mask": torch.tensor([any(place in inside for place in range(*span)) for span in offsets])}


def strength(of: Corpus) -> Labels:
    """Counts of the forget corpus and strengths of the text's tokens, moved to the positions that predict them."""
    in_forget = labels.documents(of.forget, cu_seqlens=of.cu_seqlens)
    everything = labels.token_counts(of.input_ids, VOCABULARY)
    forget = labels.token_counts(of.input_ids[in_forget], VOCABULARY)
    table = labels.frequency_strength(forget, everything - forget)
    return {"counts": forget, "strength": labels.next_token(table[of.input_ids], of.cu_seqlens)}


def strength_slow(of: Corpus) -> Labels:
    ids, lengths = of.input_ids.cpu().numpy(), of.cu_seqlens.diff().numpy()
    in_forget = np.repeat(of.forget.cpu().numpy(), lengths)
    forget, retain = (
        collections.Counter(dict(zip(*np.unique(ids[chosen], return_counts=True), strict=True)))
        for chosen in (in_forget, ~in_forget)
    )
    totals = [sum(counts.values()) + VOCABULARY for counts in (forget, retain)]

    def of_token(token: int) -> float:
        r = (forget[token] + 1) / totals[0] / ((retain[token] + 1) / totals[1])
        return 1 / (1 + math.exp(min(-(r - 1 / r - 4), 700)))

    moved = [of_token(token) for document in sampled_documents(of) for token in [*document[1:], document[-1]]]
    counts = torch.tensor([int(forget[token]) for token in range(VOCABULARY)])
    return {"counts": counts, "strength": torch.tensor(moved, dtype=torch.float64)}


def chain(of: Corpus) -> Labels:
    """Routes by three rules: n-grams, then tokens in forget documents, then forget documents."""
    in_forget = labels.documents(of.forget, cu_seqlens=of.cu_seqlens)
    found = labels.match_ngrams(of.input_ids, of.ngrams, cu_seqlens=of.cu_seqlens)
    wanted = labels.match_tokens(of.input_ids, of.wanted) & in_forget
    ids = labels.prioritise({1: found, 2: wanted, 3: in_forget})
    return {"ids": labels.next_token(ids, of.cu_seqlens)}


def chain_slow(of: Corpus) -> Labels:
    masks = zip(lookup_slow(of)["mask"].tolist(), ngrams_slow(of)["mask"].tolist(), strict=True)
    moved: list[int] = []
    for document, in_forget in zip(sampled_documents(of), of.forget[of.sample[0] :].tolist(), strict=True):
        ids = []
        for _ in document:
            wanted, found = next(masks)
            ids.append(1 if found else 2 if wanted and in_forget else 3 if in_forget else 0)
        moved += [*ids[1:], ids[-1]]
    return {"ids": torch.tensor(moved)}


def sampled(of: Corpus) -> list[int]:
    return of.input_ids[of.sample[1] :].tolist()


def sampled_documents(of: Corpus) -> list[list[int]]:
    bounds = of.cu_seqlens[of.sample[0] :].tolist()
    tokens = sampled(of)
    start = of.sample[1]
    return [tokens[a - start : b - start] for a, b in itertools.pairwise(bounds)]


#: The cases by name. Their times include whatever is made from Python lists, such as the trie of the n-grams.
CASES = {
    f"{WANTED} token ids": Entry(
        {OWN: lookup, "torch.isin": lookup_torch, "numpy.isin": lookup_numpy}, lookup_slow
    ),
    f"{NGRAMS} n-grams": Entry({OWN: ngrams}, ngrams_slow),
    f"{WORDS} words by characters": Entry({OWN: spans}, spans_slow),
    "strength by frequency": Entry({OWN: strength}, strength_slow),
    "three rules by priority": Entry({OWN: chain}, chain_slow),
}


def plans(device: torch.device, lengths: tuple[int, ...] = ()) -> list[Plan]:
    """Every case, or every one with corpora of other lengths; the target is one for TOKENS on the CPU.

    Raises:
        ValueError: a corpus too short to sample from.
    """
    for tokens in lengths:
        if tokens < LEAST_TOKENS:
            raise ValueError(f"tokens: got {tokens}, expected at least {LEAST_TOKENS} for the suite labels")
    return [
        Plan(
            "labels",
            f"labels, {name}" + (f", {tokens} tokens" if lengths else ""),
            "labels",
            {"tokens": tokens, "vocabulary": VOCABULARY},
            partial(case, entry, tokens, device),
        )
        for tokens in lengths or (TOKENS,)
        for name, entry in CASES.items()
    ]


def case(entry: Entry, tokens: int, device: torch.device) -> Case:
    of = corpus(tokens, device)
    has_limit = tokens == TOKENS and device.type == "cpu"
    return Case(
        variants={
            name: Variant(partial(_steps, way, of), is_rival=name != OWN) for name, way in entry.ways.items()
        },
        rivals=tuple(name for name in entry.ways if name != OWN) or (OWN,),
        examine=partial(examine, entry, of),
        checked=CHECKED,
        modes=(FORWARD,),
        limits=(Limit(OWN, "", MOST_SECONDS, SECONDS, FORWARD),) if has_limit else (),
        tokens=tokens,
    )


def _steps(way: Callable[[Corpus], Labels], of: Corpus, mode: str) -> list[Callable[[], Labels]]:
    return [partial(way, of)]


def examine(entry: Entry, of: Corpus, variants: Mapping[str, Any]) -> Findings:
    """Compares each way's labels of the sample with the slow way's."""
    expected = entry.slow(of)
    found: Findings = {}
    for name in variants:
        progress.step(f"checking {name}")
        found[name] = attempt(partial(compared, entry.ways[name], of, expected))
    return found


def compared(way: Callable[[Corpus], Labels], of: Corpus, expected: Labels) -> dict[str, Any]:
    for name, got in way(of).items():
        wanted = expected[name]
        part = got.cpu()[-len(wanted) :]
        close = (
            2.0**-24 if wanted.is_floating_point() else 0.0
        )  # fp32 with a complement taken twice: half an ulp of 1
        different = (part.double() - wanted.double()).abs() > close
        if part.shape != wanted.shape or bool(different.any()):
            return {"wrong": f"{name}: {int(different.sum())} of {len(wanted)} are not those of the slow way"}
    return {}
