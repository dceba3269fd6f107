"""Why FlashAttention-4's backward cannot run a call."""

from __future__ import annotations

import functools
import importlib.metadata

import torch
from torch import Tensor

from ...primitives.attention_pattern import Pattern
from ...tables import Table
from ...tracing import constant_when_traced
from ..vendor import machine
from ..vendor.refusals import HALVES, why_not_inputs, why_not_on_gpu
from .operands import MAX_ROUTES
from .passes import why_not_tables

#: The releases that the kernels were compiled with; the backward is no public function of the library.
VERSIONS = {"flash-attn-4": "4.0.0b36", "nvidia-cutlass-dsl": "4.8.1", "quack-kernels": "0.6.5"}

#: The head dimensions and the compute capabilities that they were compiled for.
HEAD_DIMS = (64, 96, 128)
CAPABILITIES = ((9, 0), (10, 0))


def why_not(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_routes: int,
    score_edges: Table | None,
    value_edges: Table | None,
    pattern: Pattern,
) -> str | None:
    """Why it cannot run the backward of a call; None when it can.

    Args:
        q: `[B, H, S_q, D]`.
        k: `[B, G, S_k, D]`.
        v: `[B, G, S_k, D]`.
        num_routes: R.
        score_edges: `[R, R]`; None: ones.
        value_edges: `[R, R]`; None: ones.
        pattern: which keys a query sees.
    """
    return (
        why_not_inputs(q, k, v, ("cuda",), HALVES)
        or why_not_installed()
        or why_not_on_gpu(q, min(CAPABILITIES))
        or _why_not_gpu(q)
        or _why_not_shape(q, k, num_routes, pattern)
        or why_not_tables(score_edges, value_edges)
        or _why_not_deterministic()
    )


@constant_when_traced
def why_not_installed() -> str | None:
    """Why the library is not used whatever the call; None where it is what the kernels were compiled with."""
    found = {package: installed_version(package) for package in VERSIONS}
    for package, version in found.items():
        if version is None:
            return f"the package {package} is not installed (gradroute's extra fa4)"
    for package, version in found.items():
        if version != VERSIONS[package]:
            return f"its kernels were compiled with {package} {VERSIONS[package]}, and {version} is installed"
    return None


@functools.cache
def installed_version(package: str) -> str | None:
    """The release of a package that is installed; None: it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _why_not_gpu(q: Tensor) -> str | None:
    capability = machine.capability(q.device.index)
    if capability is None or capability in CAPABILITIES:
        return None
    known = " and ".join(f"{major}.{minor}" for major, minor in CAPABILITIES)
    return f"it was compiled for compute capabilities {known}; {q.device} has {capability[0]}.{capability[1]}"


def _why_not_shape(q: Tensor, k: Tensor, num_routes: int, pattern: Pattern) -> str | None:
    if q.shape[3] not in HEAD_DIMS:
        known = ", ".join(str(head_dim) for head_dim in HEAD_DIMS)
        return f"it was compiled for head dimensions {known}; got {q.shape[3]}"
    if q.shape[2] != k.shape[2]:
        return "edges are between as many queries as keys"
    if pattern.dropout != 0.0:
        return "it has no dropout"
    if pattern.key_mask is not None and num_routes == MAX_ROUTES:
        return (
            f"beside a key_mask it takes {MAX_ROUTES - 1} routes, for padding is one more; got {num_routes}"
        )
    return None


def _why_not_deterministic() -> str | None:
    if torch.are_deterministic_algorithms_enabled():
        return "its backward adds up dQ by atomics, and deterministic algorithms are asked for"
    return None
