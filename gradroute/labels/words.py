"""The token sequences that words may be written as, found by writing them between neighbours."""

from __future__ import annotations

import string
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from ..arguments import shown
from .encoding import Encoder, Offsets
from .wanted import check_flag, check_word

# Punctuation of other scripts: quotes, inverted marks, dashes, dots; CJK brackets and stops; Arabic and Indic stops.
OTHER_PUNCTUATION = "“”‘’„‚«»‹›¡¿…–—‐·•" + "「」『』《》〈〉【】（）［］、。，．：；！？・" + "،؛؟।"  # noqa: RUF001
LINES = ("\n", "\r\n", "\t", "\n\n")
# Not the underscore, which is a letter to `\b` of regular expressions.
PUNCTUATION = string.punctuation.replace("_", "") + OTHER_PUNCTUATION
# Also behind a letter, because some tokenizers put a space in front of a text, and of punctuation at its start.
BEFORE = (*LINES, *PUNCTUATION, *("a" + mark for mark in (*LINES, *PUNCTUATION)))
AFTER = (" ", *LINES, *PUNCTUATION, "'s", "’s")
# Neighbours of more than one character, which sequences are not made of: they show whether those suffice.
PROBES = (
    ('("', '"'),
    ("(", ")."),
    ("**", "**"),
    ("--", "--"),
    ("\n\n", ".\n\n"),
    ("...", "..."),
    ("“", ",”"),
    (" (", ")"),
    (' "', '."'),
    ("the ", " of"),
    ("a ", ", and"),
    ("is ", "."),
    # WordPiece takes signs that are no punctuation for letters. "##tree" would find them, and every longer word too.
    ("€", ""),
    ("😀", ""),
)
CLOSING = dict(zip("([{<“‘«‹「『《〈【（［", ")]}>”’»›」』》〉】）］", strict=True))  # noqa: RUF001
MOST_SHOWN = 8  # spellings in a warning

Ids = tuple[int, ...]


def token_sequences(
    tokenizer: Any, words: Iterable[str], case_variants: bool = True, leading_space: bool = True
) -> list[tuple[int, ...]]:
    """The token sequences that words may be written as, for `match_ngrams`.

    A word is other tokens at a line's start or behind a bracket than behind a space, and which ones is the tokenizer's
    secret. So every word is encoded alone and behind a space, and then with each of about a hundred neighbours before
    and after it: ends of lines, tabs, ASCII punctuation, and punctuation of other scripts. The tokenizer's offsets say
    which tokens have characters of the word. Tokens that have a neighbour's characters too are taken with it; then
    pairs of neighbours are tried as well.

    What a sequence cannot say is where a word ends: one that is several tokens is also found where it begins or ends a
    longer word of the same tokens. Nor can it know what a tokenizer does that splits text neither at white space nor at
    punctuation: there a word may be merged with letters of the next one, in ways that none of these texts show and no
    warning names. `match_spans` looks at the text instead, and has none of these faults.

    A word takes about 10 ms of one core.

    Slow tokenizers of transformers have no offsets. With them, the tokens before a word are those of the neighbour
    alone, and what they merge, or drop, is not known.

    Args:
        tokenizer: a tokenizer of transformers, or a `tokenizers.Tokenizer`; no special tokens are added.
        words: words or phrases, at least one.
        case_variants: whether words are also written in lower case, in upper case, with the first letter of the phrase
            in upper case, and with the first letter of every word in upper case.
        leading_space: whether words are also written with a space before, which is another token in most vocabularies:
            " tree" inside a sentence, "tree" at its beginning.

    Returns:
        Each sequence once, in the order of the words, and for each word those alone and behind a space first. Forms
        with the tokenizer's unknown token are left out, because they would match everything else that the tokenizer
        does not know. Forms of which it drops characters, as a BPE without an unknown token does, are left out too,
        because they would match other words.

    Warns:
        RuntimeWarning: some spellings, which are named, have no sequence: those that are left out, and those that the
            tokenizer merges with their neighbours in more ways than were tried, as a tokenizer does that does not
            split text at punctuation or white space.

    Raises:
        TypeError: `words` is one string or has other things than strings; the tokenizer is none; options that are not
            bools.
        ValueError: no words, an empty word, or one that has no form which the tokenizer knows.
    """
    if isinstance(words, str):
        raise TypeError(f"words: got the string {words!r}, expected a list of words")
    if not isinstance(words, Iterable):
        raise TypeError(f"words: got {shown(words)}, expected a list of words")
    words = list(words)
    if not words:
        raise ValueError("words: got none, expected at least one")
    check_flag("case_variants", case_variants)
    check_flag("leading_space", leading_space)
    encode = Encoder(tokenizer)
    found: dict[Ids, None] = {}
    missed: dict[str, None] = {}
    for index, word in enumerate(words):
        check_word(f"words[{index}]", word)
        spellings = _Spellings.of(encode, _forms(word, case_variants), leading_space)
        if not spellings.sequences:
            raise ValueError(_no_form(f"words[{index}]", word, encode))
        found.update(spellings.sequences)
        missed.update(dict.fromkeys(spellings.missed()))
    if missed:
        _warn(list(missed))
    return list(found)


def _forms(word: str, case_variants: bool) -> list[str]:
    """The ways to write a word, each once, the word itself first."""
    forms = [word]
    if case_variants:
        titled = " ".join(part[:1].upper() + part[1:] for part in word.split(" "))
        forms += [word.lower(), word.upper(), word[:1].upper() + word[1:], titled]
    return list(dict.fromkeys(forms))


def _no_form(name: str, word: str, encode: Encoder) -> str:
    ids = encode(word).ids
    unknown = next((token for token in ids if token in encode.unknown), None)
    expected = (
        f"a word without its unknown token ({unknown})"
        if unknown is not None
        else "a word of which the tokenizer drops no characters"
    )
    return f"{name}: got {word!r}, which the tokenizer turns into {list(ids)}, expected {expected}"


def _warn(missed: list[str]) -> None:
    more = f" and {len(missed) - MOST_SHOWN} more" if len(missed) > MOST_SHOWN else ""
    warnings.warn(
        f"token_sequences: no sequence finds the spellings {', '.join(map(repr, missed[:MOST_SHOWN]))}{more}: the "
        "tokenizer writes them with its unknown token, drops characters of them, or merges them with their "
        "neighbours. match_spans finds words in every spelling, by the tokenizer's offsets",
        RuntimeWarning,
        stacklevel=3,
    )


class _Text(NamedTuple):
    """A form of a word between two neighbours."""

    before: str
    form: str
    after: str

    def __str__(self) -> str:
        return self.before + self.form + self.after

    def places(self, offsets: Offsets) -> list[int]:
        """The tokens that have characters of the form."""
        first, stop = len(self.before), len(self.before) + len(self.form)
        return [place for place, (a, b) in enumerate(offsets) if a < stop and b > first and a < b]

    def shares(self, start: int, stop: int) -> bool:
        """Whether some characters from start to stop are of a neighbour, and no white space."""
        after = max(stop - len(self.before) - len(self.form), 0)
        return bool(self.before[start:].strip() or self.after[:after].strip())


def _pairs(form: str, leading_space: bool) -> Iterator[_Text]:
    """A form between punctuation and white space, or two brackets, which only some tokenizers merge with it."""
    for mark in PUNCTUATION:
        yield _Text(mark, form, CLOSING.get(mark, mark))
        yield _Text(" " + mark, form, "")
        yield _Text(" " + mark, form, CLOSING.get(mark, mark))
        for space in ("", " ") if leading_space else ("",):
            yield _Text(space, form, mark + " ")
            yield _Text(space, form, mark + "\n")


class _Spellings(NamedTuple):
    """How a tokenizer writes a word.

    Attributes:
        encode: the tokenizer.
        sequences: the token sequences of the word.
        unread: for each form the texts that gave none.
        probes: texts that show whether the sequences suffice.
    """

    encode: Encoder
    sequences: dict[Ids, None]
    unread: dict[str, list[_Text]]
    probes: list[_Text]

    @classmethod
    def of(cls, encode: Encoder, forms: Sequence[str], leading_space: bool) -> _Spellings:
        spellings = cls(encode, {}, {form: [] for form in forms}, [])
        spaces = ("", " ") if leading_space else ("",)
        alone = [_Text(space, form, "") for space in spaces for form in forms]
        # A word that is given with white space has its neighbours there.
        inner = [form for form in forms if form == form.strip()]
        between = [_Text(before, form, "") for form in inner for before in BEFORE]
        between += [_Text(space, form, after) for form in inner for space in spaces for after in AFTER]
        if spellings.read([*alone, *between]):
            spellings.read([text for form in inner for text in _pairs(form, leading_space)])
        for form, unread in spellings.unread.items():
            if all(_Text(space, form, "") in unread for space in spaces):
                # One that is not known by itself is not known between neighbours either: it is named once.
                spellings.unread[form] = [_Text("", form, "")]
        probes = [probe for probe in PROBES if leading_space or not probe[0].endswith(" ")]
        spellings.probes.extend(_Text(before, form, after) for form in inner for before, after in probes)
        return spellings

    def read(self, texts: Iterable[_Text]) -> bool:
        """Collects the tokens of each text's form; says whether some token is shared with a neighbour but a space."""
        merges = False
        for text in texts:
            encoded = self.encode(str(text))
            tokens: list[Ids] = []
            if encoded.offsets is None:
                tokens = self._read_by_ids(text, encoded.ids)
            elif not encoded.drops:
                of_form = text.places(encoded.offsets)
                # A space, given or made up by the tokenizer, may be a token of its own, which belongs to the word.
                starts = (0, *of_form[:1]) if text.before in ("", " ") else of_form[:1]
                tokens = [encoded.ids] if text.before in ("", " ") and not text.after else []
                tokens += [encoded.ids[start : of_form[-1] + 1] for start in starts if of_form]
                if of_form and not merges:
                    merges = text.shares(encoded.offsets[of_form[0]][0], encoded.offsets[of_form[-1]][1])
            known = next((ids for ids in tokens if ids and self.encode.unknown.isdisjoint(ids)), None)
            if known is None:
                self.unread[text.form].append(text)
            else:
                self.sequences[known] = None
        return merges

    def _read_by_ids(self, text: _Text, ids: Ids) -> list[Ids]:
        """The tokens behind those of the neighbour before the form, where the tokenizer has no offsets."""
        if text.after:
            return []
        if text.before in ("", " "):
            return [ids]
        before = self.encode(text.before).ids
        return [ids[len(before) :]] if ids[: len(before)] == before else []

    def missed(self) -> list[str]:
        """The texts whose form the sequences do not find."""
        texts = [text for unread in self.unread.values() for text in unread]
        unwritten = {form for form, unread in self.unread.items() if unread == [_Text("", form, "")]}
        texts += [probe for probe in self.probes if probe.form not in unwritten]
        return [str(text) for text in texts if not self._finds(text)]

    def _finds(self, text: _Text) -> bool:
        """Whether the sequences have all tokens of the text's form; or occur, where it is not known which they are."""
        encoded = self.encode(str(text))
        found = [False] * len(encoded.ids)
        for length in {len(sequence) for sequence in self.sequences}:
            for start in range(len(found) - length + 1):
                if encoded.ids[start : start + length] in self.sequences:
                    found[start : start + length] = [True] * length
        if encoded.drops and any(self.encode(part).drops for part in (text.before, text.after)):
            return True  # the form is written as with other neighbours
        if encoded.offsets is None or encoded.drops:
            return any(found)
        return all(found[place] for place in text.places(encoded.offsets))
