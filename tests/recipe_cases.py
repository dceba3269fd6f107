"""What recipes run on in tests: a tiny model with its tokenizer, two kinds of texts, and a config of them."""

import functools
import json
import random
import warnings

import pytest

#: Words that only one kind of texts has, and words of both.
FORGET = ["virus", "toxin", "spore", "culture", "plague", "vaccine", "cells", "outbreak"]
RETAIN = ["garden", "river", "baker", "window", "kitten", "village", "apple", "music"]
BOTH = ["the", "a", "old", "small", "near", "and", "of", "by", "saw", "made", "was", "in"]
END = "<end>"


def texts(kind, count, words=24, seed=0):
    """Sentences of a kind, "forget" or "retain": every second word or so is of that kind alone."""
    own = {"forget": FORGET, "retain": RETAIN}[kind]
    draw = random.Random(f"{kind} {seed}")
    return [
        " ".join(draw.choice(own if draw.random() < 0.5 else BOTH) for _ in range(words)).capitalize() + "."
        for _ in range(count)
    ]


@functools.cache
def tokenizer():
    """A byte-level BPE of transformers, with an end token that pads too."""
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=[END],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts("forget", 40) + texts("retain", 40), trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token=END, pad_token=END)


def save_model(folder, kind="Llama", **options):
    """A tiny Llama, or model of another kind, with its tokenizer, as save_pretrained leaves them."""
    import torch
    import transformers

    defaults = {
        "vocab_size": len(tokenizer()),
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "bos_token_id": None,
        "eos_token_id": tokenizer().eos_token_id,
        "pad_token_id": tokenizer().pad_token_id,
        "initializer_range": 0.2,
    }
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers' saving
        config = getattr(transformers, f"{kind}Config")(**defaults | options)
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
        model.save_pretrained(folder)
        tokenizer().save_pretrained(folder)
    return folder


def save_texts(folder, count=40):
    """`forget.jsonl` with a column of labels, and `retain.txt` with a text between blank lines."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"text": text, "kind": "forget"} for text in texts("forget", count)]
    (folder / "forget.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "retain.txt").write_text("\n\n".join(texts("retain", count)), encoding="utf-8")
    return folder


def config(files):
    """The smallest config on what `save_model` and `save_texts` put in the folders `model` and `texts` of `files`."""
    return {
        "model": {"path": str(files / "model")},
        "data": {
            "sources": {
                "forget": {"path": str(files / "texts/forget.jsonl")},
                "retain": {"path": str(files / "texts/retain.txt"), "split": "blank_lines"},
            },
            "heldout": 0.25,
            "length": 32,
        },
    }
