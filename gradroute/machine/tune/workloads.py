"""The sizes of the calls that are timed, and the calls."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...routes import Routes
from ...sites import Sites
from ...tables import Table
from ...testing import Sample, Sizes, sample, site_names
from ...testing.ops import OPS
from .measuring import Effort


class Size(NamedTuple):
    """The size of a call.

    Attributes:
        name: what it is limited by.
        tokens: of all ops but attention.
        sequence: (batch, sequence) of attention.
        widths: of all ops.
        is_launch_bound: whether launching is what takes the time.
    """

    name: str
    tokens: int
    sequence: tuple[int, int]
    widths: Sizes
    is_launch_bound: bool = False


_LAUNCHES = Sizes(d_model=64, d_ff=256, vocabulary=256, heads=4, kv_heads=2, head_dim=16)

#: By type of device, the smallest first: bound by launching, in the caches, beyond them.
SIZES: dict[str, tuple[Size, ...]] = {
    "cpu": (
        Size("small", 16, (1, 16), _LAUNCHES, is_launch_bound=True),
        Size("cached", 512, (1, 256), Sizes(256, 1024, 1024, heads=4, kv_heads=2, head_dim=64)),
        Size("large", 2048, (1, 1024), Sizes(512, 2048, 8192, heads=4, kv_heads=2, head_dim=64)),
    ),
    "cuda": (
        Size("small", 128, (1, 128), _LAUNCHES, is_launch_bound=True),
        Size("cached", 2048, (2, 1024), Sizes(1024, 4096, 8192, heads=16, kv_heads=4, head_dim=64)),
        Size("large", 8192, (2, 2048), Sizes(2048, 8192, 32768, heads=16, kv_heads=4, head_dim=128)),
    ),
}

#: By type of device, the dtypes that are asked about, the most used first.
DTYPES: dict[str, tuple[torch.dtype, ...]] = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.bfloat16, torch.float16, torch.float32),
}


def dtypes_of(device: torch.device, effort: Effort) -> tuple[torch.dtype, ...]:
    """The dtypes that a run asks about."""
    return DTYPES[device.type][: 1 if effort.is_quick else None]


def sizes_of(device: torch.device, effort: Effort) -> tuple[Size, ...]:
    """The sizes that a run takes calls of."""
    return SIZES[device.type][: 2 if effort.is_quick else None]


def largest(device: torch.device, effort: Effort) -> Size:
    """The largest of them, for what pays at large sizes alone."""
    return sizes_of(device, effort)[-1]


def call_of(
    op: str, size: Size, dtype: torch.dtype, device: torch.device, seed: int, **options: Any
) -> Sample:
    """A call of an op with blocks of zeros at its first site, or with other options of `sample`."""
    return sample(
        op,
        dtype=dtype,
        tokens=size.sequence if op == "routed_attention" else size.tokens,
        sizes=size.widths,
        seed=seed,
        device=device,
        **{"tables": "blocks", "sites": site_names(op)[0]} | options,
    )


def kinds_of_calls(op: str) -> tuple[dict[str, Any], ...]:
    """Options of calls that together launch the kernels of an op: what they mask decides which are launched.

    Edges of values are left out: plain PyTorch, with which results are compared, needs a copy of all values a query.
    """
    if op != "routed_attention":
        return {}, {"sites": "all"}
    operands = ("query", "key", "value", "heads")
    return (
        {},
        {"sites": operands},
        {"padding": 1},
        {"sites": "score_edges"},
        {"sites": (*operands, "score_edges")},
    )


def activation_of(call: Sample) -> Tensor:
    """The tensor by whose size the automatic choice goes: the first activation, of embeddings the weight."""
    tensors = (*(call.tensors[name] for name in OPS[call.op].activations), *call.tensors.values())
    return next(tensor for tensor in tensors if tensor is not None and tensor.is_floating_point())


def routed_product(
    op: str,
    tokens: int,
    widths: Sizes,
    table: Table,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    is_counted: bool,
) -> Sample:
    """A call of a linear layer or an MLP with one table at the sites that make parts of its products vanish.

    The tokens of every route are as many, in any order, and the host knows how many where they are to be counted.
    """
    call = sample(op, dtype=dtype, tokens=tokens, sites=(), sizes=widths, seed=seed, device=device)
    generator = torch.Generator("cpu").manual_seed(seed)
    ids = torch.randperm(tokens, generator=generator, device="cpu") % table.num_routes
    names = ("output",) if op == "routed_linear" else ("hidden", "update")
    sites: Sites = OPS[op].sites_class()(**dict.fromkeys(names, table))
    routes = Routes.of(ids, table.num_routes).to(device)
    if not is_counted:
        routes.host_counts = None
    return call.with_routes(routes).with_sites(sites)
