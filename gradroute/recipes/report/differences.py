"""The section on two checkpoints on the same text: what moved, by token, context, position, document and weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from . import plots
from .blocks import STEPS, Block, Picture, Prose, Section, Table, colored
from .text import number, percent, signed, token, visible, with_error

UNIT = "nats a token"
COLORS = "orange rose, blue fell, deeper at " + ", ".join(f"{step:g}" for step in STEPS) + " nats"


def section(results: Mapping[str, Any]) -> Iterator[Section]:
    """The section, where there are differences."""
    found = results.get("differences") or {}
    if found:
        yield Section("Where two checkpoints differ", list(_blocks(found)))


def _blocks(found: Mapping[str, Any]) -> Iterator[Block]:
    before, after = (visible(found.get(name, name)) for name in ("before", "after"))
    yield Prose(
        f"Losses of {after} less those of {before}, token by token on the same held-out text, in nats; without routes. "
        "Above zero: the token has become harder to predict."
    )
    yield from _by_source(found.get("sources") or {})
    yield from _histogram(found.get("histogram") or {})
    yield from _tokens(found.get("tokens") or [])
    yield from _contexts(found.get("contexts") or [])
    yield from _positions(found.get("positions") or {})
    yield from _documents(found.get("documents") or [])
    for text in found.get("texts") or []:
        title = f"Document {text['document']} of {visible(text['source'])}: {COLORS}"
        yield colored(title, text["tokens"], text["differences"], text.get("left_out", 0))
    yield from _weights(found.get("weights") or {})


def _by_source(sources: Mapping[str, Any]) -> Iterator[Block]:
    rows = [
        [
            visible(source),
            number(figures["before"]),
            number(figures["after"]),
            with_error(figures["difference"], figures["standard_error"], change=True),
            number(figures["tokens"]),
            number(figures["documents"]),
        ]
        for source, figures in sources.items()
    ]
    if rows:
        columns = [
            "source",
            f"before ({UNIT})",
            f"after ({UNIT})",
            f"difference ({UNIT})",
            "tokens",
            "documents",
        ]
        yield Table(columns, rows, "Means, the difference ± its standard error over documents.")


def _histogram(histogram: Mapping[str, Any]) -> Iterator[Block]:
    if histogram and plots.unavailable() is None:
        yield Picture(
            plots.histogram(histogram["edges"], histogram["counts"], "difference (nats)"),
            "Tokens by how much their losses moved, in nats; what lies beyond is counted in the outermost bins.",
        )


def _tokens(tokens: Sequence[Mapping[str, Any]]) -> Iterator[Block]:
    columns = ["token", f"difference ({UNIT})", "before", "after", "times"]
    for title, sign in (("became harder", 1), ("became easier", -1)):
        rows = [
            [
                token(entry["text"]),
                with_error(entry["difference"], entry["standard_error"], change=True),
                number(entry["before"]),
                number(entry["after"]),
                number(entry["count"]),
            ]
            for entry in tokens
            if _number(entry["difference"]) * sign > 0
        ]
        if rows:
            caption = (
                f"Tokens that {title}, whose mean is surely far from zero; ± standard error over occurrences."
            )
            yield Table(columns, rows, caption)


def _number(value: Any) -> float:
    """A figure of JSON, in which numbers that are not finite are words."""
    return float(value)


def _contexts(contexts: Sequence[Mapping[str, Any]]) -> Iterator[Block]:
    rows = [
        [
            signed(entry["difference"]),
            f"{visible(entry['left'])} ▸{visible(entry['text'])}◂ {visible(entry['right'])}",
            number(entry["before"]),
            number(entry["after"]),
            visible(entry["source"]),
            f"{entry['document']} at {entry['position']}",
        ]
        for entry in contexts
    ]
    if rows:
        columns = ["difference (nats)", "the token, between ▸ and ◂", "before", "after", "source", "document"]
        yield Table(columns, rows, "The single tokens that moved most.", texts=frozenset({1, 4, 5}))


def _positions(positions: Mapping[str, Any]) -> Iterator[Block]:
    edges = positions.get("edges") or []
    rows = [
        [
            f"{start} to {end - 1}",
            with_error(mean, error, change=True),
            number(tokens),
        ]
        for start, end, mean, error, tokens in zip(
            edges,
            edges[1:],
            positions.get("difference", []),
            positions.get("standard_error", []),
            positions.get("tokens", []),
            strict=False,
        )
    ]
    if rows:
        columns = ["position in the document", f"difference ({UNIT})", "tokens"]
        yield Table(columns, rows, "By position, ± standard error over documents", opened=False)


def _documents(documents: Sequence[Mapping[str, Any]]) -> Iterator[Block]:
    rows = [
        [
            str(entry["document"]),
            visible(entry["source"]),
            signed(entry["difference"]),
            number(entry["tokens"]),
        ]
        for entry in documents
    ]
    if rows:
        columns = ["document", "source", f"difference ({UNIT})", "tokens"]
        yield Table(columns, rows, "The documents that moved most", texts=frozenset({0, 1}), opened=False)


def _weights(weights: Mapping[str, Any]) -> Iterator[Block]:
    """Where the parameters moved."""
    label = "relative change ‖after − before‖ / ‖before‖"
    if weights.get("change") and plots.unavailable() is None:
        yield Picture(
            plots.heat(weights["modules"], weights["layers"], weights["change"], label),
            f"Where the parameters moved: {label}, by module and layer.",
        )
    rows = [[visible(name), number(ratio, 5)] for name, ratio in (weights.get("outside") or {}).items()]
    rows += [
        [f"{visible(name)}, layer {layer}", number(ratio, 5)]
        for name, ratios in zip(weights.get("modules", []), weights.get("change", []), strict=True)
        for layer, ratio in zip(weights["layers"], ratios, strict=True)
    ]
    if rows:
        yield Table(["module", label], rows, "Every module's relative change", opened=False)
    odd = [
        f"{what}: {', '.join(map(visible, weights[part]))}."
        for part, what in (("reshaped", "Of another shape"), ("missing", "In one of the two alone"))
        if weights.get(part)
    ]
    if odd:
        yield Prose(" ".join(odd))


def findings(found: Mapping[str, Any]) -> list[str]:
    """What the differences say, in sentences."""
    share = (found.get("concentration") or {}).get("0.01")
    if share is None:
        return []
    return [
        f"The hundredth of the tokens that moved most has {percent(share)} of all that moved (sum of |difference|)."
    ]
