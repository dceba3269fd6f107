"""What a page is made of: sections of tables, pictures, texts. The template has one macro for each kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from .text import signed, token, visible


@dataclass(frozen=True)
class Table:
    """Figures or texts in rows; the first column names them.

    Attributes:
        columns: the heads, with units.
        rows: cells, as they are shown.
        caption: what they are.
        texts: the columns that hold texts, which are set from the left.
        opened: False for a long table, which is folded.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    texts: frozenset[int] = frozenset({0})
    opened: bool = True
    kind: str = field(default="table", init=False)


@dataclass(frozen=True)
class Picture:
    """A plot.

    Attributes:
        svg: the picture.
        caption: what it shows, with units; also what is read aloud in its place.
    """

    svg: str
    caption: str
    kind: str = field(default="picture", init=False)


@dataclass(frozen=True)
class Prose:
    """A paragraph."""

    text: str
    kind: str = field(default="prose", init=False)


@dataclass(frozen=True)
class Listing:
    """Text as it was written, folded under a title."""

    title: str
    text: str
    kind: str = field(default="listing", init=False)


@dataclass(frozen=True)
class Completions:
    """A prompt with what was written after it.

    Attributes:
        prompt: the text.
        source: where it comes from, or "".
        entries: (name, text).
    """

    prompt: str
    source: str
    entries: Sequence[tuple[str, str]]
    kind: str = field(default="completions", init=False)


@dataclass(frozen=True)
class Colored:
    """A document whose tokens have the colours of their changes.

    Attributes:
        title: which document it is.
        spans: (text, class of the colour, change in words) of each token.
    """

    title: str
    spans: Sequence[tuple[str, str, str]]
    kind: str = field(default="colored", init=False)


Block = Table | Picture | Prose | Listing | Completions | Colored


@dataclass(frozen=True)
class Section:
    """A part of the page under a heading."""

    title: str
    blocks: Sequence[Block]

    @property
    def anchor(self) -> str:
        """Its id in the page."""
        return "".join(c if c.isascii() and c.isalnum() else "-" for c in self.title.lower())


#: Changes, in nats, up to which a token has a paler colour.
STEPS = (0.1, 0.5, 1.0, 2.0, 4.0)


def colored(title: str, tokens: Sequence[str], changes: Sequence[float | str], left_out: int) -> Colored:
    """A document token by token: orange where the loss rose, blue where it fell, deeper by `STEPS`."""
    spans = []
    for text, change in zip(tokens, changes, strict=True):
        value = float(change)  # JSON has words for numbers that are not finite
        depth = len(STEPS) - sum(abs(value) < step for step in STEPS)
        color = f"{'d' if value < 0 else 'u'}{depth}" if depth else ""
        spans.append((visible(text, lines=True), color, f"{token(text)} {signed(value)}"))
    more = [(f" … {left_out} more tokens", "", "")] if left_out else []
    return Colored(title, [*spans, *more])
