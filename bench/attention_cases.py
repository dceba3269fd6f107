"""The calls of routed_attention that the suite `attention` times, by device, and the ways to do without it."""

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from gradroute import AttentionSites, Routes, attention
from gradroute.backends.attention_plan import Plan
from gradroute.backends.fa4 import refusals
from gradroute.tables import Table, localize
from gradroute.testing import Sample

from . import memory
from .cases import FORWARD, FULL, Limit, Step
from .rivals import DenseMasks, compiled

NUM_ROUTES = 4


class Shape(NamedTuple):
    """q `[B, H, S, D]`; k, v `[B, G, S, D]`.

    Attributes:
        batch, heads, kv_heads, length, head_dim: B, H, G, S and D.
        run: the shortest and the longest run of tokens of one route.
    """

    batch: int
    heads: int
    kv_heads: int
    length: int
    head_dim: int
    run: tuple[int, int] = (64, 512)


SHAPES = {
    "cpu": Shape(batch=1, heads=8, kv_heads=4, length=4096, head_dim=64),
    "cuda": Shape(batch=4, heads=32, kv_heads=8, length=4096, head_dim=128),
}
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}


class Calls(NamedTuple):
    """Causal calls on the same tensors.

    Attributes:
        ordinary: a call without routes.
        masks: a call whose heads, keys and values are masked; one route has half of its heads off.
        edges: a call in which every route teaches itself and route 0, through scores and values.
        score_edges: the same call with edges through scores alone.
        half: a call in which every route has half of its heads off.
    """

    ordinary: Sample
    masks: Sample
    edges: Sample
    score_edges: Sample
    half: Sample


def calls(shape: Shape, device: torch.device) -> Calls:
    generator = torch.Generator(device).manual_seed(0)

    def normal(heads: int) -> Tensor:
        size = (shape.batch, heads, shape.length, shape.head_dim)
        return torch.randn(size, generator=generator, device=device, dtype=DTYPES[device.type])

    tensors = {"q": normal(shape.heads), "k": normal(shape.kv_heads), "v": normal(shape.kv_heads)}
    routes, upstream = Routes.of(ids_in_runs(shape), NUM_ROUTES).to(device), normal(shape.heads)

    def call(**tables: Table | Tensor) -> Sample:
        return Sample("routed_attention", tensors, routes, AttentionSites(**tables), {}, upstream)

    by_head, by_key_head = (
        localize(NUM_ROUTES, heads, {1: slice(heads // 2)}) for heads in (shape.heads, shape.kv_heads)
    )
    edges = torch.eye(NUM_ROUTES)  # [query token's route, key token's route]
    edges[:, 0] = 1
    first_half = torch.ones(NUM_ROUTES, shape.heads)
    first_half[:, shape.heads // 2 :] = 0
    return Calls(
        ordinary=call().with_routes(None),
        masks=call(heads=by_head, key=by_key_head, value=by_key_head),
        edges=call(score_edges=edges, value_edges=edges),
        score_edges=call(score_edges=edges),
        half=call(heads=first_half),
    )


def ids_in_runs(shape: Shape) -> Tensor:  # [B, S]
    """Random routes of random runs of tokens, always the same ones."""
    generator = torch.Generator().manual_seed(0)
    least, most = shape.run
    runs = -(-shape.length // least)
    rows = []
    for _ in range(shape.batch):
        lengths = torch.randint(least, most + 1, (runs,), generator=generator)
        of_runs = torch.randint(NUM_ROUTES, (runs,), generator=generator)
        rows.append(of_runs.repeat_interleave(lengths)[: shape.length])
    return torch.stack(rows)


class Way(NamedTuple):
    """One way to make a call.

    Attributes:
        call: the call to compute.
        forward: (q, k, v) → z `[B, H, S, D]`, differentiable.
        explain: names the kernel that runs the call, and why; None: a rival.
    """

    call: Sample
    forward: Callable[..., Tensor]
    explain: Callable[[], Plan] | None = None

    def steps(self, mode: str) -> list[Step]:
        """The step of a pass on one set of inputs."""
        leaves = self.call.leaves()
        if mode == FORWARD:  # all that backward needs is kept until it returns, as in training
            return [lambda: self.forward(**leaves)]
        wanted = tuple(leaf for leaf in leaves.values() if leaf is not None)
        return [lambda: torch.autograd.grad(self.forward(**leaves), wanted, self.call.upstream)]

    def saved_bytes(self) -> int:
        leaves = self.call.leaves()
        return memory.saved(lambda: self.forward(**leaves), ())


class Entry(NamedTuple):
    """Ways that are timed in the same rounds.

    Attributes:
        ways: the ways by name.
        rivals: names of those whose times divide everyone's; the first is the base.
        limits: the targets.
        needs_flash_4: rivals that need FlashAttention-4, the extra fa4.
    """

    ways: dict[str, Way]
    rivals: tuple[str, ...]
    limits: tuple[Limit, ...] = ()
    needs_flash_4: tuple[str, ...] = ()

    @property
    def missing(self) -> dict[str, str]:
        """The rivals that this machine lacks a package for, with the reason."""
        why = refusals.why_not_installed()
        return {} if why is None else dict.fromkeys(self.needs_flash_4, why)


def routed(call: Sample, backend: str | None = None) -> Way:
    """routed_attention on a backend; None stands for the automatic choice."""
    explain = partial(
        attention.explain, **call.tensors, routes=call.routes, sites=call.sites, backend=backend
    )
    return Way(call, lambda **tensors: call.call(tensors, backend), explain)


def sdpa(q: Tensor, k: Tensor, v: Tensor, kernel: SDPBackend | None = None) -> Tensor:
    """PyTorch's own attention; where a `kernel` is named, that one or none."""
    if kernel is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    with sdpa_kernel(kernel):
        return sdpa(q, k, v)


def detach(call: Sample) -> dict[str, Way]:
    """The detach idiom, `m*x + (1-m)*x.detach()`, by head around SDPA, eager and compiled, with masks made before."""
    idiom = partial(detach_idiom, DenseMasks(call, call.upstream.dtype))
    return {"detach": Way(call, idiom), "detach, compiled": Way(call, compiled(idiom))}


def detach_idiom(marks: DenseMasks, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    o = sdpa(marks.by_head("query", q), marks.by_head("key", k), marks.by_head("value", v))
    return marks.by_head("heads", o)


class Flex:
    """FlexAttention, compiled; edges between scores are `torch.where(edge, s, s.detach())`.

    An edge is a bit of its query token, as in gradroute's kernels: a load by row and one by column, none by element.

    Args:
        call: the call to compute.
        kernel_options: FlexAttention's; its BACKEND "FLASH" is FlashAttention-4.
    """

    def __init__(self, call: Sample, **kernel_options: Any) -> None:
        self.call, self.kernel_options = call, kernel_options or None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attend(
            q,
            k,
            v,
            score_mod=self.score_mod,
            block_mask=self.block_mask,
            enable_gqa=True,
            kernel_options=self.kernel_options,
        )

    @cached_property
    def attend(self) -> Callable[..., Any]:
        """FlexAttention, compiled at its first call."""
        return torch.compile(flex_attention, dynamic=False, fullgraph=True)

    @cached_property
    def block_mask(self) -> Any:
        """The causal mask, in FlexAttention's form."""
        length, device = self.call.upstream.shape[2], self.call.upstream.device
        return create_block_mask(lambda b, h, i, j: i >= j, None, None, length, length, device)

    @cached_property
    def score_mod(self) -> Callable[..., Tensor] | None:
        """The change of scores that edges make; None where there are no edges."""
        routes, table = self.call.routes, self.call.tables.get("score_edges")
        if routes is None or table is None:
            return None
        ids = routes.ids.view(routes.shape)  # [B, S]
        powers = 1 << torch.arange(routes.num_routes, device=ids.device)
        by_route = ((table.on(ids.device) != 0) * powers).sum(-1).int()  # [R]
        bits = by_route[ids.long()]  # [B, S]

        def with_edges(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            edge = ((bits[b, i] >> ids[b, j]) & 1) != 0
            return torch.where(edge, s, s.detach())

        return with_edges


def cudnn(calls: Calls) -> Way:
    """cuDNN's attention, the fastest unmasked one on Hopper: the base of the CUDA cases."""
    return Way(calls.ordinary, partial(sdpa, kernel=SDPBackend.CUDNN_ATTENTION))


def flash(calls: Calls) -> Way:
    """PyTorch's own FlashAttention 2."""
    return Way(calls.ordinary, partial(sdpa, kernel=SDPBackend.FLASH_ATTENTION))


def edges_on_cpu(calls: Calls) -> Entry:
    return Entry(
        {
            "reference": routed(calls.edges, "reference"),
            "torch": routed(calls.edges, "torch"),
            "cpu": routed(calls.edges, "cpu"),
            "SDPA, unmasked": Way(calls.ordinary, sdpa),
        },
        rivals=("SDPA, unmasked", "reference"),
        limits=(Limit("cpu", "reference", 0.5), Limit("cpu", "reference", 1 / 8, "memory")),
    )


def masks_on_cpu(calls: Calls) -> Entry:
    return Entry(
        {
            "SDPA, unmasked": Way(calls.ordinary, sdpa),
            **detach(calls.masks),
            "torch": routed(calls.masks, "torch"),
            "cpu": routed(calls.masks, "cpu"),
        },
        rivals=("SDPA, unmasked", "detach"),
    )


def unmasked_on_cuda(calls: Calls) -> Entry:
    return Entry(
        {
            "cuDNN": cudnn(calls),
            "flash": flash(calls),
            "SDPA": Way(calls.ordinary, sdpa),
            "Flex": Way(calls.ordinary, Flex(calls.ordinary)),
            "Flex, FA4": Way(calls.ordinary, Flex(calls.ordinary, BACKEND="FLASH")),
            "triton": routed(calls.ordinary, "triton"),
        },
        rivals=("cuDNN", "flash", "SDPA", "Flex", "Flex, FA4"),
        limits=(Limit("triton", "cuDNN", 1.4),),
        needs_flash_4=("Flex, FA4",),
    )


def masks_on_cuda(calls: Calls) -> Entry:
    return Entry(
        {
            "cuDNN, unmasked": cudnn(calls),
            "flash, unmasked": flash(calls),
            **detach(calls.masks),
            "automatic": routed(calls.masks),
            "cuda": routed(calls.masks, "cuda"),
            "torch": routed(calls.masks, "torch"),
            "triton": routed(calls.masks, "triton"),
        },
        rivals=("cuDNN, unmasked", "detach"),
        limits=(Limit("automatic", "cuDNN, unmasked", 1.05),),
    )


def edges_on_cuda(calls: Calls) -> Entry:
    return Entry(
        {
            "cuDNN, unmasked": cudnn(calls),
            "Flex, score edges alone": Way(calls.score_edges, Flex(calls.score_edges)),
            "Flex, FA4, score edges alone": Way(calls.score_edges, Flex(calls.score_edges, BACKEND="FLASH")),
            "automatic": routed(calls.edges),
            "triton": routed(calls.edges, "triton"),
        },
        rivals=("cuDNN, unmasked", "Flex, score edges alone", "Flex, FA4, score edges alone"),
        limits=(
            Limit("automatic", "cuDNN, unmasked", 1.5),
            Limit("triton", "cuDNN, unmasked", 1.5),
            Limit("triton", "Flex, score edges alone", 1.0),
        ),
        needs_flash_4=("Flex, FA4, score edges alone",),
    )


def half_on_cuda(calls: Calls) -> Entry:
    return Entry(
        {
            "triton, unmasked": routed(calls.ordinary, "triton"),
            "triton": routed(calls.half, "triton"),
            "cuDNN, unmasked": cudnn(calls),
        },
        rivals=("triton, unmasked", "cuDNN, unmasked"),
        limits=(Limit("triton", "triton, unmasked", 0.75),),
    )


CASES: dict[str, dict[str, Callable[[Calls], Entry]]] = {
    "cpu": {"both edges": edges_on_cpu, "masks by head": masks_on_cpu},
    "cuda": {
        "unmasked": unmasked_on_cuda,
        "masks by head": masks_on_cuda,
        "both edges": edges_on_cuda,
        "half of the heads off": half_on_cuda,
    },
}


def warm_step_on_cpu(shape: Shape, case: str, way: str) -> Callable[[], Any]:
    """A step after a short one of its kind, so that what is loaded once is not counted."""
    short, whole = (
        CASES["cpu"][case](calls(some, torch.device("cpu"))).ways[way].steps(FULL)[0]
        for some in (shape._replace(length=min(64, shape.length)), shape)
    )
    short()
    return whole
