"""Labels: which route each token takes, from words, token ids, two corpora, documents, samples or episodes.

Everything here is vectorised on the device of its tensors. Masks are bool and compose with `|`, `&` and `~`;
`prioritise` makes ids of them. Ids work as the `ids` of `Routes.of` and as `route_ids=` of a routed model, strengths as
`strength` and `route_strength=`.

    encoded = tokenizer(texts, padding=True, return_offsets_mapping=True, return_tensors="pt")
    trees = match_spans(texts, encoded["offset_mapping"], ["tree", "pine forest"], ignore_case=True)
    route_ids = next_token(prioritise({1: trees, 2: match_tokens(encoded["input_ids"], [7, 9])}))

Where only token ids are left, `match_ngrams(input_ids, token_sequences(tokenizer, words))` finds words in them.

Where an argument may be an array or a list, it is copied to the CPU first; tensors stay where they are. A function
that makes the host wait for the device says so. Integers of 8 or 16 bits and unsigned ones become int64.
"""

from .errors import prioritise, with_errors
from .frequency import candidates, frequency_ratio, frequency_strength, soft_weights, token_counts
from .groups import documents, episode_numbers, episodes, next_token, samples
from .ngrams import match_ngrams, match_tokens
from .spans import match_spans
from .summary import Summary, summarize
from .words import token_sequences

__all__ = [
    "Summary",
    "candidates",
    "documents",
    "episode_numbers",
    "episodes",
    "frequency_ratio",
    "frequency_strength",
    "match_ngrams",
    "match_spans",
    "match_tokens",
    "next_token",
    "prioritise",
    "samples",
    "soft_weights",
    "summarize",
    "token_counts",
    "token_sequences",
    "with_errors",
]
