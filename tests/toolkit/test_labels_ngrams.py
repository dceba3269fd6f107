"""Labels: tokens and n-grams against the obvious loop over tokens."""

import numpy as np
import pytest
import torch

pytest.importorskip("hypothesis")  # a machine that runs the GPU proof alone may lack it

from hypothesis import given, settings
from hypothesis import strategies as st
from labels_cases import bounds_of, few, parts, rows_of, small_ids

from gradroute.labels import match_ngrams, match_tokens, ngrams


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
    """The marks of one row or document, by comparing every sequence at every place."""
    marked = [False] * len(row)
    for sequence in sequences:
        for start in range(len(row) - len(sequence) + 1):
            if list(row[start : start + len(sequence)]) == list(sequence):
                offsets = {"all": range(len(sequence)), "first": [0], "last": [len(sequence) - 1]}[mark]
                for offset in offsets:
                    marked[start + offset] = True
    return marked


sequences_ = st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=4), min_size=1, max_size=6)


@pytest.mark.slow
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
    """If every step has the same hash, the search in the keys decides alone."""
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
