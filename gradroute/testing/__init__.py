"""Sample calls of every op, each op in plain PyTorch, and the error budget; shared by tests and bench.

`sample(op, ...)` makes one call: tensors, routes, sites, keywords and an upstream gradient. A Sample runs itself on a
backend, in fp64, and in plain PyTorch under ordinary autograd, without gradroute's Functions: by the detach idiom
m * x + (1 - m) * x.detach() (`run_detached`), or in the cheapest form with the eager op's forward bits (`run_plain`).
Both come from one formula per op, written on `Marks`. Needs no test framework.
"""

from ..tables import Table
from .activations import PLAIN_ACTIVATIONS
from .budget import (
    INNER_ROUNDINGS,
    ROUNDINGS,
    Result,
    assert_result_within_budget,
    assert_same_bits,
    excess,
)
from .covering import covering
from .draw import LAYOUTS, Draw, Sizes
from .marks import Marks
from .memory import SavedBytes, saved_bytes
from .op import Op
from .ops import OPS
from .samples import STRENGTHS, Sample, sample, site_names, variants
from .tables import TABLE_KINDS, make_table

__all__ = [
    "INNER_ROUNDINGS",
    "LAYOUTS",
    "OPS",
    "PLAIN_ACTIVATIONS",
    "ROUNDINGS",
    "STRENGTHS",
    "TABLE_KINDS",
    "Draw",
    "Marks",
    "Op",
    "Result",
    "Sample",
    "SavedBytes",
    "Sizes",
    "Table",
    "assert_result_within_budget",
    "assert_same_bits",
    "covering",
    "excess",
    "make_table",
    "sample",
    "saved_bytes",
    "site_names",
    "variants",
]
