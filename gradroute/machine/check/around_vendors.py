"""Attention in the combinations of kernels that the automatic choice takes on CUDA, and no request for a backend names.

Own kernels run the backward under a vendor's forward: what is wrong there is found against their backend. The backward
of FlashAttention-4 is no backend, but has a verdict of its own, under the name FA4: found wrong, it is not taken, and
the backends around it stay. No guards are put around what it writes to, because it needs memory that is aligned, and
its bits are compared where all keys are one block, because it adds up blocks by atomics.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ... import attention, backends, testing
from ...backends import attention_plan, fa4
from ...backends.attention_plan import FA4
from ...primitives.attention_kernels import AttentionKernels
from ...primitives.attention_pattern import Pattern
from ...tables import Table
from ...testing import Sample
from .larger import HEAD_DIMENSIONS, LONG_SEQUENCE, Cover, Sizes

#: All that has a verdict: the backends, and FlashAttention-4's backward.
CHECKED: tuple[str, ...] = (*backends.BACKENDS, FA4)
#: The kinds of checks of one block of keys, beside those of numbers.
SAME_BITS_ON_CUDA = ("graphs", "streams")

OP = "routed_attention"
VARIANTS = testing.variants(OP)
BY_HEAD = ("query", "key", "value", "heads", "forward_heads")
# The weights of edges that FlashAttention-4's backward makes in one pass or in two, by the sites that have them.
WEIGHTS = {
    ("score_edges",): ("blocks", "fractional", "dense"),
    ("value_edges",): ("blocks", "fractional"),
    ("score_edges", "value_edges"): ("blocks", "fractional"),
}


def why_not_fa4(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why FlashAttention-4's backward runs no call on a device in a dtype; None where it runs some."""
    one = torch.empty(1, 1, 1, fa4.HEAD_DIMS[0], dtype=dtype, device=device)
    return fa4.why_not(one, one, one, 1, Table([[1.0]]), None, Pattern(True, None, 1.0))


def backend_around(name: str, device: torch.device) -> str:
    """The backend that runs what is checked: around FA4 cuda, or torch where that cannot run."""
    if name != FA4:
        return name
    return "torch" if "cuda" in backends.unavailable_backends(OP, device) else "cuda"


def covers_under_vendors(device: torch.device) -> Iterator[Cover]:
    """The covers of backend triton's backward under a vendor's forward; no device but CUDA has that."""
    if device.type != "cuda":
        return
    common: dict[str, Any] = {"tables": "blocks", "under_vendor": True}
    heads = tuple(Sizes(heads=2, kv_heads=1, head_dim=number) for number in (8, *HEAD_DIMENSIONS))
    variants = {"variant": VARIANTS}
    some = {"sites": ("all", "score_edges", "forward_heads"), "strength": ("token", None)}
    yield Cover("numbers", variants | some | {"sizes": heads}, common | {"tokens": 70}, True, 2)
    yield Cover("numbers", variants, common | {"tokens": LONG_SEQUENCE})
    for kind in ("determinism", "bounds", *SAME_BITS_ON_CUDA):
        yield Cover(kind, variants, common | {"tokens": 70}, is_quick=True)


def covers_of_fa4(device: torch.device) -> Iterator[Cover]:
    """The covers of FlashAttention-4's backward."""
    heads = tuple(
        Sizes(heads=2, kv_heads=number, head_dim=head_dim) for head_dim in fa4.HEAD_DIMS for number in (1, 2)
    )
    for edges, weights in WEIGHTS.items():
        common = {"same_edges": len(edges) > 1}
        axes = {
            "tables": weights,
            "sites": (edges, (*edges, *BY_HEAD)),
            "tokens": (150, 37, 1, (2, 300)),
            "variant": VARIANTS,
            "strength": ("token", None),
            "sizes": heads,
            "num_routes": (4, 2, 33),
        }
        yield Cover("numbers", axes, common, True, 2)
        long = {"tokens": LONG_SEQUENCE, "sites": edges, "sizes": heads[-1]}
        yield Cover("numbers", {"variant": VARIANTS, "tables": weights}, common | long)
    one: dict[str, Any] = {"sites": ("score_edges",), "tables": "dense", "sizes": heads[0]}
    yield Cover("strides", {"far": ("q", "k", "v", "upstream")}, one | {"tokens": 3}, is_quick=True)
    if device.type == "cuda":
        for kind in SAME_BITS_ON_CUDA:
            yield Cover(kind, {}, one | {"tokens": 70}, is_quick=True)


def output_under_vendor(call: Sample, leaves: dict[str, Tensor | None], backend: str) -> Tensor:
    """Attention's output by a vendor's forward, whose backward is a backend's own.

    Raises:
        BackendError: no vendor's kernel can run the forward, or the backend cannot run the call.
    """
    checked = _checked(call, leaves)
    plan = attention_plan.under_vendor(checked, backend)
    kernels = AttentionKernels(plan.vendor, plan.backward)
    z, *_ = attention.AttentionFunction.apply(*checked, kernels, backends.primitives(plan.backend))
    return z


def explain_under_vendor(call: Sample, backend: str) -> attention_plan.Plan:
    """The plan of a call that `output_under_vendor` makes; raises as it does."""
    return attention_plan.under_vendor(_checked(call, call.leaves()), backend)


def _checked(call: Sample, leaves: dict[str, Tensor | None]) -> attention.AttentionCall:
    q, k, v = (leaves[name] for name in "qkv")
    assert q is not None and k is not None and v is not None
    options = {
        "causal": True,
        "window": None,
        "scale": None,
        "dropout": 0.0,
        "cu_seqlens": None,
        "key_mask": None,
    }
    pattern = attention.checked_pattern(q, k, **(options | dict(call.keywords)))
    return attention.AttentionCall.of(q, k, v, call.routes, call.sites, pattern)  # type: ignore[arg-type]
