"""Labels: simulated mistakes and priorities against their definitions."""

import pytest
import torch

pytest.importorskip("hypothesis")  # a machine that runs the GPU proof alone may lack it

from hypothesis import given
from hypothesis import strategies as st
from labels_cases import few

from gradroute import Routes
from gradroute.labels import (
    documents,
    frequency_strength,
    match_ngrams,
    match_tokens,
    next_token,
    prioritise,
    samples,
    with_errors,
)
from gradroute.models.collator import RouteCollator


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
