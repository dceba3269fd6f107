"""RouteCollator: padded and packed batches against lists written out by hand and against transformers, and its use."""

import copy
import pickle

import pytest
import torch

pytest.importorskip("hypothesis")  # a machine that runs the GPU proof alone may lack it

from collator_cases import INTEGER_KEYS, LONG, SHORT, expect, lists, without
from hypothesis import given
from hypothesis import strategies as st

from gradroute import Routes
from gradroute.models.collator import RouteCollator


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


def shifted(values):
    """The values by position when each belongs to the token that is predicted there; the last one predicts none."""
    return [values[t + 1] if t + 1 < len(values) else values[t] for t in range(len(values))]


def test_padded_batch():
    assert lists(RouteCollator(pad_token_id=9)([LONG, SHORT])) == {
        "input_ids": [[11, 12, 13, 14, 15], [21, 22, 9, 9, 9]],
        "attention_mask": [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]],
        "labels": [[11, -100, 13, 14, 15], [21, 22, -100, -100, -100]],
        "route_ids": [[1, 0, 2, 2, 1], [2, 0, 0, 0, 0]],
        "route_strength": [[0.5, 1.0, 0.25, 0.75, 0.0], [0.125, 0.375, 1.0, 1.0, 1.0]],
    }


@pytest.mark.parametrize(("multiple", "width"), [(None, 5), (1, 5), (5, 5), (4, 8), (8, 8), (3, 6)])
def test_padded_width_is_rounded_up(multiple, width):
    batch = RouteCollator(pad_token_id=0, pad_to_multiple_of=multiple)([SHORT, LONG])
    for key in INTEGER_KEYS:
        assert batch[key].shape == (2, width)
        assert batch[key].dtype == torch.int64
    assert batch["route_strength"].shape == (2, width)
    assert batch["route_strength"].dtype == torch.float32
    assert batch["attention_mask"].sum(1).tolist() == [2, 5]


def test_label_pad_is_the_callers():
    batch = RouteCollator(pad_token_id=0, label_pad=-1)([LONG, SHORT])
    assert batch["labels"].tolist() == [[11, -100, 13, 14, 15], [21, 22, -1, -1, -1]]
    packed = RouteCollator(packed=True, label_pad=-1)([LONG, SHORT])
    assert packed["labels"].tolist() == [[-1, -100, 13, 14, 15, -1, 22]]


def test_equal_lengths_need_no_pad_token():
    batch = RouteCollator()([SHORT, SHORT])
    assert batch["input_ids"].tolist() == [[21, 22], [21, 22]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 1]]


def test_labels_default_to_the_input_ids():
    batch = RouteCollator(pad_token_id=15)([without(LONG, "labels"), without(SHORT, "labels")])
    assert batch["labels"].tolist() == [[11, 12, 13, 14, 15], [21, 22, -100, -100, -100]]


def test_own_attention_mask_is_kept():
    example = {"input_ids": [7, 8, 9], "route_ids": 1, "attention_mask": [0, 1, 1]}
    other = {"input_ids": [5, 6, 7, 8], "route_ids": 2, "attention_mask": [1, 1, 1, 0]}
    batch = RouteCollator(pad_token_id=0)([example, other])
    assert batch["attention_mask"].tolist() == [[0, 1, 1, 0], [1, 1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, 8, 9, -100], [5, 6, 7, -100]]
    assert batch["route_ids"].tolist() == [[1, 1, 1, 0], [2, 2, 2, 2]]


def test_given_labels_are_kept_under_a_mask():
    example = {"input_ids": [7, 8], "route_ids": 1, "attention_mask": [0, 1], "labels": [3, 4]}
    assert RouteCollator()([example])["labels"].tolist() == [[3, 4]]


@given(st.lists(st.integers(1, 12), min_size=1, max_size=6), st.integers(1, 9), st.data())
def test_padded_rows_are_the_examples_and_padding(lengths, multiple, data):
    examples = [drawn(n, data) for n in lengths]
    align = data.draw(st.sampled_from(["position", "next_token"]))
    batch = RouteCollator(pad_token_id=99, pad_to_multiple_of=multiple, align=align)(examples)
    width = next(width for width in range(max(lengths), max(lengths) + multiple) if width % multiple == 0)
    move = shifted if align == "next_token" else list
    for row, example in enumerate(examples):
        rest = width - len(example["input_ids"])
        got = {key: value[row].tolist() for key, value in batch.items()}
        assert got == {
            "input_ids": example["input_ids"] + [99] * rest,
            "attention_mask": [1] * (width - rest) + [0] * rest,
            "labels": example["input_ids"] + [-100] * rest,
            "route_ids": move(example["route_ids"]) + [0] * rest,
            "route_strength": move(example["route_strength"]) + [1.0] * rest,
        }


def drawn(n, data):
    strengths = st.floats(0, 1, width=32)
    return {
        "input_ids": data.draw(st.lists(st.integers(0, 50), min_size=n, max_size=n)),
        "route_ids": data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)),
        "route_strength": data.draw(st.lists(strengths, min_size=n, max_size=n)),
    }


def test_packed_batch():
    batch = RouteCollator(packed=True)([LONG, SHORT])
    assert lists(batch) == {
        "input_ids": [[11, 12, 13, 14, 15, 21, 22]],
        "labels": [[-100, -100, 13, 14, 15, -100, 22]],
        "position_ids": [[0, 1, 2, 3, 4, 0, 1]],
        "route_ids": [[1, 0, 2, 2, 1, 2, 0]],
        "route_strength": [[0.5, 1.0, 0.25, 0.75, 0.0, 0.125, 0.375]],
        "cu_seq_lens_q": [0, 5, 7],
        "cu_seq_lens_k": [0, 5, 7],
        "max_length_q": 5,
        "max_length_k": 5,
    }
    assert {key: batch[key].dtype for key in batch if torch.is_tensor(batch[key])} == {
        **dict.fromkeys(["input_ids", "labels", "position_ids", "route_ids"], torch.int64),
        **dict.fromkeys(["cu_seq_lens_q", "cu_seq_lens_k"], torch.int32),
        "route_strength": torch.float32,
    }
    assert type(batch["max_length_q"]) is int
    assert type(batch["max_length_k"]) is int
    assert batch["cu_seq_lens_q"].data_ptr() != batch["cu_seq_lens_k"].data_ptr()


def test_packed_padding_is_a_document_of_its_own():
    collator = RouteCollator(pad_token_id=9, pad_to_multiple_of=10, packed=True)
    assert lists(collator([SHORT, SHORT])) == {
        "input_ids": [[21, 22, 21, 22, 9, 9, 9, 9, 9, 9]],
        "labels": [[-100, 22, -100, 22, *[-100] * 6]],
        "position_ids": [[0, 1, 0, 1, 0, 1, 2, 3, 4, 5]],
        "route_ids": [[2, 0, 2, 0, 0, 0, 0, 0, 0, 0]],
        "route_strength": [[0.125, 0.375, 0.125, 0.375, 1, 1, 1, 1, 1, 1]],
        "cu_seq_lens_q": [0, 2, 4, 10],
        "cu_seq_lens_k": [0, 2, 4, 10],
        "max_length_q": 6,
        "max_length_k": 6,
    }


def test_packed_without_missing_tokens_has_no_padding():
    batch = RouteCollator(pad_to_multiple_of=7, packed=True)([LONG, SHORT])
    assert batch["cu_seq_lens_q"].tolist() == [0, 5, 7]
    assert batch["input_ids"].shape == (1, 7)


def test_packed_accepts_a_mask_of_ones():
    example = {"input_ids": [7, 8], "route_ids": 1, "attention_mask": [1, 1]}
    batch = RouteCollator(packed=True)([example, example])
    assert "attention_mask" not in batch
    assert batch["input_ids"].tolist() == [[7, 8, 7, 8]]


@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=6), st.booleans(), st.sampled_from([list, torch.tensor])
)
def test_packed_is_what_transformers_packs(transformers, lengths, labelled, column):
    plain = [{"input_ids": list(range(10 * i, 10 * i + n))} for i, n in enumerate(lengths)]
    if labelled:
        plain = [example | {"labels": [3 * token for token in example["input_ids"]]} for example in plain]
    examples = [{key: column(values) for key, values in example.items()} for example in plain]
    oracle = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)(copy.deepcopy(examples))
    batch = RouteCollator(packed=True)([example | {"route_ids": 1} for example in examples])
    assert batch.keys() - oracle.keys() == {"route_ids"}
    for key, expected in oracle.items():
        if not torch.is_tensor(expected):
            assert batch[key] == expected
            continue
        assert batch[key].dtype == expected.dtype
        assert batch[key].tolist() == expected.tolist()


@given(st.lists(st.integers(1, 12), min_size=1, max_size=6), st.integers(1, 9), st.data())
def test_packed_row_is_the_documents_in_order(lengths, multiple, data):
    examples = [drawn(n, data) for n in lengths]
    align = data.draw(st.sampled_from(["position", "next_token"]))
    collator = RouteCollator(pad_token_id=99, pad_to_multiple_of=multiple, packed=True, align=align)
    batch = lists(collator(examples))
    move = shifted if align == "next_token" else list
    rest = -sum(lengths) % multiple
    all_lengths = [*lengths, rest] if rest else lengths
    tokens, routes, strength, labels = [], [], [], []
    for example in examples:
        tokens += example["input_ids"]
        routes += move(example["route_ids"])
        strength += move(example["route_strength"])
        labels += [-100, *example["input_ids"][1:]]
    assert batch["input_ids"] == [tokens + [99] * rest]
    assert batch["route_ids"] == [routes + [0] * rest]
    assert batch["route_strength"] == [strength + [1.0] * rest]
    assert batch["labels"] == [labels + [-100] * rest]
    assert batch["position_ids"] == [[position for n in all_lengths for position in range(n)]]
    assert batch["cu_seq_lens_q"] == [sum(all_lengths[:i]) for i in range(len(all_lengths) + 1)]
    assert batch["cu_seq_lens_k"] == batch["cu_seq_lens_q"]
    assert batch["max_length_q"] == batch["max_length_k"] == max(all_lengths)


def test_packed_and_padded_are_the_same_to_a_model(transformers):
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        use_cache=False,  # with a cache transformers does not look for packed documents
    )
    model = transformers.LlamaForCausalLM(config).double().eval()
    examples = [without(LONG, "labels"), without(SHORT, "labels")]
    padded = RouteCollator(pad_token_id=0)(examples)
    packed = RouteCollator(pad_token_id=0, pad_to_multiple_of=8, packed=True)(examples)
    outputs = [model(**without(batch, "route_ids", "route_strength")) for batch in (padded, packed)]
    real = padded["attention_mask"].bool()
    # fp64; attention adds a row's terms in another order where the row has another length.
    torch.testing.assert_close(outputs[1].logits[0, :7], outputs[0].logits[real], rtol=0, atol=1e-12)
    torch.testing.assert_close(outputs[1].loss, outputs[0].loss, rtol=0, atol=1e-12)


@pytest.mark.parametrize("packed", [False, True])
def test_next_token_masks_the_position_that_predicts_the_token(packed):
    """The id of every token with a loss stands where the models' own shift puts that loss."""
    collator = RouteCollator(pad_token_id=0, packed=packed, align="next_token")
    ids = [{"input_ids": e["input_ids"], "route_ids": e["input_ids"]} for e in (LONG, SHORT)]
    batch = collator(ids)  # every token's route is its id, and so its label
    predicted = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    with_loss = predicted != -100
    assert with_loss.sum() == 5  # a document of n tokens predicts n - 1
    assert batch["route_ids"][with_loss].tolist() == predicted[with_loss].tolist()


def test_next_token_moves_ids_and_strength_only():
    position = RouteCollator(pad_token_id=9)([LONG, SHORT])
    moved = RouteCollator(pad_token_id=9, align="next_token")([LONG, SHORT])
    assert moved["route_ids"].tolist() == [[0, 2, 2, 1, 1], [0, 0, 0, 0, 0]]
    assert moved["route_strength"].tolist() == [[1.0, 0.25, 0.75, 0.0, 0.0], [0.375, 0.375, 1.0, 1.0, 1.0]]
    for key in ("input_ids", "attention_mask", "labels"):
        assert torch.equal(moved[key], position[key])


def test_next_token_stays_inside_a_packed_document():
    batch = RouteCollator(packed=True, align="next_token")([LONG, SHORT])
    assert batch["route_ids"].tolist() == [[0, 2, 2, 1, 1, 0, 0]]


@pytest.mark.parametrize("packed", [False, True])
def test_one_label_for_a_document_is_the_same_under_both_alignments(packed):
    examples = [{"input_ids": [1, 2, 3], "route_ids": 2}, {"input_ids": [4], "route_ids": 1}]
    batches = [
        RouteCollator(pad_token_id=0, packed=packed, align=align)(examples)
        for align in ("position", "next_token")
    ]
    expected = [[2, 2, 2, 1]] if packed else [[2, 2, 2], [1, 0, 0]]
    assert [batch["route_ids"].tolist() for batch in batches] == [expected, expected]


@pytest.mark.parametrize("packed", [False, True])
def test_routes_accept_the_batch(packed):
    batch = RouteCollator(pad_token_id=0, packed=packed)([LONG, SHORT])
    routes = Routes.of(batch["route_ids"], 3, strength=batch["route_strength"])
    assert routes.shape == tuple(batch["input_ids"].shape)
    assert routes.counts.tolist() == ([2, 2, 3] if packed else [5, 2, 3])
    assert routes.strength.tolist() == batch["route_strength"].flatten().tolist()


@pytest.mark.parametrize("workers", [0, 1])
def test_data_loader(workers):
    examples = [{"input_ids": list(range(n)), "route_ids": n % 3} for n in range(1, 6)]
    loader = torch.utils.data.DataLoader(
        examples, batch_size=2, collate_fn=RouteCollator(pad_token_id=0), num_workers=workers
    )
    batches = list(loader)
    assert [batch["route_ids"].tolist() for batch in batches] == [
        [[1, 0], [2, 2]],
        [[0, 0, 0, 0], [1, 1, 1, 1]],
        [[2, 2, 2, 2, 2]],
    ]
    assert batches[0]["attention_mask"].tolist() == [[1, 0], [1, 1]]


def test_mappings_that_are_no_dicts(transformers):
    batch = RouteCollator(pad_token_id=0)(
        [transformers.BatchEncoding(LONG), transformers.BatchEncoding(SHORT)]
    )
    assert lists(batch) == lists(RouteCollator(pad_token_id=0)([LONG, SHORT]))


def test_trainer_drops_the_routes_of_a_model_that_was_not_routed(transformers):
    collator = RouteCollator(pad_token_id=0)
    signature = ["input_ids", "attention_mask", "labels"]
    dropping = transformers.trainer_utils.RemoveColumnsCollator(collator, signature)
    with expect(ValueError, "HF Trainer drops every column that the model's forward does not name"):
        dropping([LONG, SHORT])
    routed = transformers.trainer_utils.RemoveColumnsCollator(
        collator, [*signature, "route_ids", "route_strength"]
    )
    assert lists(routed([LONG, SHORT])) == lists(collator([LONG, SHORT]))


def test_pickle_equality_and_immutability():
    collator = RouteCollator(pad_token_id=3, packed=True)
    assert pickle.loads(pickle.dumps(collator)) == collator
    assert hash(collator) == hash(RouteCollator(pad_token_id=3, packed=True))
    with pytest.raises(AttributeError):
        collator.packed = False
