"""Cases of the ops beside attention: every backend that runs a setting, and every rival that has its meaning."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gradroute import backends, testing
from gradroute.testing import OPS, Result, Sample

from . import memory, progress, rivals
from .cases import BACKWARD, FORWARD, FULL, Case, Findings, Limit, Plan, Step, Variant, attempt
from .op_table import OPS as OP_TABLE
from .op_table import ops_by_suite
from .settings import Setting, samples
from .work import work_of

SUITES = ops_by_suite()

SETS = 2  # sets of random inputs, which the rounds take in turn
BASE = "unmasked"

CHECKED = (
    "every variant, before it is timed, on every set of inputs that is timed, output and gradients, against "
    "the reference in fp64: backends within the budget of gradroute.testing.excess; rivals by their root mean "
    "square (RMS) error, which may be 4 times that of plain PyTorch plus 8 eps of the values; plain PyTorch's "
    "own must be at most 32 eps, and the unmasked op must exceed what a masked one may have"
)
# Rivals round at more places: eager idioms four products more on the longest path (m x, 1 - m, their product with x,
# and the sum), compilers elsewhere than eager code.
RIVAL_TIMES, RIVAL_EPS = 4.0, 8.0
# Plain PyTorch rounds a few times to the dtype, and sums of thousands of terms add some more; another formula is off by
# its own size, which is 8e6 eps in fp32 and 128 in bf16.
PLAIN_EPS = 32.0


@dataclass(frozen=True)
class Way:
    """One way to make the calls of a case.

    Attributes:
        calls: the calls to compute, by set of inputs.
        forward: (**tensors) → the output, differentiable.
        is_rival: whether it is others' code.
    """

    calls: Sequence[Sample]
    forward: Callable[..., Tensor]
    is_rival: bool = True

    def steps(self, mode: str) -> list[Step]:
        make = {FORWARD: self._forward, BACKWARD: self._backward, FULL: self._full}[mode]
        return [make(call) for call in self.calls]

    def _forward(self, call: Sample) -> Step:
        """A forward that keeps what backward needs until it returns, as in training."""
        leaves = call.leaves()
        return lambda: self.forward(**leaves)

    def _backward(self, call: Sample) -> Step:
        leaves, wanted = _leaves(call)
        output = self.forward(**leaves)
        return lambda: torch.autograd.grad(output, wanted, call.upstream, retain_graph=True)

    def _full(self, call: Sample) -> Step:
        leaves, wanted = _leaves(call)
        return lambda: torch.autograd.grad(self.forward(**leaves), wanted, call.upstream)

    def result(self, call: Sample) -> Result:
        leaves, wanted = _leaves(call)
        output = self.forward(**leaves)
        found = torch.autograd.grad(output, wanted, call.upstream)
        return Result(output.detach(), dict(zip(call.differentiable, found, strict=True)))

    def saved_bytes(self) -> int:
        leaves, activations = self.calls[0].leaves(), OPS[self.calls[0].op].activations
        parameters = [leaf for name, leaf in leaves.items() if leaf is not None and name not in activations]
        return memory.saved(lambda: self.forward(**leaves), parameters)


def _leaves(call: Sample) -> tuple[dict[str, Any], tuple[Tensor, ...]]:
    """The tensors as leaves, and those that have gradients."""
    leaves = call.leaves()
    return leaves, tuple(leaf for name in call.differentiable if (leaf := leaves[name]) is not None)


@dataclass(frozen=True)
class Homogeneous(Way):
    """Steps of one route each, as SGTM's code trains."""

    steps_by_route: rivals.HomogeneousSteps | None = None

    def steps(self, mode: str) -> list[Step]:
        if mode != FULL:  # every route's forward is followed by its backward
            return []
        return [self._of_routes.step(call.tensors, call.upstream) for call in self.calls]

    @property
    def _of_routes(self) -> rivals.HomogeneousSteps:
        assert self.steps_by_route is not None
        return self.steps_by_route

    def result(self, call: Sample) -> Result:
        return Result(*self._of_routes.together(self._of_routes.step(call.tensors, call.upstream)()))

    def saved_bytes(self) -> int:
        return self._of_routes.saved_bytes(self.calls[0].tensors)


def ways(calls: Sequence[Sample], with_compiled: bool = True) -> dict[str, Way]:
    """Every way by name that has the meaning of a case, and the unmasked ones that it is compared with."""
    call = calls[0]
    ordinary = [one.with_routes(None) for one in calls]
    dtype = call.upstream.dtype
    made = {BASE: Way(ordinary, rivals.unmasked(call)), "detach": Way(calls, rivals.detach(call, dtype))}
    if dtype.itemsize < 4 and any(not site.startswith("update") for site in call.tables):
        made["detach, fp32 mask"] = Way(calls, rivals.detach(call, torch.float32))
    made["hook"] = Way(calls, rivals.hook(call))
    if any(site.startswith("update") for site in call.tables) and OP_TABLE[call.op].updates:
        assert call.routes is not None
        if call.routes.strength is None:
            steps = rivals.HomogeneousSteps(call)
            made["homogeneous steps"] = Homogeneous(calls, rivals.unmasked(call), steps_by_route=steps)
    if with_compiled:
        for name in (BASE, "detach"):
            made[f"{name}, compiled"] = Way(made[name].calls, rivals.compiled(made[name].forward))
    if rivals.has_liger(call) and not missing(call):
        made["Liger, unmasked"] = Way(ordinary, rivals.liger(call))
    device = call.upstream.device
    for backend in backends.available_backends(call.op, device):
        if backend != "reference":
            made[backend] = Way(calls, partial(_routed, call, backend), is_rival=False)
    return made


def _routed(call: Sample, backend: str, **tensors: Tensor | None) -> Tensor:
    return call.call(tensors, backend)


def missing(call: Sample) -> dict[str, str]:
    """Peers that cannot run on this machine, with the reason."""
    if not rivals.has_liger(call):
        return {}
    why = rivals.LIGER_MISSING or (None if call.upstream.is_cuda else "Liger-Kernel needs a GPU")
    return {"Liger, unmasked": why} if why else {}


def copy_steps(moved_bytes: float, device: torch.device) -> list[Step]:
    """A copy that reads and writes as many bytes: the ceiling of ops that only move data."""
    source = torch.randint(256, (max(1, int(moved_bytes) // 2),), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return [lambda: target.copy_(source)]


def examine(made: Mapping[str, Way], variants: Mapping[str, Variant]) -> Findings:
    """Checks the numbers of every way on every set of inputs; see CHECKED."""
    found: Findings = {name: {} for name in variants}
    by_calls: dict[int, list[str]] = {}
    for name in variants:
        if name in made:
            by_calls.setdefault(id(made[name].calls), []).append(name)
    for names in by_calls.values():
        for call in made[names[0]].calls:
            exact, plain = call.in_float64().run("reference"), call.run_plain()
            useless = why_useless(call, exact, plain)
            for name in names:
                if not found[name]:
                    progress.step(f"checking {name}")
                    check = partial(_examine, name, made[name], call, exact, plain)
                    found[name] = {"wrong": useless} if useless else attempt(check)
    return found


def why_useless(call: Sample, exact: Result, plain: Result) -> str | None:
    """Why a budget made of plain PyTorch's error says nothing here, if so."""
    for part, (_, want, eager) in _parts(plain, exact, plain).items():
        most = PLAIN_EPS * torch.finfo(eager.dtype).eps * _rms(want)
        if not _rms(eager - want) <= most:
            return (
                f"{part}: plain PyTorch is off by RMS {_rms(eager - want):.3g}, expected at most {most:.3g}"
            )
    if all(bool((table.weights == 1).all()) for table in call.tables.values()) or call.routes is None:
        return None
    try:
        assert_rival_is_right(call.with_routes(None).run_plain(), exact, plain, "unmasked")
    except AssertionError:
        return None
    return "masks change so little here that the unmasked op would pass for a masked one"


def _examine(name: str, way: Way, call: Sample, exact: Result, plain: Result) -> dict[str, Any]:
    got = way.result(call)
    try:
        if way.is_rival:
            assert_rival_is_right(got, exact, plain, name)
        else:
            testing.assert_result_within_budget(got, exact, plain, name)
    except AssertionError as error:
        return {"wrong": str(error)}
    return {}


def assert_rival_is_right(got: Result, exact: Result, plain: Result, name: str) -> None:
    """Raises AssertionError, naming the tensor, where a rival computes something else; see CHECKED."""
    for part, (actual, want, eager) in _parts(got, exact, plain).items():
        error, eager_error = _rms(actual - want), _rms(eager - want)
        allowed = RIVAL_TIMES * eager_error + RIVAL_EPS * torch.finfo(actual.dtype).eps * _rms(want)
        if not error <= allowed:  # a NaN fails too
            raise AssertionError(f"{name}: {part}: RMS error {error:.3g}, expected at most {allowed:.3g}")


def _parts(*results: Result) -> dict[str, tuple[Any, ...]]:
    """The output and the gradients of several results, side by side."""
    names = results[0].gradients
    gradients = {f"d{name}": tuple(result.gradients[name] for result in results) for name in names}
    return {"output": tuple(result.output for result in results)} | gradients


def _rms(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x.double())) / math.sqrt(max(1, x.numel()))


@dataclass(frozen=True)
class Options:
    """The options that cases are made with.

    Attributes:
        device: where they run.
        with_compiled: whether rivals are compiled too.
    """

    device: torch.device
    with_compiled: bool = True


def case(
    setting: Setting,
    options: Options,
    modes: tuple[str, ...],
    limits: tuple[Limit, ...] = (),
    with_memory: bool = False,
) -> Case:
    """The case of a setting; on the CPU `with_memory` measures each peak, which takes a process of its own."""
    calls = samples(setting, options.device, SETS)
    made = ways(calls, options.with_compiled)
    work = work_of(calls[0])
    on_cuda = options.device.type == "cuda"
    variants = {
        name: Variant(
            steps=way.steps,
            saved_bytes=way.saved_bytes,
            memory_bytes=partial(_memory_bytes, options.device, setting, name)
            if on_cuda or (with_memory and "compiled" not in name)
            else None,
            is_rival=way.is_rival,
            does_work=name != BASE or setting.op != "route_grad",  # the unmasked op hands its input on
        )
        for name, way in made.items()
    }
    for mode in modes:
        moved = work[mode].moved_bytes
        if moved:
            variants[copy_name(mode)] = Variant(partial(_copies, mode, moved, options.device), is_rival=True)
    return Case(
        variants=variants,
        rivals=(
            *(() if setting.op == "route_grad" else (BASE,)),  # the unmasked route_grad takes no time
            "detach",
            *(copy_name(mode) for mode in modes if work[mode].moved_bytes),
        ),
        examine=partial(examine, made),
        checked=CHECKED,
        modes=modes,
        limits=limits,
        missing=missing(calls[0]),
        work=work,
    )


def copy_name(mode: str) -> str:
    return f"copy of the bytes of {mode}"


def _copies(mode: str, moved: float, device: torch.device, asked: str) -> list[Step]:
    return copy_steps(moved, device) if asked == mode else []


def _memory_bytes(device: torch.device, setting: Setting, name: str, mode: str, step: Step) -> int | None:
    if device.type == "cuda":
        return memory.on_device(step)
    return memory.on_cpu(partial(warm_step_on_cpu, setting, name, mode))


def warm_step_on_cpu(setting: Setting, name: str, mode: str) -> Step:
    """A step after a short one of its kind, so that what is loaded once is not counted."""
    short = setting._replace(tokens=min(64, setting.tokens))
    first, whole = (
        ways(samples(one, torch.device("cpu"), 1), with_compiled=False)[name].steps(mode)[0]
        for one in (short, setting)
    )
    first()
    return whole


def automatic(op: str, device: torch.device) -> str:
    """The backend that the automatic choice tries first; targets are about its times."""
    able = backends.available_backends(op, device)
    # A case for a device that is not here is listed all the same.
    return able[0] if able else backends.OPS[op][0]


def plan(
    setting: Setting,
    options: Options,
    modes: tuple[str, ...] = (),
    limits: tuple[Limit, ...] = (),
    name: str = "",
    x: str = "tokens",
) -> Plan:
    """The case of a setting, not made yet.

    Raises:
        ValueError: a value that its axis does not have.
    """
    setting.check()
    suite = OP_TABLE[setting.op].suite
    passes = modes or ((FORWARD, BACKWARD) if suite in ("primitive", "norm") else (FORWARD, FULL))
    make = partial(case, setting, options, passes, limits, bool(limits))
    return Plan(suite, name or setting.title, setting.op, setting.axes, make, x)
