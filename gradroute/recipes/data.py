"""Stage `data`: texts of files to tokenised documents, split into training and held-out ones.

Which documents are held out is decided by a hash of their text alone: it does not change when texts are added, moved
or read in another order, and equal texts are never on both sides.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from . import conversations
from .config import Config
from .conversations import Span
from .documents import Writer
from .progress import bar, say
from .reading import ConfigError
from .sections import Data, Source
from .sources import Text, check_source, texts
from .stages import Context, Figures, Stage

SPLITS = ("train", "heldout")
_BATCH = 256  # texts that are tokenised at once
_LEAST = 2  # tokens of a document: one that predicts, and one that is predicted


def run(context: Context) -> Figures:
    """Writes `train` and `heldout`: columns text, source, input_ids, label, and offsets where the tokenizer has them.

    Where a source has prompts or conversations of which not all is learnt there are `labels` too, of all sources.

    Returns:
        `sources`: source → documents and tokens of both splits, and how many texts were left out because they are
        empty, too short or have nothing that is learnt; `vocabulary`: how many tokens there are.
    """
    from .models import tokenizer_of

    config = context.config
    tokenizer = tokenizer_of(config.model)
    return {"sources": write(config, tokenizer, context.folder), "vocabulary": len(tokenizer)}


def write(config: Config, tokenizer: Any, folder: Path) -> dict[str, dict[str, int]]:
    """The stage's work, with a tokenizer that is at hand."""
    cutter = Cutter(config.data, tokenizer)
    columns = ["text", "source", "input_ids", "label", *(["offsets"] if cutter.has_offsets else [])]
    columns += ["labels"] if any(map(learns_in_part, config.data.sources.values())) else []
    figures: dict[str, dict[str, int]] = {}
    with Writer(folder / "train", columns) as train, Writer(folder / "heldout", columns) as heldout:
        for name, source in config.data.sources.items():
            counts = dict.fromkeys(("train", "heldout", "train_tokens", "heldout_tokens", "left_out"), 0)
            found = bar(texts(f"data.sources.{name}", source), what=f"tokenizing {name}", unit=" texts")
            for batch in _batched(iter(found), _BATCH):
                for split, rows in cutter.documents(name, batch, counts).items():
                    (train if split == "train" else heldout).write(rows)
            _check_counts(f"data.sources.{name}", counts, config.data.heldout)
            if counts["left_out"]:
                say(
                    f"data.sources.{name}: {counts['left_out']} texts are left out: empty, too short, or without "
                    "anything that is learnt"
                )
            figures[name] = counts
    return figures


class Cutter:
    """Makes documents of texts.

    Args:
        data: how long they are, and how many are held out.
        tokenizer: a tokenizer of transformers.
    """

    def __init__(self, data: Data, tokenizer: Any) -> None:
        self._data, self._tokenizer = data, tokenizer
        self.has_offsets = bool(tokenizer.is_fast)
        _check_tokenizer(data, tokenizer)

    def documents(
        self, source: str, batch: list[Text], counts: dict[str, int]
    ) -> dict[str, dict[str, list[Any]]]:
        """The documents of some texts: split → column → list. What there is of them is added to `counts`."""
        made: dict[str, dict[str, list[Any]]] = {split: _no_rows() for split in SPLITS}
        settings = self._data.sources[source]
        written = [self._written(f"data.sources.{source}", settings, text) for text in batch]
        encoded = self._tokenizer(
            [text for text, _ in written],
            return_offsets_mapping=self.has_offsets,
            return_attention_mask=False,
            add_special_tokens=settings.messages is None,  # chat templates write their own
            verbose=False,  # texts longer than the model's context are cut below
        )
        for index, text in enumerate(batch):
            split = "heldout" if is_heldout(text.text, self._data.heldout) else "train"
            ids = list(encoded["input_ids"][index])
            offsets = [list(pair) for pair in encoded["offset_mapping"][index]] if self.has_offsets else None
            whole, spans = written[index]
            if not text.text.strip() or len(ids) < _LEAST or spans == []:
                counts["left_out"] += 1
                continue
            if self._closes(settings) and ids[-1] != self._tokenizer.eos_token_id:
                ids.append(self._tokenizer.eos_token_id)
                if offsets is not None:
                    offsets.append([0, 0])
            before = counts[split]
            for row in self._pieces(whole, ids, offsets, spans):
                counts[split] += 1
                counts[f"{split}_tokens"] += len(row["input_ids"])
                for name, value in (row | {"source": source, "label": text.label}).items():
                    made[split][name].append(value)
            if counts[split] == before:
                counts["left_out"] += 1  # what is learnt of it lies beyond `length`, and was cut
        return made

    def _written(self, key: str, source: Source, text: Text) -> tuple[str, list[Span] | None]:
        """A text as it is tokenised, and what of it is learnt; None: all of it."""
        whole, spans = text.text, [(text.prompt, len(text.text))]
        if text.messages is not None:
            whole, spans = conversations.written(
                f"{key}.messages", text.messages, self._tokenizer, text.place, spans=learns_in_part(source)
            )
        return whole, spans if learns_in_part(source) else None

    def _closes(self, source: Source) -> bool:
        """Whether an end token closes the texts of a source; chat templates close a message by their own."""
        return self._data.end_token and source.messages is None

    def _pieces(
        self, text: str, ids: list[int], offsets: list[list[int]] | None, spans: list[Span] | None
    ) -> Iterator[dict[str, Any]]:
        """A text as documents of at most `length` tokens, each with its part of the text, where offsets begin at 0.

        Documents in which no token is learnt but the first, which nothing predicts, are left out.
        """
        length = self._data.length
        labels = ids if spans is None or offsets is None else conversations.labels(ids, offsets, spans)
        if len(ids) <= length:
            if _teaches(labels):
                yield {"text": text, "input_ids": ids, "offsets": offsets, "labels": labels}
            return
        stops = [length] if self._data.overlong == "cut" else range(length, len(ids) + length, length)
        for stop in stops:
            at = slice(stop - length, stop)
            row = {"input_ids": ids[at], "labels": labels[at]}
            if not _teaches(labels[at]):
                continue
            if offsets is None:
                yield row | {"text": self._tokenizer.decode(ids[at]), "offsets": None}
                continue
            part = offsets[at]
            real = [pair for pair in part if pair[1] > pair[0]]
            first, last = (real[0][0], max(end for _, end in real)) if real else (0, 0)
            moved = [[start - first, end - first] if end > start else [0, 0] for start, end in part]
            yield row | {"text": text[first:last], "offsets": moved}


def learns_in_part(source: Source) -> bool:
    """Whether a source has tokens that are read, but not learnt."""
    return source.learn == "completions" and (source.prompt is not None or source.messages is not None)


def _teaches(labels: list[int]) -> bool:
    """Whether a document has a token that is learnt, and that another one predicts."""
    return any(label != conversations.NOT_LEARNT for label in labels[1:])


def is_heldout(text: str, share: float) -> bool:
    """Whether a text is among the share that is held out: its hash decides. A larger share has all of a smaller one."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def _no_rows() -> dict[str, list[Any]]:
    return {name: [] for name in ("text", "source", "input_ids", "label", "offsets", "labels")}


def _batched(items: Iterator[Text], size: int) -> Iterator[list[Text]]:
    while batch := list(itertools.islice(items, size)):
        yield batch


def _check_counts(key: str, counts: Mapping[str, int], share: float) -> None:
    for split, words in (("train", "are left to train on"), ("heldout", "are held out")):
        if counts[split] == 0:
            total = counts["train"] + counts["heldout"]
            raise ConfigError(
                f"{key}: got {total} documents ({counts['left_out']} texts were empty, too short or "
                f"without anything to learn), expected so many "
                f"that some {words} with data.heldout: {share}"
            )


def _check_tokenizer(data: Data, tokenizer: Any) -> None:
    """Raises ConfigError where the tokenizer lacks what the section asks for."""
    for name, source in data.sources.items():
        key = f"data.sources.{name}"
        conversations.check_template(key, source.messages, tokenizer)
        if learns_in_part(source):
            conversations.check_offsets(key, source.prompt, source.messages, bool(tokenizer.is_fast))
    if data.end_token and tokenizer.eos_token_id is None:
        raise ConfigError.of("data.end_token", True, "false, because the tokenizer has no end token")


def check(config: Config) -> None:
    """Raises ConfigError where files of a source, or the tokenizer, are not as the config says.

    The tokenizer of a GGUF file takes half a minute to read: that one is looked at by the stage alone.
    """
    from .models import check_device, is_folder, tokenizer_of

    check_device("model.device", config.model.device)
    for name, source in config.data.sources.items():
        check_source(f"data.sources.{name}", source)
    sources = config.data.sources.values()
    asks = config.data.end_token or any(source.messages or source.prompt for source in sources)
    if asks and is_folder(config.model.tokenizer or config.model.path):
        _check_tokenizer(config.data, tokenizer_of(config.model))


STAGE = Stage("data", run, reads=("model.path", "model.tokenizer", "data"), check=check)
