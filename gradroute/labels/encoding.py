"""A tokenizer, as labels ask it: the tokens of a text, where its characters are, and what it does not know."""

from __future__ import annotations

from typing import Any, NamedTuple

from ..arguments import shown

Offsets = list[tuple[int, int]]

NO_CHARACTER = "\U0010ffff"  # Unicode will never have a character there


class Encoded(NamedTuple):
    """A text in tokens.

    Attributes:
        ids: the tokens.
        offsets: where the characters of each token start and end; None: the tokenizer does not say.
        drops: whether the tokenizer left out characters of the text without a token for them.
    """

    ids: tuple[int, ...]
    offsets: Offsets | None
    drops: bool


class Encoder:
    """A tokenizer of transformers, or a `tokenizers.Tokenizer`, as one function of texts. No special tokens are added.

    Attributes:
        unknown: the tokenizer's unknown token, if it has one, or two where its parts disagree.
        has_offsets: whether it says where characters are; slow tokenizers of transformers do not.
    """

    unknown: frozenset[int]
    has_offsets: bool

    def __init__(self, tokenizer: Any) -> None:
        if isinstance(tokenizer, str) or not callable(
            getattr(tokenizer, "encode", None)
        ):  # a str has encode too
            raise TypeError(
                f"tokenizer: got {shown(tokenizer)}, expected a tokenizer of transformers or a "
                "tokenizers.Tokenizer"
            )
        inner = getattr(tokenizer, "backend_tokenizer", tokenizer)
        self.has_offsets = hasattr(inner, "model") and hasattr(inner, "to_str")
        self._tokenizer = tokenizer
        self._inner: Any = _whole(inner) if self.has_offsets else None
        self.unknown = _unknown_tokens(tokenizer, self._inner)

    def __call__(self, text: str) -> Encoded:
        if self._inner is None:
            return Encoded(tuple(self._tokenizer.encode(text, add_special_tokens=False)), None, False)
        encoding = self._inner.encode(text, add_special_tokens=False)
        # White space at the end would hide that characters are missing there: pre-tokenizers may remove it.
        shown = text.rstrip()
        shorter = encoding if shown == text else self._inner.encode(shown, add_special_tokens=False)
        return Encoded(tuple(encoding.ids), encoding.offsets, self._drops(shown, shorter))

    def _drops(self, text: str, encoding: Any) -> bool:
        """Whether the tokenizer drops characters of a text, as a BPE without an unknown token does.

        A BPE lays its tokens end to end, so that dropped characters are missing at the end of the offsets. Characters
        that the normaliser changes or removes are not dropped, because every text goes through it, but they have no
        offsets either: NFKC makes one character of an e and a combining accent, at the place of the e. So the
        normalised text is looked at. A normaliser that changes its own output again (it prepends a space, or turns
        bytes into characters) makes another text of it; then the text itself is looked at too.
        """
        if self._inner.normalizer is None:
            return self._is_short(text, encoding)
        normalised = self._inner.normalizer.normalize_str(text)
        if not self._is_short(normalised, self._inner.encode(normalised, add_special_tokens=False)):
            return False
        is_stable = self._inner.normalizer.normalize_str(normalised) == normalised
        return is_stable or self._is_short(text, encoding)

    def _is_short(self, text: str, encoding: Any) -> bool:
        # Byte-level offsets may be trimmed of a space that was prepended, and so begin a character late.
        reached = int(bool(encoding.ids) and self._inner.id_to_token(encoding.ids[0]).startswith("Ġ"))
        left_out = ""
        for start, stop in encoding.offsets:
            left_out += text[reached:start]
            reached = max(reached, stop)
        left_out += text[reached:]
        return bool(left_out.replace("▁", "").strip())  # normalisers make "▁" of a space


def _whole(inner: Any) -> Any:
    """The `tokenizers.Tokenizer`, or a copy of it that neither pads nor truncates."""
    if inner.padding is None and inner.truncation is None:
        return inner
    copy = type(inner).from_str(inner.to_str())
    copy.no_padding()
    copy.no_truncation()
    return copy


def _unknown_tokens(tokenizer: Any, inner: Any) -> frozenset[int]:
    """The token that a tokenizer says is its unknown one, and the one that its model really uses."""
    known: int | None = getattr(tokenizer, "unk_token_id", None)
    ids = {known} if known is not None else set()
    if inner is not None:
        try:
            tokens = inner.model.tokenize(NO_CHARACTER)
        except Exception:  # `tokenizers` raises this where a model needs an unknown token and has none
            tokens = []
        # Several tokens are the bytes of the character, which are known.
        ids |= {token.id for token in tokens if len(tokens) == 1}
    return frozenset(ids)
