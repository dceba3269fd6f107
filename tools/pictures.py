"""Draws the pictures of the README and of docs/: `python tools/pictures.py [--check]` writes docs/pictures/*.svg.

Every picture comes twice, for a light and for a dark page. Colours mean the same in all of them: blue is route 0,
orange is route 1, and an empty cell is a gradient that a mask made zero. `--check` only compares.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

FOLDER = Path(__file__).parent.parent / "docs" / "pictures"
FONT = "-apple-system, 'Segoe UI', 'Noto Sans', Helvetica, Arial, 'DejaVu Sans', sans-serif"
MONO = "ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace"


class Theme(NamedTuple):
    """The colours of one kind of page."""

    name: str
    page: str
    text: str
    faint: str
    line: str
    neutral: str
    empty: str
    routes: tuple[str, str]
    on_route: str
    green: str


LIGHT = Theme(
    name="light",
    page="#ffffff",
    text="#1f2328",
    faint="#59636e",
    line="#c5ccd3",
    neutral="#9aa5b1",
    empty="#f6f8fa",
    routes=("#2f6fdb", "#e07b1f"),
    on_route="#ffffff",
    green="#1a7f4b",
)
DARK = Theme(
    name="dark",
    page="#0d1117",
    text="#e6edf3",
    faint="#9da7b1",
    line="#55606c",
    neutral="#6e7a87",
    empty="#161b22",
    routes=("#5b9bff", "#f0964a"),
    on_route="#0d1117",
    green="#4cc38a",
)


class Canvas:
    """Shapes on a page of one theme, in the order in which they were drawn."""

    def __init__(self, width: int, height: int, title: str, theme: Theme) -> None:
        self.theme = theme
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
            f'height="{height}" role="img" font-family="{FONT}">',
            f"<title>{escape(title)}</title>",
            f'<rect width="{width}" height="{height}" rx="10" fill="{theme.page}"/>',
        ]

    def text(
        self,
        x: float,
        y: float,
        words: str,
        *,
        size: float = 14,
        fill: str | None = None,
        anchor: str = "start",
        bold: bool = False,
        mono: bool = False,
    ) -> None:
        style = f' font-family="{MONO}"' if mono else ""
        style += ' font-weight="600"' if bold else ""
        colour = self.theme.text if fill is None else fill
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" fill="{colour}" text-anchor="{anchor}"{style}>'
            f"{escape(words)}</text>"
        )

    def lines(self, x: float, y: float, words: Sequence[str], *, step: float = 18, **style: object) -> None:
        for number, line in enumerate(words):
            self.text(x, y + number * step, line, **style)  # type: ignore[arg-type]

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        fill: str,
        *,
        stroke: str = "none",
        radius: float = 3,
        opacity: float = 1.0,
        dashed: bool = False,
    ) -> None:
        dashes = ' stroke-dasharray="4 3"' if dashed else ""
        self.parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}" fill="{fill}" '
            f'fill-opacity="{opacity:g}" stroke="{stroke}"{dashes}/>'
        )

    def arrow(
        self,
        points: Sequence[tuple[float, float]],
        colour: str | None = None,
        *,
        width: float = 1.6,
        dashed: bool = False,
    ) -> None:
        """A line through the points, with a head at the last one."""
        colour = self.theme.faint if colour is None else colour
        path = "M" + " L".join(f"{x:g} {y:g}" for x, y in points)
        dashes = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(
            f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="{width:g}"{dashes}/>'
        )
        self.head(points[-2], points[-1], colour)

    def curve(self, start: tuple[float, float], top: float, end: tuple[float, float], colour: str) -> None:
        """An arc over `top` with a head at its end, which it reaches from above."""
        (x0, y0), (x1, y1) = start, end
        path = f"M{x0:g} {y0:g} C{x0:g} {top:g} {x1:g} {top:g} {x1:g} {y1:g}"
        self.parts.append(f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.8"/>')
        self.head((x1, y1 - 10), end, colour)

    def head(self, before: tuple[float, float], tip: tuple[float, float], colour: str) -> None:
        (x0, y0), (x1, y1) = before, tip
        length = ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5
        dx, dy = (x1 - x0) / length, (y1 - y0) / length
        left = (x1 - 8 * dx + 4 * dy, y1 - 8 * dy - 4 * dx)
        right = (x1 - 8 * dx - 4 * dy, y1 - 8 * dy + 4 * dx)
        points = " ".join(f"{x:g},{y:g}" for x, y in ((x1, y1), left, right))
        self.parts.append(f'<polygon points="{points}" fill="{colour}"/>')

    def chip(self, x: float, y: float, route: int) -> None:
        """A route's number on its colour, centred."""
        self.box(x - 10, y - 10, 20, 20, self.theme.routes[route], radius=10)
        self.text(x, y + 4.5, str(route), size=12.5, fill=self.theme.on_route, anchor="middle", bold=True)

    def cell(self, x: float, y: float, size: float, colour: str | None, opacity: float = 1.0) -> None:
        """A filled cell, or with None an empty one."""
        inner = size - 4
        if colour is None:
            self.box(x, y, inner, inner, self.theme.empty, stroke=self.theme.line, dashed=True)
        else:
            self.box(x, y, inner, inner, colour, opacity=opacity)

    def svg(self) -> str:
        return "\n".join([*self.parts, "</svg>"]) + "\n"


TOKENS = ("the", "old", "oak", "tree", "by", "the", "mill")
IDS = (0, 0, 1, 1, 0, 0, 1)
UNITS, FORGET = 8, 2  # hidden units, and how many of them, the last ones, are route 1's
TABLE = ((1,) * (UNITS - FORGET) + (0,) * FORGET, (0,) * (UNITS - FORGET) + (1,) * FORGET)


def mask(theme: Theme) -> Canvas:
    """A mixed batch, forward, backward, and what has trained which weights."""
    canvas = Canvas(960, 372, "What a mask does to which gradient", theme)
    size, top = 24, 96
    x_tokens, x_forward, x_backward, x_weights = 24, 150, 438, 726

    canvas.text(x_tokens, 36, "A mixed batch", bold=True)
    canvas.text(x_tokens, 56, "each token", size=13, fill=theme.faint)
    canvas.text(x_tokens, 73, "has a route", size=13, fill=theme.faint)
    canvas.text(x_forward, 36, "Forward", bold=True)
    canvas.text(x_forward, 56, "the ordinary one,", size=13, fill=theme.faint)
    canvas.text(x_forward, 73, "bit for bit", size=13, fill=theme.faint)
    canvas.text(x_backward, 36, "Backward", bold=True)
    canvas.text(x_backward, 56, "each token’s gradient times", size=13, fill=theme.faint)
    canvas.text(x_backward, 73, "its route’s row of the table", size=13, fill=theme.faint)
    canvas.text(x_weights, 36, "What trains which weights", bold=True)
    canvas.text(x_weights, 56, "input weights of each unit:", size=13, fill=theme.faint)
    canvas.text(x_weights, 73, "route 1 trains the last two", size=13, fill=theme.faint)

    for t, (token, route) in enumerate(zip(TOKENS, IDS, strict=True)):
        y = top + t * size
        canvas.text(x_tokens, y + 15, token, size=14, mono=True)
        canvas.chip(x_tokens + 76, y + 10, route)
        for unit in range(UNITS):
            canvas.cell(x_forward + unit * size, y, size, theme.neutral)
            colour = theme.routes[route] if TABLE[route][unit] else None
            canvas.cell(x_backward + unit * size, y, size, colour)
    bottom = top + len(TOKENS) * size
    canvas.text(x_forward, bottom + 16, "hidden units →", size=12, fill=theme.faint)
    canvas.text(x_backward, bottom + 16, "hidden units →", size=12, fill=theme.faint)
    middle = top + len(TOKENS) * size / 2 - 2
    canvas.arrow([(x_forward + UNITS * size + 12, middle), (x_backward - 16, middle)])
    canvas.text(
        (x_forward + UNITS * size + x_backward - 4) / 2,
        middle - 8,
        "loss",
        size=12.5,
        fill=theme.faint,
        anchor="middle",
    )
    canvas.arrow([(x_backward + UNITS * size + 12, middle), (x_weights - 16, middle)])
    canvas.text(
        (x_backward + UNITS * size + x_weights - 4) / 2,
        middle - 8,
        "Σ tokens",
        size=12.5,
        fill=theme.faint,
        anchor="middle",
    )

    height = len(TOKENS) * size - 4
    for unit in range(UNITS):
        route = 0 if TABLE[0][unit] else 1
        canvas.box(x_weights + unit * size, top, size - 4, height, theme.routes[route])
    x_block = x_weights + (UNITS - FORGET) * size
    canvas.box(
        x_block - 4, top - 5, FORGET * size + 4, height + 10, "none", stroke=theme.text, radius=5, dashed=True
    )
    canvas.lines(
        x_weights + UNITS * size - 2,
        bottom + 18,
        ["ablate these two,", "keep the rest"],
        size=12.5,
        fill=theme.faint,
        anchor="end",
        step=16,
    )

    y = 318
    canvas.text(x_tokens, y + 6, "the table", size=14, bold=True)
    canvas.text(x_tokens, y + 25, "[routes, units]", size=12.5, fill=theme.faint)
    for route in range(2):
        canvas.chip(x_forward - 22, y + route * size + 8, route)
        for unit in range(UNITS):
            weight = TABLE[route][unit]
            canvas.cell(
                x_forward + unit * size, y + route * size - 2, size, theme.routes[route] if weight else None
            )
            fill = theme.on_route if weight else theme.faint
            canvas.text(
                x_forward + unit * size + 10,
                y + route * size + 13,
                str(weight),
                size=12.5,
                fill=fill,
                anchor="middle",
            )
    canvas.lines(
        x_backward,
        y + 8,
        [
            "Weights may be any numbers: 0, 1, 0.5, −0.75. An empty cell is a",
            "gradient of exactly zero. No mask [tokens, units] is ever stored.",
        ],
        size=13.5,
        fill=theme.faint,
        step=20,
    )
    return canvas


def table(theme: Theme) -> Canvas:
    """Ids and a table make a mask; a strength lies between route 0's row and the token's own."""
    canvas = Canvas(960, 296, "A mask is the table’s row of the token’s route", theme)
    size, top = 28, 92
    ids, weights = (0, 2, 1, 0, 1), ((1, 1, 1, 1, 1), (0, 0, 0, 1, 1), (-0.5, 1, 1, 0, 0))
    colours = (theme.routes[0], theme.routes[1], theme.green)

    def row(x: float, y: float, values: Sequence[float], colour: str) -> None:
        for feature, value in enumerate(values):
            at = x + feature * (size + 8)
            canvas.box(
                at,
                y,
                size + 4,
                size - 4,
                colour if value else theme.empty,
                stroke="none" if value else theme.line,
                opacity=max(abs(value), 0.35) if value else 1,
                dashed=not value,
            )
            fill = theme.faint if not value else theme.on_route if abs(value) > 0.6 else theme.text
            canvas.text(
                at + size / 2 + 2,
                y + 17,
                f"{value:g}".replace("-", "−"),
                size=12.5,
                fill=fill,
                anchor="middle",
            )

    def chip(x: float, y: float, route: int) -> None:
        canvas.box(x - 10, y - 10, 20, 20, colours[route], radius=10)
        canvas.text(x, y + 4.5, str(route), size=12.5, fill=theme.on_route, anchor="middle", bold=True)

    canvas.text(24, 36, "Routes", bold=True)
    canvas.text(24, 56, "ids [T]", size=13, fill=theme.faint)
    canvas.text(150, 36, "Table", bold=True)
    canvas.text(150, 56, "weights W [R, F]", size=13, fill=theme.faint)
    canvas.text(470, 36, "Mask", bold=True)
    canvas.text(470, 56, "m[t, f] = W[r_t, f], never stored", size=13, fill=theme.faint)
    canvas.text(730, 36, "Mask at strength 0.5", bold=True)
    canvas.text(730, 56, "halfway to the token’s own row", size=13, fill=theme.faint)
    for route, values in enumerate(weights):
        chip(160, top + route * size + 12, route)
        row(182, top + route * size, values, colours[route])
    for t, route in enumerate(ids):
        y = top + t * size
        canvas.text(24, y + 17, f"t = {t}", size=13, fill=theme.faint)
        chip(84, y + 12, route)
        chip(452, y + 12, route)
        row(470, y, weights[route], colours[route])
    canvas.arrow([(104, top + 12), (136, top + 12)])
    canvas.arrow([(372, top + 40), (426, top + 40)])
    canvas.arrow([(662, top + 40), (716, top + 40)])
    for t, route in enumerate(ids):
        y = top + t * size
        half = [(one + zero) / 2 for one, zero in zip(weights[route], weights[0], strict=True)]
        row(730, y, half, colours[route])
    canvas.lines(
        24,
        top + 5 * size + 26,
        [
            "Row 0 is the base route. A strength s, one a token or one for all, gives lerp(W[0, f], W[r_t, f], s):",
            "at 1 the token has the row of its own route, at 0 that of route 0.",
        ],
        size=13,
        fill=theme.faint,
    )
    return canvas


def sites(theme: Theme) -> Canvas:
    """The sites of an MLP, at the tensors whose gradient they mask."""
    canvas = Canvas(960, 330, "The sites of an MLP", theme)
    blue, orange, green = *theme.routes, theme.green
    y = 150
    nodes = ((40, "x"), (250, "a"), (430, "h"), (580, "z"), (868, "y"))
    ops = ((145, "W_in"), (340, "act"), (700, "W_out"))
    for (x0, _), (x1, _) in itertools.pairwise(nodes):
        canvas.arrow([(x0 + 18, y), (x1 - 20, y)], theme.neutral, width=2)
    for x, name in nodes:
        canvas.box(x - 17, y - 17, 34, 34, theme.empty, stroke=theme.neutral, radius=17)
        canvas.text(x, y + 5, name, size=15, anchor="middle", mono=True)
    for x, name in ops:
        canvas.box(x - 34, y - 20, 68, 40, theme.page, stroke=theme.text, radius=6)
        canvas.text(x, y + 5, name, size=14, anchor="middle", mono=True)
    canvas.text(
        24, 36, "x → a = x W_inᵀ + b → h = act(a) → z = m_forward ⊙ h → y = z W_outᵀ + b", size=14, mono=True
    )
    canvas.text(
        24,
        60,
        "Where the tables of MLPSites stand. A gated MLP has the same sites, with two branches before h.",
        size=13,
        fill=theme.faint,
    )

    def above(x: float, name: str, colour: str, what: str) -> None:
        canvas.text(x, y - 46, name, size=14, fill=colour, anchor="middle", mono=True, bold=True)
        canvas.text(x, y - 30, what, size=11.5, fill=theme.faint, anchor="middle")

    def below(x: float, name: str, what: str) -> None:
        canvas.arrow([(x, y + 24), (x, y + 44)], green)
        canvas.text(x, y + 62, name, size=14, fill=green, anchor="middle", mono=True, bold=True)
        canvas.text(x, y + 78, what, size=11.5, fill=theme.faint, anchor="middle")

    above(250, "pre", blue, "gradient of a")
    above(430, "hidden", blue, "gradient of h")
    above(580, "forward", orange, "h itself, and its gradient")
    above(868, "output", blue, "gradient of y")
    below(145, "update_in", "who updates W_in")
    below(700, "update_out", "who updates W_out")
    canvas.arrow([(868, y + 24), (868, y + 44)], green)
    canvas.text(868, y + 62, "update_output_bias", size=14, fill=green, anchor="middle", mono=True, bold=True)
    canvas.text(868, y + 78, "who updates its bias", size=11.5, fill=theme.faint, anchor="middle")
    canvas.text(430, y + 62, "update", size=14, fill=green, anchor="middle", mono=True, bold=True)
    canvas.text(430, y + 78, "both at once", size=11.5, fill=theme.faint, anchor="middle")
    canvas.arrow([(394, y + 58), (204, y + 58)], green, dashed=True)
    canvas.arrow([(466, y + 58), (638, y + 58)], green, dashed=True)

    legend = (
        (blue, "masks a gradient that flows on: earlier layers get it masked too"),
        (orange, "masks the activation in forward as well: the token does not see it"),
        (green, "masks what a weight learns; the gradient that flows on is untouched"),
    )
    for number, (colour, words) in enumerate(legend):
        canvas.box(24, 264 + number * 21 - 10, 12, 12, colour)
        canvas.text(44, 264 + number * 21, words, size=13)
    return canvas


def edges(theme: Theme) -> Canvas:
    """Causal attention, and which of its edges carry gradient."""
    canvas = Canvas(960, 340, "Edges: who may teach whom through attention", theme)
    ids, size, top = (0, 0, 1, 0, 1, 1), 30, 108
    table = ((1, 1), (0, 1))
    for x, title, words in (
        (96, "Forward: causal attention", "every query reads every earlier key"),
        (420, "Backward with these edges", "what a key and a value learn from a query"),
    ):
        canvas.text(x, 34, title, bold=True)
        canvas.text(x, 54, words, size=13, fill=theme.faint)
        for j, route in enumerate(ids):
            canvas.chip(x + j * size + 13, top - 18, route)
        canvas.text(x + len(ids) * size + 6, top - 13, "keys", size=12.5, fill=theme.faint)
        for i, route in enumerate(ids):
            canvas.chip(x - 18, top + i * size + 13, route)
            for j in range(i + 1):
                flows = x == 96 or table[route][ids[j]]
                colour = theme.neutral if x == 96 else theme.routes[route] if flows else None
                canvas.cell(x + j * size, top + i * size, size, colour)
        canvas.text(x - 28, top + len(ids) * size + 16, "queries ↑", size=12.5, fill=theme.faint)
    x, y = 720, 108
    canvas.text(x, 34, "The table [R, R]", bold=True)
    canvas.text(x, 54, "row: the query’s route", size=13, fill=theme.faint)
    canvas.text(x, 72, "column: the key’s route", size=13, fill=theme.faint)
    for route in range(2):
        canvas.chip(x + 40 + route * 40 + 13, y - 10, route)
        canvas.chip(x + 16, y + 18 + route * 36, route)
        for key in range(2):
            weight = table[route][key]
            at = x + 40 + key * 40
            canvas.box(
                at,
                y + 6 + route * 36,
                28,
                24,
                theme.routes[route] if weight else theme.empty,
                stroke="none" if weight else theme.line,
                dashed=not weight,
            )
            canvas.text(
                at + 14,
                y + 23 + route * 36,
                str(weight),
                size=13,
                fill=theme.on_route if weight else theme.faint,
                anchor="middle",
            )
    canvas.lines(
        x,
        y + 106,
        [
            "Queries of route 1 send no",
            "gradient to keys and values",
            "of route 0: their loss cannot",
            "reach those positions through",
            "attention.",
        ],
        size=13,
        fill=theme.faint,
        step=18,
    )
    return canvas


def position(theme: Theme) -> Canvas:
    """The loss of a routed token reaches earlier positions, where their own routes mask it."""
    canvas = Canvas(860, 316, "A route belongs to the position, not to the loss", theme)
    words = ("the", "recipe", "needs", "saffron", "threads")
    ids = (0, 0, 1, 1, 0)
    step, left, y = 150, 90, 196
    canvas.text(24, 34, "The loss of one token reaches earlier positions through attention", bold=True)
    canvas.text(
        24,
        54,
        "Each position masks what arrives there by its own route, whichever token’s loss it comes from.",
        size=13,
        fill=theme.faint,
    )
    for t, (word, route) in enumerate(zip(words, ids, strict=True)):
        x = left + t * step
        canvas.box(x - 54, y - 20, 108, 40, theme.empty, stroke=theme.routes[route], radius=8)
        canvas.text(x, y + 5, word, size=14.5, anchor="middle", mono=True)
        canvas.chip(x, y + 40, route)
        said = (
            "not masked by route 1",
            "not masked by route 1",
            "masked by route 1",
            "masked by route 1",
            "",
        )[t]
        canvas.text(x, y + 70, said, size=12, fill=theme.routes[route], anchor="middle")
    source = left + 3 * step
    canvas.text(source + 36, 96, "loss of a token of route 1", size=13, fill=theme.routes[1])
    canvas.arrow([(source, 104), (source, y - 24)], theme.routes[1], width=2)
    for t in (2, 1, 0):
        canvas.curve(
            (source - 4, y - 26),
            96 + 22 * t,
            (left + t * step, y - 24),
            theme.routes[1] if ids[t] else theme.routes[0],
        )
    canvas.text(
        24,
        y + 104,
        "Where this matters: label whole documents and keep them apart (cu_seqlens), or forbid it with edges.",
        size=13,
        fill=theme.faint,
    )
    return canvas


#: By the name of its files.
PICTURES: dict[str, Callable[[Theme], Canvas]] = {
    "mask": mask,
    "table": table,
    "sites": sites,
    "edges": edges,
    "position": position,
}


def drawn() -> dict[Path, str]:
    """The text of every file."""
    return {
        FOLDER / f"{name}-{theme.name}.svg": draw(theme).svg()
        for name, draw in PICTURES.items()
        for theme in (LIGHT, DARK)
    }


def main(check: bool) -> int:
    """Writes the pictures, or with `check` compares them: 1 where one differs."""
    differing = {
        file: text
        for file, text in drawn().items()
        if not file.exists() or file.read_text(encoding="utf-8") != text
    }
    for file, text in differing.items():
        if check:
            print(f"{file} differs: run `python tools/pictures.py`", file=sys.stderr)
        else:
            FOLDER.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
    return int(check and bool(differing))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--check", action="store_true", help="change nothing; exit code 1 when a file differs"
    )
    sys.exit(main(parser.parse_args().check))
