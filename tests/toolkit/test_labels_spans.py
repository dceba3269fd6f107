"""Labels by characters: tokens of every kind of tokenizer against the obvious loop over characters."""

import re

import numpy as np
import pytest
import torch

pytest.importorskip("hypothesis")  # a machine that runs the GPU proof alone may lack it

from hypothesis import given, settings
from hypothesis import strategies as st
from labels_cases import expect, few
from tokenizer_cases import CORPUS, KINDS, tokenizer_of

from gradroute.labels import match_spans, next_token, prioritise

PIECES = [
    "tree",
    " ",
    "mill",
    "\n",
    "(",
    '"',
    "Tree",
    "  ",
    "é",
    "e\u0301",
    "😀",
    "👩‍🌾",
    "ﬁ",
    "the",
    "_",
    "a\u3000b",
    "½",
]
texts_ = st.lists(st.sampled_from(PIECES), max_size=10).map("".join)


def by_character(text, offsets, spans, whole_tokens=False):
    """The marks of one row of offsets, character by character."""
    wanted = {place for start, stop in spans for place in range(start, stop)}
    marked = []
    for start, stop in offsets:
        places = list(range(start, stop))
        inner = list(places)
        while inner and text[inner[0]].isspace():
            del inner[0]
        in_spans = [place in wanted for place in inner or places]
        marked.append(bool(in_spans) and (all if whole_tokens else any)(in_spans))
    return marked


def spans_in(length, draw):
    places = st.integers(0, length)
    return [tuple(sorted(span)) for span in draw(st.lists(st.tuples(places, places), max_size=4))]


@pytest.mark.setup(
    "Tokenizers", "match_spans with every fast tokenizer: byte-level BPE, SentencePiece, WordPiece, Unigram"
)
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25)
@given(texts_, st.booleans(), st.data())
def test_spans_mark_the_tokens_of_their_characters(kind, text, whole_tokens, data):
    """Offsets with and without the space of a word, of bytes of one character, and behind normalisers."""
    offsets = tokenizer_of(kind).encode(text, add_special_tokens=False).offsets
    spans = spans_in(len(text), data.draw)
    expected = by_character(text, offsets, spans, whole_tokens)
    assert match_spans(text, offsets, spans, whole_tokens=whole_tokens).tolist() == expected
    tensor = torch.tensor(offsets, dtype=torch.int32).view(1, -1, 2)
    array = np.array(spans, dtype=np.int64).reshape(-1, 2)
    assert match_spans([text], tensor, [array], whole_tokens=whole_tokens)[0].tolist() == expected


@few
@given(
    texts_,
    st.lists(
        st.sampled_from(["tree", "tree tree", "TREE mill", "mill", "(", "the", "e", "tree("]), min_size=1
    ),
    st.booleans(),
    st.booleans(),
)
def test_words_are_those_of_one_expression_each(text, words, ignore_case, whole_words):
    """Words that overlap, begin alike, or end in punctuation are found as if each were looked for alone."""
    spans = []
    for word in words:
        inner = r"\s+".join(map(re.escape, word.split()))
        before = r"(?<!\w)" if whole_words and word[0].isalnum() else ""
        after = r"(?!\w)" if whole_words and word[-1].isalnum() else ""
        one = re.compile(f"(?={before}({inner}){after})", re.IGNORECASE if ignore_case else 0)
        spans += [match.span(1) for match in one.finditer(text)]
    offsets = [(place, place + 1) for place in range(len(text))]
    got = match_spans(text, offsets, words, ignore_case=ignore_case, whole_words=whole_words)
    assert got.tolist() == by_character(text, offsets, spans)


def test_many_words_are_found_one_by_one():
    words = [f"{a}{b}{c}{d}" for a in "tT" for b in "re" for c in "re+" for d in ("e", "es", "", " x", "+")]
    text = "trees Tre+ tre+ x tre  x teee ter tr+ trr++ TRES" * 2
    offsets = [(place, place + 1) for place in range(len(text))]
    one_by_one = torch.stack([match_spans(text, offsets, [word]) for word in words]).any(0)
    assert torch.equal(match_spans(text, offsets, words), one_by_one)
    assert 0 < one_by_one.sum() < len(text)


def test_expressions():
    text = "tree Trees\ntree"
    offsets = [(0, 4), (4, 10), (10, 11), (11, 15)]
    assert match_spans(text, offsets, "tree").tolist() == [True, False, False, True]
    assert match_spans(text, offsets, "tree", ignore_case=True).tolist() == [True, True, False, True]
    assert match_spans(text, offsets, re.compile("^tree$", re.M)).tolist() == [False, False, False, True]
    assert match_spans(text, offsets, r"\n").tolist() == [False, False, True, False]
    assert match_spans(text, offsets, r"tree\s").tolist() == [True, False, False, False]
    assert match_spans(text, offsets, "x*").tolist() == [False] * 4  # empty matches
    assert match_spans(text, offsets, ["trees"], ignore_case=True).tolist() == [False, True, False, False]


def test_groups_compose_with_priorities_and_positions():
    text = "the oak tree stood"
    encoding = tokenizer_of("bert").encode(text, add_special_tokens=False)
    masks = match_spans(text, encoding.offsets, {2: ["oak tree"], 1: "tree", "none": []})
    assert list(masks) == [2, 1, "none"]
    assert not masks["none"].any()
    ids = prioritise({route: masks[route] for route in (2, 1)})
    words = encoding.tokens
    assert [words[place] for place in ids.nonzero().squeeze(1)] == ["oak", "tree"]
    assert ids.unique().tolist() == [0, 2]
    moved = next_token(ids)
    assert moved[:-1].tolist() == ids[1:].tolist()


@pytest.fixture(scope="module")
def wrapped():
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    own = tokenizers.Tokenizer.from_str(tokenizer_of("llama3").to_str())
    own.add_special_tokens(["<s>", "<pad>"])
    own.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", own.token_to_id("<s>"))]
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>", pad_token="<pad>")


@pytest.mark.parametrize("side", ["left", "right"])
@few
@given(texts=st.lists(texts_, min_size=1, max_size=4))
def test_padded_and_truncated_batches(wrapped, side, texts):
    encoded = wrapped(
        texts,
        padding=True,
        truncation=True,
        max_length=6,
        padding_side=side,
        return_offsets_mapping=True,
        return_tensors="pt",
    )
    offsets = encoded["offset_mapping"]
    got = match_spans(texts, offsets, ["tree"])
    assert got.shape == encoded["input_ids"].shape
    for row, text in enumerate(texts):
        spans = [match.span() for match in re.finditer(r"\btree\b", text)]
        assert got[row].tolist() == by_character(text, offsets[row].tolist(), spans)
    assert not got[encoded["attention_mask"] == 0].any()
    assert torch.equal(match_spans(texts, offsets.numpy(), ["tree"]), got)
    assert torch.equal(match_spans(tuple(texts), offsets.tolist(), ["tree"]), got)


def test_windows_of_long_texts(wrapped):
    """Rows of several texts, and of one, with the tokens that windows have in common."""
    encoded = wrapped(
        CORPUS[:3],
        padding=True,
        truncation=True,
        max_length=8,
        stride=3,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        return_tensors="pt",
    )
    offsets, mapping = encoded["offset_mapping"], encoded["overflow_to_sample_mapping"]
    assert min(mapping.bincount()) > 1  # how many windows depends on the version of tokenizers
    got = match_spans(CORPUS[:3], offsets, ["tree", "mill"], sample_mapping=mapping)
    for row, sample in enumerate(mapping.tolist()):
        spans = [match.span() for match in re.finditer(r"\b(tree|mill)\b", CORPUS[sample])]
        assert got[row].tolist() == by_character(CORPUS[sample], offsets[row].tolist(), spans)
    first = offsets[mapping == 0]
    assert torch.equal(match_spans(CORPUS[0], first, ["tree", "mill"]), got[mapping == 0])
    with expect(ValueError, "expected [3, S, 2]; windows of long texts need sample_mapping"):
        match_spans(CORPUS[:3], offsets, ["tree"])


def test_offsets_of_pairs_are_refused(wrapped):
    encoded = wrapped("the tree", "the mill", return_offsets_mapping=True)
    with expect(
        ValueError, "expected no token before the one ahead of it: offsets of one text a row, not of pairs"
    ):
        match_spans("the tree", encoded["offset_mapping"], ["tree"])


def test_masks_are_on_the_device_of_the_offsets(device):
    offsets = torch.tensor([[[0, 4], [4, 9]], [[0, 4], [0, 0]]], device=device)
    got = match_spans(["tree mill", "mill"], offsets, ["mill"])
    assert got.device.type == device.type
    assert got.tolist() == [[False, True], [True, False]]


def test_nothing_to_mark():
    assert match_spans("", [], ["tree"]).tolist() == []
    assert match_spans("tree", [(0, 4)], []).tolist() == [False]
    assert match_spans([], torch.zeros(0, 5, 2, dtype=torch.int64), ["tree"]).shape == (0, 5)
    assert match_spans(["", "a"], [[], []], ["tree"]).shape == (2, 0)
    assert match_spans("tree", [(0, 0), (2, 2)], ["tree"]).tolist() == [False, False]


OFFSETS = [(0, 4), (4, 9)]
TEXT = "tree mill"


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((5, OFFSETS, ["a"]), {}, TypeError, "texts: got a int, expected a string or a list of strings"),
        (([TEXT, 5], OFFSETS, ["a"]), {}, TypeError, "texts[1]: got a int, expected a string"),
        (
            (TEXT, None, ["a"]),
            {},
            ValueError,
            "offsets: got None, expected where the characters of each token",
        ),
        ((TEXT, None, ["a"]), {}, ValueError, "use_fast=True, or label by match_ngrams("),
        (
            (TEXT, {"offset_mapping": OFFSETS}, ["a"]),
            {},
            TypeError,
            "got a dict, expected its 'offset_mapping'",
        ),
        ((TEXT, [0, 4], ["a"]), {}, ValueError, "offsets: got shape [2], expected [S, 2] or [B, S, 2]"),
        ((TEXT, [[0.0, 4.0]], ["a"]), {}, TypeError, "offsets: got dtype torch.float"),
        (
            (TEXT, [(0, 4), (4, 10)], ["a"]),
            {},
            ValueError,
            "offsets: got (4, 10) at [1], expected no end beyond",
        ),
        (
            (TEXT, [(-1, 4)], ["a"]),
            {},
            ValueError,
            "offsets: got (-1, 4) at [0], expected a start of 0 or more",
        ),
        (
            (TEXT, [(4, 3)], ["a"]),
            {},
            ValueError,
            "offsets: got (4, 3) at [0], expected a start of 0 or more",
        ),
        (
            (TEXT, [(4, 9), (0, 4)], ["a"]),
            {},
            ValueError,
            "offsets: got (0, 4) at [1], expected no token before",
        ),
        (
            ([TEXT, "a"], [OFFSETS, [(0, 1)]], ["a"]),
            {},
            ValueError,
            "offsets: got rows of 1 to 2 tokens, expected",
        ),
        (
            ([TEXT], OFFSETS, ["a"]),
            {},
            ValueError,
            "offsets: got shape [2, 2] for a list of 1 texts, expected [1,",
        ),
        (
            (TEXT, OFFSETS, 5),
            {},
            TypeError,
            "wanted: got a int, expected a regular expression, words, or spans",
        ),
        ((TEXT, OFFSETS, {}), {}, ValueError, "wanted: got an empty mapping, expected at least one group"),
        ((TEXT, OFFSETS, {3: ["a", 5]}), {}, TypeError, "wanted[3][1]: got 5, expected a string"),
        (
            (TEXT, OFFSETS, ["a", " "]),
            {},
            ValueError,
            "wanted[1]: got ' ', expected a word that is not empty",
        ),
        ((TEXT, OFFSETS, ""), {}, ValueError, "wanted: got an empty string, expected a regular expression"),
        ((TEXT, OFFSETS, "("), {}, ValueError, "wanted: got '(', expected a regular expression (missing )"),
        (
            (TEXT, OFFSETS, re.compile(b"a")),
            {},
            TypeError,
            "wanted: got an expression of bytes, expected one of",
        ),
        (
            (TEXT, OFFSETS, [(0, 10)]),
            {},
            ValueError,
            "wanted: got (0, 10) at [0], expected 0 <= start <= end <= 9",
        ),
        ((TEXT, OFFSETS, [(1, 2), (3, 2)]), {}, ValueError, "wanted: got (3, 2) at [1], expected 0 <= start"),
        ((TEXT, OFFSETS, [(0.5, 1.0)]), {}, TypeError, "wanted: got dtype torch.float"),
        (
            (TEXT, OFFSETS, [1, 2]),
            {},
            ValueError,
            "wanted: got shape [2], expected [n, 2], start and end of each",
        ),
        (([TEXT], [OFFSETS], []), {}, ValueError, "wanted: got the spans of 0 texts, expected those of 1"),
        (
            ([TEXT], [OFFSETS], [[(0, 11)]]),
            {},
            ValueError,
            "wanted[0]: got (0, 11) at [0], expected 0 <= start",
        ),
        (
            (TEXT, OFFSETS, "a"),
            {"whole_words": False},
            ValueError,
            "whole_words: got False, which is for a list",
        ),
        (
            (TEXT, OFFSETS, re.compile("a")),
            {"ignore_case": True},
            ValueError,
            "ignore_case: got True, which is for",
        ),
        (
            (TEXT, OFFSETS, [(0, 1)]),
            {"ignore_case": True},
            ValueError,
            "ignore_case: got True, which is for words",
        ),
        ((TEXT, OFFSETS, "a"), {"ignore_case": 1}, TypeError, "ignore_case: got 1, expected True or False"),
        (
            (TEXT, OFFSETS, "a"),
            {"whole_tokens": None},
            TypeError,
            "whole_tokens: got None, expected True or False",
        ),
        (
            (TEXT, [OFFSETS], "a"),
            {"sample_mapping": [0, 0]},
            ValueError,
            "sample_mapping: got 2, expected 1, one",
        ),
        (
            (TEXT, [OFFSETS], "a"),
            {"sample_mapping": [1]},
            ValueError,
            "sample_mapping: got 1 of 1 out of range",
        ),
    ],
)
def test_refusals(arguments, options, error, message):
    with expect(error, message):
        match_spans(*arguments, **options)
