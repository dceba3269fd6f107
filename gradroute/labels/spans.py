"""Masks of tokens by the characters that they stand for: spans of a text and the offsets of its tokenizer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar, cast, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .arguments import Values, as_integers, check_range, check_row, on_host
from .wanted import Integers, Wanted, check_flag, spans_of

Group = TypeVar("Group")

# Whether a character is white space, by its code point; the last entry is for all beyond, of which none is.
LAST_SPACE = 0x3000
SPACES = np.array([chr(code).isspace() for code in range(LAST_SPACE + 2)])


@overload
def match_spans(
    texts: str | Sequence[str],
    offsets: Values,
    wanted: Mapping[Group, Wanted],
    *,
    ignore_case: bool = False,
    whole_words: bool = True,
    whole_tokens: bool = False,
    sample_mapping: Values | None = None,
) -> dict[Group, Tensor]: ...


@overload
def match_spans(
    texts: str | Sequence[str],
    offsets: Values,
    wanted: Wanted,
    *,
    ignore_case: bool = False,
    whole_words: bool = True,
    whole_tokens: bool = False,
    sample_mapping: Values | None = None,
) -> Tensor: ...


def match_spans(
    texts: str | Sequence[str],
    offsets: Values,
    wanted: Mapping[Group, Wanted] | Wanted,
    *,
    ignore_case: bool = False,
    whole_words: bool = True,
    whole_tokens: bool = False,
    sample_mapping: Values | None = None,
) -> Tensor | dict[Group, Tensor]:
    r"""Marks the tokens of some characters of their texts: a regular expression's matches, words, or spans.

    It looks at the text and not at the vocabulary, and so finds a word wherever it stands and however its tokens are
    cut. The offsets are those of any fast tokenizer: `tokenizer(texts, return_offsets_mapping=True)["offset_mapping"]`
    of transformers, `Encoding.offsets` of `tokenizers`.

    A token is marked where it has a character with a span in common. White space that a token begins with does not
    count, because byte-level tokenizers put the space before a word into its token: a span that ends before or after
    that space does not mark the next word. Tokens of white space alone are marked as all others are. Tokens without
    characters, such as special tokens and padding, which have the offsets (0, 0), are never marked. Where several
    tokens share one character, as bytes of an emoji do, all of them are marked.

    The work is done on the host, which waits for offsets that are on a device.

    Args:
        texts: the text, or a list of texts, as they were given to the tokenizer.
        offsets: integers `[*, S, 2]`, where the characters of each token start and end in its text: `[S, 2]` or
            `[B, S, 2]`. With one text, all rows are windows of it; with a list, row b belongs to `texts[b]`.
        wanted: what to mark in the texts:

            - a regular expression, a string or compiled: its matches;
            - a list of words or phrases; white space inside a phrase stands for any white space;
            - spans of characters, integers `[n, 2]` with start and end, for one text; for a list of texts, one such
              list for each; they may overlap, and empty ones mark nothing;
            - a mapping from groups (routes or names) to any of these.
        ignore_case: whether a regular expression given as a string, or words, also match in upper or lower case.
        whole_words: whether words are found only where no letter, digit or underscore stands right before or after
            them, as `\b` of regular expressions says. Languages that do not put spaces between words need False.
        whole_tokens: whether only tokens are marked that lie in spans as a whole.
        sample_mapping: integers `[B]`, the text of each row, `overflow_to_sample_mapping` of transformers.

    Returns:
        bool `[*, S]` on the offsets' device; for a mapping, a dict of such masks in its order, as `prioritise` takes.

    Raises:
        TypeError: texts that are not strings, offsets or spans that are not integers, another kind of `wanted`, options
            that are not bools.
        ValueError: no offsets, as slow tokenizers have none; offsets or spans that leave their text, or end before they
            start; offsets that go back, as those of text pairs do; another number of rows than texts; a regular
            expression that is none; no words, or an empty one; options that do not go with what is wanted.
    """
    check_flag("ignore_case", ignore_case)
    check_flag("whole_words", whole_words)
    check_flag("whole_tokens", whole_tokens)
    texts = _texts(texts)
    listed = [texts] if isinstance(texts, str) else texts
    bounds = np.cumsum([0, *map(len, listed)], dtype=np.int64)
    given = _offsets(offsets)
    rows = _row_texts(texts, len(listed), given, sample_mapping)
    starts, stops = _characters(given, rows, bounds)
    codes = _codes("".join(listed))

    def mask(name: str, value: Wanted) -> Tensor:
        spans = spans_of(name, value, texts, ignore_case=ignore_case, whole_words=whole_words)
        of_text = np.repeat(bounds[:-1], [len(of_one) for of_one in spans])
        spans_of_all = np.concatenate([np.zeros((0, 2), dtype=np.int64), *spans]) + of_text[:, None]
        marked = _marked(codes, starts, stops, spans_of_all, whole_tokens)
        return torch.from_numpy(marked).view(given.shape[:-1]).to(given.device)

    if not isinstance(wanted, Mapping):
        return mask("wanted", wanted)
    if not wanted:
        raise ValueError("wanted: got an empty mapping, expected at least one group")
    return {group: mask(f"wanted[{group!r}]", value) for group, value in wanted.items()}


def _texts(texts: object) -> str | list[str]:
    if isinstance(texts, str):
        return texts
    if isinstance(texts, Mapping) or not isinstance(texts, Iterable):
        raise TypeError(f"texts: got a {type(texts).__name__}, expected a string or a list of strings")
    listed = list(texts)
    for index, text in enumerate(listed):
        if not isinstance(text, str):
            raise TypeError(f"texts[{index}]: got a {type(text).__name__}, expected a string")
    return listed


def _offsets(offsets: object) -> Tensor:
    """The offsets as integers `[*, S, 2]`."""
    if offsets is None:
        raise ValueError(
            "offsets: got None, expected where the characters of each token are, as a fast tokenizer says with "
            "return_offsets_mapping=True; a slow one cannot: load it with use_fast=True, or label by "
            "match_ngrams(input_ids, token_sequences(tokenizer, words))"
        )
    if isinstance(offsets, Mapping):
        raise TypeError(f"offsets: got a {type(offsets).__name__}, expected its 'offset_mapping'")
    if isinstance(offsets, (list, tuple)):
        if not offsets:
            return torch.zeros(0, 2, dtype=torch.int64, device="cpu")
        sizes = {len(row) for row in offsets if isinstance(row, (list, tuple))}
        if len(sizes) > 1:
            raise ValueError(
                f"offsets: got rows of {min(sizes)} to {max(sizes)} tokens, expected rows of one length: pad them "
                "(padding=True), or call match_spans for one text after the other"
            )
        if sizes == {0}:
            return torch.zeros(len(offsets), 0, 2, dtype=torch.int64, device="cpu")
    given = as_integers("offsets", cast(Values, offsets))
    if given.dim() < 2 or given.shape[-1] != 2:
        raise ValueError(
            f"offsets: got shape {list(given.shape)}, expected [S, 2] or [B, S, 2], start and end of each token"
        )
    return given


def _row_texts(texts: str | list[str], number: int, given: Tensor, sample_mapping: Values | None) -> Integers:
    """The index of the text that each row of the offsets belongs to, `[rows]`."""
    rows = math.prod(given.shape[:-2])
    if sample_mapping is not None:
        mapping = on_host("sample_mapping", as_integers("sample_mapping", sample_mapping)).long()
        check_row("sample_mapping", mapping, rows, "one for each row of the offsets")
        check_range("sample_mapping", mapping, number, "number of texts")
        return mapping.numpy()
    if isinstance(texts, str):
        return np.zeros(rows, dtype=np.int64)
    if given.dim() != 3 or rows != number:
        raise ValueError(
            f"offsets: got shape {list(given.shape)} for a list of {number} texts, expected [{number}, S, 2]; windows "
            "of long texts need sample_mapping, the tokenizer's overflow_to_sample_mapping"
        )
    return np.arange(number)


def _characters(given: Tensor, rows: Integers, bounds: Integers) -> tuple[Integers, Integers]:
    """Where each token starts and ends in all texts end to end, `[*tokens]` flat, checked."""
    starts, stops = (
        on_host("offsets", given).long().reshape(len(rows), given.shape[-2], 2).numpy().transpose(2, 0, 1)
    )
    ends = np.diff(bounds)[rows][:, None]
    _check_offsets(given, (starts >= 0) & (starts <= stops), "a start of 0 or more, and no end before it")
    _check_offsets(given, stops <= ends, "no end beyond its text: are these the texts' own offsets?")
    last = np.maximum.accumulate(np.where(stops > starts, starts, 0), axis=1)
    _check_offsets(
        given,
        (starts >= last) | (starts == stops),
        "no token before the one ahead of it: offsets of one text a row, not of pairs, words or packed texts",
    )
    begins = bounds[:-1][rows][:, None]
    return (starts + begins).reshape(-1), (stops + begins).reshape(-1)


def _check_offsets(given: Tensor, valid: npt.NDArray[np.bool_], expected: str) -> None:
    if not valid.all():
        token = np.unravel_index(int(valid.reshape(-1).argmin()), tuple(given.shape[:-1]))
        place = [int(index) for index in token]
        raise ValueError(
            f"offsets: got {tuple(given[tuple(place)].tolist())} at {place}, expected {expected}"
        )


def _codes(text: str) -> npt.NDArray[np.unsignedinteger[Any]]:
    """The code points of a text's characters."""
    if text.isascii():  # a quarter of the memory
        return np.frombuffer(text.encode("ascii"), dtype=np.uint8)
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def _merged(spans: Integers) -> tuple[Integers, Integers]:
    """The starts and stops of spans, ascending, where those that overlap or touch are one and empty ones are gone."""
    spans = spans[spans[:, 0] < spans[:, 1]]
    starts, stops = spans[np.argsort(spans[:, 0], kind="stable")].T
    reached = np.maximum.accumulate(stops)
    begins = np.ones(len(starts), dtype=bool)
    begins[1:] = starts[1:] > reached[:-1]
    ends = np.roll(begins, -1)  # the last one ends, as the first one begins
    return starts[begins], reached[ends]


def _marked(
    codes: npt.NDArray[np.unsignedinteger[Any]],
    starts: Integers,
    stops: Integers,
    spans: Integers,
    whole_tokens: bool,
) -> npt.NDArray[np.bool_]:
    """Whether each token `[T]` has characters in spans `[n, 2]`, or all of them; leading white space does not count."""
    begins, ends = _merged(spans)
    marked = np.zeros(len(starts), dtype=bool)
    if not len(begins):
        return marked
    # Few of 10M tokens are near a span, and only their characters are looked at.
    near = np.flatnonzero(_meets(begins, ends, starts, stops))
    stops = stops[near]
    starts = _without_leading_space(codes, starts[near], stops)
    marked[near] = _meets(begins, ends, starts, stops)
    if whole_tokens:
        first = np.searchsorted(ends, starts, side="right").clip(max=len(ends) - 1)
        marked[near] &= (begins[first] <= starts) & (stops <= ends[first])
    return marked


def _meets(begins: Integers, ends: Integers, starts: Integers, stops: Integers) -> npt.NDArray[np.bool_]:
    """Whether tokens have characters in common with spans that ascend and do not touch."""
    first = np.searchsorted(ends, starts, side="right")  # the first span that ends behind the token's start
    behind_all = np.iinfo(np.int64).max
    return (np.append(begins, behind_all)[first] < stops) & (starts < stops)


def _without_leading_space(
    codes: npt.NDArray[np.unsignedinteger[Any]], starts: Integers, stops: Integers
) -> Integers:
    """Where each token's first character is that is no white space, or its start if there is none, `[T]`."""
    inner = starts.copy()
    left = np.flatnonzero(starts < stops)
    while len(left):  # as often as the longest token of white space has characters
        code = codes[inner[left]].astype(np.int64).clip(max=LAST_SPACE + 1)
        left = left[SPACES[code]]
        inner[left] += 1
        left = left[inner[left] < stops[left]]
    return np.where(inner < stops, inner, starts)
