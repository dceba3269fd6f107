"""A summary of labels: the share of each route, and examples in context."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ..routes import MAX_ROUTES
from .arguments import (
    Values,
    as_bounds,
    as_integers,
    as_tensor,
    check_int,
    check_like,
    check_range,
    on_host,
)

if TYPE_CHECKING:
    from rich.table import Table


class Tokenizer(Protocol):
    """A tokenizer of transformers or of `tokenizers`, as far as it writes text."""

    def decode(self, ids: Any, /, skip_special_tokens: bool = ...) -> Any:
        """The text of token ids."""


@dataclass(frozen=True)
class Summary:
    """How many tokens take each route, with examples. `str` makes a plain table of it, rich prints a richer one.

    Attributes:
        names: `[R]`, the names of the routes.
        counts: `[R]`, how many tokens take each route.
        examples: `[R]`, for each route some of its runs of tokens, in [brackets] between the tokens around them.
    """

    names: tuple[str, ...]
    counts: tuple[int, ...]
    examples: tuple[tuple[str, ...], ...]

    @property
    def shares(self) -> tuple[float, ...]:
        """The share of the tokens of each route `[R]`; zeros where there are no tokens."""
        total = max(sum(self.counts), 1)
        return tuple(count / total for count in self.counts)

    def as_dict(self) -> dict[str, Any]:
        """The summary for JSON: "tokens", and for each route "route", "name", "tokens", "share" and "examples"."""
        rows = zip(self.names, self.counts, self.shares, self.examples, strict=True)
        routes = [
            {"route": route, "name": name, "tokens": count, "share": share, "examples": list(examples)}
            for route, (name, count, share, examples) in enumerate(rows)
        ]
        return {"tokens": sum(self.counts), "routes": routes}

    def _cells(self) -> list[tuple[str, str, str, str]]:
        rows = zip(self.names, self.counts, self.shares, strict=True)
        return [(str(route), *_cells_of(*row)) for route, row in enumerate(rows)]

    def __str__(self) -> str:
        lines = [("route", "name", "tokens", "share"), *self._cells()]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = []
        for line, examples in zip(lines, ((), *self.examples), strict=True):
            route, name, tokens, share = (
                cell.ljust(width) if place < 2 else cell.rjust(width)
                for place, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            text.append(f"{route}  {name}  {tokens}  {share}")
            text += [f"    {example}" for example in examples]
        return "\n".join(text)

    def __rich__(self) -> Table:
        from rich.table import Table
        from rich.text import Text

        table = Table("route", "name")
        table.add_column("tokens", justify="right")
        table.add_column("share", justify="right")
        table.add_column("examples")
        for (route, name, tokens, share), examples in zip(self._cells(), self.examples, strict=True):
            # Text, not str: rich would read the brackets as markup.
            table.add_row(route, Text(name), tokens, share, Text("\n".join(examples)))
        return table


def _cells_of(name: str, count: int, share: float) -> tuple[str, str, str]:
    return name, f"{count:,}", f"{share:.2%}"


def summarize(
    ids: Values,
    routes: int | Sequence[str],
    input_ids: Values | None = None,
    tokenizer: Tokenizer | None = None,
    examples: int = 3,
    context: int = 6,
    cu_seqlens: Values | None = None,
) -> Summary:
    """How many tokens take each route, with examples of them. The host waits for the device.

    Args:
        ids: integers or bools `[*tokens]`, each in `[0, R)`.
        routes: R, or the routes' names.
        input_ids: integers `[*tokens]`, the tokens: without them there are no examples.
        tokenizer: one of transformers or `tokenizers`, to write the examples as text; without it, as token ids.
        examples: how many examples each route has at the most, evenly spread over its runs.
        context: how many tokens are shown before a run, of the run, and after it, at the most and in the same row.
        cu_seqlens: integers `[documents + 1]` from 0 to T, the bounds of the documents in one packed row: examples then
            keep to their document.

    Raises:
        TypeError: ids that are not integers, names that are not strings.
        ValueError: ids out of range; two routes of one name; `input_ids` of another shape, or none of them beside
            `tokenizer` or `cu_seqlens`; negative numbers; `cu_seqlens` as in `match_ngrams`.
    """
    given = as_tensor("ids", ids)
    route_ids = on_host("ids", given.long() if given.dtype == torch.bool else as_integers("ids", given))
    names = _names(routes)
    check_range("ids", route_ids, len(names), "number of routes")
    check_int("examples", examples, 0)
    check_int("context", context, 1)
    counts = torch.bincount(route_ids.reshape(-1), minlength=len(names)).tolist()
    if input_ids is None and (tokenizer is not None or cu_seqlens is not None):
        name = "tokenizer" if tokenizer is not None else "cu_seqlens"
        raise ValueError(f"{name}: got one without input_ids, expected None: examples are made of input_ids")
    shown: tuple[tuple[str, ...], ...] = ((),) * len(names)
    if input_ids is not None:
        tokens = on_host("input_ids", as_integers("input_ids", input_ids))
        check_like("input_ids", tokens, "ids", route_ids)
        bounds = _row_bounds(route_ids) if cu_seqlens is None else as_bounds(cu_seqlens, route_ids)
        write = _writer(tokenizer)
        shown = tuple(
            tuple(_example(tokens, run, context, write) for run in runs)
            for runs in _chosen_runs(route_ids.reshape(-1).long(), bounds, len(names), examples)
        )
    return Summary(names, tuple(counts), shown)


def _names(routes: int | Sequence[str]) -> tuple[str, ...]:
    if isinstance(routes, (int, np.integer)):
        return tuple(f"route {route}" for route in range(check_int("routes", routes, 1, MAX_ROUTES)))
    if (
        isinstance(routes, str)
        or not isinstance(routes, Sequence)
        or not all(isinstance(name, str) for name in routes)
    ):
        raise TypeError(f"routes: got {routes!r}, expected the number of routes, or their names")
    check_int("routes, their number", len(routes), 1, MAX_ROUTES)
    if len(set(routes)) < len(routes):
        raise ValueError(f"routes: got {routes!r}, expected different names")
    return tuple(routes)


def _row_bounds(ids: Tensor) -> Tensor:
    """The places where the rows of ids start and the last one ends, in the form of `cu_seqlens`."""
    return torch.arange(0, ids.numel() + 1, max(ids.shape[-1] if ids.dim() else 1, 1), device="cpu")


class _Run(NamedTuple):
    """Tokens side by side with one route, and the row or document they are in, by flat positions."""

    start: int
    stop: int
    row_start: int
    row_stop: int


def _chosen_runs(ids: Tensor, bounds: Tensor, num_routes: int, number: int) -> list[list[_Run]]:
    """For each route, `number` evenly spread runs in flat ids `[T]`; no run crosses one of the bounds."""
    begins = torch.ones_like(ids, dtype=torch.bool)
    begins[1:] = ids[1:] != ids[:-1]
    begins[bounds[bounds < len(ids)]] = True
    starts = begins.nonzero().squeeze(1)
    stops = torch.cat((starts[1:], starts.new_full((1,), len(ids))))
    of_runs = ids[starts]
    order = of_runs.sort(stable=True)[1]
    chosen, before = [], 0
    for count in torch.bincount(of_runs, minlength=num_routes).tolist():
        shown = min(number, count)
        run = order[[before + place * count // shown for place in range(shown)]]
        row = torch.searchsorted(bounds, starts[run], right=True)
        places = torch.stack((starts[run], stops[run], bounds[row - 1], bounds[row]), dim=1)
        chosen.append([_Run(*place) for place in places.tolist()])
        before += count
    return chosen


def _example(tokens: Tensor, run: _Run, context: int, write: Callable[[list[int]], str]) -> str:
    """A run in its context: "… was a [tree] on the …"."""
    flat = tokens.reshape(-1)
    first, last = max(run.row_start, run.start - context), min(run.row_stop, run.stop + context)
    shown = min(run.stop, run.start + context)
    if shown < run.stop:
        last = shown  # a long run is shown without its end, so that nothing follows
    texts = [write(flat[first:stop].tolist()) for stop in (run.start, shown, last)]
    if not (texts[1].startswith(texts[0]) and texts[2].startswith(texts[1])):
        texts = [
            write(flat[a:b].tolist()) for a, b in ((first, run.start), (run.start, shown), (shown, last))
        ]
        before, inside, after = texts
    else:
        # The run is written together with the tokens before it: many tokenizers would drop its leading space.
        before, inside, after = texts[0], texts[1][len(texts[0]) :], texts[2][len(texts[1]) :]
    core = inside.lstrip(" ")
    text = f"{before}{inside[: len(inside) - len(core)]}[{core}]{after}"
    text = ("… " if first > run.row_start else "") + text + (" …" if last < run.row_stop else "")
    return text.replace("\n", "\\n").replace("\r", "\\r")


def _writer(tokenizer: Tokenizer | None) -> Callable[[list[int]], str]:
    if tokenizer is None:
        return lambda tokens: "".join(f" {token}" for token in tokens)
    if not callable(getattr(tokenizer, "decode", None)):
        raise TypeError(
            f"tokenizer: got a {type(tokenizer).__name__}, expected a tokenizer of transformers or a "
            "tokenizers.Tokenizer"
        )
    return lambda tokens: tokenizer.decode(tokens, skip_special_tokens=False) if tokens else ""
