"""Labels: the sequences of words, with tokenizers of every kind, against the words that a regular expression finds."""

import re
import warnings

import pytest
import torch
from labels_cases import expect
from tokenizer_cases import KINDS, tokenizer_of

from gradroute.labels import match_ngrams, match_spans, token_sequences

WORDS = ["tree", "mill"]
TEXT = (
    'tree by the road.\ntree (tree) "tree" oak-tree, a tree\nmill [mill] the mill\tTree\r\n{TREE}, the Tree\'s\n\n'
    "“tree” «mill» *mill* :tree; -mill? 'tree' tree's the tree, and a (mill), and the mill."
)
SPLITTING = [kind for kind in KINDS if kind not in ("unsplit", "llama2", "bert")]


def marks(kind, text, **options):
    """What sequences mark, what spans mark, and the tokens as text."""
    encoding = tokenizer_of(kind).encode(text, add_special_tokens=False)
    sequences = token_sequences(tokenizer_of(kind), WORDS, **options)
    words = match_spans(text, encoding.offsets, WORDS, ignore_case=options.get("case_variants", True))
    return match_ngrams(torch.tensor(encoding.ids), sequences), words, encoding.tokens


@pytest.mark.setup(
    "Tokenizers", "token_sequences: a word at a line's start, in brackets, quotes and beside punctuation"
)
@pytest.mark.parametrize("kind", SPLITTING)
def test_words_are_found_between_all_neighbours(kind):
    """At a line's start, behind brackets, quotes, dashes and tabs; nothing is warned of, for nothing is missed."""
    found, words, tokens = marks(kind, TEXT)
    assert words.sum() >= len(re.findall(r"(?i)\b(tree|mill)\b", TEXT)) == 22
    missed = [tokens[place] for place in (words & ~found).nonzero().squeeze(1).tolist()]
    assert not missed
    # A lone mark of a space may belong to a word.
    assert {tokens[place] for place in (found & ~words).nonzero().squeeze(1).tolist()} <= {"▁", "Ġ"}


def test_wordpiece_takes_signs_for_letters():
    """It finds words behind all punctuation, and says that behind a euro sign it does not."""
    with pytest.warns(
        RuntimeWarning, match="no sequence finds the spellings '€tree', '😀tree', '€mill', '😀mill'"
    ):
        found, words, _ = marks("bert", TEXT, case_variants=False)
    assert torch.equal(
        found, match_spans(TEXT, tokenizer_of("bert").encode(TEXT).offsets, WORDS, ignore_case=True)
    )
    assert words.sum() > 15


@pytest.mark.setup(
    "Tokenizers",
    "token_sequences where a tokenizer merges a word with its neighbours: a warning names the spellings",
)
@pytest.mark.parametrize("kind", ["unsplit", "llama2"])
def test_spellings_that_are_merged_are_warned_of(kind):
    """A tokenizer that splits nowhere makes tokens of a word's end and what follows."""
    tokenizer = tokenizer_of(kind)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sequences = token_sequences(tokenizer, WORDS)
    encoding = tokenizer.encode("the tree of", add_special_tokens=False)
    found = match_ngrams(torch.tensor(encoding.ids), sequences)
    words = match_spans("the tree of", encoding.offsets, WORDS)
    is_named = any("'the tree of'" in str(warning.message) for warning in caught)
    assert is_named == bool((words & ~found).any())
    assert is_named == (kind == "llama2")


def test_a_quote_that_takes_a_letter_is_no_obstacle():
    """GPT-2 takes the first letters of 'tree for the end of a word such as can't."""
    encoding = tokenizer_of("gpt2").encode("'tree'")
    assert encoding.tokens[0] == "'t"
    found, words, _ = marks("gpt2", "'tree' (tree)")
    assert torch.equal(found, words)


def test_a_word_with_its_own_space_has_no_neighbours():
    encode = tokenizer_of("gpt2").encode
    sequences = token_sequences(tokenizer_of("gpt2"), [" the"], case_variants=False, leading_space=False)
    assert sequences == [tuple(encode(" the").ids)]


def test_a_letter_whose_offsets_are_trimmed_away_is_a_word():
    """Byte-level offsets may leave out a space that is not in the text, and with it the only character."""
    tokenizers = pytest.importorskip("tokenizers")
    own = tokenizers.Tokenizer.from_str(tokenizer_of("prefixed").to_str())
    own.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True, add_prefix_space=False)
    encoding = own.encode("a")
    assert encoding.offsets == [(1, 1)]
    assert token_sequences(own, ["a"], case_variants=False)[0] == tuple(encoding.ids)


def test_padding_and_truncation_of_the_tokenizer_are_not_taken_for_the_word():
    tokenizers = pytest.importorskip("tokenizers")
    own = tokenizers.Tokenizer.from_str(tokenizer_of("bert").to_str())
    own.enable_padding(length=16)
    own.enable_truncation(3)
    with pytest.warns(RuntimeWarning, match="'€oak tree'"):
        sequences = token_sequences(own, ["oak tree"])
    assert sequences == [tuple(tokenizer_of("bert").encode("oak tree").ids)]
    assert own.padding["length"] == 16
    assert own.truncation["max_length"] == 3


def test_the_unknown_token_is_the_one_that_the_model_uses():
    """A tokenizer of transformers may call another token its unknown one than its model writes."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    vocabulary = [("<pad>", 0.0), ("a", -1.0), ("▁", -1.0), ("<unk>", 0.0)]
    own = tokenizers.Tokenizer(tokenizers.models.Unigram(vocabulary, 0, False))
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=own, unk_token="<unk>")
    assert wrapped.unk_token_id == 3
    with expect(ValueError, "turns into [0], expected a word without its unknown token (0)"):
        token_sequences(wrapped, ["zzz"])


class Slow:
    """A tokenizer without offsets, with the ids of another."""

    unk_token_id = None

    def __init__(self, kind):
        self.tokenizer = tokenizer_of(kind)

    def encode(self, text, add_special_tokens):
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids


@pytest.mark.parametrize("kind", ["bpe first", "unigram first"])
def test_without_offsets_the_tokens_behind_a_neighbours_are_the_word(kind):
    text = "tree\ntree (tree) [mill] the mill"
    encoding = tokenizer_of(kind).encode(text, add_special_tokens=False)
    sequences = token_sequences(Slow(kind), WORDS)
    found = match_ngrams(torch.tensor(encoding.ids), sequences)
    assert (found | ~match_spans(text, encoding.offsets, WORDS)).all()


def test_without_offsets_a_quote_that_takes_a_letter_is_warned_of():
    with pytest.warns(RuntimeWarning, match='no sequence finds the spellings "\'tree", "a\'tree": the'):
        token_sequences(Slow("gpt2"), WORDS)


def test_options_are_bools():
    with expect(TypeError, "case_variants: got 1, expected True or False"):
        token_sequences(tokenizer_of("gpt2"), WORDS, 1)
    with expect(TypeError, "leading_space: got 'no', expected True or False"):
        token_sequences(tokenizer_of("gpt2"), WORDS, leading_space="no")
