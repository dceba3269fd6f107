"""Stage `labels`: a route for every token of the documents, and for soft labels a strength.

Training documents may have fewer labels than there are (`share`), and wrong ones (`errors`); held-out documents always
have the right ones, because losses are reported by them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .. import labels as toolkit
from ..labels.wanted import spans_of
from . import documents
from .config import Config
from .data import SPLITS
from .progress import bar
from .reading import ConfigError
from .stages import Context, Figures, Stage

Ids = npt.NDArray[np.int16]
Strengths = npt.NDArray[np.float32]
Batch = Mapping[str, list[Any]]

#: Documents of a batch to the route of each of their tokens, one array a document.
Labeller = Callable[[Batch], list[Ids]]


def run(context: Context) -> Figures:
    """Writes `train` and `heldout`: the columns of `data`, `route_ids`, and `route_strength` where labels are soft.

    Returns:
        Split → source → route → tokens, as `train` and `heldout`; the documents whose label is known as `labelled`, and
        the mistakes that were made as `mistaken_tokens`.
    """
    config = context.config
    figures: dict[str, Any] = {}
    splits = {name: documents.load(context.inputs["data"].folder / name) for name in SPLITS}
    strengths = None
    if config.labels.by == "frequency":
        strengths = _strengths(config, splits["train"], context.inputs["data"].figures["vocabulary"])
    label = _labeller(config, splits["train"])
    for name, split in splits.items():
        ids = [
            one
            for batch in bar(documents.batches(split), what=f"labelling {name}", total=-(-len(split) // 1000))
            for one in label(batch)
        ]
        if name == "train":
            _check_all_routes(config, ids)  # errors may give tokens to a route whose words never match
            ids, figures["labelled"], figures["mistaken_tokens"] = _with_mistakes(config, ids)
            _check_all_routes(config, ids)
            if config.labels.by == "words":
                _warn_absent(config, split)
        counts = _write(context, name, split, ids, strengths)
        figures[name] = {source: dict(zip(config.routes, of, strict=True)) for source, of in counts.items()}
    return figures


def _labeller(config: Config, train: Any) -> Labeller:
    """What gives documents their routes, as `labels.by` says."""
    by = config.labels.by
    if by in ("words", "regex"):
        if "offsets" not in train.column_names:
            raise ConfigError.of(
                "labels.by", by, "source, frequency or column, because the tokenizer has no offsets"
            )
        return lambda batch: _by_spans(config, batch)
    if by == "frequency":
        labels, route = config.labels.frequency, _soft_route(config)
        by_source = {
            name: route if name == labels.forget else config.routes[0] for name in config.data.sources
        }
        if labels.everywhere:
            by_source = dict.fromkeys(by_source, route)
        return lambda batch: _whole(config, batch, [by_source[source] for source in batch["source"]])
    column = "source" if by == "source" else "label"
    return lambda batch: _whole(config, batch, [_route_of(config, value) for value in batch[column]])


def _soft_route(config: Config) -> str:
    """The route whose tokens have a strength below 1."""
    return config.labels.frequency.route or config.routes[1]


def _route_of(config: Config, value: str | None) -> str:
    """The route of a source or of a column's value."""
    routes = config.labels.routes
    if value is not None and value in routes:
        return routes[value]
    if value in config.routes:
        return str(value)
    if "*" in routes:
        return routes["*"]
    raise ConfigError.of(
        "labels.routes", dict(routes), f"a route for the label {value!r}, or for * (all others)"
    )


def _whole(config: Config, batch: Batch, routes: list[str]) -> list[Ids]:
    """One route a document."""
    return [
        np.full(len(ids), config.routes.index(route), dtype=np.int16)
        for ids, route in zip(batch["input_ids"], routes, strict=True)
    ]


def _by_spans(config: Config, batch: Batch) -> list[Ids]:
    """The routes of tokens that words or regular expressions match; the route that is named first wins."""
    labels = config.labels
    wanted: dict[int, Any] = {}
    for name, words in labels.words.items():
        wanted[config.routes.index(name)] = list(words)
    for name, pattern in labels.patterns.items():
        wanted[config.routes.index(name)] = pattern
    longest = max(map(len, batch["input_ids"]))
    offsets = np.zeros((len(batch["input_ids"]), longest, 2), dtype=np.int64)
    for row, pairs in zip(offsets, batch["offsets"], strict=True):
        row[: len(pairs)] = pairs
    options = {"whole_words": labels.whole_words} if labels.by == "words" else {}
    masks = toolkit.match_spans(
        list(batch["text"]), offsets, wanted, ignore_case=labels.ignore_case, **options
    )
    ids = toolkit.prioritise(masks).numpy().astype(np.int16)
    return [
        row[: len(tokens)]
        if not labels.sources or source in labels.sources
        else np.zeros(len(tokens), np.int16)
        for row, tokens, source in zip(ids, batch["input_ids"], batch["source"], strict=True)
    ]


def _warn_absent(config: Config, train: Any) -> None:
    """Warns of words that no training document has: one that is written otherwise there would label nothing."""
    labels = config.labels
    absent = {route: list(words) for route, words in labels.words.items()}
    for batch in documents.batches(train):
        texts = [
            text
            for text, source in zip(batch["text"], batch["source"], strict=True)
            if not labels.sources or source in labels.sources
        ]
        for words in absent.values():
            words[:] = [word for word in words if not _is_found(config, word, texts)]
    for route, words in absent.items():
        if words:
            warnings.warn(
                f"labels.words.{route}: got {', '.join(map(repr, words))}, which no training document has",
                RuntimeWarning,
                stacklevel=2,
            )


def _is_found(config: Config, word: str, texts: list[str]) -> bool:
    options = {"ignore_case": config.labels.ignore_case, "whole_words": config.labels.whole_words}
    return any(len(spans) for spans in spans_of("labels.words", [word], texts, **options))


def _strengths(config: Config, train: Any, vocabulary: int) -> Strengths:
    """The strength of each token `[vocabulary]`: 1 minus the paper's weight, counted in the training documents."""
    frequency = config.labels.frequency
    counts = {name: np.zeros(vocabulary, dtype=np.int64) for name in (frequency.forget, frequency.retain)}
    for batch in bar(documents.batches(train), what="counting tokens", total=-(-len(train) // 1000)):
        for source, ids in zip(batch["source"], batch["input_ids"], strict=True):
            if source in counts:
                counts[source] += np.bincount(ids, minlength=vocabulary)
    forget, retain = counts.values()
    smoothing = (frequency.smoothing[0], frequency.smoothing[-1])
    strength = toolkit.frequency_strength(
        forget, retain, smoothing, scale=frequency.scale, bias=frequency.bias
    )
    return strength.numpy()


def _check_all_routes(config: Config, ids: list[Ids]) -> None:
    """A route without a token in training is a word that never matches, or a label that nobody has: a mistake."""
    counts = sum(
        (np.bincount(one, minlength=len(config.routes)) for one in ids), np.zeros(len(config.routes), int)
    )
    may_be_empty = {config.labels.unlabelled}
    if config.labels.by == "frequency" and config.labels.frequency.everywhere:
        may_be_empty.add(config.routes[0])  # strengths do its work
    for name, count in zip(config.routes, counts, strict=True):
        if not count and name not in may_be_empty:
            raise ConfigError(f"labels: got no training token of the route {name}, expected some")


def _with_mistakes(config: Config, ids: list[Ids]) -> tuple[list[Ids], int, int]:
    """Labels of training documents with errors, and for some documents none; the known documents and wrong tokens."""
    labels = config.labels
    order = torch.randperm(
        len(ids), generator=torch.Generator().manual_seed(config.seed), device="cpu"
    ).tolist()
    known = sorted(order[: round(labels.share * len(ids))])
    changed = list(ids)
    mistaken = 0
    if known and (labels.errors.false_negative or labels.errors.false_positive):
        for index, wrong in zip(known, _with_errors(config, [ids[index] for index in known]), strict=True):
            mistaken += int((wrong != ids[index]).sum())
            changed[index] = wrong
    unlabelled = config.routes.index(labels.unlabelled) if labels.unlabelled is not None else 0
    for index in set(range(len(ids))) - set(known):
        changed[index] = np.full_like(ids[index], unlabelled)
    return changed, len(known), mistaken


def _with_errors(config: Config, ids: list[Ids]) -> Iterator[Ids]:
    errors = config.labels.errors
    lengths = [len(one) for one in ids]
    of_documents = errors.of == "documents"
    labels = torch.from_numpy(np.array([one[0] for one in ids]) if of_documents else np.concatenate(ids))
    wrong = toolkit.with_errors(
        labels,
        seed=config.seed,
        false_negative=errors.false_negative,
        false_positive=errors.false_positive,
        route=1 if errors.route is None else config.routes.index(errors.route),
    ).numpy()
    if of_documents:
        return (np.full(length, route, dtype=np.int16) for length, route in zip(lengths, wrong, strict=True))
    return iter(np.split(wrong.astype(np.int16), np.cumsum(lengths)[:-1]))


def _write(
    context: Context, name: str, split: Any, ids: list[Ids], strengths: Strengths | None
) -> dict[str, list[int]]:
    """Writes one split with its labels; returns source → tokens of each route."""
    config = context.config
    soft = config.routes.index(_soft_route(config))
    counts: dict[str, npt.NDArray[np.int64]] = {}
    columns = [*split.column_names, "route_ids", *(["route_strength"] if strengths is not None else [])]
    start = 0
    with documents.Writer(context.folder / name, columns) as writer:
        for batch in bar(documents.batches(split), what=f"writing {name}", total=-(-len(split) // 1000)):
            of_batch = ids[start : start + len(batch["text"])]
            start += len(of_batch)
            for source, one in zip(batch["source"], of_batch, strict=True):
                counts[source] = counts.get(source, 0) + np.bincount(one, minlength=len(config.routes))
            more: dict[str, list[Any]] = {"route_ids": of_batch}
            if strengths is not None:
                more["route_strength"] = [
                    np.where(routes == soft, strengths[tokens], np.float32(1))
                    for routes, tokens in zip(of_batch, batch["input_ids"], strict=True)
                ]
            writer.write({**batch, **more})
    return {source: of.tolist() for source, of in counts.items()}


STAGE = Stage("labels", run, reads=("labels", "routes", "seed", "data.sources"), after=("data",))
