"""RouteCollator: examples with a route id for every token, as one padded or packed batch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..arguments import check_bool, check_choice, check_int, check_values, shown

REQUIRED = ("input_ids", "route_ids")
OPTIONAL = ("labels", "route_strength", "attention_mask")
ALIGNMENTS = ("position", "next_token")

_INTEGERS = (
    *(torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint16, torch.uint32, torch.uint64),
)

# A document is one checked example, or padding: its columns by name, each `[n]` on the CPU. `route_strength` is fp32
# and may be absent; `input_ids`, `labels`, `attention_mask` and `route_ids` are int64 and always there.
Document = dict[str, Tensor]

# Errors name by this the things that have a number each in a column.
_TOKEN = "the example's input_ids"

# A column of an example as it comes: a number, a list, a tensor, an array, or what turns out to be none of these.
Column = Any


@dataclass(frozen=True)
class RouteCollator:
    """Collates examples that carry a route id for every token: for DataLoader, or as `data_collator` of HF Trainer.

    An example is a mapping; columns of n numbers are lists, one-dimensional tensors or arrays:

    - `input_ids`: n integers, n at least 1.
    - `route_ids`: n integers (or bools), or one: the label of the whole document.
    - `labels`: n integers, optional. Without them, the `input_ids`, and `label_pad` where `attention_mask` is 0.
      Models of transformers shift labels themselves: `labels[t]` is the token at t, predicted at t - 1.
    - `route_strength`: n real numbers or one, optional; see `Routes.of`.
    - `attention_mask`: n zeros and ones, optional. In a packed batch all must be one.

    All examples of a batch have the same keys, and no others: nothing is dropped silently.

    Padded batches (`packed=False`) are padded on the right to the longest example: `input_ids` with `pad_token_id`,
    `attention_mask` with 0, `labels` with `label_pad`, `route_ids` with 0 (the base route), `route_strength` with 1.
    Packed batches are one row of all documents, one after the other, for attention that keeps them apart: by
    `cu_seq_lens_*` and `max_length_*`, under the names that transformers uses, or by `position_ids`, in which
    transformers looks for documents only where it keeps no cache (`use_cache=False`, the default of its Trainer).
    The first label of every document is `label_pad`, so that no document is asked to predict the next one's first
    token: the rule of transformers' DataCollatorWithFlattening.

    `align` matters because a mask is applied at a position, to all gradient that arrives there, and a causal language
    model predicts token t + 1 at position t. With "position" id t masks position t, where token t is *read*: the
    loss of predicting a labelled token arrives one position earlier and would be masked by another token's id.
    Gradient routing whose masks are given by the token to be predicted (Cloud et al. 2024, arXiv 2410.04332) routes
    the gradient of that token's loss; "next_token" moves ids and strengths one position to the left, so that
    position t takes those of the token at t + 1, as its loss does. The last position of a document predicts nothing
    and keeps its own. One label for a whole document is the same under both.

    Attributes:
        pad_token_id: the token that `input_ids` are padded with; may be None where nothing needs padding.
        pad_to_multiple_of: the length of a row is rounded up to a multiple of it. In a packed batch the padding is
            one more document, of its own, at the end.
        packed: whether the batch is one row without padding.
        align: "position" or "next_token": which position an id masks; see above.
        label_pad: the label that no loss is taken of; models of transformers ignore -100.

    Raises:
        TypeError: a field is not of its type.
        ValueError: `align` or a number is not one of those above.
    """

    pad_token_id: int | None = None
    pad_to_multiple_of: int | None = None
    packed: bool = False
    align: str = "position"
    label_pad: int = -100

    def __post_init__(self) -> None:
        check_int("pad_token_id", self.pad_token_id, 0, optional=True)
        check_int("pad_to_multiple_of", self.pad_to_multiple_of, 1, optional=True)
        check_int("label_pad", self.label_pad)
        check_bool("packed", self.packed)
        check_choice("align", self.align, ALIGNMENTS)

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """One batch of B examples, on the CPU; the examples are copied, not changed.

        Returns:
            Padded, S being the longest example's length, rounded up: `input_ids`, `attention_mask`, `labels`,
            `route_ids`, each `[B, S]` int64.

            Packed, S being the sum of all lengths, rounded up: `input_ids`, `labels`, `position_ids`, which start
            at 0 in every document, `route_ids`, each `[1, S]` int64; `cu_seq_lens_q` and `cu_seq_lens_k`
            `[documents + 1]` int32, where the documents start and end; `max_length_q` and `max_length_k`, Python
            ints, the length of the longest; no `attention_mask`.

            Where the examples have it, `route_strength` fp32, of the shape of `route_ids`.

        Raises:
            TypeError: an example is not a mapping, or numbers are not of the kind that their column needs.
            ValueError: no examples; keys missing, unknown or not those of the first example; a column that is empty,
                of another length than the example's `input_ids`, or out of range; tokens masked in a packed batch;
                padding needed without `pad_token_id`.
        """
        _check_keys(examples)
        documents = [self._document(index, example) for index, example in enumerate(examples)]
        return self._pack(documents) if self.packed else self._pad(documents)

    def _document(self, index: int, example: Mapping[str, Any]) -> Document:
        document = _checked(example, f"examples[{index}]")
        mask = document["attention_mask"]
        if self.packed and not mask.all():
            raise ValueError(
                f"examples[{index}]['attention_mask']: got {int((mask == 0).sum())} of {len(mask)} tokens masked, "
                "expected ones only: a packed batch has no attention_mask, remove those tokens"
            )
        if "labels" not in document:
            document["labels"] = document["input_ids"].masked_fill(mask == 0, self.label_pad)
        if self.align == "next_token":
            for key in document.keys() & {"route_ids", "route_strength"}:
                document[key] = next_token(document[key])
        return document

    def _pad(self, documents: list[Document]) -> dict[str, Any]:
        lengths = [_length(document) for document in documents]
        width = self._rounded_up(max(lengths))
        rows = [
            _joined([document, self._padding(width - length, document)])
            for document, length in zip(documents, lengths, strict=True)
        ]
        return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}

    def _pack(self, documents: list[Document]) -> dict[str, Any]:
        total = sum(map(_length, documents))
        missing = self._rounded_up(total) - total
        if missing:
            documents = [*documents, self._padding(missing, documents[0])]
        lengths = torch.tensor([_length(document) for document in documents], dtype=torch.int64, device="cpu")
        ends = lengths.cumsum(0)
        starts = ends - lengths
        row = _joined(documents)
        del row["attention_mask"]
        row["labels"][starts] = self.label_pad
        positions = torch.arange(int(ends[-1]), device="cpu")
        row["position_ids"] = positions - starts.repeat_interleave(lengths)
        return {key: tokens[None] for key, tokens in row.items()} | _boundaries(lengths)

    def _rounded_up(self, length: int) -> int:
        multiple = self.pad_to_multiple_of or 1
        return -(-length // multiple) * multiple

    def _padding(self, n: int, like: Document) -> Document:
        """A document of n tokens of padding, with the columns of `like`."""
        if n and self.pad_token_id is None:
            raise ValueError(
                "pad_token_id: got None, expected the token to pad with, such as the tokenizer's pad_token_id: "
                f"a row needs {n} more tokens"
            )
        values = {
            "input_ids": self.pad_token_id or 0,
            "attention_mask": 0,
            "labels": self.label_pad,
            "route_ids": 0,
            "route_strength": 1.0,
        }
        return {key: column.new_full((n,), values[key]) for key, column in like.items()}


def next_token(column: Tensor) -> Tensor:
    """The column `[n]` of a document, moved to the positions that predict its tokens; the last keeps its own."""
    return torch.cat((column[1:], column[-1:]))


def _length(document: Document) -> int:
    return document["input_ids"].shape[0]


def _joined(documents: Sequence[Document]) -> Document:
    """The documents one after the other: always new memory."""
    return {key: torch.cat([document[key] for document in documents]) for key in documents[0]}


def _boundaries(lengths: Tensor) -> dict[str, Any]:
    """The bounds of packed documents of these `lengths` `[documents]` for attention, under transformers' names."""
    ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
    longest = int(lengths.max())
    return {
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends.clone(),
        "max_length_q": longest,
        "max_length_k": longest,
    }


def _check_keys(examples: Sequence[Mapping[str, Any]]) -> None:
    if isinstance(examples, Mapping):
        raise TypeError(f"examples: got a {type(examples).__name__}, expected a list of examples")
    if not hasattr(examples, "__len__") or not hasattr(examples, "__getitem__"):
        raise TypeError(f"examples: got {shown(examples)}, expected a list of examples")
    if len(examples) == 0:
        raise ValueError("examples: got an empty batch, expected at least one example")
    for index, example in enumerate(examples):
        if not isinstance(example, Mapping):
            raise TypeError(
                f"examples[{index}]: got a {type(example).__name__}, expected a mapping of columns"
            )
        _check_names(f"examples[{index}]", example)
        if example.keys() != examples[0].keys():
            raise ValueError(
                f"examples[{index}]: got the keys {_listed(example)}, "
                f"expected those of examples[0]: {_listed(examples[0])}"
            )


def _check_names(name: str, example: Mapping[str, Any]) -> None:
    unknown = [key for key in example if key not in REQUIRED + OPTIONAL]
    if unknown:
        raise ValueError(
            f"{name}: got the unknown keys {_listed(unknown)}, expected none but {_listed(REQUIRED + OPTIONAL)}; "
            f"{_advice(unknown, example)}"
        )
    missing = [key for key in REQUIRED if key not in example]
    if missing:
        raise ValueError(
            f"{name}: got the keys {_listed(example)}, expected {_listed(missing)} too; if the dataset has them, the "
            "trainer dropped them on the way: HF Trainer drops every column that the model's forward does not name, so "
            "route the model before the Trainer is made; TRL's trainers drop route_ids of routed models too, so make "
            "the trainer by gradroute.models.routed_trainer, such as routed_trainer(SFTTrainer)(...)"
        )


def _advice(unknown: Sequence[str], example: Mapping[str, Any]) -> str:
    absent = [key for key in REQUIRED + OPTIONAL if key not in example]
    meant = {key: difflib.get_close_matches(str(key), absent, 1) for key in unknown}
    renamed = ", ".join(f"{key!r} to {match[0]!r}" for key, match in meant.items() if match)
    return (
        f"rename {renamed}, if that is meant, or remove those columns from the dataset"
        if renamed
        else ("remove those columns from the dataset")
    )


def _listed(keys: Iterable[str]) -> str:
    return ", ".join(sorted(map(repr, keys))) or "(none)"


def _checked(example: Mapping[str, Any], name: str) -> Document:
    """The columns of one example, checked; an `attention_mask` in any case, `labels` only if given."""
    names = {key: f"{name}[{key!r}]" for key in example}
    input_ids = _integers(names["input_ids"], example["input_ids"])
    n = len(input_ids)
    document = {
        "input_ids": _not_negative(names["input_ids"], input_ids),
        "attention_mask": torch.ones_like(input_ids),
        "route_ids": checked_ids(names["route_ids"], example["route_ids"], n),
    }
    if "attention_mask" in example:
        mask = _integers(names["attention_mask"], example["attention_mask"], n, bools=True)
        document["attention_mask"] = _zeros_and_ones(names["attention_mask"], mask)
    if "labels" in example:
        document["labels"] = _integers(names["labels"], example["labels"], n)
    if "route_strength" in example:
        document["route_strength"] = checked_strength(names["route_strength"], example["route_strength"], n)
    return document


def checked_ids(name: str, value: Column, n: int, each: str = _TOKEN) -> Tensor:
    """Route ids as `[n]` int64, from n integers (or bools) or one; `each` says in errors what has an id."""
    return _not_negative(name, _integers(name, value, n, single=True, bools=True, each=each))


def _integers(
    name: str,
    value: Column,
    n: int | None = None,
    single: bool = False,
    bools: bool = False,
    each: str = _TOKEN,
) -> Tensor:
    """`value` as `[n]` int64; `single` allows one number for all, `bools` the dtype bool."""
    expected = "integers or bools" if bools else "integers"
    tokens = _column(name, value, expected, n, single, each)
    if tokens.dtype not in _INTEGERS and not (bools and tokens.dtype == torch.bool):
        raise TypeError(f"{name}: got dtype {tokens.dtype}, expected {expected}")
    return tokens.to(torch.int64)


def checked_strength(name: str, value: Column, n: int, each: str = _TOKEN) -> Tensor:
    """Strengths as `[n]` fp32, from n real numbers or one; `each` says in errors what has a strength."""
    strength = _column(name, value, "real numbers", n, single=True, each=each)
    if not strength.is_floating_point() and strength.dtype not in _INTEGERS:
        raise TypeError(f"{name}: got dtype {strength.dtype}, expected real numbers")
    strength = strength.to(torch.float32)
    _check_all(name, strength, torch.isfinite(strength), "finite numbers")
    return strength


def _column(
    name: str, value: Column, expected: str, n: int | None, single: bool, each: str = _TOKEN
) -> Tensor:
    """`value` as a tensor `[n]` on the CPU, of the dtype it came with."""
    tokens = _tensor(name, value, expected)
    if tokens.dim() == 0 and single and n is not None:
        return tokens.expand(n)
    if tokens.dim() != 1:
        wanted = f"[{'n' if n is None else n}]" + (" or one number" if single else "")
        raise ValueError(f"{name}: got shape {list(tokens.shape)}, expected {wanted}")
    if n is None and len(tokens) == 0:
        raise ValueError(f"{name}: got no tokens, expected at least one")
    if n is not None and len(tokens) != n:
        raise ValueError(f"{name}: got {len(tokens)} numbers, expected {n}, one for each of {each}")
    return tokens


def _tensor(name: str, value: Column, expected: str) -> Tensor:
    if isinstance(value, Tensor):
        try:
            check_values(value, "numbers")
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        return value.detach().to("cpu")
    try:
        # Through numpy: torch warns of arrays that are not writable, and reads a list of floats as its default dtype.
        return torch.from_numpy(np.array(value, order="C"))
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{name}: got a {type(value).__name__} that is no tensor ({error}), expected {expected}"
        ) from error


def _not_negative(name: str, ids: Tensor) -> Tensor:
    _check_all(name, ids, ids >= 0, "ids of 0 or more")
    return ids


def _zeros_and_ones(name: str, mask: Tensor) -> Tensor:
    _check_all(name, mask, (mask == 0) | (mask == 1), "zeros and ones")
    return mask


def _check_all(name: str, column: Tensor, valid: Tensor, expected: str) -> None:
    """Raises unless all numbers of the column `[n]` are `valid` `[n]` bool."""
    if not valid.all():
        first = int((~valid).nonzero()[0])
        raise ValueError(f"{name}: got {column[first].item()} at token {first}, expected {expected}")
