"""Labels: frequencies in two corpora against the papers' formulas, and the mask that gradroute makes of them."""

import math

import pytest
import torch

pytest.importorskip("hypothesis")  # a machine that runs the GPU proof alone may lack it

from hypothesis import given
from hypothesis import strategies as st
from labels_cases import few

from gradroute import Routes, route_grad
from gradroute.labels import (
    candidates,
    frequency_ratio,
    frequency_strength,
    match_tokens,
    next_token,
    samples,
    soft_weights,
    token_counts,
)
from gradroute.tables import localize

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
    assert got.tolist() == pytest.approx([weight(r) for r in ratios], abs=2**-24)  # twice half an ulp of fp32


def test_weights_of_other_slopes():
    got = soft_weights([2.0], scale=2.0, bias=-1.5).item()
    assert got == pytest.approx(1 / (1 + math.exp(2 * 1.5 - 1.5)), abs=2**-24)
    strength = frequency_strength([3, 0], [0, 3], scale=2.0, bias=-1.5)
    ratio = frequency_ratio([3, 0], [0, 3])
    assert torch.equal(1 - strength, soft_weights(ratio, 2.0, -1.5))


def test_the_mask_of_the_original_parameters_is_the_papers_weight(device):
    """The chain of `frequency_strength`'s docstring, through Routes, a table and a gradient, is exact."""
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
