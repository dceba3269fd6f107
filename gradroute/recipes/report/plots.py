"""Plots as SVG that stands inside a page: in its font, and in its colours whether they are light or dark."""

from __future__ import annotations

import importlib.util
import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .text import shortened, visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Picture

#: Okabe and Ito's colours, which people with all kinds of sight tell apart; those that are seen on white and on black.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#7f7f7f")
MARKERS = "os^Dv<>P"
#: It stands for the colour of the page's text, which SVG calls currentColor.
_TEXT_COLOR = "#010203"
_WIDTH, _HEIGHT = 7.2, 3.3
_MOST = 28  # characters of a name

Point = tuple[float, float, float | None]  # x, y, the standard error of y


def unavailable() -> str | None:
    """Why there are no plots; None: there are."""
    if importlib.util.find_spec("matplotlib") is None:
        return "matplotlib is not installed: pip install 'gradroute[recipes]'"
    return None


def bars(groups: Mapping[str, Mapping[str, tuple[float, float | None]]], unit: str) -> str:
    """Bars with standard errors, side by side: group → name → (value, error)."""
    names = list(dict.fromkeys(name for values in groups.values() for name in values))

    def draw(axes: Axes) -> None:
        width = 0.8 / max(1, len(groups))
        for at, (group, values) in enumerate(groups.items()):
            places = [names.index(name) + (at - (len(groups) - 1) / 2) * width for name in values]
            axes.bar(
                places,
                [value for value, _ in values.values()],
                width,
                yerr=[error or 0.0 for _, error in values.values()],
                color=COLORS[at % len(COLORS)],
                ecolor=_TEXT_COLOR,
                label=_named(group),
                capsize=2,
            )
        axes.set_xticks(range(len(names)), [_named(name) for name in names])
        axes.set_ylabel(unit)

    return _svg([draw], legend=True)


def lines(
    panels: Mapping[str, Mapping[str, Sequence[Point]]],
    x_label: str,
    y_label: str,
    levels: Mapping[str, Mapping[str, float]] | None = None,
) -> str:
    """Lines with bands of one standard error, a panel each: panel → line → points; `levels`: panel → name → height."""
    order = list(dict.fromkeys(name for curves in panels.values() for name in curves))

    def panel(title: str, curves: Mapping[str, Sequence[Point]]) -> Callable[[Axes], None]:
        def draw(axes: Axes) -> None:
            for name, points in curves.items():
                at = order.index(name)
                x, y, errors = zip(*points, strict=True)
                color = COLORS[at % len(COLORS)]
                marker = MARKERS[at % len(MARKERS)] if len(points) < 40 else None
                axes.plot(x, y, color=color, marker=marker, markersize=4, label=_named(name))
                if all(error is not None for error in errors):
                    low, high = ([a + s * b for a, b in zip(y, errors, strict=True)] for s in (-1, 1))
                    axes.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
            for name, height in (levels or {}).get(title, {}).items():
                axes.axhline(height, color=_TEXT_COLOR, linestyle=":", linewidth=1, label=_named(name))
            axes.set_title(_named(title), fontsize=10)
            axes.set_xlabel(x_label)
            axes.set_ylabel(y_label)

        return draw

    return _svg([panel(title, curves) for title, curves in panels.items()], legend=True)


def histogram(edges: Sequence[float], counts: Mapping[str, Sequence[int]], x_label: str) -> str:
    """Shares of tokens by value, a line a source, on a logarithmic scale."""

    def draw(axes: Axes) -> None:
        for at, (source, values) in enumerate(counts.items()):
            total = sum(values) or 1
            axes.stairs(
                [value / total for value in values],
                edges,
                color=COLORS[at % len(COLORS)],
                label=_named(source),
            )
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")  # not a formula, which texts are not read as
        axes.yaxis.set_minor_formatter("")
        axes.axvline(0, color=_TEXT_COLOR, linewidth=0.6)
        axes.set_xlabel(x_label)
        axes.set_ylabel("share of tokens")

    return _svg([draw], legend=True)


def heat(
    rows: Sequence[str], columns: Sequence[int], values: Sequence[Sequence[float | None]], label: str
) -> str:
    """A map of values by row and column."""
    import numpy as np

    def draw(axes: Axes) -> None:
        grid = np.array(
            [[np.nan if value is None else value for value in row] for row in values], dtype=float
        )
        shown = axes.pcolormesh(
            np.arange(len(columns) + 1), np.arange(len(rows) + 1), grid, cmap="viridis", vmin=0
        )
        axes.set_yticks(np.arange(len(rows)) + 0.5, [_named(name) for name in rows], fontsize=7)
        every = max(1, len(columns) // 16)
        axes.set_xticks(np.arange(len(columns))[::every] + 0.5, [str(number) for number in columns[::every]])
        axes.invert_yaxis()
        axes.set_xlabel("layer")
        bar = axes.figure.colorbar(shown, ax=axes)
        bar.set_label(label)
        bar.outline.set_visible(False)

    return _svg([draw], legend=False, height=max(_HEIGHT, 0.22 * len(rows) + 1))


def _named(text: str) -> str:
    return shortened(visible(text), _MOST)


def _svg(drawings: Sequence[Callable[[Axes], None]], *, legend: bool, height: float = _HEIGHT) -> str:
    """One picture of panels below each other, two beside each other."""
    import matplotlib
    from matplotlib.figure import Figure

    columns = min(2, len(drawings))
    rows = -(-len(drawings) // columns)
    with matplotlib.rc_context(_style()), warnings.catch_warnings():
        # The page's fonts have the letters; matplotlib's own only measures them.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        picture = Figure(figsize=(_WIDTH, height * rows), layout="constrained")
        for at, draw in enumerate(drawings):
            axes = picture.add_subplot(rows, columns, at + 1)
            draw(axes)
            axes.spines[["top", "right"]].set_visible(False)
        if legend:
            _legend(picture)
        buffer = io.StringIO()
        picture.savefig(buffer, format="svg", transparent=True, metadata=dict.fromkeys(_METADATA))
    return _embedded(buffer.getvalue())


_METADATA = ("Creator", "Date", "Format", "Type")


def _style() -> dict[str, Any]:
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": "gradroute",
        "font.family": "sans-serif",
        "font.size": 9,
        "text.parse_math": False,
        "axes.unicode_minus": True,
        **dict.fromkeys(
            ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _TEXT_COLOR
        ),
    }


def _legend(picture: Picture) -> None:
    """One legend for all panels, above them."""
    entries: dict[str, Any] = {}
    for axes in picture.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if entries:
        picture.legend(
            list(entries.values()),
            list(entries),
            loc="outside upper center",
            ncols=min(4, len(entries)),
            frameon=False,
            fontsize=8,
        )


def _embedded(svg: str) -> str:
    """An SVG without its prologue and metadata, whose ids are its own and whose text has the page's colour."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = body.replace(_TEXT_COLOR, "currentColor")
    return body.strip()


def with_own_ids(svg: str, prefix: str) -> str:
    """An SVG whose ids begin with a prefix, so that several can stand in one page."""
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'(xlink:href|href)="#', rf'\1="#{prefix}-', svg)
    return svg.replace("url(#", f"url(#{prefix}-")
