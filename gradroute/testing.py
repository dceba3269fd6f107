"""Sample calls of every op, each op in plain PyTorch, and the error budget; shared by tests and bench.

`sample(op, ...)` makes one call: tensors, routes, sites, keywords and an upstream gradient. A Sample runs itself on a
backend, in fp64, and in plain PyTorch under ordinary autograd, without gradroute's Functions: by the detach idiom
m * x + (1 - m) * x.detach() (`run_detached`), or in the cheapest form with the eager op's forward bits (`run_plain`).
Both come from one formula per op, written on `Marks`. Needs no test framework.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import gradroute

from .activations import ACTIVATIONS
from .routes import Routes
from .tables import Table

#: What `sample(tables=...)` takes, see `make_table`.
TABLE_KINDS = ("ones", "zeros", "blocks", "fractional", "negative", "dense", "sparse", "unused", "broadcast")

#: What `sample(strength=...)` takes: none, one value a token, one 0-dim value.
STRENGTHS = (None, "token", "scalar")

#: What `sample(gradient=...)` takes: the strides of the upstream gradient.
LAYOUTS = ("contiguous", "sliced", "transposed", "zero_stride")

# Roundings to the dtype: five masked products on the longest path to a gradient (output, forward, hidden, pre, update),
# and the gradient's own.
ROUNDINGS = 6

# Roundings to fp32 inside a kernel: the derivative of tanh-GELU (twenty operations), the interpolation of five masks
# (three each).
INNER_ROUNDINGS = 35


class Sizes(NamedTuple):
    """Widths of the sample inputs; odd enough to leave partial tiles."""

    d_model: int = 20
    d_ff: int = 37
    vocabulary: int = 11
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8


class Result(NamedTuple):
    """What one run gave: the output, and the gradient of every floating-point input (None where it was frozen)."""

    output: Tensor
    gradients: dict[str, Tensor | None]


@dataclass(frozen=True, eq=False)
class Sample:
    """One call of an op, with the gradient that arrives at its output.

    Attributes:
        op: its name in `gradroute.backends.OPS`.
        tensors: the public function's tensor arguments by name, in its order; None for an absent bias.
        routes: the batch's routes, or None.
        sites: the op's sites, or None; for route_grad the table.
        keywords: the other arguments.
        upstream: the gradient of the output, in the layout that was asked for.
    """

    op: str
    tensors: dict[str, Tensor | None]
    routes: Routes | None
    sites: Any
    keywords: dict[str, Any]
    upstream: Tensor

    @property
    def tables(self) -> dict[str, Table]:
        """The tables by site, as they were given."""
        if self.sites is None or isinstance(self.sites, Table):
            return {} if self.sites is None else {"table": self.sites}
        given = {field.name: getattr(self.sites, field.name) for field in fields(self.sites)}
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
        sites = {"table" if self.op == "route_grad" else "sites": self.sites}
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
        return self._run(lambda tensors: self.call(tensors, backend), frozen)

    def run_plain(self, frozen: Iterable[str] = ()) -> Result:
        """Forward and backward in plain PyTorch."""
        return self._run(self.call_plain, frozen)

    def run_detached(self) -> Result:
        """Forward and backward by the detach idiom."""
        return self._run(self.call_detached, ())

    def _run(self, call: Callable[[dict[str, Tensor | None]], Tensor], frozen: Iterable[str]) -> Result:
        leaves = self.leaves(frozen)
        output = call(leaves)
        wanted = {name: leaf for name, leaf in leaves.items() if leaf is not None and leaf.requires_grad}
        gradients: dict[str, Tensor | None] = dict.fromkeys(self.differentiable)
        if wanted:
            found = torch.autograd.grad(output, list(wanted.values()), self.upstream, allow_unused=True)
            gradients |= dict(zip(wanted, found, strict=True))
        return Result(output.detach(), gradients)

    def in_float64(self) -> Sample:
        """The same values in fp64: what is exact for every dtype."""
        tensors = {name: _float64(tensor) for name, tensor in self.tensors.items()}
        keywords = {name: _float64(value) for name, value in self.keywords.items()}
        return replace(self, tensors=tensors, keywords=keywords, upstream=self.upstream.double())

    def with_sites(self, sites: Any) -> Sample:
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
        name = f"{self.op} on {backend}"
        assert_result_within_budget(self.run(backend), exact, self.run_plain(), name, self._cancelling())

    def _cancelling(self) -> dict[str, float]:
        """By argument, the size of the terms whose sum is exactly 0: the score of an only key has no gradient."""
        q, k, v = (self.tensors.get(name) for name in "qkv")
        if self.op != "routed_attention" or q is None or k is None or v is None or k.shape[2] != 1:
            return {}
        group = q.shape[1] // k.shape[1]
        scale = self.keywords.get("scale") or q.shape[3] ** -0.5
        dp = (self.upstream * v.repeat_interleave(group, 1)).sum(-1).abs().amax()
        sizes = {"q": scale * dp * k.abs().amax(), "k": group * scale * dp * q.abs().amax()}
        return {name: float(size) for name, size in sizes.items()}


def _float64(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


# --------------------------------------------------------------------------------------------------------------------


def excess(actual: Tensor, exact: Tensor, plain: Tensor, cancelling: float = 0.0) -> str | None:
    """What exceeds the error budget of `actual`, in words; None when it is within.

    The error against fp64 may be twice that of plain PyTorch at the same dtype on the same inputs, plus a floor.
    Twice: a fused backward rounds as often as eager PyTorch, at other places. Errors are measured by their maximum and
    by their root mean square (RMS); both must hold.

    The floor is a share of the exact values' own maximum, or RMS, for where plain PyTorch happens to be exact: few
    tokens, few elements that a mask leaves, exact sums. A routed gradient is still rounded, each time by at most half
    an eps of its value: ROUNDINGS times to the dtype and INNER_ROUNDINGS times to fp32. Where every exact value is 0,
    every actual value must be 0, unless terms cancel there: then the floor is a share of those terms.

    For fp64 nothing wider is at hand: `exact` has errors of the same size, and cancelling sums make them many eps of
    the result. There the floor is 2⁻⁴⁰, 4096 eps: far above rounding, far below any wrong mask.

    Args:
        actual: what is tested, at dtype.
        exact: the same in fp64.
        plain: the same in plain PyTorch, at dtype.
        cancelling: the size of the terms whose sum is exactly 0, where every exact value is 0 for that reason.
    """
    if actual.shape != exact.shape:
        return f"got shape {list(actual.shape)}, expected {list(exact.shape)}"
    if actual.dtype != plain.dtype:
        return f"got {actual.dtype}, expected {plain.dtype}"
    if actual.numel() == 0:
        return None
    floor = _floor(actual.dtype)
    for name, size in {"maximum": _maximum, "RMS": _rms}.items():
        error, plain_error, scale = size(actual.double() - exact), size(plain.double() - exact), size(exact)
        scale = max(scale, cancelling)
        if not error <= 2 * plain_error + floor * scale:  # a NaN fails too
            return (
                f"{name} error {error:.3e} exceeds 2 × {plain_error:.3e} of plain PyTorch + {floor:.1e} × "
                f"{scale:.3e} scale, in {actual.dtype}"
            )
    return None


def _floor(dtype: torch.dtype) -> float:
    if dtype == torch.float64:
        return 2.0**-40
    return (ROUNDINGS * torch.finfo(dtype).eps + INNER_ROUNDINGS * torch.finfo(torch.float32).eps) / 2


def _maximum(x: Tensor) -> float:
    return float(x.abs().max())


def _rms(x: Tensor) -> float:
    return math.sqrt(float(x.square().mean()))


def assert_result_within_budget(
    actual: Result, exact: Result, plain: Result, name: str, cancelling: Mapping[str, float] | None = None
) -> None:
    """Raises AssertionError, naming the tensor, unless the output and every gradient keep the budget (`excess`)."""
    excesses = {"output": excess(actual.output, exact.output, plain.output)}
    for argument, gradient in actual.gradients.items():
        expected, plain_gradient = exact.gradients[argument], plain.gradients[argument]
        if gradient is None or expected is None or plain_gradient is None:
            excesses[f"d{argument}"] = "the gradient is None"
        else:
            terms = (cancelling or {}).get(argument, 0.0)
            excesses[f"d{argument}"] = excess(gradient, expected, plain_gradient, terms)
    wrong = [f"{part}: {why}" for part, why in excesses.items() if why is not None]
    if wrong:
        raise AssertionError(f"{name}: " + "; ".join(wrong))


def assert_same_bits(actual: Result, expected: Result, name: str) -> None:
    """Raises AssertionError, naming the tensor, unless two results agree in every bit (0 and -0 are equal)."""
    pairs = {"output": (actual.output, expected.output)}
    for argument, gradient in actual.gradients.items():
        other = expected.gradients[argument]
        if gradient is None or other is None:
            assert gradient is other, f"{name}: d{argument}: got {gradient}, expected {other}"
            continue
        pairs[f"d{argument}"] = (gradient, other)
    for part, (got, want) in pairs.items():
        different = int((got != want).sum()) if got.shape == want.shape else -1
        assert different == 0, f"{name}: {part}: {different} of {want.numel()} elements differ"


class SavedBytes(NamedTuple):
    """Bytes kept for the backward: every storage once, and once per tensor saved."""

    once: int
    packed: int


def saved_bytes(forward: Callable[[], Any]) -> SavedBytes:
    """What autograd saves while `forward` runs, counted with `torch.autograd.graph.saved_tensors_hooks`."""
    storages: dict[int, int] = {}
    packed = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal packed
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        packed += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    del output
    return SavedBytes(sum(storages.values()), packed)


# --------------------------------------------------------------------------------------------------------------------


class Draw:
    """Random values, the same on every device and in every dtype up to rounding, for one call of an op.

    Attributes:
        generator: their source; on the CPU, or with `on_device` where the values are wanted: large ones come sooner,
            and differ from device to device.
        tokens, sizes, layout: the activations' leading shape, the widths, and one of LAYOUTS for activations.
    """

    def __init__(
        self,
        seed: int,
        dtype: torch.dtype,
        device: torch.device | str,
        tokens: tuple[int, ...],
        sizes: Sizes,
        layout: str = "contiguous",
        with_bias: bool = True,
        on_device: bool = False,
    ) -> None:
        self.generator = torch.Generator(device if on_device else "cpu").manual_seed(seed)
        self.dtype, self.device = dtype, device
        self.tokens, self.sizes, self.layout, self.with_bias = tokens, sizes, layout, with_bias

    def normal(self, *shape: int, scale: float = 1.0, layout: str = "contiguous") -> Tensor:
        """Normal values in one of LAYOUTS."""
        if layout == "zero_stride":
            return self._values((), scale).expand(shape)
        if layout == "sliced":
            return self._values((*shape[:-1], 2 * shape[-1] + 1), scale)[..., 1::2]
        if layout == "transposed":
            return self._values((shape[-1], *shape[:-1]), scale).movedim(0, -1)
        if layout != "contiguous":
            raise ValueError(f"layout: got {layout!r}, expected one of {', '.join(LAYOUTS)}")
        return self._values(shape, scale)

    def activation(self, width: int) -> Tensor:  # [*tokens, width]
        """An activation in the layout asked for."""
        return self.normal(*self.tokens, width, layout=self.layout)

    def weight(self, outputs: int, inputs: int) -> Tensor:  # [outputs, inputs]
        """A weight that keeps the size of what it multiplies."""
        return self.normal(outputs, inputs, scale=inputs**-0.5)

    def bias(self, width: int) -> Tensor | None:  # [width]
        """A bias, if any."""
        return self.normal(width) if self.with_bias else None

    def integers(self, high: int, *shape: int) -> Tensor:
        """Integers in [0, high)."""
        source = self.generator.device
        return torch.randint(high, shape, generator=self.generator, device=source).to(self.device)

    def _values(self, shape: tuple[int, ...], scale: float) -> Tensor:
        source = self.generator.device
        dtype = torch.float64 if source.type == "cpu" else torch.float32
        values = torch.randn(shape, generator=self.generator, dtype=dtype, device=source) * scale
        return values.to(device=self.device, dtype=self.dtype)


def make_table(kind: str, num_routes: int, features: int, seed: int = 0) -> Table:
    """A table of one of TABLE_KINDS.

    "ones"; "zeros"; "blocks", "fractional" and "negative": up to four constant pieces of weights in {0, 1}, {0.5, 1},
    {-0.75, 1}; "dense" and "unused": any feature any of {0, 1, 0.5, -0.75} (for "unused", `sample` gives the last
    route no token); "sparse": the same, three quarters of it 0; "broadcast": the same, `[R, 1]`.
    """
    generator = torch.Generator().manual_seed(seed)

    def one_of(values: Iterable[float], columns: int) -> Tensor:
        choice = torch.tensor(tuple(values))
        return choice[torch.randint(len(choice), (num_routes, columns), generator=generator)]

    mixed = (0.0, 1.0, 0.5, -0.75)
    pieces = {"blocks": (0.0, 1.0), "fractional": (0.5, 1.0), "negative": (-0.75, 1.0)}
    if kind in ("ones", "zeros"):
        weights = torch.full((num_routes, features), float(kind == "ones"))
    elif kind in pieces:
        bounds = [piece * features // 4 for piece in range(5)]
        weights = torch.cat(
            [one_of(pieces[kind], 1).expand(-1, stop - start) for start, stop in pairwise(bounds)],
            dim=1,
        )
    elif kind in ("dense", "unused"):
        weights = one_of(mixed, features)
    elif kind == "sparse":
        weights = one_of((*mixed, *(0.0,) * 8), features)
    elif kind == "broadcast":
        weights = one_of(mixed, 1)
    else:
        raise ValueError(f"tables: got {kind!r}, expected one of {', '.join(TABLE_KINDS)}")
    return Table(weights)


def _routes(draw: Draw, num_routes: int, used: int, strength: str | None, flat_ids: bool) -> Routes:
    """Random ids in [0, used); per-token strengths are 0 and 1 in part, otherwise anything in [0, 1.25)."""
    ids = draw.integers(used, *draw.tokens)
    per_token = 1.25 * torch.rand(draw.tokens, generator=draw.generator)
    per_token.view(-1)[::3] = 1
    per_token.view(-1)[1::5] = 0
    strengths = {
        None: None,
        "token": per_token,
        "scalar": torch.tensor(0.3),
        "ones": torch.ones(draw.tokens),
    }
    s = strengths[strength]
    if flat_ids:
        ids = ids.reshape(-1)
        s = s.reshape(-1) if s is not None and s.dim() else s
    return Routes.of(ids, num_routes, strength=None if s is None else s.to(draw.device))


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
        dtype: of all floating-point tensors.
        tokens: the activations' leading shape; for routed_attention (batch, sequence).
        tables: one of TABLE_KINDS; every site gets another table of it.
        strength: one of STRENGTHS, or "ones".
        sites: "all", one name or several, see `site_names`. Bias sites are left out where there is no bias.
        gradient: one of LAYOUTS, of the upstream gradient.
        inputs: one of LAYOUTS, of the activations.
        bias: whether biases are given where the op has any.
        flat_ids: ids `[T]` instead of `[*tokens]`.
        num_routes: R.
        sizes: the widths.
        seed: of all random values.
        device: where everything is.
        **keywords: the op's other arguments. For routed_attention also `documents` (how many documents the sequence is
            cut into: makes cu_seqlens) and `padding` (how many keys at the end are padding: makes key_mask).
    """
    entry = OPS[op]
    shape = (tokens,) if isinstance(tokens, int) else tuple(tokens)
    sizes = sizes or Sizes()
    draw = Draw(seed, dtype, device, shape, sizes, inputs, bias)
    tensors, keywords = entry.inputs(draw), entry.keywords(draw, keywords)
    widths = entry.site_features(sizes, num_routes, bias)
    names = tuple(widths) if sites == "all" else (sites,) if isinstance(sites, str) else sites
    made = {
        name: make_table(_kind(tables, name), num_routes, widths[name], seed=100 * seed + index)
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
        sites=made.get("table") if op == "route_grad" else entry.sites_class()(**made),
        keywords=keywords,
        upstream=draw.normal(*output.shape, layout=gradient),
    )


def _kind(tables: str, site: str) -> str:
    """Edges are indexed by two routes: they have no `[R, 1]` form."""
    return "dense" if tables == "broadcast" and site.endswith("_edges") else tables


def site_names(op: str, bias: bool = True) -> tuple[str, ...]:
    """The sites of `op`; route_grad's only one is "table"."""
    return tuple(OPS[op].site_features(Sizes(), 1, bias))


def variants(op: str) -> tuple[dict[str, Any], ...]:
    """Keyword arguments of `sample` that choose another computation of `op`: activations, casting modes, masks."""
    return OPS[op].variants


# --------------------------------------------------------------------------------------------------------------------


class Marks:
    """The sites of one call in plain PyTorch under ordinary autograd; without tables, nothing.

    An op's formula marks its tensors: `gradient` where a site masks a gradient, `forward` where it masks an activation,
    `parameter` and `linear` where it decides who updates a parameter.

    Args:
        routes: the batch's routes; None when there are no tables.
        tables: those of the sites, by name.
        copies: the detach idiom as it is published, m * x + (1 - m) * x.detach(), and a copy per token of a routed
            parameter, so that its update is literally the token's: the definition, `[T, O, I]` large. Otherwise with
            the bits of the ordinary forward, and parameters updated by a second product that adds zero.
    """

    def __init__(self, routes: Routes | None, tables: Mapping[str, Table], copies: bool = False) -> None:
        self.routes, self.tables, self.copies = routes, tables, copies

    def table(self, site: str, shorthand: str | None = None) -> Table | None:
        """The table of a site, or of the site it takes its table from when it has none."""
        found = self.tables.get(site)
        return self.tables.get(shorthand) if found is None and shorthand else found

    def mask(self, table: Table, dtype: torch.dtype, tokens: torch.Size) -> Tensor:
        """m `[*tokens, F]`, from its formula."""
        assert self.routes is not None
        wide = torch.promote_types(dtype, torch.float32)
        weights = table.weights.to(device=self.routes.device, dtype=wide)
        m = weights[self.routes.ids.long()]
        if self.routes.strength is not None:
            s = self.routes.strength.to(wide).reshape(-1, 1)
            m = weights[0] + s * (m - weights[0])
        return m.to(dtype).reshape(*tokens, m.shape[-1])

    def detached(self, m: Any, x: Tensor) -> Tensor:
        """x, its gradient times m."""
        return m * x + (1 - m) * x.detach() if self.copies else x.detach() + _only_gradient(m * x)

    def gradient(self, site: str, x: Tensor) -> Tensor:
        """x, its gradient masked at `site`."""
        table = self.table(site)
        return x if table is None else self.detached(self.mask(table, x.dtype, x.shape[:-1]), x)

    def forward(self, site: str, x: Tensor) -> Tensor:
        """x masked at `site`, and so its gradient."""
        table = self.table(site)
        return x if table is None else self.mask(table, x.dtype, x.shape[:-1]) * x

    def by_head(self, site: str, x: Tensor, forward: bool = False) -> Tensor:
        """`gradient` (or `forward`) for x `[B, H, S, D]` and a table `[R, H]`."""
        table = self.table(site)
        if table is None:
            return x
        m = self.mask(table, x.dtype, torch.Size((x.shape[0], x.shape[2]))).transpose(1, 2).unsqueeze(-1)
        return m * x if forward else self.detached(m, x)

    def edges(self, site: str, batch: int, dtype: torch.dtype) -> Tensor | None:
        """E[query's route, key's route] `[B, 1, S, S]`, or None."""
        table = self.table(site)
        if table is None:
            return None
        assert self.routes is not None
        ids = self.routes.ids.long().reshape(batch, -1)
        weights = table.weights.to(device=ids.device, dtype=dtype)
        return weights[ids.unsqueeze(2), ids.unsqueeze(1)].unsqueeze(1)

    def parameter(self, parameter: Tensor, tokens: torch.Size, *tables: Table | None) -> Tensor:
        """`parameter`, or each token's copy `[*tokens, *parameter.shape]`; one table (or None) per dimension of it."""
        masks = [
            _along(dimension, parameter.dim(), self.mask(table, parameter.dtype, tokens))
            for dimension, table in enumerate(tables)
            if table is not None
        ]
        return self.detached(math.prod(masks), parameter) if masks else parameter

    def linear(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: Table | None = None,
        cols: Table | None = None,
        bias_rows: Table | None = None,
    ) -> Tensor:
        """A linear layer, some entries of whose weight and bias some tokens may not update."""
        if rows is None and cols is None and bias_rows is None:
            return F.linear(x, weight, bias)
        tokens = x.shape[:-1]
        if self.copies:
            y = (self.parameter(weight, tokens, rows, cols) @ x.unsqueeze(-1)).squeeze(-1)
            return y if bias is None else y + self.parameter(bias, tokens, bias_rows)
        seen = x.detach() if cols is None else self.mask(cols, x.dtype, tokens) * x.detach()
        update = F.linear(seen, weight)
        if rows is not None:
            update = self.mask(rows, x.dtype, tokens) * update
        y = F.linear(x, weight.detach(), None if bias is None else bias.detach()) + _only_gradient(update)
        if bias is None:
            return y
        copied = bias if bias_rows is None else self.mask(bias_rows, x.dtype, tokens) * bias
        return y + _only_gradient(copied)


def _only_gradient(x: Tensor) -> Tensor:
    """0, with the gradient of x."""
    return x - x.detach()


def _along(dimension: int, dimensions: int, m: Tensor) -> Tensor:
    """m `[*tokens, F]` with F moved to one of the dimensions of a parameter, the others 1."""
    ones = (1,) * dimensions
    return m.reshape(*m.shape[:-1], *ones[:dimension], m.shape[-1], *ones[dimension + 1 :])


# --------------------------------------------------------------------------------------------------------------------
# The ops: inputs, site widths, and the ordinary formula with its sites marked.


class Op(NamedTuple):
    """What `sample` knows about an op.

    Attributes:
        inputs: the public function's tensors by name.
        site_features: (sizes, num_routes, bias) → the width of every site that such a call can honour.
        formula: (marks, **tensors, **keywords) → the op in eager PyTorch, its sites marked.
        sites_name: the dataclass of its sites in gradroute; None for route_grad.
        activations: the tensors that have tokens.
        variants: see `variants`.
        keywords: (draw, keywords of `sample`) → keywords of the public function.
    """

    inputs: Callable[[Draw], dict[str, Tensor | None]]
    site_features: Callable[[Sizes, int, bool], dict[str, int]]
    formula: Callable[..., Tensor]
    sites_name: str | None
    activations: tuple[str, ...] = ("x",)
    variants: tuple[dict[str, Any], ...] = ({},)
    keywords: Callable[[Draw, dict[str, Any]], dict[str, Any]] = lambda _, keywords: keywords

    def sites_class(self) -> Any:
        """The dataclass of its sites."""
        assert self.sites_name is not None
        return getattr(gradroute, self.sites_name)


def _route_grad_inputs(draw: Draw) -> dict[str, Tensor | None]:
    return {"x": draw.activation(draw.sizes.d_model)}


def _route_grad_sites(sizes: Sizes, num_routes: int, bias: bool) -> dict[str, int]:
    return {"table": sizes.d_model}


def _route_grad(marks: Marks, x: Tensor) -> Tensor:
    return marks.gradient("table", x)


def _linear_inputs(draw: Draw) -> dict[str, Tensor | None]:
    inputs, outputs = draw.sizes.d_model, draw.sizes.d_ff
    return {"x": draw.activation(inputs), "weight": draw.weight(outputs, inputs), "bias": draw.bias(outputs)}


def _linear_sites(sizes: Sizes, num_routes: int, bias: bool) -> dict[str, int]:
    inputs, outputs = sizes.d_model, sizes.d_ff
    widths = {"output": outputs, "input": inputs, "update_rows": outputs, "update_cols": inputs}
    return widths | ({"update_bias": outputs} if bias else {})


def _linear(marks: Marks, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = marks.linear(
        marks.gradient("input", x),
        weight,
        bias,
        rows=marks.table("update_rows"),
        cols=marks.table("update_cols"),
        bias_rows=marks.table("update_bias", "update_rows"),
    )
    return marks.gradient("output", y)


def _activation_inputs(draw: Draw) -> dict[str, Tensor | None]:
    return {"a": draw.activation(draw.sizes.d_ff)}


def _activation_sites(sizes: Sizes, num_routes: int, bias: bool) -> dict[str, int]:
    return dict.fromkeys(("pre", "hidden", "forward"), sizes.d_ff)


def _activation(marks: Marks, a: Tensor, activation: str) -> Tensor:
    h = PLAIN_ACTIVATIONS[activation](marks.gradient("pre", a))
    return marks.forward("forward", marks.gradient("hidden", h))


def _activation_keywords(draw: Draw, keywords: dict[str, Any]) -> dict[str, Any]:
    return {"activation": "gelu"} | keywords


def _glu_inputs(draw: Draw) -> dict[str, Tensor | None]:
    return {"gate": draw.activation(draw.sizes.d_ff), "up": draw.activation(draw.sizes.d_ff)}


def _glu(marks: Marks, gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    h = PLAIN_ACTIVATIONS[activation](marks.gradient("pre", gate)) * marks.gradient("pre", up)
    return marks.forward("forward", marks.gradient("hidden", h))


def _mlp_inputs(draw: Draw) -> dict[str, Tensor | None]:
    d_model, d_ff = draw.sizes.d_model, draw.sizes.d_ff
    return {
        "x": draw.activation(d_model),
        "w_in": draw.weight(d_ff, d_model),
        "b_in": draw.bias(d_ff),
        "w_out": draw.weight(d_model, d_ff),
        "b_out": draw.bias(d_model),
    }


def _mlp_sites(sizes: Sizes, num_routes: int, bias: bool) -> dict[str, int]:
    names = ("pre", "hidden", "forward", "update", "update_in", "update_out")
    widths = dict.fromkeys(names, sizes.d_ff) | {"output": sizes.d_model}
    return widths | ({"update_output_bias": sizes.d_model} if bias else {})


def _mlp(
    marks: Marks,
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    activation: str = "gelu",
) -> Tensor:
    update_in = marks.table("update_in", "update")
    a = marks.linear(x, w_in, b_in, rows=update_in, bias_rows=update_in)
    return _mlp_output(marks, _activation(marks, a, activation), w_out, b_out)


def _mlp_output(marks: Marks, z: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    update_out, update_bias = marks.table("update_out", "update"), marks.table("update_output_bias")
    return marks.gradient("output", marks.linear(z, weight, bias, cols=update_out, bias_rows=update_bias))


def _gated_mlp_inputs(draw: Draw) -> dict[str, Tensor | None]:
    d_model, d_ff = draw.sizes.d_model, draw.sizes.d_ff
    return {
        "x": draw.activation(d_model),
        "w_gate": draw.weight(d_ff, d_model),
        "w_up": draw.weight(d_ff, d_model),
        "w_down": draw.weight(d_model, d_ff),
        "b_gate": draw.bias(d_ff),
        "b_up": draw.bias(d_ff),
        "b_down": draw.bias(d_model),
    }


def _gated_mlp(
    marks: Marks,
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    b_gate: Tensor | None,
    b_up: Tensor | None,
    b_down: Tensor | None,
    activation: str = "silu",
) -> Tensor:
    update_in = marks.table("update_in", "update")
    gate = marks.linear(x, w_gate, b_gate, rows=update_in, bias_rows=update_in)
    up = marks.linear(x, w_up, b_up, rows=update_in, bias_rows=update_in)
    return _mlp_output(marks, _glu(marks, gate, up, activation), w_down, b_down)


def _rms_norm_inputs(draw: Draw) -> dict[str, Tensor | None]:
    return {"x": draw.activation(draw.sizes.d_model), "weight": draw.normal(draw.sizes.d_model)}


def _update_site(sizes: Sizes, num_routes: int, bias: bool) -> dict[str, int]:
    return {"update": sizes.d_model}


def _rms_norm(
    marks: Marks,
    x: Tensor,
    weight: Tensor,
    eps: float | None = 1e-6,
    offset: float = 0.0,
    casting_mode: str = "torch",
) -> Tensor:
    copies = marks.parameter(weight, x.shape[:-1], marks.table("update"))
    if casting_mode == "torch":
        if copies is weight:
            return F.rms_norm(x, x.shape[-1:], weight + offset if offset else weight, eps)
        return F.rms_norm(x, x.shape[-1:], eps=eps) * (copies + offset)
    # LlamaRMSNorm and GemmaRMSNorm of transformers.
    assert eps is not None
    wide = torch.promote_types(x.dtype, torch.float32)
    normalised = x.to(wide) * torch.rsqrt(x.to(wide).pow(2).mean(-1, keepdim=True) + eps)
    if casting_mode == "llama":
        return (copies + offset if offset else copies) * normalised.to(x.dtype)
    return (normalised * (offset + copies.to(wide))).to(x.dtype)


def _layer_norm_inputs(draw: Draw) -> dict[str, Tensor | None]:
    d_model = draw.sizes.d_model
    return {"x": draw.activation(d_model), "weight": draw.normal(d_model), "bias": draw.bias(d_model)}


def _layer_norm(marks: Marks, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float = 1e-5) -> Tensor:
    update, tokens = marks.table("update"), x.shape[:-1]
    if update is None:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    y = F.layer_norm(x, x.shape[-1:], eps=eps) * marks.parameter(weight, tokens, update)
    return y if bias is None else y + marks.parameter(bias, tokens, update)


def _embedding_inputs(draw: Draw) -> dict[str, Tensor | None]:
    sizes = draw.sizes
    tokens = draw.integers(sizes.vocabulary, *draw.tokens)
    return {"tokens": tokens, "weight": draw.normal(sizes.vocabulary, sizes.d_model)}


def _embedding(marks: Marks, tokens: Tensor, weight: Tensor, padding_idx: int | None = None) -> Tensor:
    return marks.gradient("update", F.embedding(tokens, weight, padding_idx))


def _attention_inputs(draw: Draw) -> dict[str, Tensor | None]:
    (batch, length), sizes = draw.tokens, draw.sizes
    heads = {"q": sizes.heads, "k": sizes.kv_heads, "v": sizes.kv_heads}
    return {
        name: draw.normal(batch, number, length, sizes.head_dim, layout=draw.layout)
        for name, number in heads.items()
    }


def _attention_keywords(draw: Draw, keywords: dict[str, Any]) -> dict[str, Any]:
    (batch, length), keywords = draw.tokens, dict(keywords)
    documents, padding = keywords.pop("documents", None), keywords.pop("padding", None)
    if documents is not None:
        bounds = [document * length // documents for document in range(documents + 1)]
        keywords["cu_seqlens"] = torch.tensor(bounds, dtype=torch.int32, device=draw.device)
    if padding is not None:
        keywords["key_mask"] = (torch.arange(length, device=draw.device) < length - padding).expand(batch, -1)
    return keywords


def _attention_sites(sizes: Sizes, num_routes: int, bias: bool) -> dict[str, int]:
    by_query_head = dict.fromkeys(("query", "heads", "forward_heads"), sizes.heads)
    by_key_head = dict.fromkeys(("key", "value"), sizes.kv_heads)
    return by_query_head | by_key_head | dict.fromkeys(("score_edges", "value_edges"), num_routes)


def _visible(
    queries: int,
    keys: int,
    device: torch.device,
    causal: bool,
    window: int | None,
    cu_seqlens: Tensor | None,
    key_mask: Tensor | None,
) -> Tensor:
    """Which key a query sees, bool `[B or 1, 1, S_q, S_k]`."""
    key = torch.arange(keys, device=device)
    query = key[keys - queries :].unsqueeze(1)
    far = query - key
    seen = torch.ones_like(far, dtype=torch.bool)
    if causal:
        seen = seen & (far >= 0)
    if window is not None:
        seen = seen & ((far if causal else far.abs()) < window)
    if cu_seqlens is not None:
        lengths = cu_seqlens.diff().long()
        document = torch.arange(len(lengths), device=device).repeat_interleave(lengths)
        seen = seen & (document[query] == document)
    seen = seen.expand(1, 1, queries, keys)
    return seen if key_mask is None else seen & key_mask[:, None, None, :]


def _attention(
    marks: Marks,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    seen = _visible(q.shape[2], k.shape[2], q.device, causal, window, cu_seqlens, key_mask)
    if not marks.tables:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True)
    group = q.shape[1] // k.shape[1]
    q, k, v = marks.by_head("query", q), marks.by_head("key", k), marks.by_head("value", v)
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = (q @ k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    score_edges = marks.edges("score_edges", q.shape[0], q.dtype)
    if score_edges is not None:
        scores = marks.detached(score_edges, scores)
    p = torch.softmax(scores.masked_fill(~seen, torch.finfo(q.dtype).min), -1) * seen.any(-1, keepdim=True)
    value_edges = marks.edges("value_edges", q.shape[0], q.dtype)
    if value_edges is None:
        o = p @ v
    else:  # every query has its own copy of every value
        o = (p.unsqueeze(-1) * marks.detached(value_edges.unsqueeze(-1), v.unsqueeze(2))).sum(-2)
    return marks.by_head("forward_heads", marks.by_head("heads", o), forward=True)


PLAIN_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda a: F.gelu(a, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda a: F.relu(a).square(),
}

_ACTIVATION_VARIANTS = tuple({"activation": name} for name in ACTIVATIONS)

#: What `sample` knows about every op of `gradroute.backends.OPS`.
OPS = {
    "route_grad": Op(_route_grad_inputs, _route_grad_sites, _route_grad, None),
    "routed_linear": Op(_linear_inputs, _linear_sites, _linear, "LinearSites"),
    "routed_activation": Op(
        _activation_inputs,
        _activation_sites,
        _activation,
        "ActivationSites",
        activations=("a",),
        variants=_ACTIVATION_VARIANTS,
        keywords=_activation_keywords,
    ),
    "routed_glu": Op(
        _glu_inputs,
        _activation_sites,
        _glu,
        "ActivationSites",
        activations=("gate", "up"),
        variants=_ACTIVATION_VARIANTS,
    ),
    "routed_mlp": Op(_mlp_inputs, _mlp_sites, _mlp, "MLPSites", variants=_ACTIVATION_VARIANTS),
    "routed_gated_mlp": Op(
        _gated_mlp_inputs, _mlp_sites, _gated_mlp, "MLPSites", variants=_ACTIVATION_VARIANTS
    ),
    "routed_rms_norm": Op(
        _rms_norm_inputs,
        _update_site,
        _rms_norm,
        "NormSites",
        variants=(
            {},
            {"eps": None},
            {"offset": 1.0},
            {"casting_mode": "llama"},
            {"casting_mode": "gemma", "offset": 1.0},
        ),
    ),
    "routed_layer_norm": Op(
        _layer_norm_inputs, _update_site, _layer_norm, "NormSites", variants=({}, {"eps": 1e-3})
    ),
    "routed_embedding": Op(
        _embedding_inputs,
        _update_site,
        _embedding,
        "EmbeddingSites",
        activations=("tokens",),
        variants=({}, {"padding_idx": 3}),
    ),
    "routed_attention": Op(
        _attention_inputs,
        _attention_sites,
        _attention,
        "AttentionSites",
        activations=("q", "k", "v"),
        variants=(
            {},
            {"causal": False},
            {"window": 5},
            {"causal": False, "window": 5, "scale": 0.2},
            {"documents": 3},
            {"padding": 4},
        ),
        keywords=_attention_keywords,
    ),
}
