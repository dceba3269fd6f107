"""The shipped launch configuration that serves a call of attention."""

from __future__ import annotations

from typing import Any

import triton
from torch import Tensor

from ..launch import config_of, dot_precision
from .edges import Edges


def block_d(q: Tensor) -> int:
    """Columns of a tile: the head dimension, padded to a power of two."""
    return max(16, triton.next_power_of_2(q.shape[3]))


def constants(q: Tensor) -> dict[str, Any]:
    """The constants that all kernels with products take."""
    return {"HEAD_DIM": q.shape[3], "PRECISION": dot_precision(), "BLOCK_D": block_d(q)}


def attention_config(
    kernel: triton.JITFunction, q: Tensor, edges: str = "", masked: bool = False
) -> dict[str, int]:
    """The shipped configuration for q's head dimension and dtype, and, of halves, for what else needs registers."""
    variant = f".{max(64, block_d(q))}"
    if q.element_size() == 2:
        variant += edges + (".masked" if masked else "")
    return config_of(kernel, q.device, q.dtype, variant)


def edges_variant(*tables: Edges) -> str:
    """How the edges of tables are read, as configurations name it."""
    levels = [edges.levels.value for edges in tables if edges.given]
    if not levels:
        return ""
    return ".gather" if 0 in levels else ".edges"
