"""Arguments of ops: the schema that follows from the fields of a NamedTuple, and the way there and back."""

from __future__ import annotations

from typing import NamedTuple, Optional

import pytest
import torch
from torch import Tensor

from gradroute.primitives.attention_pattern import Pattern
from gradroute.primitives.schema import flat, schema_of, unflat


class Inner(NamedTuple):
    ids: Tensor | None
    levels: int


class Outer(NamedTuple):
    x: Tensor
    score: Inner
    value: Inner
    name: str
    limit: Optional[int]  # noqa: UP045
    wants: bool


class Unknown(NamedTuple):
    sizes: list[int]


def test_a_schema_names_every_field_of_every_field():
    assert schema_of(Outer) == (
        "Tensor x, Tensor? score_ids, SymInt score_levels, Tensor? value_ids, SymInt value_levels, str name, "
        "SymInt? limit, bool wants"
    )
    assert schema_of(Pattern) == (
        "bool causal, SymInt? window, float scale, float dropout, Tensor? cu_seqlens, Tensor? key_mask"
    )


def test_torch_reads_the_schema():
    parsed = torch._C.parse_schema(f"op({schema_of(Outer)}) -> ()")
    assert [argument.name for argument in parsed.arguments] == [
        "x",
        *("score_ids", "score_levels", "value_ids", "value_levels"),
        *("name", "limit", "wants"),
    ]


def test_values_go_there_and_back():
    x, ids = torch.zeros(2), torch.zeros(3)
    outer = Outer(x, Inner(None, 3), Inner(ids, 0), "silu", None, True)
    values = flat(outer)
    assert [value is x or value is ids for value in values] == [True] + [False] * 2 + [True] + [False] * 4
    again = unflat(Outer, values)
    assert again.x is x
    assert again.value.ids is ids
    assert again[1::2] == (Inner(None, 3), "silu", True)
    assert isinstance(again.score, Inner)
    assert again.limit is None


def test_a_type_that_no_schema_has_is_refused():
    with pytest.raises(TypeError, match=r"Unknown.sizes: got the type list\[int\], which no schema has"):
        schema_of(Unknown)
