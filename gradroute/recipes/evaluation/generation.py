"""Generations of several checkpoints from the same prompts, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...arguments import check_bool, check_int, check_is, check_number, shown
from ..conversations import NOT_LEARNT
from .held_out import evaluating

MAX_NEW_TOKENS = 48


def generations(
    models: Mapping[str, nn.Module],
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    sample: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """What every model writes after every prompt.

    Routed models generate without routes. Prompts are not padded, so that no completion depends on another prompt.

    Args:
        models: name → a causal language model of transformers. One model is asked for at a time, so that a mapping may
            load each when it is read.
        tokenizer: theirs.
        prompts: texts of at least one token.
        max_new_tokens: the longest completion.
        sample: whether tokens are drawn at random, rather than the likeliest taken. Every model and prompt begins with
            the same random numbers, and the caller's stay as they were.
        temperature: of sampling alone: logits are divided by it.
        top_p: of sampling alone: the share of probability whose likeliest tokens are drawn from.
        seed: of sampling alone.

    Returns:
        Of each prompt {"prompt": text, "completions": {name: text}}, completions without special tokens.

    Raises:
        TypeError, ValueError: an argument is not what is expected; a prompt with its completion is longer than
            the model allows.
    """
    check_is("models", models, Mapping, "a mapping of names to models")
    found: list[dict[str, Any]] = [{"prompt": prompt, "completions": {}} for prompt in prompts]
    for name in models:
        texts = completions(
            models[name],
            tokenizer,
            prompts,
            max_new_tokens=max_new_tokens,
            sample=sample,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
        )
        for entry, text in zip(found, texts, strict=True):
            entry["completions"][name] = text
    return found


def completions(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = MAX_NEW_TOKENS,
    sample: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[str]:
    """What one model writes after every prompt: see `generations`."""
    options = _options(model, tokenizer, max_new_tokens, sample, temperature, top_p)
    check_int("seed", seed, 0)
    encoded = [_encoded(number, prompt, tokenizer) for number, prompt in enumerate(prompts)]
    _check_lengths(model, encoded, max_new_tokens)
    device = next(model.parameters()).device
    texts = []
    with evaluating(model), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        for input_ids in encoded:
            torch.manual_seed(seed)
            output = model.generate(  # type: ignore[operator]  # transformers' models have it, see _options
                input_ids.to(device), attention_mask=torch.ones_like(input_ids, device=device), **options
            )
            texts.append(tokenizer.decode(output[0, input_ids.shape[1] :].tolist(), skip_special_tokens=True))
    return texts


def _options(
    model: nn.Module, tokenizer: Any, max_new_tokens: int, sample: bool, temperature: float, top_p: float
) -> dict[str, Any]:
    """The arguments of `generate`: all of them, so that nothing of the model's own generation_config remains."""
    if not callable(getattr(model, "generate", None)):
        raise TypeError(
            f"model: got a {type(model).__name__}, expected a model of transformers that generates"
        )
    check_int("max_new_tokens", max_new_tokens, 1)
    if not check_number("temperature", temperature) > 0:
        raise ValueError(f"temperature: got {temperature}, expected a number above 0")
    if not 0 < check_number("top_p", top_p) <= 1:
        raise ValueError(f"top_p: got {top_p}, expected a number above 0, up to 1")
    sampling = {"temperature": temperature, "top_p": top_p} if check_bool("sample", sample) else {}
    from transformers import GenerationConfig

    own = getattr(model, "generation_config", None)
    end = getattr(own, "eos_token_id", None)
    end = tokenizer.eos_token_id if end is None else end
    first = end[0] if isinstance(end, (list, tuple)) else end
    padding = first if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=sample,
        num_beams=1,
        eos_token_id=end,
        pad_token_id=padding,
        bos_token_id=getattr(own, "bos_token_id", None),
        **({"top_k": 0} | sampling if sample else {}),
    )
    return {"generation_config": config}


def _encoded(number: int, prompt: object, tokenizer: Any) -> Tensor:
    """A prompt's tokens, int64 [1, S]."""
    if not isinstance(prompt, str):
        raise TypeError(f"prompts[{number}]: got {shown(prompt)}, expected a text")
    begin = getattr(tokenizer, "bos_token", None)
    has_begin = begin and prompt.startswith(begin)  # as chat templates write it
    tokens = tokenizer(prompt, **({"add_special_tokens": False} if has_begin else {}))["input_ids"]
    if not tokens:
        raise ValueError(
            f"prompts[{number}]: got {shown(prompt)}, which has no tokens, expected at least one"
        )
    return torch.tensor([tokens], dtype=torch.int64, device="cpu")


def _check_lengths(model: nn.Module, encoded: Sequence[Tensor], max_new_tokens: int) -> None:
    longest = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    for number, tokens in enumerate(encoded):
        length = tokens.shape[1]
        if isinstance(longest, int) and length + max_new_tokens > longest:
            raise ValueError(
                f"prompts[{number}]: got {length} tokens and max_new_tokens {max_new_tokens}, expected {longest} "
                "together at most, the model's max_position_embeddings"
            )


def openings(
    rows: Sequence[Mapping[str, Any]], tokenizer: Any, *, each: int, tokens: int, continuation: int
) -> list[dict[str, str]]:
    """Prompts from held-out documents: the first tokens of the first documents of every source that are long enough.

    A document with `labels` begins with its own prompt: all up to the first token that is learnt.

    Args:
        rows: documents, with `input_ids` and `source`.
        tokenizer: theirs.
        each: documents of a source, at most.
        tokens: tokens of a prompt.
        continuation: tokens of the document's own text behind it that are given too.

    Returns:
        Of each {"prompt", "source", "text": what the document goes on with}.
    """
    found: list[dict[str, str]] = []
    taken: dict[str, int] = {}
    for row in rows:
        source, ids = row["source"], list(row["input_ids"])
        own = next((at for at, label in enumerate(row.get("labels") or []) if label != NOT_LEARNT), 0)
        length = own or tokens
        if taken.get(source, 0) >= each or len(ids) <= length:
            continue
        # The marks of a chat template are special tokens of a prompt of its own.
        prompt = tokenizer.decode(ids[:length], skip_special_tokens=not own)
        if not prompt.strip():
            continue
        taken[source] = taken.get(source, 0) + 1
        rest = tokenizer.decode(ids[length : length + continuation], skip_special_tokens=True)
        found.append({"prompt": prompt, "source": source, "text": rest})
    return sorted(found, key=lambda entry: list(taken).index(entry["source"]))
