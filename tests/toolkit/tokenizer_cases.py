"""Tokenizers of every kind, trained on a few lines: by name, each made once."""

import functools

import pytest

CORPUS = [
    "An old oak tree stood by the road, and the road led on past the mill. The mill and the tree.",
    "tree mill road oak house past the and in on by is of a Tree TREE Mill MILL",
    '(tree) "tree" tree. tree, (mill [mill] caf\u00e9',
    "can't don't won't isn't",
] * 20
MARKS = list("\n\t()\"[]{}.,-'!?:;")
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
SPLIT = r'[\n\t()"\[\]{}.,\-\'!?:;]'
KINDS = (
    "gpt2",
    "prefixed",
    "trimmed",
    "llama3",
    "unsplit",
    "bpe first",
    "bpe always",
    "bpe never",
    "unigram first",
    "unigram always",
    "unigram never",
    "llama2",
    "nfkc",
    "bert",
)


@functools.cache
def tokenizer_of(kind):
    """A `tokenizers.Tokenizer` of one of KINDS."""
    tokenizers = pytest.importorskip("tokenizers")
    models, norms, pre = tokenizers.models, tokenizers.normalizers, tokenizers.pre_tokenizers
    trainers, alphabet = tokenizers.trainers, pre.ByteLevel.alphabet()
    if kind == "bert":
        tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer, tokenizer.pre_tokenizer = norms.BertNormalizer(), pre.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=90, special_tokens=["[UNK]"], show_progress=False)
    elif kind.startswith("unigram"):
        tokenizer = tokenizers.Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = spaced(kind)
        trainer = trainers.UnigramTrainer(
            vocab_size=110,
            special_tokens=["<unk>"],
            unk_token="<unk>",
            show_progress=False,
            initial_alphabet=MARKS,
        )
    elif kind.startswith("bpe") or kind == "llama2":
        tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
        if kind == "llama2":
            tokenizer.normalizer = norms.Sequence([norms.Prepend("▁"), norms.Replace(" ", "▁")])
        else:
            tokenizer.pre_tokenizer = spaced(kind)
        trainer = trainers.BpeTrainer(
            vocab_size=300, special_tokens=["<unk>"], show_progress=False, initial_alphabet=MARKS
        )
    else:
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = byte_level(kind)
        if kind == "nfkc":
            tokenizer.normalizer = norms.Sequence([norms.NFKC(), norms.Lowercase()])
        if kind == "trimmed":
            tokenizer.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
        trainer = trainers.BpeTrainer(vocab_size=450, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def spaced(kind):
    """Spaces as SentencePiece writes them, in front of the first piece, of all of them, or of none; and punctuation."""
    tokenizers = pytest.importorskip("tokenizers")
    pre = tokenizers.pre_tokenizers
    return pre.Sequence(
        [pre.Metaspace(prepend_scheme=kind.split()[1]), pre.Split(tokenizers.Regex(SPLIT), "isolated")]
    )


def byte_level(kind):
    tokenizers = pytest.importorskip("tokenizers")
    pre = tokenizers.pre_tokenizers
    if kind == "llama3":
        split = pre.Split(tokenizers.Regex(LLAMA_3), "isolated")
        return pre.Sequence([split, pre.ByteLevel(add_prefix_space=False, use_regex=False)])
    return pre.ByteLevel(add_prefix_space=kind == "prefixed", use_regex=kind != "unsplit")
