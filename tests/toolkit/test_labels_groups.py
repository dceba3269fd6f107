"""Labels: documents, samples, episodes and the next token against the obvious loop."""

import pytest
import torch

pytest.importorskip("hypothesis")  # a machine that runs the GPU proof alone may lack it

from hypothesis import given
from hypothesis import strategies as st
from labels_cases import bounds_of, few, parts, rows_of, small_ids

from gradroute import Routes
from gradroute.labels import documents, episode_numbers, episodes, next_token, samples
from gradroute.models.collator import RouteCollator


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
    got[0, 0] = 1  # the result has memory of its own
    assert got.tolist() == [[1, 2, 2], [0, 0, 0]]


def numbered(dones):
    """The number of the episode by [time][environment]; the step after a done begins a new one."""
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
