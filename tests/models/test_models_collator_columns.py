"""RouteCollator: what columns may be, and every refusal."""

import copy

import numpy as np
import pytest
import torch
from collator_cases import INTEGER_KEYS, LONG, SHORT, expect, lists, without

from gradroute.models.collator import RouteCollator


def read_only(values):
    array = np.array(values)[::-1].copy()[::-1]  # the strides are negative
    array.setflags(write=False)
    return array


COLUMNS = {
    "list": list,
    "tuple": tuple,
    "tensor": torch.tensor,
    "strided tensor": lambda values: torch.tensor(values).repeat_interleave(2)[::2],
    "list of tensors": lambda values: [torch.tensor(value) for value in values],
    "array": np.array,
    "read-only array": read_only,
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("column", COLUMNS.values(), ids=COLUMNS.keys())
def test_columns_of_any_kind(column, packed):
    collator = RouteCollator(pad_token_id=9, packed=packed)
    examples = [{key: column(values) for key, values in example.items()} for example in (LONG, SHORT)]
    assert lists(collator(examples)) == lists(collator([LONG, SHORT]))


@pytest.mark.parametrize("one", [2, np.int64(2), np.array(2), torch.tensor(2)])
def test_one_route_id_labels_the_document(one):
    batch = RouteCollator(pad_token_id=0)([{"input_ids": [5, 6, 7], "route_ids": one}])
    assert batch["route_ids"].tolist() == [[2, 2, 2]]
    assert batch["route_ids"].dtype == torch.int64


@pytest.mark.parametrize("one", [0.5, np.float32(0.5), torch.tensor(0.5, dtype=torch.bfloat16)])
def test_one_strength_holds_for_the_document(one):
    batch = RouteCollator()([{"input_ids": [5, 6], "route_ids": [1, 2], "route_strength": one}])
    assert batch["route_strength"].tolist() == [[0.5, 0.5]]
    assert batch["route_strength"].dtype == torch.float32


@pytest.mark.parametrize("strength", [1, [1, 1], torch.ones(2, dtype=torch.int32)])
def test_whole_numbers_are_strengths(strength):
    batch = RouteCollator()([{"input_ids": [5, 6], "route_ids": 1, "route_strength": strength}])
    assert batch["route_strength"].tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64"])
@pytest.mark.parametrize("library", [np, torch])
def test_integers_of_any_width(library, dtype):
    column = np.array if library is np else torch.tensor
    example = {key: column([1, 0, 1], dtype=getattr(library, dtype)) for key in INTEGER_KEYS}
    batch = RouteCollator()([example])
    for key in INTEGER_KEYS:
        assert batch[key].dtype == torch.int64
        assert batch[key].tolist() == [[1, 0, 1]]


def test_bools_are_routes_and_masks():
    example = {"input_ids": [5, 6], "route_ids": [True, False], "attention_mask": torch.tensor([True, False])}
    batch = RouteCollator()([example])
    assert batch["route_ids"].tolist() == [[1, 0]]
    assert batch["attention_mask"].tolist() == [[1, 0]]
    assert batch["route_ids"].dtype == batch["attention_mask"].dtype == torch.int64


@pytest.mark.parametrize("packed", [False, True])
def test_examples_are_not_changed_and_not_shared(packed):
    example = {
        "input_ids": torch.tensor([5, 6]),
        "labels": torch.tensor([7, 8]),
        "route_ids": torch.tensor([1, 2]),
    }
    before = copy.deepcopy(example)
    batch = RouteCollator(packed=packed)([example])
    for value in batch.values():
        if torch.is_tensor(value):
            value.fill_(77)
    assert lists(example) == lists(before)


@pytest.mark.parametrize("packed", [False, True])
def test_default_device_and_dtype_do_not_matter(packed):
    collator = RouteCollator(pad_token_id=9, pad_to_multiple_of=4, packed=packed)
    example = {"input_ids": [5, 6, 7], "route_ids": 1, "route_strength": [0.1, 0.2, 0.3]}
    expected = collator([example])
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            batch = collator([example])
    finally:
        torch.set_default_dtype(torch.float32)
    assert lists(batch) == lists(expected)
    assert expected["route_strength"].flatten().tolist() == np.float32([0.1, 0.2, 0.3, 1.0]).tolist()


def test_strength_needs_no_gradient():
    strength = torch.tensor([0.5, 0.25], requires_grad=True)
    batch = RouteCollator()([{"input_ids": [5, 6], "route_ids": 1, "route_strength": strength}])
    assert not batch["route_strength"].requires_grad
    assert batch["route_strength"].tolist() == [[0.5, 0.25]]


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"pad_token_id": 1.0}, TypeError, "pad_token_id: got 1.0, expected an int of 0 or more or None"),
        ({"pad_token_id": True}, TypeError, "pad_token_id: got True, expected an int of 0 or more or None"),
        ({"pad_token_id": -1}, ValueError, "pad_token_id: got -1, expected an int of 0 or more or None"),
        (
            {"pad_to_multiple_of": "8"},
            TypeError,
            "pad_to_multiple_of: got '8', expected an int of 1 or more or None",
        ),
        (
            {"pad_to_multiple_of": 0},
            ValueError,
            "pad_to_multiple_of: got 0, expected an int of 1 or more or None",
        ),
        ({"label_pad": None}, TypeError, "label_pad: got None, expected an int"),
        ({"packed": 1}, TypeError, "packed: got 1, expected True or False"),
        ({"align": "label"}, ValueError, "align: got 'label', expected one of 'position', 'next_token'"),
    ],
)
def test_fields_are_checked(fields, error, message):
    with expect(error, message):
        RouteCollator(**fields)


@pytest.mark.parametrize(
    ("examples", "error", "message"),
    [
        ([], ValueError, "examples: got an empty batch, expected at least one example"),
        (LONG, TypeError, "examples: got a dict, expected a list of examples"),
        ([LONG, [1, 2]], TypeError, "examples[1]: got a list, expected a mapping of columns"),
        (
            [LONG | {"token_type_ids": [0] * 5, "text": "five"}],
            ValueError,
            "examples[0]: got the unknown keys 'text', 'token_type_ids', expected none but 'attention_mask', "
            "'input_ids', 'labels', 'route_ids', 'route_strength'; remove those columns from the dataset",
        ),
        (
            [LONG, without(LONG, "route_ids")],
            ValueError,
            "examples[1]: got the keys 'input_ids', 'labels', 'route_strength', expected 'route_ids' too; "
            "if the dataset has them, the trainer dropped them on the way: HF Trainer drops every column that the "
            "model's forward does not name, so route the model before the Trainer is made; TRL's trainers drop "
            "route_ids of routed models too, so make the trainer by gradroute.models.routed_trainer, such as "
            "routed_trainer(SFTTrainer)(...)",
        ),
        (
            [{}],
            ValueError,
            "examples[0]: got the keys (none), expected 'input_ids', 'route_ids' too; if the dataset has them",
        ),
        (
            [LONG, without(SHORT, "labels")],
            ValueError,
            "examples[1]: got the keys 'input_ids', 'route_ids', 'route_strength', expected those of "
            "examples[0]: 'input_ids', 'labels', 'route_ids', 'route_strength'",
        ),
    ],
)
def test_batches_and_keys_are_checked(examples, error, message):
    for packed in (False, True):
        with expect(error, message):
            RouteCollator(pad_token_id=0, packed=packed)(examples)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"input_ids": []}, ValueError, "['input_ids']: got no tokens, expected at least one"),
        ({"input_ids": [[1, 2]]}, ValueError, "['input_ids']: got shape [1, 2], expected [n]"),
        ({"input_ids": 5}, ValueError, "['input_ids']: got shape [], expected [n]"),
        (
            {"input_ids": [1.0, 2.0]},
            TypeError,
            "['input_ids']: got dtype torch.float64, expected integers",
        ),
        (
            {"input_ids": torch.tensor([True, False])},
            TypeError,
            "['input_ids']: got dtype torch.bool, expected integers",
        ),
        ({"input_ids": [3, -4]}, ValueError, "['input_ids']: got -4 at token 1, expected ids of 0 or more"),
        ({"input_ids": "ab"}, TypeError, "['input_ids']: got a str that is no tensor (can't convert"),
        ({"input_ids": None}, TypeError, "['input_ids']: got a NoneType that is no tensor (can't convert"),
        ({"input_ids": [1, [2]]}, TypeError, "['input_ids']: got a list that is no tensor (setting"),
        ({"input_ids": [1, 2**70]}, TypeError, "['input_ids']: got a list that is no tensor (can't convert"),
        (
            {"route_ids": [1]},
            ValueError,
            "['route_ids']: got 1 numbers, expected 2, one for each of the example's input_ids",
        ),
        ({"route_ids": []}, ValueError, "['route_ids']: got 0 numbers, expected 2, one for each"),
        (
            {"route_ids": [[1], [2]]},
            ValueError,
            "['route_ids']: got shape [2, 1], expected [2] or one number",
        ),
        (
            {"route_ids": [0.5, 1.0]},
            TypeError,
            "['route_ids']: got dtype torch.float64, expected integers or bools",
        ),
        ({"route_ids": 1.0}, TypeError, "['route_ids']: got dtype torch.float64, expected integers or bools"),
        ({"route_ids": [-1, 0]}, ValueError, "['route_ids']: got -1 at token 0, expected ids of 0 or more"),
        ({"route_ids": -2}, ValueError, "['route_ids']: got -2 at token 0, expected ids of 0 or more"),
        ({"labels": [1, 2, 3]}, ValueError, "['labels']: got 3 numbers, expected 2, one for each"),
        ({"labels": 3}, ValueError, "['labels']: got shape [], expected [2]"),
        ({"labels": [0.0, 1.0]}, TypeError, "['labels']: got dtype torch.float64, expected integers"),
        ({"labels": [True, False]}, TypeError, "['labels']: got dtype torch.bool, expected integers"),
        ({"attention_mask": [1]}, ValueError, "['attention_mask']: got 1 numbers, expected 2, one for each"),
        ({"attention_mask": 1}, ValueError, "['attention_mask']: got shape [], expected [2]"),
        (
            {"attention_mask": [1, 2]},
            ValueError,
            "['attention_mask']: got 2 at token 1, expected zeros and ones",
        ),
        (
            {"attention_mask": [1.0, 1.0]},
            TypeError,
            "['attention_mask']: got dtype torch.float64, expected integers or bools",
        ),
        (
            {"route_strength": [0.5]},
            ValueError,
            "['route_strength']: got 1 numbers, expected 2, one for each",
        ),
        (
            {"route_strength": [0.5, float("nan")]},
            ValueError,
            "['route_strength']: got nan at token 1, expected finite numbers",
        ),
        (
            {"route_strength": 1e39},
            ValueError,
            "['route_strength']: got inf at token 0, expected finite numbers",
        ),
        (
            {"route_strength": [1j, 0]},
            TypeError,
            "['route_strength']: got dtype torch.complex128, expected real numbers",
        ),
        (
            {"route_strength": [True, False]},
            TypeError,
            "['route_strength']: got dtype torch.bool, expected real numbers",
        ),
        (
            {"route_strength": "1"},
            TypeError,
            "['route_strength']: got a str that is no tensor (can't convert",
        ),
    ],
)
def test_columns_are_checked(changes, error, message):
    """In the second example of a batch, which the message names."""
    first = {
        "input_ids": [5, 6],
        "route_ids": 0,
        "labels": [5, 6],
        "attention_mask": [1, 1],
        "route_strength": 1.0,
    }
    for packed in (False, True):
        with expect(error, "examples[1]" + message):
            RouteCollator(pad_token_id=0, packed=packed)([first, first | changes])


def test_masked_tokens_are_refused_in_a_packed_batch():
    example = {"input_ids": [5, 6, 7], "route_ids": 0, "attention_mask": [1, 0, 0]}
    message = (
        "examples[0]['attention_mask']: got 2 of 3 tokens masked, expected ones only: "
        "a packed batch has no attention_mask, remove those tokens"
    )
    with expect(ValueError, message):
        RouteCollator(packed=True)([example])


@pytest.mark.parametrize(("packed", "missing"), [(False, 3), (True, 1)])
def test_padding_needs_a_token(packed, missing):
    message = (
        "pad_token_id: got None, expected the token to pad with, such as the tokenizer's pad_token_id: "
        f"a row needs {missing} more tokens"
    )
    with expect(ValueError, message):
        RouteCollator(pad_to_multiple_of=4 if packed else None, packed=packed)([LONG, SHORT])
