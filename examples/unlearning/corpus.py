"""Real text that every machine has, in two labelled sets, packed into mixed batches.

Retain: Python's help topics and the sources of its standard library.
Forget: the licence files that ship inside installed packages, and /usr/share/common-licenses where there is one.
"""

import importlib.metadata
import pydoc_data.topics
import random
import re
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

RETAIN, FORGET = 0, 1
ROUTE_NAMES = ("retain", "forget")
BEGIN = "<begin>"
NO_LABEL = -100  # transformers takes no loss where this is the label

DOCUMENT_CHARACTERS = 1000
RETAIN_CHARACTERS = 3_000_000
HELD_OUT_FRACTION = 0.1
SHINGLE_WORDS = 8

LICENCE_NAME = re.compile(r"(?<![a-z])(un)?(licen[sc]e|copying|eula)s?(?![a-z])", re.IGNORECASE)
LICENCE_SUFFIXES = {"", ".txt", ".md", ".rst"}
# Some library sources open with a licence of their own, which would teach the retain set what is to be forgotten.
LEGAL_WORDS = re.compile(r"copyright|licen[sc]|warrant|permission to|redistribut", re.IGNORECASE)


@dataclass
class Corpus:
    """Documents of both sets, indexed by route: RETAIN, FORGET."""

    train: list[list[str]]
    held_out: list[list[str]]


class Batch(NamedTuple):
    """Rows of packed documents, as transformers takes them; every field is [B, S]."""

    input_ids: Tensor
    labels: Tensor  # the same, shifted by the model; NO_LABEL where a document begins
    position_ids: Tensor  # from 0 in every document
    route_ids: Tensor  # RETAIN or FORGET, the label of the token's document

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(field.to(device) for field in self))

    def rows(self, start: int, count: int) -> "Batch":
        return Batch(*(field[start : start + count] for field in self))


def load_corpus(seed: int) -> Corpus:
    """Reads, deduplicates and only then splits, so that no held-out paragraph was also trained on."""
    generator = random.Random(seed)
    corpus = Corpus(train=[], held_out=[])
    for texts in (retain_texts(), licence_texts()):
        documents = list(as_documents(texts))
        generator.shuffle(documents)
        held_out = round(HELD_OUT_FRACTION * len(documents))
        corpus.train.append(documents[held_out:])
        corpus.held_out.append(documents[:held_out])
    return corpus


def retain_texts() -> Iterator[str]:
    """Help topics first, then library sources until there is enough."""
    topics = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    yield from topics
    characters = sum(map(len, topics))
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        if characters > RETAIN_CHARACTERS:
            return
        text = path.read_text(encoding="utf-8", errors="replace")
        characters += len(text)
        yield "\n\n".join(p for p in paragraphs(text) if not LEGAL_WORDS.search(p))


def licence_texts() -> Iterator[str]:
    """In an order that does not depend on where packages are: of paragraphs that repeat only the first is left."""
    yield read(Path(sysconfig.get_path("stdlib")) / "LICENSE.txt")
    shared = {path.resolve() for path in Path("/usr/share/common-licenses").glob("*")}
    yield from map(read, sorted(shared))
    found = {
        str(file): Path(str(distribution.locate_file(file)))
        for distribution in importlib.metadata.distributions()
        for file in distribution.files or ()
        if LICENCE_NAME.search(file.name) and file.suffix in LICENCE_SUFFIXES
    }
    yield from (read(found[name]) for name in sorted(found, key=PurePath))


def read(path: Path) -> str:
    """A file's text; nothing where there is none."""
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def paragraphs(text: str) -> list[str]:
    return [p for p in re.split(r"\n\s*\n", text) if p.strip()]


def as_documents(texts: Iterable[str]) -> Iterator[str]:
    """Runs of paragraphs of one text that no earlier paragraph (nearly) repeats."""
    seen: set[tuple[str, ...]] = set()
    for text in texts:
        document = ""
        for paragraph in paragraphs(text):
            if seen_before(paragraph, seen):
                continue
            document += paragraph.strip("\n") + "\n\n"
            if len(document) >= DOCUMENT_CHARACTERS:
                yield document
                document = ""
        if document:
            yield document


def seen_before(paragraph: str, seen: set[tuple[str, ...]]) -> bool:
    """Whether at least half of the paragraph's runs of words are in `seen`; adds them all.

    Equality alone would keep a licence once per copyright holder and once per line width.
    """
    words = re.findall(r"[a-z0-9]+", paragraph.lower())
    runs = {tuple(words[i : i + SHINGLE_WORDS]) for i in range(max(1, len(words) - SHINGLE_WORDS + 1))}
    repeated = 2 * len(runs & seen) >= len(runs)
    seen |= runs
    return repeated


def train_tokenizer(corpus: Corpus, vocabulary: int) -> Tokenizer:
    """Byte-level BPE, on the training documents only."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BEGIN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Equal shares of both sets, or the smaller one would be left with the words of the larger.
    share = min(map(len, corpus.train))
    tokenizer.train_from_iterator((d for documents in corpus.train for d in documents[:share]), trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, documents: list[str]) -> list[list[int]]:
    return [encoding.ids for encoding in tokenizer.encode_batch([BEGIN + d for d in documents])]


def pack(documents: Iterable[tuple[int, list[int]]], rows: int, length: int) -> Batch:
    """Lays (route, tokens) documents end to end, in [rows, length] positions at most; drops a last row cut short."""
    input_ids: list[int] = []
    labels: list[int] = []
    position_ids: list[int] = []
    route_ids: list[int] = []
    for route, ids in documents:
        if len(input_ids) >= rows * length:
            break
        input_ids += ids
        labels += [NO_LABEL, *ids[1:]]
        position_ids += range(len(ids))
        route_ids += [route] * len(ids)
    rows = min(rows, len(input_ids) // length)
    columns = (input_ids, labels, position_ids, route_ids)
    return Batch(*(torch.tensor(column[: rows * length]).view(rows, length) for column in columns))


def mixture(
    documents: list[list[list[int]]], forget_fraction: float, seed: int
) -> Iterator[tuple[int, list[int]]]:
    """Endless (route, tokens), each set in reshuffled rounds, with the given share of forget tokens throughout."""
    for route, number in order(documents, forget_fraction, seed):
        yield route, documents[route][number]


def order(documents: list[list[list[int]]], forget_fraction: float, seed: int) -> Iterator[tuple[int, int]]:
    """The documents that `mixture` takes: (route, number among the documents of its route)."""
    rounds = [
        reshuffled(range(len(of_route)), random.Random(seed + route))
        for route, of_route in enumerate(documents)
    ]
    count = [0, 0]
    while True:
        route = FORGET if count[FORGET] < forget_fraction * sum(count) else RETAIN
        number = next(rounds[route])
        count[route] += len(documents[route][number])
        yield route, number


def reshuffled(numbers: Sequence[int], generator: random.Random) -> Iterator[int]:
    while True:
        yield from generator.sample(numbers, len(numbers))
