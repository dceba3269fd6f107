"""Sample calls of every op, which run themselves on a backend, in fp64 and in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

import gradroute

from ..routes import Routes
from ..sites import Sites
from ..tables import Table
from .budget import Result, assert_result_within_budget
from .draw import Draw, Sizes
from .marks import Marks
from .op import Op
from .ops import OPS
from .tables import make_table

#: The strengths that `sample(strength=...)` takes: none, one value a token, one 0-dim value.
STRENGTHS = (None, "token", "scalar")


@dataclass(frozen=True, eq=False)
class Sample:
    """One call of an op, with the gradient that arrives at its output.

    Attributes:
        op: its name in `gradroute.backends.OPS`.
        tensors: the public function's tensor arguments by name, in its order; None for an absent bias.
        routes: the batch's routes, or None.
        sites: the op's sites, or the one table of an op that takes no sites; None: no site has a table.
        keywords: the other arguments.
        upstream: the gradient that arrives at the output, in the layout that was asked for.
    """

    op: str
    tensors: dict[str, Tensor | None]
    routes: Routes | None
    sites: Sites | Table | None
    keywords: dict[str, Any]
    upstream: Tensor

    @property
    def tables(self) -> dict[str, Table]:
        """The tables by site, as they were given."""
        if self.sites is None or isinstance(self.sites, Table):
            return {} if self.sites is None else {"table": self.sites}
        given = {field.name: getattr(self.sites, field.name) for field in fields(self.sites)}  # type: ignore[arg-type]
        return {name: table for name, table in given.items() if table is not None}

    @property
    def differentiable(self) -> tuple[str, ...]:
        """The names of the tensors that have gradients."""
        return tuple(name for name, t in self.tensors.items() if t is not None and t.is_floating_point())

    def leaves(self, frozen: Iterable[str] = ()) -> dict[str, Tensor | None]:
        """The tensors as fresh autograd leaves over the same memory; those named in `frozen` need no gradient."""
        names = set(self.differentiable) - set(frozen)
        return {
            name: None if tensor is None else tensor.detach().requires_grad_(name in names)
            for name, tensor in self.tensors.items()
        }

    def call(self, tensors: Mapping[str, Tensor | None], backend: str | None = None) -> Tensor:
        """The op's output for `tensors`, through its public function."""
        sites = {"table" if OPS[self.op].sites_name is None else "sites": self.sites}
        function = getattr(gradroute, self.op)
        return function(**tensors, routes=self.routes, **sites, **self.keywords, backend=backend)

    def call_plain(self, tensors: Mapping[str, Tensor | None]) -> Tensor:
        """The op's output in plain PyTorch; without routes or sites that is the ordinary eager op."""
        return OPS[self.op].formula(self._marks(), **tensors, **self.keywords)

    def call_detached(self, tensors: Mapping[str, Tensor | None]) -> Tensor:
        """The op's output by the detach idiom, every token with its own copy of a routed parameter."""
        return OPS[self.op].formula(self._marks(copies=True), **tensors, **self.keywords)

    def _marks(self, copies: bool = False) -> Marks:
        return Marks(self.routes, {} if self.routes is None else self.tables, copies)

    def run(self, backend: str | None = None, frozen: Iterable[str] = ()) -> Result:
        """Forward and backward on a backend."""
        return self.run_by(lambda tensors: self.call(tensors, backend), frozen)

    def run_plain(self, frozen: Iterable[str] = ()) -> Result:
        """Forward and backward in plain PyTorch."""
        return self.run_by(self.call_plain, frozen)

    def run_detached(self) -> Result:
        """Forward and backward by the detach idiom."""
        return self.run_by(self.call_detached)

    def run_by(
        self, call: Callable[[dict[str, Tensor | None]], Tensor], frozen: Iterable[str] = ()
    ) -> Result:
        """Forward and backward by a function of the tensors that gives the op's output."""
        leaves = self.leaves(frozen)
        output = call(leaves)
        wanted = {name: leaf for name, leaf in leaves.items() if leaf is not None and leaf.requires_grad}
        gradients: dict[str, Tensor | None] = dict.fromkeys(self.differentiable)
        if wanted:
            found = torch.autograd.grad(output, list(wanted.values()), self.upstream, allow_unused=True)
            gradients |= dict(zip(wanted, found, strict=True))
        return Result(output.detach(), gradients)

    def in_float64(self) -> Sample:
        """The same call in fp64: what is exact for every dtype."""
        tensors = {name: _float64(tensor) for name, tensor in self.tensors.items()}
        keywords = {name: _float64(value) for name, value in self.keywords.items()}
        keywords.update(OPS[self.op].exact)
        return replace(self, tensors=tensors, keywords=keywords, upstream=self.upstream.double())

    def with_sites(self, sites: Sites | Table | None) -> Sample:
        """The same call with other sites."""
        return replace(self, sites=sites)

    def with_upstream(self, upstream: Tensor) -> Sample:
        """The same call with another upstream gradient."""
        return replace(self, upstream=upstream)

    def with_routes(self, routes: Routes | None) -> Sample:
        """The same call with other routes; None: the ordinary op."""
        return replace(self, routes=routes)

    def of_tokens(self, index: Tensor) -> Sample:
        """The call on some tokens only: `index [n]` into the flattened tokens. Not for attention."""
        assert self.routes is not None
        tensors = dict(self.tensors)
        for name in OPS[self.op].activations:
            tensor = tensors[name]
            assert tensor is not None
            tensors[name] = tensor.flatten(0, self.upstream.dim() - 2)[index]
        upstream = self.upstream.flatten(0, -2)[index]
        return replace(self, tensors=tensors, upstream=upstream, routes=self.routes.select(index))

    def assert_within_budget(self, backend: str | None = None) -> None:
        """Runs the call on a backend and asserts the error budget, see `excess`, of the output and every gradient."""
        exact = self.in_float64().run("reference")
        cancelling = OPS[self.op].cancelling(self.tensors, self.keywords, self.upstream)
        name = f"{self.op} on {backend}"
        assert_result_within_budget(self.run(backend), exact, self.run_plain(), name, cancelling)


def _float64(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def sample(
    op: str,
    *,
    dtype: torch.dtype = torch.float32,
    tokens: int | tuple[int, ...] = 37,
    tables: str = "dense",
    strength: str | None = None,
    sites: str | tuple[str, ...] = "all",
    gradient: str = "contiguous",
    inputs: str = "contiguous",
    bias: bool = True,
    flat_ids: bool = False,
    num_routes: int = 4,
    sizes: Sizes | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    **keywords: Any,
) -> Sample:
    """One call of `op`.

    Args:
        op: its name in `gradroute.backends.OPS`.
        dtype: the dtype of all floating-point tensors.
        tokens: the activations' leading shape; for routed_attention (batch, sequence).
        tables: one of TABLE_KINDS; every site gets another table of it.
        strength: one of STRENGTHS, or "ones".
        sites: "all", one name or several, see `site_names`. Bias sites are left out where there is no bias.
        gradient: the layout of the upstream gradient, one of LAYOUTS.
        inputs: the layout of the activations, one of LAYOUTS.
        bias: whether biases are given where the op has any.
        flat_ids: ids `[T]` instead of `[*tokens]`.
        num_routes: R, the number of routes.
        sizes: the widths of the inputs.
        seed: the seed of all random values.
        device: the device of all tensors.
        **keywords: the op's other arguments. For routed_attention also `documents` (how many documents the sequence is
            cut into: makes cu_seqlens) and `padding` (how many keys at the end are padding: makes key_mask).

    Raises:
        ValueError: no such op, site, table kind, strength or layout.
    """
    entry = _op(op)
    shape = (tokens,) if isinstance(tokens, int) else tuple(tokens)
    draw = Draw(seed, dtype, device, shape, sizes or Sizes(), inputs, bias)
    tensors, keywords = entry.inputs(draw), entry.keywords(draw, keywords)
    widths = entry.site_features(draw.sizes, num_routes, bias)
    names = _named_sites(op, sites)
    made = {
        name: make_table(_table_kind(tables, name), num_routes, widths[name], seed=100 * seed + index)
        for index, name in enumerate(widths)
        if name in names
    }
    used = num_routes - 1 if tables == "unused" else num_routes
    with torch.no_grad():
        output = entry.formula(Marks(None, {}), **tensors, **keywords)
    return Sample(
        op=op,
        tensors=tensors,
        routes=_routes(draw, num_routes, used, strength, flat_ids),
        sites=entry.make_sites(made),
        keywords=keywords,
        upstream=draw.normal(*output.shape, layout=gradient),
    )


def _routes(draw: Draw, num_routes: int, used: int, strength: str | None, flat_ids: bool) -> Routes:
    """Random ids in [0, used); per-token strengths are 0 and 1 in part, otherwise anything in [0, 1.25)."""
    ids = draw.integers(used, *draw.tokens)
    source = draw.generator.device
    per_token = 1.25 * torch.rand(draw.tokens, generator=draw.generator, dtype=torch.float32, device=source)
    per_token.view(-1)[::3] = 1
    per_token.view(-1)[1::5] = 0
    strengths = {
        None: None,
        "token": per_token,
        "scalar": torch.tensor(0.3, dtype=torch.float32, device=source),
        "ones": torch.ones(draw.tokens, dtype=torch.float32, device=source),
    }
    if strength not in strengths:
        raise ValueError(f"strength: got {strength!r}, expected one of {', '.join(map(repr, strengths))}")
    s = strengths[strength]
    if flat_ids:
        ids = ids.reshape(-1)
        s = s.reshape(-1) if s is not None and s.dim() else s
    return Routes.of(ids, num_routes, strength=None if s is None else s.to(draw.device))


def _op(name: str) -> Op:
    if name not in OPS:
        raise ValueError(f"op: got {name!r}, expected one of {', '.join(OPS)}")
    return OPS[name]


def _named_sites(op: str, sites: str | tuple[str, ...]) -> tuple[str, ...]:
    """The sites that "all", one name or several names choose."""
    known = site_names(op)
    names = known if sites == "all" else (sites,) if isinstance(sites, str) else sites
    for name in names:
        if name not in known:
            raise ValueError(f"sites: got {name!r}, expected all or sites of {op}: {', '.join(known)}")
    return names


def _table_kind(tables: str, site: str) -> str:
    """The table kind of a site's table: "dense" instead of "broadcast" for edges, which two routes index, not one."""
    return "dense" if tables == "broadcast" and site.endswith("_edges") else tables


def site_names(op: str, bias: bool = True) -> tuple[str, ...]:
    """The sites of `op`; an op that takes one table has the site "table"."""
    return tuple(OPS[op].site_features(Sizes(), 1, bias))


def variants(op: str) -> tuple[dict[str, Any], ...]:
    """Keyword arguments of `sample` that choose another computation of `op`: activations, casting modes, masks."""
    return OPS[op].variants
