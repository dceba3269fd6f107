"""The launches of every Triton kernel at its target shape, recorded without running or touching any memory.

Matrices are allocated and never written, which reserves addresses alone; so the divisibilities that Triton specialises
kernels by are those of real calls. Primitives are called as the ops' backwards call them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradroute import AttentionSites, Routes, Table
from gradroute.backends import triton as primitives
from gradroute.kernels.launch import Launch
from gradroute.primitives.arguments import ActivationMasks, AdamWOptions, Blocks, NormArguments
from gradroute.primitives.attention_kernels import AttentionKernels
from gradroute.primitives.attention_pattern import Pattern

TOKENS, D_MODEL, D_FF, VOCABULARY = 16384, 4096, 14336, 32768
NUM_ROUTES = 4
LONG_ROW = 16384  # features of a norm whose rows do not fit into registers
OWN = AttentionKernels(None, "own")  # attention's kernels: no vendor's
RUN_LENGTHS = (64, 512)  # tokens in a row that have the same route, at least and at most


class Shape(NamedTuple):
    """Attention: q `[B, H, S, D]`, k and v `[B, G, S, D]`, causal."""

    batch: int = 4
    heads: int = 32
    kv_heads: int = 8
    length: int = 4096
    head_dim: int = 128


class Case(NamedTuple):
    """A kernel at a target shape.

    Attributes:
        name: what is called, such as "gated MLP, gradients of activations masked".
        kernel: the name of the kernel whose launch it is.
        call: calls the primitive.
        reads: how many matrices of the tile's shape the kernel reads from memory; 0: the model is that of products.
        writes: how many it writes.
        flop: the FLOP of a tile's products by its configuration; 0: there are none.
        shape: attention's.
        sites: attention's tables by site.
        documents: how many documents a sequence is made of.
    """

    name: str
    kernel: str
    call: Callable[[], None]
    reads: int = 0
    writes: int = 0
    flop: Callable[[dict[str, int]], int] = lambda config: 0
    shape: Shape | None = None
    sites: tuple[str, ...] = ()
    documents: int = 1


def recorded(case: Case, architecture: int) -> Launch:
    """The launch of a case's kernel, with what is shipped for an architecture.

    Raises:
        LookupError: the case launches no such kernel.
    """
    with primitives.record(architecture) as launches:
        case.call()
    found = [launch for launch in launches if launch.kernel.__name__ == case.kernel]
    if not found:
        names = ", ".join(launch.kernel.__name__ for launch in launches) or "no kernel"
        raise LookupError(f"{case.name}: got launches of {names}, expected {case.kernel}")
    return found[0]


def cases() -> list[Case]:
    """All of them."""
    return [*_elementwise(), *_norms(), *_optimizer(), *_attention()]


def matrix(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A matrix whose values nothing reads."""
    return torch.empty(shape, dtype=dtype)


def ids_in_runs(shape: tuple[int, ...]) -> Tensor:  # [B, S]
    """Random routes of random runs of tokens, always the same ones."""
    generator = torch.Generator().manual_seed(0)
    least, most = RUN_LENGTHS
    rows = []
    for _ in range(shape[0]):
        number = -(-shape[1] // least)
        lengths = torch.randint(least, most + 1, (number,), generator=generator)
        routes = torch.randint(NUM_ROUTES, (number,), generator=generator)
        rows.append(routes.repeat_interleave(lengths)[: shape[1]])
    return torch.stack(rows)


@cache
def _routes() -> Routes:
    return Routes.of(ids_in_runs((1, TOKENS))[0], NUM_ROUTES)


@cache
def _table(features: int) -> Table:
    """Weights that have no structure, most of them 1."""
    generator = torch.Generator().manual_seed(0)
    return Table((torch.rand(NUM_ROUTES, features, generator=generator) < 0.9).float())


def _broadcast() -> Table:
    return Table([[1.0], [0.0], [0.5], [1.0]])


def _elementwise() -> list[Case]:
    def product(table: Table, overwrite: bool = False) -> Callable[[], None]:
        def call() -> None:
            primitives.masked_product(matrix(TOKENS, D_MODEL), _routes(), table, overwrite=overwrite)

        return call

    def embedding() -> None:
        tokens = torch.arange(TOKENS) % VOCABULARY
        primitives.embedding_backward(
            matrix(TOKENS, D_MODEL), tokens, _routes(), _table(D_MODEL), VOCABULARY, None
        )

    return [
        Case("route_grad, a table", "masked_product_kernel", product(_table(D_MODEL)), 1, 1),
        Case("route_grad, one weight a route", "masked_product_kernel", product(_broadcast()), 1, 1),
        Case("route_grad in place", "masked_product_kernel", product(_table(D_MODEL), True), 1, 1),
        Case(
            "bias gradient",
            "bias_grad_kernel",
            lambda: _ignore(primitives.bias_grad(matrix(TOKENS, D_FF), _routes(), _table(D_FF))),
            reads=1,
        ),
        Case("MLP, activations masked", "activation_bwd_kernel", _activation("gelu"), 2, 2),
        Case("MLP with biases, all masked", "activation_bwd_kernel", _activation("gelu", True), 2, 2),
        Case("gated MLP, activations masked", "glu_bwd_kernel", _glu(), 3, 3),
        Case("gated MLP with biases, all masked", "glu_bwd_kernel", _glu(True), 3, 3),
        Case("gated MLP's forward", "activation_fwd_kernel", _forward(), 2, 1),
        Case("gated MLP's forward, masked", "activation_fwd_kernel", _forward(_table(D_FF)), 2, 1),
        Case("embedding", "embedding_bwd_kernel", embedding, reads=1),
    ]


def _ignore(result: Any) -> None:
    """Leaves out a primitive's result, which has no values."""


def _masks(with_update: bool) -> ActivationMasks:
    return ActivationMasks(dh=(_table(D_FF),), update=(_table(D_FF),) if with_update else ())


def _activation(activation: str, want_bias: bool = False) -> Callable[[], None]:
    def call() -> None:
        dz, a = matrix(TOKENS, D_FF), matrix(TOKENS, D_FF)
        primitives.activation_backward(
            dz, a, _routes(), _masks(want_bias), activation, want_z=True, want_bias=want_bias
        )

    return call


def _glu(want_bias: bool = False) -> Callable[[], None]:
    def call() -> None:
        dz, gate, up = (matrix(TOKENS, D_FF) for _ in range(3))
        primitives.glu_backward(
            dz, gate, up, _routes(), _masks(want_bias), "silu", want_z=True, want_bias=want_bias
        )

    return call


def _forward(table: Table | None = None) -> Callable[[], None]:
    def call() -> None:
        gate, up = matrix(TOKENS, D_FF), matrix(TOKENS, D_FF)
        primitives.activation_forward(gate, up, _routes(), table, "silu")

    return call


def _norms() -> list[Case]:
    def norm(features: int, centered: bool = False) -> Callable[[], None]:
        def call() -> None:
            primitives.norm_backward(
                matrix(TOKENS, features),
                matrix(TOKENS, features),
                matrix(features),
                _routes(),
                _table(features),
                NormArguments(1e-6, 0.0, centered, not centered),
                want_weight=True,
                want_bias=centered,
            )

        return call

    return [
        Case("RMS norm", "norm_bwd_kernel", norm(D_MODEL), 2, 1),
        Case("layer norm", "norm_bwd_kernel", norm(D_MODEL, True), 2, 1),
        Case("RMS norm of long rows", "norm_bwd_chunked_kernel", norm(LONG_ROW), 2, 1),
    ]


def _optimizer() -> list[Case]:
    def step(blocks: int, kind: int, count: int = 1) -> Callable[[], None]:
        def call() -> None:
            tensors = [[matrix(D_FF, D_MODEL) for _ in range(count)] for _ in range(4)]
            factors = matrix(5, blocks * count, dtype=torch.float32)
            options = AdamWOptions(0.9, 0.999, 1e-8, False)
            primitives.adamw_step(*tensors, [], factors, [kind] * count, options)

        return call

    return [
        Case("RoutedAdamW, one block", "adamw_step_kernel", step(1, Blocks.ONE), 4, 3),
        Case("RoutedAdamW, blocks of rows", "adamw_step_kernel", step(D_FF, Blocks.ROWS), 4, 3),
        Case("RoutedAdamW, rows of several", "adamw_step_kernel", step(D_FF, Blocks.ROWS, 8), 4, 3),
        Case("RoutedAdamW, blocks of columns", "adamw_step_kernel", step(D_MODEL, Blocks.COLUMNS), 4, 3),
    ]


#: How many products of queries × keys × D each of attention's kernels makes of a tile.
PRODUCTS = {"attention_fwd_kernel": 2, "attention_dkdv_kernel": 4, "attention_dq_kernel": 3}

#: Attention's cases by name: the shape, the sites that have tables, and documents.
ATTENTION: dict[str, tuple[Shape, tuple[str, ...], int]] = {
    "attention": (Shape(), (), 1),
    "attention, half of the heads": (Shape(), ("heads",), 1),
    "attention, both edges": (Shape(), ("score_edges", "value_edges"), 1),
    "attention, documents": (Shape(batch=1), (), 8),
    "attention, B 1": (Shape(batch=1), (), 1),
    "attention, MQA": (Shape(kv_heads=1), (), 1),
    "attention, D 64": (Shape(head_dim=64), (), 1),
    "attention, D 256": (Shape(head_dim=256), (), 1),
}


#: Attention's other kernels, with the case that launches them and how many matrices of a tile's shape they read.
AROUND = {
    "attention_delta_kernel": ("attention, half of the heads", 2),
    "attention_tiles_kernel": ("attention, both edges", 0),
    "attention_documents_kernel": ("attention, documents", 0),
}


def _attention() -> list[Case]:
    multiplying = [
        Case(
            name,
            kernel,
            _attention_call(*of_case),
            flop=_flop_of_attention(products, of_case[0].head_dim),
            shape=of_case[0],
            sites=of_case[1],
            documents=of_case[2],
        )
        for name, of_case in ATTENTION.items()
        for kernel, products in PRODUCTS.items()
    ]
    return multiplying + [
        Case(name, kernel, _attention_call(*ATTENTION[name]), reads)
        for kernel, (name, reads) in AROUND.items()
    ]


def _flop_of_attention(products: int, head_dim: int) -> Callable[[dict[str, int]], int]:
    return lambda config: 2 * products * config["BLOCK_Q"] * config["BLOCK_K"] * head_dim


def attention_sites(shape: Shape, names: tuple[str, ...]) -> AttentionSites:
    """The tables of the named sites: every route has the first half of the heads; edges to itself and to route 0."""
    half = torch.ones(NUM_ROUTES, shape.heads)
    half[:, shape.heads // 2 :] = 0
    edges = torch.eye(NUM_ROUTES)  # [query token's route, key token's route]
    edges[:, 0] = 1
    return AttentionSites(**{name: Table(edges if name.endswith("_edges") else half) for name in names})


def document_ends(shape: Shape, documents: int) -> Tensor | None:  # [documents + 1]
    """Where documents of unequal lengths begin and end; None for one."""
    if documents == 1:
        return None
    shares = torch.arange(1, documents + 1).cumsum(0)
    ends = shares * shape.length // shares[-1]
    return torch.cat((torch.zeros(1), ends)).to(torch.int32)


def _attention_call(shape: Shape, names: tuple[str, ...], documents: int) -> Callable[[], None]:
    def call() -> None:
        batch, heads, kv_heads, length, head_dim = shape
        q, dz = (matrix(batch, heads, length, head_dim) for _ in range(2))
        k, v = (matrix(batch, kv_heads, length, head_dim) for _ in range(2))
        routes = Routes.of(ids_in_runs((batch, length)), NUM_ROUTES) if names else None
        sites = attention_sites(shape, names)
        pattern = Pattern(True, None, head_dim**-0.5, cu_seqlens=document_ends(shape, documents))
        z, saved = primitives.attention_forward(q, k, v, routes, sites, pattern, OWN)
        primitives.attention_backward(
            dz, q, k, v, z, saved, routes, sites, pattern, OWN, want_query=True, want_key_value=True
        )

    return call
