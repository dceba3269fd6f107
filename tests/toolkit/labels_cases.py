"""Shared by the tests of labels: inputs that hypothesis draws, and messages that are expected."""

import itertools
import re

import pytest

pytest.importorskip("hypothesis")  # a machine that runs the GPU proof alone may lack it

from hypothesis import settings
from hypothesis import strategies as st

TEXTS = [
    "The tree stood in the forest. Trees are tall, and a tree is old.",
    "A cat sat on the mat in the house; the cat was not in the forest.",
    "In the White House there is no tree, and no cat.",
] * 5


WORDS = ("tree", "cat", "white house")
few = settings(max_examples=40)
small_ids = st.integers(-1, 6)


def expect(error, message):
    return pytest.raises(error, match=re.escape(message))


def rows_of(width=12):
    return st.integers(0, width).flatmap(
        lambda n: st.lists(st.lists(small_ids, min_size=n, max_size=n), min_size=1, max_size=3)
    )


def bounds_of(total, draw):
    """Where documents start and end, empty ones among them."""
    inner = draw(st.lists(st.integers(0, total), max_size=5))
    return [0, *sorted(inner), total]


def parts(values, bounds):
    return [values[a:b] for a, b in itertools.pairwise(bounds)]
