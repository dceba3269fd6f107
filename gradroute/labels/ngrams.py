"""Masks of tokens that are among some ids, or belong to n-grams such as those of `token_sequences`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .arguments import MAX_VOCABULARY, Values, as_bounds, as_integers, as_vocabulary_ids

# The number of hashes that sort out steps of n-grams: a table of 1 MB, which thousands of n-grams leave almost empty.
SLOTS = 1 << 20
MARKS = ("all", "first", "last")


def match_tokens(input_ids: Values, token_ids: Iterable[int] | Tensor) -> Tensor:
    """Marks the tokens that are among some ids of the vocabulary.

    Args:
        input_ids: integers `[*tokens]`. Negative ones, such as -100, are never marked.
        token_ids: the ids, at least one, in any order. A tensor is copied to the host, which waits for it.

    Returns:
        bool `[*tokens]`.

    Raises:
        TypeError: ids that are not integers.
        ValueError: no `token_ids`, or one that is negative or beyond MAX_VOCABULARY.
    """
    ids = as_integers("input_ids", input_ids)
    return _match(ids, as_vocabulary_ids("token_ids", token_ids))


def _match(ids: Tensor, wanted: Tensor) -> Tensor:
    # A table, not torch.isin: for 10M ids on two cores 35 ms for any number of ids wanted; isin takes 37 ms for 3 of
    # them, 84 ms for 20 and 590 ms for 1000.
    size = int(wanted.max()) + 1
    table = torch.zeros(size + 1, dtype=torch.bool, device="cpu")
    table[wanted] = True
    # The last entry is for tokens outside the table on either side: an index of -1 counts from the end.
    return table.to(ids.device)[ids.clamp(-1, size)]


def match_ngrams(
    input_ids: Values,
    sequences: Iterable[Sequence[int]],
    mark: str = "all",
    cu_seqlens: Values | None = None,
) -> Tensor:
    """Marks the tokens that belong to an occurrence of some token sequence; occurrences may overlap.

    Tokens that begin some sequence are looked up in a table. Then, in one step for each token of the longest sequence,
    the starts are kept whose next token goes on as in some sequence. Every step looks only at the starts that are left,
    so that thousands of sequences cost little more than one.

    On an accelerator the host waits for the device several times a step, to learn how many starts are left.

    Args:
        input_ids: integers `[*tokens]`; an occurrence never crosses the end of a row, the last dimension.
        sequences: at least one sequence of at least one token id each, as `token_sequences` returns them.
        mark: the tokens of an occurrence to mark: "all", its "first" or its "last".
        cu_seqlens: integers `[documents + 1]` from 0 to T, where the documents of one packed row start and end:
            occurrences do not cross these bounds either. They are checked where they are on the host.

    Returns:
        bool `[*tokens]`.

    Raises:
        TypeError: ids that are not integers.
        ValueError: no sequences, an empty one, ids that are negative or beyond MAX_VOCABULARY, another `mark`,
            `cu_seqlens` that do not go from 0 to the number of tokens, or come with more than one row.
    """
    ids = as_integers("input_ids", input_ids)
    if mark not in MARKS:
        raise ValueError(f"mark: got {mark!r}, expected one of {', '.join(map(repr, MARKS))}")
    trie = _Trie.of(_checked_sequences(sequences), ids.device)
    stops = _row_stops(ids) if cu_seqlens is None else _document_stops(as_bounds(cu_seqlens, ids))
    marked = torch.zeros(ids.numel(), dtype=torch.bool, device=ids.device)
    for length, starts in _occurrences(ids.reshape(-1), trie, stops):
        offsets = {"all": range(length), "first": (0,), "last": (length - 1,)}[mark]
        for offset in offsets if len(starts) else ():
            marked.index_fill_(0, starts + offset, True)
    return marked.view(ids.shape)


class _Trie(NamedTuple):
    """Sequences by their prefixes, which are its states; 0 is the empty one.

    Attributes:
        first: `[n]`, the tokens that sequences begin with, on the CPU.
        states: `[size]` int64: the state after a first token.
        keys: `[E]` int64, ascending: `state * size + token` of every step from a prefix to a longer one.
        next: `[E]` int64: the state that the step leads to.
        slots: `[SLOTS]` bool: whether some key has this hash.
        ends: `[states]` bool: whether the prefix is a whole sequence.
        size: one more than the largest token.
        lengths: the lengths of the sequences.
    """

    first: Tensor
    states: Tensor
    keys: Tensor
    next: Tensor
    slots: Tensor
    ends: Tensor
    size: int
    lengths: frozenset[int]

    @classmethod
    def of(cls, sequences: list[list[int]], device: torch.device) -> _Trie:
        steps: dict[tuple[int, int], int] = {}
        ends: list[bool] = [False]
        for sequence in sequences:
            state = 0
            for token in sequence:
                state = steps.setdefault((state, token), len(ends))
                if state == len(ends):
                    ends.append(False)
            ends[state] = True
        size = 1 + max(map(max, sequences))
        keys = torch.tensor([state * size + token for state, token in steps], dtype=torch.int64, device="cpu")
        keys, order = keys.sort()
        after = torch.tensor(list(steps.values()), dtype=torch.int64, device="cpu")[order]
        of_first = keys < size  # the key of a step from state 0 is its token
        states = torch.zeros(size, dtype=torch.int64, device="cpu")
        states[keys[of_first]] = after[of_first]
        slots = torch.zeros(SLOTS, dtype=torch.bool, device="cpu")
        slots[_hashes(keys)] = True
        return cls(
            keys[of_first],
            states.to(device),
            keys.to(device),
            after.to(device),
            slots.to(device),
            torch.tensor(ends, dtype=torch.bool, device=device),
            size,
            frozenset(map(len, sequences)),
        )

    def step(
        self, ids: Tensor, starts: Tensor, states: Tensor, length: int, stops: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The starts that go on as some sequence does with the token after `length` others, and their new states."""
        places = starts + length
        tokens = ids[places.clamp(max=len(ids) - 1)].long()
        keys = states * self.size + tokens
        # Most starts end here. On one core the hashes sort out 96 % of 2.4M in 36 ms; a search for all takes 94.
        some = self.slots[_hashes(keys)].nonzero().squeeze(1)
        starts, places, tokens, keys = starts[some], places[some], tokens[some], keys[some]
        found = torch.searchsorted(self.keys, keys).clamp_(max=len(self.keys) - 1)
        known = (self.keys[found] == keys) & (tokens >= 0) & (tokens < self.size) & (places < stops(starts))
        some = known.nonzero().squeeze(1)
        return starts[some], self.next[found[some]]


def _hashes(keys: Tensor) -> Tensor:
    """The hashes of int64 `[n]`, from 0 to SLOTS - 1: upper bits of a product with 2⁶⁴ over the golden ratio."""
    return ((keys * -7046029254386353131) >> 40) & (SLOTS - 1)


def _checked_sequences(sequences: object) -> list[list[int]]:
    if isinstance(sequences, (str, Mapping)) or not isinstance(sequences, Iterable):
        raise TypeError(
            f"sequences: got a {type(sequences).__name__}, expected a list of sequences of token ids"
        )
    checked = []
    for index, sequence in enumerate(sequences):
        name = f"sequences[{index}]"
        tokens = sequence.tolist() if isinstance(sequence, (Tensor, np.ndarray)) else sequence
        if isinstance(tokens, str) or not isinstance(tokens, Iterable):
            raise TypeError(f"{name}: got {sequence!r}, expected a sequence of token ids")
        tokens = list(tokens)
        if not tokens:
            raise ValueError(f"{name}: got no token ids, expected at least one")
        for token in tokens:
            if isinstance(token, bool) or not isinstance(token, (int, np.integer)):
                raise TypeError(f"{name}: got {token!r}, expected token ids, integers")
            if not 0 <= token < MAX_VOCABULARY:
                raise ValueError(f"{name}: got {token}, expected token ids from 0 to {MAX_VOCABULARY - 1}")
        checked.append([int(token) for token in tokens])
    if not checked:
        raise ValueError("sequences: got none, expected at least one")
    return checked


def _row_stops(ids: Tensor) -> Callable[[Tensor], Tensor]:
    """A function of flat positions `[n]` that says where their rows end."""
    width = max(ids.shape[-1] if ids.dim() else 1, 1)
    return lambda positions: (positions // width + 1) * width


def _document_stops(bounds: Tensor) -> Callable[[Tensor], Tensor]:
    """A function of flat positions `[n]` that says where their documents end."""
    return lambda positions: bounds[torch.searchsorted(bounds, positions, right=True)]


def _occurrences(ids: Tensor, trie: _Trie, stops: Callable[[Tensor], Tensor]) -> Iterable[tuple[int, Tensor]]:
    """The lengths of the sequences, each with the places `[n]` where sequences of that length start."""
    starts = _match(ids, trie.first).nonzero().squeeze(1)
    states = trie.states[ids[starts]]
    longest = max(trie.lengths)
    for length in range(1, longest + 1):
        if length in trie.lengths:
            yield length, starts[trie.ends[states]]
        if length < longest:
            starts, states = trie.step(ids, starts, states, length, stops)
