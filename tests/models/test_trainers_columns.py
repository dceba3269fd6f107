"""Routes beside the batches of other collators: RouteColumns."""

import re

import pytest
import torch

pytest.importorskip("transformers")

from transformers import DataCollatorWithFlattening, default_data_collator

from gradroute.models import RouteCollator
from gradroute.models.route_columns import RouteColumns

EXAMPLES = [
    {"input_ids": [5, 6, 7], "labels": [5, 6, 7], "route_ids": [1, 0, 1]},
    {"input_ids": [8, 9, 10, 11, 12], "labels": [8, 9, 10, 11, 12], "route_ids": 1},
]


def padded(examples, side="right"):
    """A collator that knows input_ids alone."""
    width = max(len(example["input_ids"]) for example in examples)
    rows, masks = [], []
    for example in examples:
        assert "route_ids" not in example
        n = len(example["input_ids"])
        row, mask = torch.zeros(width, dtype=torch.int64), torch.zeros(width, dtype=torch.int64)
        kept = slice(0, n) if side == "right" else slice(width - n, width)
        row[kept], mask[kept] = torch.tensor(example["input_ids"]), 1
        rows.append(row)
        masks.append(mask)
    return {"input_ids": torch.stack(rows), "attention_mask": torch.stack(masks)}


def expect(error, message):
    return pytest.raises(error, match=re.escape(message))


@pytest.mark.parametrize(
    ("side", "expected"),
    [
        ("right", [[1, 0, 1, 0, 0], [1, 1, 1, 1, 1]]),
        ("left", [[0, 0, 1, 0, 1], [1, 1, 1, 1, 1]]),
    ],
)
def test_padding(side, expected):
    batch = RouteColumns(lambda examples: padded(examples, side))(EXAMPLES)
    assert batch["route_ids"].tolist() == expected


def test_documents_in_one_row():
    """Each document's last position keeps its own id, which is not that of the next document's first token."""
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    batch = RouteColumns(collator, align="next_token")(EXAMPLES)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10, 11, 12]]
    assert batch["route_ids"].tolist() == [[0, 1, 1, 1, 1, 1, 1, 1]]


def test_documents_that_were_packed_before():
    example = {"input_ids": [5, 6, 7, 8], "route_ids": [0, 0, 1, 0], "seq_lengths": [2, 2]}
    batch = RouteColumns(padded, align="next_token")([example])
    assert batch["route_ids"].tolist() == [[0, 0, 0, 0]]
    assert RouteColumns(padded, align="next_token")([example | {"seq_lengths": [4]}])[
        "route_ids"
    ].tolist() == [[0, 1, 0, 0]]


def test_strengths_are_padded_with_one():
    batch = RouteColumns(padded)([example | {"route_strength": 0.25} for example in EXAMPLES])
    assert batch["route_strength"].tolist() == [[0.25, 0.25, 0.25, 1, 1], [0.25] * 5]


def test_batches_of_evaluation_have_no_routes():
    for collator in (padded, RouteCollator(pad_token_id=0)):
        assert "route_ids" not in RouteColumns(collator, routed=False)(EXAMPLES)
        plain = [{"input_ids": example["input_ids"]} for example in EXAMPLES]
        assert "route_ids" not in RouteColumns(collator, routed=False)(plain)


def test_a_route_collator_does_it_all_itself():
    batch = RouteColumns(RouteCollator(pad_token_id=0))(EXAMPLES)
    assert batch["route_ids"].tolist() == [[1, 0, 1, 0, 0], [1, 1, 1, 1, 1]]


def test_pairs():
    def collator(examples):
        return {"attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 0], [1, 1, 1]])}

    batch = RouteColumns(collator, pairs=True)([{"route_ids": 1}, {"route_ids": [0, 1]}])
    assert batch["route_ids"].tolist() == [[1, 1, 1], [0, 0, 0], [1, 1, 0], [1, 1, 1]]
    with expect(
        ValueError, "examples[0]['route_ids']: got 3 numbers, expected 2, one for each of the chosen"
    ):
        RouteColumns(collator, pairs=True)([{"route_ids": [0, 1, 1]}, {"route_ids": 1}])
    with expect(ValueError, "got 4 rows for 3 pairs, expected 6"):
        RouteColumns(collator, pairs=True)([{"route_ids": 1}] * 3)


def truncated(examples):
    return default_data_collator([{"input_ids": example["input_ids"][:2]} for example in examples])


def reversed_(examples):
    return padded(examples[::-1])


@pytest.mark.parametrize("collator", [truncated, reversed_])
def test_a_collator_that_changes_tokens_is_refused(collator):
    with expect(ValueError, "do not stand whole"):
        RouteColumns(collator)(EXAMPLES)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"route_ids": [0, 1]}, ValueError, "examples[1]['route_ids']: got 2 numbers, expected 5"),
        ({"route_ids": [0.5] * 5}, TypeError, "examples[1]['route_ids']: got dtype torch.float64"),
        ({"route_ids": -1}, ValueError, "examples[1]['route_ids']: got -1"),
        ({"route_ids": None}, TypeError, "examples[1]['route_ids']"),
    ],
)
def test_wrong_routes(change, error, message):
    with expect(error, message):
        RouteColumns(padded)([EXAMPLES[0], EXAMPLES[1] | change])


def test_missing_routes():
    plain = {name: EXAMPLES[1][name] for name in ("input_ids", "labels")}
    for examples, index in (([EXAMPLES[0], plain], 1), ([plain, EXAMPLES[0]], 0)):
        with expect(
            ValueError, f"examples[{index}]: got the columns input_ids, labels, expected route_ids too"
        ):
            RouteColumns(padded)(examples)
    for examples in (
        [EXAMPLES[0] | {"route_strength": 1.0}, EXAMPLES[1]],
        [EXAMPLES[0], EXAMPLES[1] | {"route_strength": 1.0}],
    ):
        with expect(ValueError, "expected route_ids, route_strength too"):
            RouteColumns(padded)(examples)
    with expect(TypeError, "examples: got a list, expected mappings of columns"):
        RouteColumns(padded)([[1, 2]])
    with expect(ValueError, "expected input_ids beside route_ids"):
        RouteColumns(lambda examples: {})([{"text": "a", "route_ids": 1}])
