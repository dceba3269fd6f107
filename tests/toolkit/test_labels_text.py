"""Labels: the words of real tokenizers, and summaries, which write tokens as text."""

import io
import itertools
import json
import re

import pytest
import torch

pytest.importorskip("hypothesis")  # a machine that runs the GPU proof alone may lack it

from hypothesis import given
from hypothesis import strategies as st
from labels_cases import TEXTS, WORDS, bounds_of, expect, few

from gradroute.labels import match_ngrams, summarize, token_sequences


@pytest.fixture(scope="module")
def byte_level():
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=alphabet, special_tokens=["<s>"], show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


@pytest.fixture(scope="module")
def wrapped(byte_level):
    """The same tokenizer as one of transformers, which adds <s> before a text."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    own = tokenizers.Tokenizer.from_str(byte_level.to_str())
    own.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", own.token_to_id("<s>"))]
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>")


@pytest.mark.parametrize("kind", ["byte_level", "wrapped"])
def test_words_of_a_real_tokenizer_are_found_in_text(kind, request, byte_level):
    tokenizer = request.getfixturevalue(kind)
    text = " ".join(TEXTS[:3])
    encoding = byte_level.encode(text, add_special_tokens=False)
    sequences = token_sequences(tokenizer, WORDS)
    found = match_ngrams(torch.tensor(encoding.ids), sequences)
    # Every word is found, in any case and at any place, and nothing outside of words.
    covered = {place for match in re.finditer("|".join(WORDS), text, re.I) for place in range(*match.span())}
    for is_found, (start, stop) in zip(found.tolist(), encoding.offsets, strict=True):
        word = [place in covered for place in range(start, stop) if text[place] != " "]
        # "Trees" is one token where the tokenizer knows it, and then not the word "tree".
        assert is_found == (any(word) and all(word))
    assert found.sum() >= 3 + 3 + 2


def test_forms_of_words(byte_level):
    def texts(*words, **options):
        return [byte_level.decode(list(one)) for one in token_sequences(byte_level, words, **options)]

    assert texts("tree", case_variants=False, leading_space=False) == ["tree"]
    assert texts("tree", case_variants=False) == ["tree", " tree"]
    assert texts("tree", leading_space=False) == ["tree", "TREE", "Tree"]
    assert texts("white cat", leading_space=False) == ["white cat", "WHITE CAT", "White cat", "White Cat"]
    assert texts("iPod", leading_space=False) == ["iPod", "ipod", "IPOD", "IPod"]
    assert texts("cat", "Cat", "cat") == ["cat", "CAT", "Cat", " cat", " CAT", " Cat"]


@pytest.fixture(scope="module")
def word_level():
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"[UNK]": 0, "tree": 1, "cat": 2}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return tokenizer


def test_forms_that_a_tokenizer_does_not_know_are_left_out(word_level):
    transformers = pytest.importorskip("transformers")
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=word_level, unk_token="[UNK]")
    for tokenizer in (word_level, wrapped):
        with pytest.warns(
            RuntimeWarning, match="no sequence finds the spellings 'Tree', 'TREE', 'TREE CAT', "
        ):
            assert token_sequences(tokenizer, ["Tree", "tree cat"]) == [(1,), (1, 2)]
        with expect(ValueError, "words[1]: got 'tree dog', which the tokenizer turns into [1, 0], expected"):
            token_sequences(tokenizer, ["cat", "tree dog"])
        with expect(ValueError, "words[0]: got 'Tree', which"):
            token_sequences(tokenizer, ["Tree"], case_variants=False)


def test_the_unknown_token_of_a_unigram():
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    vocabulary = [("<unk>", 0.0), ("a", -1.0)]
    own = tokenizers.Tokenizer(tokenizers.models.Unigram(vocabulary, 0, False))
    for tokenizer in (own, transformers.PreTrainedTokenizerFast(tokenizer_object=own)):
        assert token_sequences(tokenizer, ["aa"], case_variants=False, leading_space=False) == [(1, 1)]
        with expect(ValueError, "got 'zzz', which the tokenizer turns into [0], expected a word without its"):
            token_sequences(tokenizer, ["zzz"])
        with pytest.warns(RuntimeWarning, match="no sequence finds the spellings 'A': the tokenizer writes"):
            assert token_sequences(tokenizer, ["a"]) == [(1,)]  # " a" is found as "a" behind an unknown token


def bpe(*texts, alphabet=(), pre_tokenizer=None, normalizer=None):
    """A BPE without an unknown token, which drops characters that it does not know."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=list(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def test_forms_of_which_a_tokenizer_drops_characters_are_left_out():
    transformers = pytest.importorskip("transformers")
    own = bpe("nave nave")
    nave = own.token_to_id("nave")
    for tokenizer in (own, transformers.PreTrainedTokenizerFast(tokenizer_object=own)):
        with pytest.warns(RuntimeWarning, match="no sequence finds the spellings 'NAVE', 'Nave': the"):
            # "Nave" is not taken for "ave".
            assert token_sequences(tokenizer, ["nave"], leading_space=False) == [(nave,)]
        message = (
            f"words[0]: got 'naïve', which the tokenizer turns into [{nave}], expected a word of which the"
        )
        with expect(ValueError, message + " tokenizer drops no characters"):
            token_sequences(tokenizer, ["naïve"])
        with expect(ValueError, "got 'ïï', which the tokenizer turns into [], expected a word of which the"):
            token_sequences(tokenizer, ["ïï"])


def test_drops_behind_a_normaliser_are_seen():
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = bpe("fine nave", normalizer=tokenizers.normalizers.NFKC())
    with expect(ValueError, "got 'ïﬁ', which"):  # "fi", of which the offsets reach the ligature
        token_sequences(tokenizer, ["ïﬁ"], leading_space=False)


def normalised():
    """Tokenizers that know each word they come with, and its sequence without variants."""
    tokenizers = pytest.importorskip("tokenizers")
    norms, pre = tokenizers.normalizers, tokenizers.pre_tokenizers
    byte_level, alphabet = pre.ByteLevel(add_prefix_space=False), pre.ByteLevel.alphabet()
    strip = norms.Sequence([norms.NFD(), norms.StripAccents(), norms.Lowercase()])
    llama = norms.Sequence([norms.NFKC(), norms.Prepend("▁"), norms.Replace(" ", "▁")])
    yield bpe("naive", normalizer=norms.Lowercase()), "NAIVE"
    yield bpe("naive", normalizer=strip), "NAI\u0308VE"
    yield bpe("naive", normalizer=strip), "Naïve"
    yield bpe("naïve fine", normalizer=norms.NFKC()), "nai\u0308ve"
    yield bpe("fine", normalizer=norms.NFKC()), "ﬁne"
    yield bpe("naive", normalizer=norms.Replace("\u200b", "")), "naive\u200b"
    yield bpe("naïve fine", normalizer=llama), "nai\u0308ve ﬁne"
    yield bpe("naïve"), "naïve"
    yield bpe("white cat", pre_tokenizer=pre.Whitespace()), "white cat"
    yield bpe("white cat", pre_tokenizer=pre.Metaspace()), "white cat"
    yield bpe("", alphabet=alphabet, pre_tokenizer=byte_level), "naïve 😀"
    yield bpe("", alphabet=alphabet, pre_tokenizer=byte_level, normalizer=norms.NFKC()), "ﬁe\u0301x"
    yield bpe("", alphabet=alphabet, normalizer=norms.ByteLevel()), "naïve"
    prefixed = bpe("tree tree", alphabet=alphabet, pre_tokenizer=pre.ByteLevel(add_prefix_space=True))
    prefixed.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
    yield prefixed, "tree"
    trimmed = tokenizers.Tokenizer.from_str(prefixed.to_str())
    trimmed.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True, add_prefix_space=False)
    yield trimmed, "tree"


# Ends of lines are, by those that do not know them, and then a word is merged with the line before.
@pytest.mark.filterwarnings("ignore:token_sequences. no sequence finds the spellings:RuntimeWarning")
def test_what_a_normaliser_changes_is_not_dropped():
    transformers = pytest.importorskip("transformers")
    for own, word in normalised():
        want = tuple(own.encode(word, add_special_tokens=False).ids)
        assert want
        for tokenizer in (own, transformers.PreTrainedTokenizerFast(tokenizer_object=own)):
            assert token_sequences(tokenizer, [word], False, False)[0] == want


def test_a_tokenizer_without_offsets_is_taken_at_its_word():
    class Slow:
        unk_token_id = None

        def encode(self, text, add_special_tokens):
            return [ord(char) for char in text if char in "nave"]

    assert token_sequences(Slow(), ["naïve"], False, False) == [tuple(map(ord, "nave"))]
    with expect(ValueError, "got 'ïï', which the tokenizer turns into [], expected a word of which the"):
        token_sequences(Slow(), ["ïï"])


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        ([], ValueError, "words: got none, expected at least one"),
        ("tree", TypeError, "words: got the string 'tree', expected a list of words"),
        (["tree", ""], ValueError, "words[1]: got '', expected a word that is not empty"),
        (["tree", "  "], ValueError, "words[1]: got '  '"),
        (["tree", 3], TypeError, "words[1]: got 3, expected a string"),
    ],
)
def test_words_that_are_none(words, error, message, word_level):
    with expect(error, message):
        token_sequences(word_level, words)


def test_what_is_no_tokenizer():
    with expect(TypeError, "tokenizer: got a dict, expected a tokenizer of transformers"):
        token_sequences({}, ["tree"])
    with expect(TypeError, "tokenizer: got a dict, expected a tokenizer of transformers"):
        summarize([0], 1, [0], {})


def test_a_summary_counts(device):
    ids = torch.tensor([[0, 0, 1], [2, 0, 0]], device=device)
    summary = summarize(ids, ["retain", "forget", "other", "none"])
    assert summary.counts == (4, 1, 1, 0)
    assert summary.shares == pytest.approx((4 / 6, 1 / 6, 1 / 6, 0))
    assert str(summary).splitlines() == [
        "route  name    tokens   share",
        "0      retain       4  66.67%",
        "1      forget       1  16.67%",
        "2      other        1  16.67%",
        "3      none         0   0.00%",
    ]
    assert summarize(torch.tensor([True, False]), 2).counts == (1, 1)
    assert summarize([], 2).shares == (0, 0)
    assert summarize(torch.zeros(3, 0).long(), 1, torch.zeros(3, 0).long()).examples == ((),)


@few
@given(st.lists(st.integers(0, 3), max_size=20), st.integers(0, 4), st.data())
def test_examples_are_runs_of_their_route(values, number, data):
    bounds = bounds_of(len(values), data.draw)
    summary = summarize(values, 4, list(range(len(values))), examples=number, context=99, cu_seqlens=bounds)
    assert summary.counts == tuple(values.count(route) for route in range(4))
    runs = [
        (route, tuple(token for token, _ in run))
        for a, b in itertools.pairwise(bounds)
        for route, run in itertools.groupby(zip(range(a, b), values[a:b], strict=True), lambda pair: pair[1])
    ]
    for route, examples in enumerate(summary.examples):
        own = [run for route_of_run, run in runs if route_of_run == route]
        shown = [tuple(map(int, re.search(r"\[(.*)\]", example)[1].split())) for example in examples]
        assert len(shown) == len(set(shown)) == min(number, len(own))
        assert set(shown) <= set(own)


def test_examples_in_context():
    ids = torch.tensor([[0, 0, 0, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 1]])
    tokens = torch.arange(16).view(2, 8)
    summary = summarize(ids, 2, tokens, examples=9, context=2)
    assert summary.examples[1] == (
        "…  1 2 [3 4] 5 6 …",  # within its row
        " [8] 9 10 …",
        "…  13 14 [15]",
    )
    assert summary.examples[0][0] == " [0 1] …"  # a long run is cut
    assert len(summary.examples[0]) == 3
    assert summarize(ids, 2, tokens, examples=2, context=2).examples[1] == (
        "…  1 2 [3 4] 5 6 …",
        " [8] 9 10 …",
    )
    assert summarize(ids, 2, tokens, examples=0).examples == ((), ())
    assert summarize(ids, 3, tokens).examples[2] == ()
    packed = summarize(ids.view(1, 16), 2, tokens.view(1, 16), context=2, cu_seqlens=[0, 4, 4, 8, 16])
    assert packed.examples[1] == ("…  1 2 [3]", " [4] 5 6 …", " [8] 9 10 …")
    stored = json.loads(json.dumps(summary.as_dict()))
    assert stored["tokens"] == 16
    assert [entry["tokens"] for entry in stored["routes"]] == [12, 4]
    assert stored["routes"][1]["examples"] == list(summary.examples[1])
    assert "    …  1 2 [3 4] 5 6 …" in str(summary).splitlines()


@pytest.mark.parametrize("kind", ["byte_level", "wrapped"])
def test_examples_as_text(kind, request, byte_level):
    tokenizer = request.getfixturevalue(kind)
    input_ids = torch.tensor(byte_level.encode("the cat\nin the forest", add_special_tokens=False).ids)
    ids = match_ngrams(input_ids, token_sequences(tokenizer, ["forest"])).long()
    summary = summarize(ids, 2, input_ids, tokenizer, context=50)
    assert summary.examples == (("[the cat\\nin the] forest",), ("the cat\\nin the [forest]",))


def test_a_rich_summary():
    console = pytest.importorskip("rich.console")
    summary = summarize([0, 1], ["a", "[b]"], [7, 8])
    recorder = console.Console(record=True, width=80, file=io.StringIO())
    recorder.print(summary)
    text = recorder.export_text()
    assert "[b]" in text
    assert "7 [8]" in text  # brackets are no markup
    assert "50.00%" in text
