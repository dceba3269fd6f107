"""Labels: every function against the obvious loop over tokens, the mask that gradroute makes of them, every refusal."""

import io
import itertools
import json
import math
import re

import numpy as np
import pytest
import torch

pytest.importorskip("hypothesis")  # a machine that runs the GPU proof alone may lack it

from hypothesis import given, settings
from hypothesis import strategies as st

from gradroute import Routes, route_grad
from gradroute.labels import (
    candidates,
    documents,
    episode_numbers,
    episodes,
    frequency_ratio,
    frequency_strength,
    match_ngrams,
    match_tokens,
    next_token,
    ngrams,
    prioritise,
    samples,
    soft_weights,
    summarize,
    token_counts,
    token_sequences,
    with_errors,
)
from gradroute.models.collator import RouteCollator
from gradroute.tables import localize

TEXTS = [
    "The tree stood in the forest. Trees are tall, and a tree is old.",
    "A cat sat on the mat in the house; the cat was not in the forest.",
    "In the White House there is no tree, and no cat.",
] * 5
WORDS = ("tree", "cat", "white house")

few = settings(max_examples=40)
small_ids = st.integers(-1, 6)


def expect(error, message):
    return pytest.raises(error, match=re.escape(message))


def rows_of(width=12):
    return st.integers(0, width).flatmap(
        lambda n: st.lists(st.lists(small_ids, min_size=n, max_size=n), min_size=1, max_size=3)
    )


def bounds_of(total, draw):
    """Where documents start and end, empty ones among them."""
    inner = draw(st.lists(st.integers(0, total), max_size=5))
    return [0, *sorted(inner), total]


def parts(values, bounds):
    return [values[a:b] for a, b in itertools.pairwise(bounds)]


# --- tokens and n-grams


@few
@given(rows_of(), st.lists(st.integers(0, 7), min_size=1, max_size=5))
def test_tokens_are_looked_up(rows, wanted):
    expected = [[token in wanted for token in row] for row in rows]
    for dtype in (torch.int64, torch.int32, torch.int8):
        got = match_tokens(torch.tensor(rows, dtype=dtype).view(len(rows), -1), wanted)
        assert got.dtype == torch.bool
        assert got.tolist() == expected
    assert (
        match_tokens(np.array(rows, dtype=np.int16).reshape(len(rows), -1), set(wanted)).tolist() == expected
    )


def test_arrays_of_files_are_read():
    """Token files are mapped into memory as uint16, and not writable."""
    tokens = np.array([3, 65535, 7], dtype=np.uint16)
    tokens.flags.writeable = False
    assert match_tokens(tokens, np.array([65535])).tolist() == [False, True, False]
    assert match_tokens(torch.tensor([3, 7], dtype=torch.uint16), torch.tensor([7])).tolist() == [False, True]
    assert match_tokens([1, 2], (2,)).tolist() == [False, True]


def matched(row, sequences, mark):
    """One row or document, by comparing every sequence at every place."""
    marked = [False] * len(row)
    for sequence in sequences:
        for start in range(len(row) - len(sequence) + 1):
            if list(row[start : start + len(sequence)]) == list(sequence):
                offsets = {"all": range(len(sequence)), "first": [0], "last": [len(sequence) - 1]}[mark]
                for offset in offsets:
                    marked[start + offset] = True
    return marked


sequences_ = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=4), min_size=1, max_size=6)


@settings(max_examples=100)
@given(rows_of(), sequences_, st.sampled_from(ngrams.MARKS))
def test_ngrams_in_rows(rows, sequences, mark):
    ids = torch.tensor(rows).view(len(rows), -1).long()
    expected = [matched(row, sequences, mark) for row in rows]
    assert match_ngrams(ids, sequences, mark).tolist() == expected
    assert match_ngrams(ids.int()[:, None], map(tuple, sequences), mark).squeeze(1).tolist() == expected


@few
@given(st.lists(small_ids, max_size=16), sequences_, st.sampled_from(ngrams.MARKS), st.data())
def test_ngrams_in_documents(tokens, sequences, mark, data):
    bounds = bounds_of(len(tokens), data.draw)
    expected = [flag for part in parts(tokens, bounds) for flag in matched(part, sequences, mark)]
    ids = torch.tensor(tokens).long()
    assert match_ngrams(ids, sequences, mark, bounds).tolist() == expected
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    assert match_ngrams(ids[None], sequences, mark, cu_seqlens)[0].tolist() == expected


def test_ngrams_do_not_rest_on_their_hashes(monkeypatch):
    """Where every step has the same hash, the search in the keys decides all."""
    ids = torch.randint(0, 5, (2, 300))
    sequences = [[0, 1, 2], [1, 1], [4, 3, 2, 1], [2]]
    got = match_ngrams(ids, sequences)
    assert got.tolist() == [matched(row, sequences, "all") for row in ids.tolist()]
    monkeypatch.setattr(ngrams, "SLOTS", 1)
    assert torch.equal(match_ngrams(ids, sequences), got)


def test_many_long_ngrams(device):
    ids = torch.randint(0, 30, (2000,), device=device)
    flat = ids.tolist()
    sequences = [flat[at : at + 1 + at % 8] for at in range(0, 1900, 19) if at % 8 > 2]
    sequences += [[29, 29, 29, 29, 29], [1000, 2], [2, 1000]]
    got = match_ngrams(ids, sequences)
    assert got.device.type == device.type
    assert got.tolist() == matched(flat, sequences, "all")
    assert 100 < got.sum() < 1000


# --- words of a tokenizer


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
    """As a tokenizer of transformers, which adds <s> before a text."""
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
    # Every word, in any case, wherever it stands; and nothing outside of them.
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
        assert token_sequences(tokenizer, ["a"]) == [(1,)]  # neither "A" nor " a"


def bpe(*texts, alphabet=(), pre_tokenizer=None, normalizer=None):
    """Without an unknown token: it drops characters that it does not know."""
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
        assert token_sequences(tokenizer, ["nave"], leading_space=False) == [(nave,)]  # not "Nave" as "ave"
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


def test_what_a_normaliser_changes_is_not_dropped():
    transformers = pytest.importorskip("transformers")
    for own, word in normalised():
        want = tuple(own.encode(word, add_special_tokens=False).ids)
        assert want
        for tokenizer in (own, transformers.PreTrainedTokenizerFast(tokenizer_object=own)):
            assert token_sequences(tokenizer, [word], case_variants=False, leading_space=False) == [want]


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


# --- two corpora

counts_ = st.integers(1, 6).flatmap(
    lambda v: st.tuples(*[st.lists(st.integers(0, 50), min_size=v, max_size=v)] * 2)
)


@few
@given(st.lists(st.integers(0, 4), max_size=30))
def test_counts(tokens):
    expected = [tokens.count(token) for token in range(5)]
    got = token_counts(torch.tensor(tokens, dtype=torch.int32), 5)
    assert got.dtype == torch.int64
    assert got.tolist() == expected
    assert (token_counts(tokens[:7], 5) + token_counts(tokens[7:], 5)).tolist() == expected


@few
@given(counts_, st.floats(0.25, 20), st.floats(0.25, 20))
def test_ratios_are_of_smoothed_relative_frequencies(counts, a, b):
    forget, retain = counts
    forget_total, retain_total = sum(forget) + a * len(forget), sum(retain) + b * len(retain)
    expected = [
        ((f + a) / forget_total) / ((q + b) / retain_total) for f, q in zip(forget, retain, strict=True)
    ]
    got = frequency_ratio(torch.tensor(forget), retain, smoothing=(a, b))
    assert got.dtype == torch.float64
    assert got.tolist() == pytest.approx(expected, rel=1e-12)  # a few roundings of fp64


def test_ratios_without_smoothing():
    assert frequency_ratio([0, 1, 0, 3], [0, 0, 1, 1], 0).tolist() == [1, math.inf, 0, 1.5]
    assert soft_weights(frequency_ratio([0, 1, 1], [0, 0, 2], 0)).tolist()[1] == 0
    assert soft_weights(torch.tensor([0.0, math.inf])).tolist() == [1, 0]


@few
@given(st.lists(st.floats(0.001, 1000), min_size=1, max_size=20))
def test_weights_are_the_papers(ratios):
    def weight(r):
        x = r - 1 / r - 4
        return 1 / (1 + math.exp(x)) if x < 700 else 0.0

    got = soft_weights(ratios)
    assert got.dtype == torch.float32
    assert got.tolist() == pytest.approx([weight(r) for r in ratios], abs=2**-24)  # half of fp32's ulp, twice


def test_weights_of_other_slopes():
    got = soft_weights([2.0], scale=2.0, bias=-1.5).item()
    assert got == pytest.approx(1 / (1 + math.exp(2 * 1.5 - 1.5)), abs=2**-24)
    strength = frequency_strength([3, 0], [0, 3], scale=2.0, bias=-1.5)
    ratio = frequency_ratio([3, 0], [0, 3])
    assert torch.equal(1 - strength, soft_weights(ratio, 2.0, -1.5))


def test_the_mask_of_the_original_parameters_is_the_papers_weight(device):
    """Exactly: the chain of `frequency_strength`'s docstring, through Routes, a table and a gradient."""
    vocabulary, features, block = 4000, 8, slice(6, 8)
    forget, retain = torch.randint(0, 40, (2, vocabulary), device=device)
    weights = soft_weights(frequency_ratio(forget, retain))
    assert ((weights > 0.01) & (weights < 0.99)).sum() > 1000
    assert torch.equal((weights.double() * 2**24).round() / 2**24, weights.double())
    input_ids = torch.randint(0, vocabulary, (3, 500), device=device)
    strength = next_token(frequency_strength(forget, retain)[input_ids])
    in_forget = samples(torch.tensor([1, 0, 1], device=device), input_ids.shape)
    x = torch.ones(3, 500, features, device=device, requires_grad=True)
    table = localize(2, features, {1: block})
    route_grad(x, Routes.of(in_forget, 2, strength), table).backward(torch.ones_like(x))
    predicted = weights[next_token(input_ids)]
    predicted[1] = 1  # a retain text: its tokens train everything
    expected = predicted.unsqueeze(-1).repeat(1, 1, features)
    expected[..., block] = 1
    assert torch.equal(x.grad, expected)


@few
@given(counts_, st.integers(0, 20), st.floats(0, 4), st.none() | st.integers(0, 3))
def test_candidates(counts, min_count, min_ratio, limit):
    forget, retain = counts
    ratio = frequency_ratio(forget, retain).tolist()
    kept = [t for t in range(len(forget)) if forget[t] >= min_count and ratio[t] >= min_ratio]
    expected = sorted(kept, key=lambda t: (-ratio[t], t))[:limit]
    got = candidates(forget, retain, min_count=min_count, min_ratio=min_ratio, limit=limit)
    assert got.tolist() == expected


def test_candidates_of_two_corpora(device):
    forget = torch.tensor([100, 50, 3, 0, 50], device=device)
    retain = torch.tensor([1000, 1, 0, 80, 20], device=device)
    got = candidates(forget, retain, min_count=10, min_ratio=2, smoothing=0)
    assert got.tolist() == [1, 4]
    assert match_tokens(torch.tensor([4, 0, 1], device=device), got).tolist() == [True, False, True]


# --- documents, samples, episodes


@few
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5)), max_size=6))
def test_documents(pairs):
    values, lengths = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    expected = [value for value, length in pairs for _ in range(length)]
    bounds = [sum(lengths[:n]) for n in range(len(lengths) + 1)]
    assert documents(torch.tensor(values).long(), lengths).tolist() == expected
    assert documents(torch.tensor(values).float(), cu_seqlens=bounds).tolist() == expected
    assert documents(torch.tensor(values) > 2, torch.tensor(lengths).int()).tolist() == [
        value > 2 for value in expected
    ]


def test_samples(device):
    got = samples(torch.tensor([2, 0], device=device), (2, 3))
    assert got.tolist() == [[2, 2, 2], [0, 0, 0]]
    assert samples([0.5, 1.0], torch.Size([2])).tolist() == [0.5, 1.0]
    assert samples([True, False], (2, 1, 2)).tolist() == [[[True, True]], [[False, False]]]
    got[0, 0] = 1  # memory of its own
    assert got.tolist() == [[1, 2, 2], [0, 0, 0]]


def numbered(dones):
    """[time][environment] → episode: what follows a done begins a new one."""
    numbers, number = [[0] * len(dones[0]) for _ in dones], -1
    for environment in range(len(dones[0])):
        for time in range(len(dones)):
            if time == 0 or dones[time - 1][environment]:
                number += 1
            numbers[time][environment] = number
    return numbers


rollouts = st.tuples(st.integers(1, 7), st.integers(1, 3)).flatmap(
    lambda shape: st.lists(
        st.lists(st.booleans(), min_size=shape[1], max_size=shape[1]), min_size=shape[0], max_size=shape[0]
    )
)


@few
@given(rollouts, st.data())
def test_episodes(dones, data):
    expected = numbered(dones)
    steps = len(dones)
    starts = [
        [expected[t][e] != expected[t - 1][e] if t else data.draw(st.booleans()) for e in range(len(row))]
        for t, row in enumerate(dones)
    ]
    assert episode_numbers(dones=dones).tolist() == expected
    assert episode_numbers(starts=torch.tensor(starts)).tolist() == expected
    number = max(map(max, expected)) + 1
    of_episodes = torch.randint(0, 9, (number,))
    got = episodes(of_episodes, dones=torch.tensor(dones))
    assert got.tolist() == [[of_episodes[n].item() for n in row] for row in expected]

    of_steps = torch.rand(steps, len(dones[0]))
    for take in ("first", "last"):
        got = episodes(of_steps, starts=starts, take=take)
        for e in range(len(dones[0])):
            column = [row[e] for row in expected]
            for t in range(steps):
                same = [s for s in range(steps) if column[s] == column[t]]
                assert got[t, e] == of_steps[same[0 if take == "first" else -1], e]


def test_the_convention_of_episodes(device):
    dones = torch.tensor([[False, True], [True, False], [False, False]], device=device)
    assert episode_numbers(dones=dones).tolist() == [[0, 2], [0, 3], [1, 3]]
    assert episodes(torch.tensor([1, 0, 0, 1], device=device), dones=dones).tolist() == [
        [1, 0],
        [1, 1],
        [0, 1],
    ]
    of_steps = torch.tensor([[1, 2], [3, 4], [5, 6]], device=device)
    assert episodes(of_steps, dones=dones, take="last").tolist() == [[3, 2], [3, 6], [5, 6]]
    assert episodes(of_steps, dones=dones).tolist() == [[1, 2], [1, 4], [5, 4]]
    Routes.of(episode_numbers(dones=dones), 4)


# --- next token


@few
@given(rows_of())
def test_next_token_of_rows(rows):
    width = len(rows[0])
    expected = [[row[min(t + 1, width - 1)] for t in range(width)] for row in rows]
    assert next_token(torch.tensor(rows).view(len(rows), -1)).tolist() == expected
    assert next_token(torch.tensor(rows).view(len(rows), -1).float()).tolist() == expected


@few
@given(st.lists(small_ids, max_size=12), st.data())
def test_next_token_of_documents(values, data):
    bounds = bounds_of(len(values), data.draw)
    expected = [part[min(t + 1, len(part) - 1)] for part in parts(values, bounds) for t in range(len(part))]
    assert next_token(torch.tensor(values).long(), bounds).tolist() == expected
    assert next_token(torch.tensor([values]).float(), torch.tensor(bounds))[0].tolist() == expected


@few
@given(st.lists(st.lists(st.tuples(st.integers(0, 3), st.floats(0, 1, width=32)), min_size=1), min_size=1))
def test_next_token_agrees_with_the_collator(documents_):
    examples = [
        {
            "input_ids": [5] * len(document),
            "route_ids": [pair[0] for pair in document],
            "route_strength": [pair[1] for pair in document],
        }
        for document in documents_
    ]
    for packed in (False, True):
        plain = RouteCollator(pad_token_id=9, pad_to_multiple_of=4, packed=packed)(examples)
        moved = RouteCollator(pad_token_id=9, pad_to_multiple_of=4, packed=packed, align="next_token")(
            examples
        )
        where = (
            {"cu_seqlens": plain["cu_seq_lens_q"]} if packed else {"attention_mask": plain["attention_mask"]}
        )
        for key in ("route_ids", "route_strength"):
            before = plain[key].clone()
            assert torch.equal(next_token(plain[key], **where), moved[key])
            assert torch.equal(plain[key], before)


def test_next_token_on_a_device(device):
    ids = torch.tensor([[1, 2, 3, 4]], device=device)
    assert next_token(ids, torch.tensor([0, 1, 1, 4], device=device)).tolist() == [[1, 3, 4, 4]]
    assert next_token(ids, [0, 2, 4]).tolist() == [[2, 2, 4, 4]]
    assert next_token(ids, attention_mask=[[1, 1, 0, 0]] if device.type == "cpu" else ids < 3).tolist() == [
        [2, 2, 3, 4]
    ]


# --- errors and priorities


@few
@given(
    st.lists(st.integers(0, 2), max_size=40),
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(-5, 5),
)
def test_as_many_errors_as_asked_for(values, false_negative, false_positive, seed):
    ids = torch.tensor(values).long()
    rates = {"false_negative": false_negative, "false_positive": false_positive}
    wrong = with_errors(ids, seed=seed, route=2, base=0, **rates)
    missed, taken = ((ids == 2) & (wrong != 2)), ((ids == 0) & (wrong != 0))
    assert missed.sum() == round(false_negative * values.count(2))
    assert taken.sum() == round(false_positive * values.count(0))
    assert (wrong[missed] == 0).all()
    assert (wrong[taken] == 2).all()
    assert (wrong[ids == 1] == 1).all()
    assert torch.equal(with_errors(ids, seed=seed, route=2, base=0, **rates), wrong)
    mask = with_errors(ids == 2, seed=seed, **rates)
    assert ((ids == 2) & ~mask).sum() == missed.sum()
    # Neither rate changes the other kind's mistakes, and a higher one only adds to its own.
    alone = with_errors(ids, seed=seed, route=2, base=0, false_negative=false_negative)
    assert torch.equal((ids == 2) & (alone != 2), missed)
    more = with_errors(ids, seed=seed, route=2, base=0, false_positive=min(1.0, false_positive + 0.2))
    assert ((more == 2) >= taken).all()


def test_errors_are_the_same_on_every_device(device):
    ids = torch.arange(2000) % 3 == 0
    wrong = with_errors(ids.to(device), seed=3, false_negative=0.1, false_positive=0.2)
    assert wrong.device.type == device.type
    assert (wrong.cpu() & ~ids).sum() == round(0.2 * 1333)
    assert torch.equal(wrong.cpu(), with_errors(ids, seed=3, false_negative=0.1, false_positive=0.2))
    assert not torch.equal(wrong.cpu(), with_errors(ids, seed=4, false_negative=0.1, false_positive=0.2))
    assert wrong[:500].sum() != wrong[-500:].sum()  # spread, not the first ones


@few
@given(st.lists(st.tuples(st.booleans(), st.integers(1, 4)), min_size=1, max_size=8), st.floats(0, 1))
def test_errors_of_groups_are_of_whole_groups(groups, rate):
    lengths = [length for _, length in groups]
    flags = torch.tensor([flag for flag, _ in groups])
    numbers = documents(torch.arange(len(groups)) * 7 - 3, lengths)
    wrong = with_errors(documents(flags, lengths), seed=0, false_negative=rate, groups=numbers)
    of_groups = [wrong[numbers == 7 * n - 3].unique().tolist() for n in range(len(groups))]
    assert all(len(one) == 1 for one in of_groups)
    missed = [flag and not one[0] for flag, one in zip(flags.tolist(), of_groups, strict=True)]
    assert sum(missed) == round(rate * int(flags.sum()))
    assert not (wrong & ~documents(flags, lengths)).any()


def test_groups_of_samples(device):
    ids = samples(torch.tensor([0, 1, 1, 0], device=device), (4, 5))
    numbers = samples(torch.arange(4, device=device), (4, 5))
    wrong = with_errors(ids, seed=1, false_negative=0.5, false_positive=0.5, groups=numbers)
    assert wrong.sum() == 10
    assert (wrong == wrong[:, :1]).all()
    assert (wrong != ids).any(1).tolist().count(True) == 2


@few
@given(st.permutations([1, 2, 5]), st.integers(0, 12), st.sampled_from([0, 3]), st.data())
def test_earlier_masks_win(routes, n, base, data):
    drawn = {route: data.draw(st.lists(st.booleans(), min_size=n, max_size=n)) for route in routes}
    expected = [next((r for r in routes if drawn[r][t]), base) for t in range(n)]
    masks = {route: torch.tensor(mask, dtype=torch.bool) for route, mask in drawn.items()}
    got = prioritise(masks, base)
    assert got.dtype == torch.int64
    assert got.tolist() == expected
    assert Routes.of(got, 6).ids.tolist() == expected


def test_an_entry_of_the_base_keeps_its_tokens():
    first = torch.tensor([True, False, True])
    every = torch.ones(3, dtype=torch.bool)
    assert prioritise({0: first, 1: every}).tolist() == [0, 1, 0]
    assert prioritise({2: first & ~every | first, 1: every}).tolist() == [2, 1, 2]


def test_labels_are_what_routes_and_collators_take(device):
    input_ids = torch.randint(0, 50, (2, 30), device=device)
    masks = {1: match_ngrams(input_ids, [[3], [4, 5]]), 2: match_tokens(input_ids, range(10, 20))}
    ids = next_token(prioritise(masks))
    strength = next_token(frequency_strength([1] * 50, list(range(50))).to(device)[input_ids])
    routes = Routes.of(ids, 3, strength)
    assert routes.shape == (2, 30)
    assert torch.equal(routes.strength.view(2, 30), strength)
    assert Routes.of(masks[2], 2).counts.sum() == 60
    columns = {"input_ids": input_ids[0], "route_ids": ids[0], "route_strength": strength[0]}
    batch = RouteCollator()([columns])
    assert torch.equal(batch["route_ids"][0], ids[0].cpu())


# --- summaries


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
    assert summary.examples[0][0] == " [0 1] …"  # the beginning of a long run
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


# --- refusals

IDS = torch.zeros(2, 3, dtype=torch.long)
MASK = torch.zeros(2, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: match_tokens(IDS.float(), [1]),
            TypeError,
            "input_ids: got dtype torch.float32, expected integers",
        ),
        (lambda: match_tokens(MASK, [1]), TypeError, "input_ids: got dtype torch.bool"),
        (lambda: match_tokens("text", [1]), TypeError, "input_ids: got a str that is no tensor"),
        (lambda: match_tokens(IDS, []), ValueError, "token_ids: got none, expected at least one"),
        (
            lambda: match_tokens(IDS, [3, -2]),
            ValueError,
            "token_ids: got -2 at [1], expected token ids from 0",
        ),
        (lambda: match_tokens(IDS, [1 << 30]), ValueError, "token_ids: got 1073741824"),
        (lambda: match_tokens(IDS, [1.5]), TypeError, "token_ids: got dtype torch.float32"),
        (lambda: match_tokens(IDS, [[1]]), ValueError, "token_ids: got shape [1, 1], expected one dimension"),
        (lambda: match_ngrams(IDS.double(), [[1]]), TypeError, "input_ids: got dtype torch.float64"),
        (lambda: match_ngrams(IDS, []), ValueError, "sequences: got none, expected at least one"),
        (lambda: match_ngrams(IDS, 5), TypeError, "sequences: got a int, expected a list of sequences"),
        (
            lambda: match_ngrams(IDS, [1, 2]),
            TypeError,
            "sequences[0]: got 1, expected a sequence of token ids",
        ),
        (lambda: match_ngrams(IDS, ["cat"]), TypeError, "sequences[0]: got 'cat', expected a sequence"),
        (lambda: match_ngrams(IDS, [[1], []]), ValueError, "sequences[1]: got no token ids"),
        (lambda: match_ngrams(IDS, [[1, -1]]), ValueError, "sequences[0]: got -1, expected token ids from 0"),
        (
            lambda: match_ngrams(IDS, [[1.0]]),
            TypeError,
            "sequences[0]: got 1.0, expected token ids, integers",
        ),
        (lambda: match_ngrams(IDS, [[1]], "middle"), ValueError, "mark: got 'middle', expected one of 'all'"),
        (
            lambda: match_ngrams(IDS, [[1]], cu_seqlens=[0, 6]),
            ValueError,
            "cu_seqlens: got tokens of shape [2, 3], expected one packed row, [T] or [1, T]",
        ),
        (
            lambda: match_ngrams(IDS[0], [[1]], cu_seqlens=[0, 2, 1, 3]),
            ValueError,
            "cu_seqlens: got [0, 2, 1, 3], expected ascending bounds from 0 to 3",
        ),
        (lambda: match_ngrams(IDS[0], [[1]], cu_seqlens=[0, 2]), ValueError, "cu_seqlens: got [0, 2]"),
        (lambda: match_ngrams(IDS[0], [[1]], cu_seqlens=[]), ValueError, "cu_seqlens: got []"),
        (
            lambda: match_ngrams(IDS[0], [[1]], cu_seqlens=[0.0, 3.0]),
            TypeError,
            "cu_seqlens: got dtype torch.float",
        ),
        (
            lambda: token_counts([1, 9, -1], 5),
            ValueError,
            "input_ids: got 2 of 3 out of range, values [-1, 9]; expected 0 <= id < 5, the vocab_size",
        ),
        (lambda: token_counts([1.0], 5), TypeError, "input_ids: got dtype torch.float32"),
        (lambda: token_counts([1], 0), ValueError, "vocab_size: got 0, expected an int from 1"),
        (lambda: token_counts([1], 5.0), TypeError, "vocab_size: got 5.0, expected an int"),
        (
            lambda: frequency_ratio([1, 2], [1]),
            ValueError,
            "retain_counts: got shape [1], expected that of forget_counts [2]",
        ),
        (
            lambda: frequency_ratio([[1]], [[1]]),
            ValueError,
            "forget_counts: got shape [1, 1], expected [vocab_size]",
        ),
        (
            lambda: frequency_ratio([1, -2], [1, 2]),
            ValueError,
            "forget_counts: got -2 at [1], expected finite",
        ),
        (lambda: frequency_ratio([1.0], [math.inf]), ValueError, "retain_counts: got inf at [0]"),
        (lambda: frequency_ratio([1], [True]), TypeError, "retain_counts: got dtype torch.bool"),
        (
            lambda: frequency_ratio([1], [1], -1),
            ValueError,
            "smoothing: got -1, expected a number of 0 or more",
        ),
        (lambda: frequency_ratio([1], [1], (1, 2, 3)), ValueError, "smoothing: got (1, 2, 3)"),
        (lambda: frequency_ratio([1], [0], 0), ValueError, "retain_counts: got no counts above 0"),
        (lambda: soft_weights([-0.5]), ValueError, "ratio: got -0.5 at [0], expected numbers of 0 or more"),
        (lambda: soft_weights([math.nan]), ValueError, "ratio: got nan at [0]"),
        (lambda: soft_weights([1.0], scale=0), ValueError, "scale: got 0, expected a positive number"),
        (lambda: soft_weights([1.0], bias=math.inf), ValueError, "bias: got inf, expected a finite number"),
        (lambda: candidates([1], [1], min_count=-1, min_ratio=1), ValueError, "min_count: got -1"),
        (lambda: candidates([1], [1], min_count=1, min_ratio=-1.0), ValueError, "min_ratio: got -1.0"),
        (lambda: candidates([1], [1], min_count=1, min_ratio=1, limit=-1), ValueError, "limit: got -1"),
        (lambda: documents([1, 0], [2]), ValueError, "lengths: got 1, expected 2, as many as labels"),
        (
            lambda: documents([1, 0], cu_seqlens=[0, 2]),
            ValueError,
            "cu_seqlens: got 2, expected 3, one more than",
        ),
        (lambda: documents([1], cu_seqlens=[1, 2]), ValueError, "cu_seqlens: got 1 as the first, expected 0"),
        (
            lambda: documents([1, 0], cu_seqlens=[0, 2, 1]),
            ValueError,
            "cu_seqlens: got -1 at [1], expected lengths",
        ),
        (
            lambda: documents([1], [2], cu_seqlens=[0, 2]),
            TypeError,
            "lengths, cu_seqlens: got both or neither",
        ),
        (lambda: documents([1]), TypeError, "lengths, cu_seqlens: got both or neither"),
        (lambda: documents([1], [-1]), ValueError, "lengths: got -1 at [0], expected lengths of 0 or more"),
        (lambda: documents([1], [1.5]), TypeError, "lengths: got dtype torch.float32"),
        (lambda: documents(IDS, [1, 2]), ValueError, "labels: got shape [2, 3], expected one dimension"),
        (
            lambda: samples([1, 0], (3, 4)),
            ValueError,
            "labels: got 2, expected one for each row of the shape [3, 4]",
        ),
        (lambda: samples(IDS, (2, 4)), ValueError, "labels: got shape [2, 3], expected one dimension"),
        (lambda: episode_numbers(), TypeError, "starts, dones: got both or neither, expected one of them"),
        (lambda: episode_numbers(dones=MASK, starts=MASK), TypeError, "starts, dones: got both or neither"),
        (lambda: episode_numbers(dones=IDS), TypeError, "dones: got dtype torch.int64, expected bool"),
        (
            lambda: episode_numbers(starts=MASK[0]),
            ValueError,
            "starts: got shape [3], expected [time, environments]",
        ),
        (
            lambda: episodes([1, 0], dones=MASK),
            ValueError,
            "labels: got 2, expected 3, one for each episode in dones",
        ),
        (
            lambda: episodes(IDS.T, dones=MASK),
            ValueError,
            "labels: got shape [3, 2], expected that of dones [2, 3]",
        ),
        (
            lambda: episodes(IDS, dones=MASK, take="any"),
            ValueError,
            "take: got 'any', expected 'first' or 'last'",
        ),
        (
            lambda: next_token(torch.tensor(1)),
            ValueError,
            "labels: got one number, expected labels of tokens",
        ),
        (lambda: next_token(IDS, [0, 6]), ValueError, "cu_seqlens: got tokens of shape [2, 3]"),
        (lambda: next_token(IDS[0], [1, 3]), ValueError, "cu_seqlens: got [1, 3], expected ascending bounds"),
        (
            lambda: next_token(IDS[0], [0, 3], attention_mask=IDS[0]),
            ValueError,
            "cu_seqlens, attention_mask: got both",
        ),
        (
            lambda: next_token(IDS, attention_mask=IDS[0]),
            ValueError,
            "attention_mask: got shape [3], expected that of labels [2, 3]",
        ),
        (
            lambda: with_errors(IDS, seed=0, false_negative=1.5),
            ValueError,
            "false_negative: got 1.5, expected a rate",
        ),
        (lambda: with_errors(IDS, seed=0, false_positive=-0.1), ValueError, "false_positive: got -0.1"),
        (lambda: with_errors(IDS, seed=0, false_positive=math.nan), ValueError, "false_positive: got nan"),
        (lambda: with_errors(IDS, seed=0.5), TypeError, "seed: got 0.5, expected an int"),
        (
            lambda: with_errors(IDS, seed=0, route=0),
            ValueError,
            "route, base: got 0 for both, expected two routes",
        ),
        (lambda: with_errors(MASK, seed=0, route=2), ValueError, "route: got 2, expected an int from 0 to 1"),
        (
            lambda: with_errors(IDS.float(), seed=0),
            TypeError,
            "labels: got dtype torch.float32, expected integers",
        ),
        (
            lambda: with_errors(IDS, seed=0, groups=IDS[0]),
            ValueError,
            "groups: got shape [3], expected that of labels [2, 3]",
        ),
        (
            lambda: with_errors([0, 1, 1], seed=0, groups=[4, 7, 4]),
            ValueError,
            "groups: got group 4 with the labels [0, 1], expected one label in every group",
        ),
        (lambda: prioritise({}), ValueError, "masks: got none, expected at least one"),
        (lambda: prioritise([MASK]), TypeError, "masks: got a list, expected a mapping from routes to masks"),
        (lambda: prioritise({1: IDS}), TypeError, "masks[1]: got dtype torch.int64, expected bool"),
        (
            lambda: prioritise({1: MASK, 2: MASK[0]}),
            ValueError,
            "masks[2]: got shape [3], expected that of masks[1] [2, 3]",
        ),
        (
            lambda: prioritise({1: MASK, 2: MASK.to("meta")}),
            ValueError,
            "masks[2]: got a tensor on meta, expected the device of masks[1] cpu",
        ),
        (lambda: prioritise({-1: MASK}), ValueError, "masks, a route: got -1, expected an int from 0"),
        (lambda: prioritise({"forget": MASK}), TypeError, "masks, a route: got 'forget', expected an int"),
        (lambda: prioritise({1: MASK}, base=-1), ValueError, "base: got -1"),
        (
            lambda: summarize(IDS + 2, 2),
            ValueError,
            "ids: got 6 of 6 out of range, values [2]; expected 0 <= id < 2",
        ),
        (lambda: summarize(IDS.float(), 2), TypeError, "ids: got dtype torch.float32"),
        (
            lambda: summarize(IDS, "ab"),
            TypeError,
            "routes: got 'ab', expected the number of routes, or their names",
        ),
        (lambda: summarize(IDS, [1, 2]), TypeError, "routes: got [1, 2]"),
        (lambda: summarize(IDS, 0), ValueError, "routes: got 0, expected an int from 1 to 32768"),
        (
            lambda: summarize(IDS, 1, IDS[0]),
            ValueError,
            "input_ids: got shape [3], expected that of ids [2, 3]",
        ),
        (
            lambda: summarize(IDS, 1, IDS, cu_seqlens=[0, 6]),
            ValueError,
            "cu_seqlens: got tokens of shape [2, 3]",
        ),
        (
            lambda: summarize(IDS, 1, IDS, examples=-1),
            ValueError,
            "examples: got -1, expected an int of 0 or more",
        ),
        (
            lambda: summarize(IDS, 1, IDS, context=0),
            ValueError,
            "context: got 0, expected an int of 1 or more",
        ),
    ],
)
def test_what_is_refused(call, error, message):
    with expect(error, message):
        call()
