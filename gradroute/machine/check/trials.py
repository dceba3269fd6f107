"""Calls that can be made again with their tensors in other places, and what their results have to be."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ... import attention, backends, testing
from ...attention import AttentionSites
from ...backends.attention_plan import FA4
from ...primitives.arguments import AdamWOptions, Blocks, product_dtype
from ...routes import Routes
from ...sites import Sites
from ...tables import Table
from ...testing import Result, Sample, assert_result_within_budget
from .around_vendors import backend_around, explain_under_vendor, output_under_vendor
from .cases import STEP, Case

#: The name of a tensor of a call, and the tensor → a tensor of the same values, which the call is given instead.
Place = Callable[[str, Tensor], Tensor]

#: The options that change a sample's routes.
CHANGES = ("used", "ordinary", "exact_strength", "uncounted")
EDGES = ("score_edges", "value_edges")
MOST_ROUTES_OF_EDGES = 64


class Refused(Exception):
    """The backend says, with the reason, that it does not run this very call."""


class Expected(NamedTuple):
    """What a result has to be.

    Attributes:
        exact: the result in fp64.
        plain: that of plain PyTorch at the dtype.
        cancelling: the size of terms whose sum is exactly 0, see `gradroute.testing.excess`.
    """

    exact: Result
    plain: Result
    cancelling: Mapping[str, float]

    def check(self, result: Result, name: str) -> None:
        """Raises AssertionError, naming the tensor, unless the result keeps the error budget."""
        assert_result_within_budget(result, self.exact, self.plain, name, self.cancelling)


class Trial(Protocol):
    """A call on a backend.

    Attributes:
        changing: the names of the tensors that it changes.
    """

    changing: tuple[str, ...]

    def prepared(self, place: Place, *, makes_routes: bool = False) -> Callable[[], Result]:
        """The call with its tensors put elsewhere, to be made any number of times.

        Args:
            place: where each tensor lies.
            makes_routes: derive the routes from the ids in every call, as in a CUDA graph.
        """

    def expected(self) -> Expected:
        """What its result has to be."""

    def like(self, other: Any) -> Trial:
        """This call with the tables of another one of its kind, so that only its tensors differ."""


def made(case: Case, backend: str, device: torch.device, seed: int) -> Trial:
    """The call of a case.

    Raises:
        Refused: the backend does not run it.
    """
    options, dtype = dict(case.options), getattr(torch, case.dtype)
    options.pop("far", None)
    options.pop("runs", None)
    if case.op == STEP:
        return StepTrial.of(backend, device, dtype, seed, **options)
    variant, on_host = options.pop("variant", {}), options.pop("on_host", False)
    changes = {name: options.pop(name) for name in CHANGES if name in options}
    under_vendor, same_edges = options.pop("under_vendor", False), options.pop("same_edges", False)
    frozen, twice = options.pop("frozen", ()), options.pop("twice", False)
    tokens = options.pop("tokens")
    if case.op == "routed_attention":
        one_batch = (1, max(37, tokens)) if isinstance(tokens, int) else (1, 37)
        tokens = one_batch if "documents" in variant else (1, tokens) if isinstance(tokens, int) else tokens
        if options.get("num_routes", 0) > MOST_ROUTES_OF_EDGES:
            options["sites"] = tuple(site for site in testing.site_names(case.op) if site not in EDGES)
    if not options.get("bias", True) and options["sites"] not in ("all", *testing.site_names(case.op, False)):
        options["bias"] = True
    call = testing.sample(case.op, dtype=dtype, tokens=tokens, device=device, seed=seed, **options, **variant)
    call = _with_other_routes(call, **changes)
    if on_host and call.routes is not None:
        ids = call.routes.ids.cpu().reshape(call.routes.shape)
        call = call.with_routes(Routes.of(ids, call.routes.num_routes).to(device))
    if same_edges:
        score_edges = call.tables["score_edges"]
        call = call.with_sites(AttentionSites(**call.tables | {"value_edges": score_edges}))
    if under_vendor:
        return UnderVendor(under_a_vendor(call, backend), backend)
    return CallTrial(fitting(call, backend), backend_around(backend, device), frozen, twice)


def _with_other_routes(
    call: Sample,
    used: int | None = None,
    ordinary: bool = False,
    exact_strength: bool = False,
    uncounted: bool = False,
) -> Sample:
    """The call with its tokens on fewer routes and rows of an embedding, without routes, or with an fp64 strength.

    Uncounted routes are those whose tokens the host has not counted, as where ids came from a device.
    """
    if ordinary:
        return call.with_routes(None)
    routes = call.routes
    assert routes is not None
    if uncounted:
        call = _with_other_routes(call, used)
        assert call.routes is not None
        call.routes.host_counts = None
        return call
    shaped = routes.ids.reshape(routes.shape)
    if used is not None:
        tensors = dict(call.tensors)
        if used == 1 and call.op == "routed_embedding":
            tensors["tokens"] = torch.ones_like(shaped, dtype=torch.int64)
        call = replace(call, tensors=tensors)
        return call.with_routes(Routes.of(shaped % used, routes.num_routes))
    if exact_strength and routes.strength is not None:
        strength = routes.strength.double().reshape(routes.shape)
        return call.with_routes(Routes.of(shaped, routes.num_routes, strength=strength))
    return call


def fitting(call: Sample, backend: str) -> Sample:
    """The call, without edges where the backend's attention refuses them, or another's kernels would run them.

    Raises:
        Refused: it refuses the rest too.
    """
    if call.op != "routed_attention":
        return call
    others = {site: table for site, table in call.tables.items() if site not in EDGES}
    without_edges = call.with_sites(testing.OPS[call.op].make_sites(others))
    around = backend_around(backend, call.upstream.device)
    for candidate in (call,) if backend == FA4 else (call, without_edges):
        try:
            given: dict[str, Any] = {"routes": candidate.routes, "sites": candidate.sites}
            plan = attention.explain(**candidate.leaves(), **candidate.keywords, **given, backend=around)  # type: ignore[arg-type]
        except backends.BackendError as refusal:
            reason = str(refusal)
        else:
            if (plan.backward == FA4) == (backend == FA4):
                return candidate
            reason = plan.reason
    raise Refused(reason)


def under_a_vendor(call: Sample, backend: str) -> Sample:
    """The call, where a vendor's kernel runs its forward.

    Raises:
        Refused: none can, or the backend refuses the call.
    """
    try:
        explain_under_vendor(call, backend)
    except backends.BackendError as refusal:
        raise Refused(str(refusal)) from None
    return call


class CallTrial:
    """A call of an op, forward and backward."""

    changing: tuple[str, ...] = ()

    def __init__(self, call: Sample, backend: str, frozen: tuple[str, ...] = (), twice: bool = False) -> None:
        self.call, self.backend, self.frozen, self.twice = call, backend, frozen, twice

    def _run(self, call: Sample) -> Result:
        """Forward and backward; backward a second time where it was asked for; nothing of what is frozen."""
        by = functools.partial(self._output, call)
        result = call.run_by(by, self.frozen) if not self.twice else self._run_twice(call)
        given = [name for name in self.frozen if result.gradients[name] is not None]
        assert not given, f"got gradients of {', '.join(given)}, which need none"
        kept = {name: found for name, found in result.gradients.items() if name not in self.frozen}
        return Result(result.output, kept)

    def _output(self, call: Sample, leaves: dict[str, Tensor | None]) -> Tensor:
        return call.call(leaves, self.backend)

    def _run_twice(self, call: Sample) -> Result:
        leaves = call.leaves(self.frozen)
        output = self._output(call, leaves)
        wanted = {name: leaf for name, leaf in leaves.items() if leaf is not None and leaf.requires_grad}
        inputs = list(wanted.values())
        torch.autograd.grad(output, inputs, call.upstream, retain_graph=True)
        found = torch.autograd.grad(output, inputs, call.upstream)
        return Result(output.detach(), dict(zip(wanted, found, strict=True)))

    def prepared(self, place: Place, *, makes_routes: bool = False) -> Callable[[], Result]:
        """See `Trial`."""
        call = self.call

        def put(name: str, value: Any) -> Any:
            return place(name, value) if isinstance(value, Tensor) else value

        moved = replace(
            call,
            tensors={name: put(name, tensor) for name, tensor in call.tensors.items()},
            keywords={name: put(name, value) for name, value in call.keywords.items()},
            upstream=place("upstream", call.upstream),
            sites=_placed_tables(call.sites, place, call.upstream.device),
        )
        if call.routes is None:
            return lambda: self._run(moved)
        ids, strength = place("ids", call.routes.ids), put("strength", call.routes.strength)
        if makes_routes:
            shape, num_routes = call.routes.shape, call.routes.num_routes
            shaped = strength if strength is None or strength.dim() == 0 else strength.reshape(shape)

            def run() -> Result:
                routes = Routes.of(ids.reshape(shape), num_routes, strength=shaped, validate=False)
                return self._run(moved.with_routes(routes))

            return run
        routes = call.routes.reshape(call.routes.shape)
        routes.ids, routes.strength = ids, strength
        moved = moved.with_routes(routes)
        return lambda: self._run(moved)

    def expected(self) -> Expected:
        """See `Trial`."""
        call = self.call
        cancelling = testing.OPS[call.op].cancelling(call.tensors, call.keywords, call.upstream)
        return Expected(call.in_float64().run("reference"), call.run_plain(), cancelling)

    def like(self, other: CallTrial) -> CallTrial:
        """See `Trial`."""
        return type(self)(self.call.with_sites(other.call.sites), self.backend, self.frozen, self.twice)


class UnderVendor(CallTrial):
    """A call of attention whose forward is a vendor's, and whose backward the backend's own."""

    def _output(self, call: Sample, leaves: dict[str, Tensor | None]) -> Tensor:
        return output_under_vendor(call, leaves, self.backend)


def _placed_tables(sites: Sites | Table | None, place: Place, device: torch.device) -> Any:
    """The sites, with the weights of their tables put elsewhere."""
    if sites is None:
        return None
    if isinstance(sites, Table):
        return _placed_table(sites, place, device)
    given = {name: getattr(sites, name) for name in sites.declared}
    return type(sites)(
        **{
            name: None if table is None else _placed_table(table, place, device)
            for name, table in given.items()
        }
    )


def _placed_table(table: Table, place: Place, device: torch.device) -> Table:
    placed = Table(table)
    weights = place("weights of a table", table.on(device))
    if device.type == "cpu":
        placed.weights = weights
    else:
        placed._copies[device] = weights  # what `Table.on` hands to kernels
    return placed


class StepTrial:
    """A step of RoutedAdamW by the primitive `adamw_step`, on copies of its tensors."""

    def __init__(
        self, backend: str, tensors: dict[str, Tensor], blocks: Blocks, options: AdamWOptions
    ) -> None:
        self.backend, self.tensors, self.blocks, self.options = backend, tensors, blocks, options
        self.changing = tuple(name for name in tensors if name not in ("gradient", "factors"))

    @classmethod
    def of(
        cls,
        backend: str,
        device: torch.device,
        dtype: torch.dtype,
        seed: int,
        *,
        shape: tuple[int, int],
        blocks: str,
        amsgrad: bool = True,
        transposed: bool = False,
        maximize: bool = False,
    ) -> StepTrial:
        """A step of blocks, half of which are touched, after some steps before."""
        generator = torch.Generator("cpu").manual_seed(seed)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, dtype=torch.float64, device="cpu")

        sized = shape[::-1] if transposed else shape
        names = ("parameter", "gradient", "exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if amsgrad else ()))
        values = {name: normal(*sized).square() if "sq" in name else normal(*sized) for name in names}
        number = {"rows": shape[0], "columns": shape[1], "one": 1}[blocks]
        steps = 1 + normal(number).abs()
        touched = (
            (normal(number) < 0.5).double().index_fill(0, torch.zeros(1, dtype=torch.int64, device="cpu"), 1)
        )
        factors = torch.stack(
            [torch.full_like(steps, 0.97), 0.1 / (1 - 0.9**steps), (1 - 0.99**steps).rsqrt(), touched, steps]
        )
        tensors = {
            name: (value.T if transposed else value).to(device, dtype) for name, value in values.items()
        }
        tensors["factors"] = factors.to(device, product_dtype(dtype))
        return cls(backend, tensors, Blocks[blocks.upper()], AdamWOptions(0.9, 0.99, 1e-3, maximize))

    def prepared(self, place: Place, *, makes_routes: bool = False) -> Callable[[], Result]:
        """See `Trial`. Every call goes on from where the one before ended."""
        placed = {name: place(name, tensor.clone()) for name, tensor in self.tensors.items()}
        kernel = backends.primitives(self.backend).adamw_step

        def run() -> Result:
            given: dict[str, Any] = {
                f"{name}s": [tensor] for name, tensor in placed.items() if name != "factors"
            }
            given = {"max_exp_avg_sqs": []} | given | {"factors": placed["factors"]}
            kernel(**given, blocks=[int(self.blocks)], options=self.options)
            return _state({name: placed[name] for name in self.changing})

        return run

    def expected(self) -> Expected:
        """See `Trial`."""
        dtype = self.tensors["parameter"].dtype
        return Expected(
            self._computed(torch.float64, torch.float64), self._computed(product_dtype(dtype), dtype), {}
        )

    def _computed(self, dtype: torch.dtype, rounded: torch.dtype) -> Result:
        """The step's formula in one dtype, rounded to another."""
        old = {name: tensor.to(dtype) for name, tensor in self.tensors.items()}
        beta1, beta2, eps, maximize, _ = self.options
        decay, size, scale, touched, _ = old["factors"].unsqueeze(1 if self.blocks == Blocks.COLUMNS else 2)
        g = -old["gradient"] if maximize else old["gradient"]
        new = dict(old)
        new["exp_avg"] = beta1 * old["exp_avg"] + (1 - beta1) * g
        new["exp_avg_sq"] = square = beta2 * old["exp_avg_sq"] + (1 - beta2) * g * g
        if "max_exp_avg_sq" in old:
            new["max_exp_avg_sq"] = square = torch.maximum(old["max_exp_avg_sq"], square)
        new["parameter"] = decay * old["parameter"] - size * new["exp_avg"] / (square.sqrt() * scale + eps)
        return _state(
            {name: torch.where(touched != 0, new[name], old[name]).to(rounded) for name in self.changing}
        )

    def like(self, other: StepTrial) -> StepTrial:
        """See `Trial`."""
        return copy.copy(self)


def _state(tensors: Mapping[str, Tensor]) -> Result:
    """The tensors that a step changes, as a result: the parameter is the output."""
    moments: dict[str, Tensor | None] = dict(tensors)
    del moments["parameter"]
    return Result(tensors["parameter"], moments)
