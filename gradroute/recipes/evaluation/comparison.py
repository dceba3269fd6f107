"""Where two checkpoints differ on the same text: the tokens, contexts and documents whose losses moved most."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from ...arguments import check_int
from .held_out import BATCH_TOKENS, by_document, token_losses
from .rows import Documents, Row, as_rows, check_fits

TOP, CONTEXT = 20, 8
#: Occurrences that a token needs to be listed: a mean of fewer is that of its contexts.
LEAST = 3
#: Documents shown token by token, and the tokens of each.
SHOWN, SHOWN_TOKENS = 4, 240
BINS = 41

Losses = Sequence[NDArray[np.float32]]
Figures = dict[str, Any]


def token_differences(
    before: nn.Module,
    after: nn.Module,
    rows: Documents,
    tokenizer: Any,
    *,
    top: int = TOP,
    context: int = CONTEXT,
    batch_tokens: int = BATCH_TOKENS,
) -> Figures:
    """Per-token loss differences of two models on the same documents, `after` less `before`, in nats.

    Args:
        before: a causal language model of transformers; a routed one is run without routes.
        after: another one, with the same tokenizer.
        rows: documents, mappings with `input_ids` and `source`.
        tokenizer: theirs.
        top: how many tokens, contexts and documents are listed, at most.
        context: tokens shown on each side of a token.
        batch_tokens: tokens of a forward with padding, at most.

    Returns:
        Plain figures, see `differences`.

    Raises:
        TypeError, ValueError: an argument is not what is expected; a document does not fit one of the models.
    """
    found = as_rows(rows)
    for model in (before, after):
        check_fits(model, found)
    first, second = (token_losses(model, found, batch_tokens=batch_tokens) for model in (before, after))
    return differences(first, second, found, tokenizer, top=top, context=context)


def differences(
    before: Losses,
    after: Losses,
    rows: Documents,
    tokenizer: Any,
    *,
    top: int = TOP,
    context: int = CONTEXT,
) -> Figures:
    """The same of losses that are known: `token_losses` of either model, fp32 `[S - 1]` a document.

    Returns:
        "sources": source → {"before", "after", "difference" (nats a token), "standard_error" (of the difference, over
        documents), "tokens", "documents"};
        "tokens": the tokens whose mean difference is surely largest, by |mean| less two standard errors, of those that
        occur `LEAST` times, each {"token", "text", "count", "before", "after", "difference", "standard_error"};
        "contexts": the single occurrences that moved most, each {"document", "position", "source", "left", "text",
        "right", "before", "after", "difference"}, at most one in `context` tokens of a document;
        "documents": those whose mean moved most, each {"document", "source", "difference", "tokens"};
        "texts": some of these token by token, each {"document", "source", "tokens": [text], "differences": [nats]};
        "histogram": {"edges": nats, "counts": {source: [n]}}, what lies beyond counted in the outer bins;
        "positions": the mean by position in the document, {"edges", "difference", "standard_error", "tokens"};
        "concentration": share of tokens → share that they have of all absolute difference.
    """
    check_int("top", top, 1)
    check_int("context", context, 1)
    found = as_rows(rows)
    changes = [b.astype(np.float64) - a for a, b in zip(before, after, strict=True)]
    spelled = _Spelling(tokenizer)
    by_change = by_document(changes, found)
    ranked = _documents(changes, found, top)
    return {
        "sources": _sources(before, after, found),
        "tokens": _tokens(before, after, found, spelled, top),
        "contexts": _contexts(before, after, changes, found, spelled, top, context),
        "documents": ranked,
        "texts": [_text(entry["document"], changes, found, spelled) for entry in ranked[:SHOWN]],
        "histogram": _histogram(changes, found, by_change.groups),
        "positions": _positions(changes),
        "concentration": _concentration(changes),
    }


class _Spelling:
    """The texts of tokens, decoded once each: parts of a character are shown as the replacement character."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.texts: dict[int, str] = {}

    def __call__(self, token: int) -> str:
        if token not in self.texts:
            self.texts[token] = self.tokenizer.decode([token])
        return self.texts[token]

    def together(self, tokens: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(list(tokens)) if len(tokens) else ""
        return text


def _sources(before: Losses, after: Losses, rows: Sequence[Row]) -> dict[str, Figures]:
    first, second = by_document(before, rows), by_document(after, rows)
    old, new, change = first.means(), second.means(), second.changes(first)
    return {
        source: {
            "before": old[source]["loss"],
            "after": new[source]["loss"],
            "difference": figures.pop("change"),
            **figures,
        }
        for source, figures in change.items()
    }


def _tokens(
    before: Losses, after: Losses, rows: Sequence[Row], spelled: _Spelling, top: int
) -> list[Figures]:
    tokens = np.concatenate([row.tokens[1:].numpy() for row in rows])
    if not len(tokens):
        return []
    kinds, which = np.unique(tokens, return_inverse=True)
    old, new = (np.concatenate(losses).astype(np.float64) for losses in (before, after))
    count = np.bincount(which)
    means = [np.bincount(which, values) / count for values in (old, new, new - old)]
    squares = np.bincount(which, np.square(new - old - means[2][which]))
    errors = np.sqrt(squares / np.maximum(count - 1, 1) / count)
    sure = np.where(count >= LEAST, np.abs(means[2]) - 2 * errors, -np.inf)
    order = [int(at) for at in np.argsort(-sure, kind="stable")[:top] if sure[at] > 0]
    return [
        {
            "token": int(kinds[at]),
            "text": spelled(int(kinds[at])),
            "count": int(count[at]),
            "before": float(means[0][at]),
            "after": float(means[1][at]),
            "difference": float(means[2][at]),
            "standard_error": float(errors[at]),
        }
        for at in order
    ]


def _contexts(
    before: Losses,
    after: Losses,
    changes: Sequence[NDArray[np.float64]],
    rows: Sequence[Row],
    spelled: _Spelling,
    top: int,
    context: int,
) -> list[Figures]:
    flat = np.concatenate(changes)
    documents = np.repeat(np.arange(len(rows)), [len(values) for values in changes])
    positions = np.concatenate(
        [np.arange(1, len(values) + 1) for values in changes]
    )  # of the predicted token
    taken: dict[int, list[int]] = {}
    found: list[Figures] = []
    for at in np.argsort(-np.nan_to_num(np.abs(flat), nan=np.inf), kind="stable"):
        if len(found) == top or flat[at] == 0:
            break
        document, position = int(documents[at]), int(positions[at])
        if any(abs(position - other) <= context for other in taken.get(document, ())):
            continue
        taken.setdefault(document, []).append(position)
        tokens = rows[document].tokens.tolist()
        found.append(
            {
                "document": document,
                "position": position,
                "source": rows[document].source,
                "left": spelled.together(tokens[max(0, position - context) : position]),
                "text": spelled(tokens[position]),
                "right": spelled.together(tokens[position + 1 : position + 1 + context]),
                "before": float(before[document][position - 1]),
                "after": float(after[document][position - 1]),
                "difference": float(flat[at]),
            }
        )
    return found


def _documents(changes: Sequence[NDArray[np.float64]], rows: Sequence[Row], top: int) -> list[Figures]:
    means = [(number, float(values.mean())) for number, values in enumerate(changes) if len(values)]
    return [
        {
            "document": number,
            "source": rows[number].source,
            "difference": mean,
            "tokens": len(changes[number]),
        }
        for number, mean in sorted(means, key=lambda entry: -abs(entry[1]))[:top]
    ]


def _text(
    number: int, changes: Sequence[NDArray[np.float64]], rows: Sequence[Row], spelled: _Spelling
) -> Figures:
    tokens = rows[number].tokens.tolist()[1 : SHOWN_TOKENS + 1]
    return {
        "document": number,
        "source": rows[number].source,
        "tokens": [spelled(token) for token in tokens],
        "differences": [float(value) for value in changes[number][:SHOWN_TOKENS]],
        "left_out": len(changes[number]) - len(tokens),
    }


def _histogram(
    changes: Sequence[NDArray[np.float64]], rows: Sequence[Row], sources: Sequence[str]
) -> Figures:
    """Counts between edges that are symmetric about 0, out to 99 % of the differences."""
    flat = np.concatenate(changes)
    finite = np.abs(flat[np.isfinite(flat)])
    most = float(np.quantile(finite, 0.99)) if len(finite) else 0.0
    edges = np.linspace(-1, 1, BINS + 1) * (most or 1.0)
    counts = {}
    for source in sources:
        of_source = [values for values, row in zip(changes, rows, strict=True) if row.source == source]
        inside = np.clip(np.nan_to_num(np.concatenate(of_source)), edges[0], edges[-1])
        counts[source] = np.histogram(inside, edges)[0].tolist()
    return {"edges": edges.tolist(), "counts": counts}


def _positions(changes: Sequence[NDArray[np.float64]]) -> Figures:
    """Means by position of the predicted token, in bins that double in length."""
    longest = max((len(values) for values in changes), default=0)
    edges = [1]
    while edges[-1] <= longest:
        edges.append(edges[-1] * 2)
    found: Figures = {"edges": edges, "difference": [], "standard_error": [], "tokens": []}
    for start, end in itertools.pairwise(edges):
        parts = [values[start - 1 : end - 1] for values in changes]
        values = np.concatenate(parts)
        sums = np.array([part.sum() for part in parts if len(part)])
        counts = np.array([len(part) for part in parts if len(part)])
        mean = float(values.mean())
        error = None
        if len(sums) > 1:
            squares = float(np.square(sums - mean * counts).sum())
            error = math.sqrt(squares * len(sums) / (len(sums) - 1)) / len(values)
        found["difference"].append(mean)
        found["standard_error"].append(error)
        found["tokens"].append(len(values))
    return found


def _concentration(changes: Sequence[NDArray[np.float64]]) -> dict[str, float]:
    """The share of all absolute difference that the most moved hundredth, tenth and half of the tokens have."""
    sizes = np.sort(np.abs(np.concatenate(changes)))[::-1]
    total = float(sizes.sum())
    if not total:
        return {}
    shares = (0.01, 0.1, 0.5)
    return {str(share): float(sizes[: max(1, round(share * len(sizes)))].sum()) / total for share in shares}
