"""Held-out losses: of each token, summed by document, and the mean by source or route with its standard error."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...arguments import check_int, check_is, shown
from ...models import unrouted
from ...models.base_model import BaseModel
from ...models.top import TopModel
from .rows import Documents, Row, as_rows, batches, check_fits, collate

BATCH_TOKENS = 4096
#: Logits that are in fp32 at a time: 64 MiB of them, which the largest vocabularies have in 60 tokens.
CHUNK = 2**24

Figures = dict[str, Any]
Step = Callable[[int], object]


@dataclass(frozen=True, eq=False)
class DocumentLosses:
    """Sums of losses by document and group.

    Attributes:
        groups: the names of the sources or routes.
        sums: fp64 `[D, G]`, the summed losses of each document's tokens in each group, in nats.
        tokens: int64 `[D, G]`, how many tokens these are.
    """

    groups: tuple[str, ...]
    sums: NDArray[np.float64]
    tokens: NDArray[np.int64]

    def means(self) -> dict[str, Figures]:
        """Of each group `loss` (nats a token), `standard_error` (over documents), `tokens` and `documents`.

        The loss is the mean over tokens, and its error that of a ratio of two sums over documents (Cochran 1977,
        Sampling Techniques, section 6.4), because tokens of one document are not independent. Of one document there is
        no error, and of none no loss: None.
        """
        return {
            group: _mean(self.sums[:, at], self.tokens[:, at], self.tokens[:, at])
            for at, group in enumerate(self.groups)
        }

    def changes(self, before: DocumentLosses) -> dict[str, Figures]:
        """Of each group `change` (nats a token) since `before`, with `standard_error`.

        Both are of the same documents, so that the error is that of the difference, document by document: far smaller
        than the errors of the two losses, which have the documents' difficulty in them.

        Raises:
            ValueError: they are of other documents or groups.
        """
        if self.groups != before.groups or not np.array_equal(self.tokens, before.tokens):
            raise ValueError("before: got the losses of other documents, expected those of the same ones")
        found = {}
        for at, group in enumerate(self.groups):
            figures = _mean(self.sums[:, at] - before.sums[:, at], self.tokens[:, at], self.tokens[:, at])
            found[group] = {"change": figures.pop("loss"), **figures}
        return found


def losses(
    model: nn.Module,
    rows: Documents,
    *,
    names: Sequence[str] | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> dict[str, Figures]:
    """The mean next-token loss of held-out documents, by source or by route.

    A routed model is evaluated without routes: the loss is the whole model's (docs/training.md, Evaluation).
    Log-softmax is in fp32 whatever the model's dtype, and sums are in fp64.

    Args:
        model: a causal language model of transformers, on any device; its training mode is as before afterwards.
        rows: documents, mappings with `input_ids` (integers `[S]`), `source` (a name), and with `names` `route_ids`
            (integers `[S]`).
        names: the names of the routes: a token's loss then belongs to its own route; None: to its document's source.
        batch_tokens: tokens of a forward with padding, at most; a longer document has a forward of its own.

    Returns:
        name → {"loss": nats a token, "standard_error": over documents, "tokens": n, "documents": n}. The first token of
        a document is predicted from nothing and has no loss. Without tokens the loss is None, and of one document the
        error is.

    Raises:
        TypeError, ValueError: an argument is not what is expected; a document does not fit the model.
    """
    return document_losses(model, rows, names=names, batch_tokens=batch_tokens).means()


def document_losses(
    model: nn.Module,
    rows: Documents,
    *,
    names: Sequence[str] | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> DocumentLosses:
    """What `losses` takes its means of: sums by document, by which checkpoints are compared in pairs."""
    found = as_rows(rows, routed=names is not None)
    return by_document(token_losses(model, found, batch_tokens=batch_tokens), found, names)


def by_document(
    token_losses: Sequence[NDArray[np.floating[Any]]], rows: Sequence[Row], names: Sequence[str] | None = None
) -> DocumentLosses:
    """Losses of tokens, summed by document and by source, or with `names` by the token's route."""
    groups = tuple(dict.fromkeys(row.source for row in rows)) if names is None else _checked(names, rows)
    sums = np.zeros((len(rows), len(groups)), np.float64)
    tokens = np.zeros((len(rows), len(groups)), np.int64)
    for document, (values, row) in enumerate(zip(token_losses, rows, strict=True)):
        if names is None:
            group = np.full(len(values), groups.index(row.source))
        else:
            assert row.routes is not None
            group = row.routes[1:].numpy()
        counted = slice(None) if row.learnt is None else row.learnt[1:].numpy()
        sums[document] = np.bincount(group[counted], values[counted].astype(np.float64), len(groups))
        tokens[document] = np.bincount(group[counted], minlength=len(groups))
    return DocumentLosses(groups, sums, tokens)


def token_losses(
    model: nn.Module,
    rows: Documents,
    *,
    batch_tokens: int = BATCH_TOKENS,
    step: Step | None = None,
) -> list[NDArray[np.float32]]:
    """The loss of every token of every document but its first, in nats: fp32 `[S - 1]` a document.

    Args:
        model: see `losses`.
        rows: likewise.
        batch_tokens: likewise.
        step: is called with the number of documents after every forward, as a progress bar's `update`.
    """
    check_is("model", model, nn.Module, "a torch.nn.Module")
    batch_tokens = check_int("batch_tokens", batch_tokens, 1)
    documents = as_rows(rows)
    check_fits(model, documents)
    values: list[NDArray[np.float32]] = [np.zeros(0, np.float32)] * len(documents)
    device = next(model.parameters()).device
    with evaluating(model):
        for numbers in batches(documents, batch_tokens):
            batch = collate(documents, numbers, device)
            output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
            for at, number in enumerate(numbers):
                values[number] = _losses_of(output.logits[at], batch.input_ids[at, : batch.lengths[at]])
            del output  # its logits would stay until those of the next batch were made
            if step is not None:
                step(len(numbers))
    return values


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Forwards without gradients, dropout and routes; the modules' training modes are put back."""
    training = {module: module.training for module in model.modules()}
    routed = any(isinstance(m, TopModel) and not isinstance(m, BaseModel) for m in training)
    model.eval()
    try:
        with torch.no_grad(), unrouted(model) if routed else nullcontext():
            yield
    finally:
        for module, mode in training.items():
            module.training = mode


def _losses_of(logits: Tensor, tokens: Tensor) -> NDArray[np.float32]:
    """Losses of one document, from logits `[S', V]`, S' ≥ S, and tokens `[S]`, a chunk of tokens at a time.

    All at once in fp32 would be the evaluation's largest tensor a second time.
    """
    count = len(tokens) - 1
    losses = torch.empty(count, dtype=torch.float32, device=logits.device)
    chunk = max(1, CHUNK // logits.shape[-1])
    targets = tokens[1:].to(logits.device)
    for start in range(0, count, chunk):
        part = slice(start, min(start + chunk, count))
        losses[part] = nn.functional.cross_entropy(logits[part].float(), targets[part], reduction="none")
    return losses.cpu().numpy()


def _mean(sums: NDArray[np.float64], tokens: NDArray[np.int64], counted: NDArray[np.int64]) -> Figures:
    """The mean a token, and its standard error over the documents that have tokens."""
    documents = int((counted > 0).sum())
    total = int(tokens.sum())
    figures: Figures = {"loss": None, "standard_error": None, "tokens": total, "documents": documents}
    if total:
        mean = float(sums.sum() / total)
        figures["loss"] = mean
        if documents > 1:
            squares = float(np.square(sums - mean * tokens).sum())
            figures["standard_error"] = math.sqrt(squares * documents / (documents - 1)) / total
    return figures


def _checked(names: Sequence[str], rows: Sequence[Row]) -> tuple[str, ...]:
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"names: got {shown(names)}, expected the routes' names")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"names: got {list(names)}, expected different names, one a route")
    for number, row in enumerate(rows):
        if row.routes is not None and len(row.routes):
            least, most = int(row.routes.min()), int(row.routes.max())
            if least < 0 or most >= len(names):
                wrong = least if least < 0 else most
                raise ValueError(
                    f"rows[{number}].route_ids: got the route {wrong}, expected routes from 0 to {len(names) - 1}, "
                    f"those of names, {', '.join(names)}"
                )
    return tuple(names)
