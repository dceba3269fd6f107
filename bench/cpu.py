"""The suite `cpu`: forward and backward of routed layers on the CPU, beside what one would use instead."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gradroute import LinearSites, MLPSites, Routes, Table, backends, testing
from gradroute.tables import localize
from gradroute.testing import Sample

from . import timing

# "unmasked": eager PyTorch without routing. "detach": `m*h + (1-m)*h.detach()` with the dense mask made beforehand.
# "hook": a tensor hook that multiplies the gradient with that mask. Both mask hidden activations only.
Step = Callable[[], Any]


class Case(NamedTuple):
    """One call to time.

    Attributes:
        name: what it shows.
        sample: the call.
        hidden: the table of the hidden units, which the rivals apply; None where they have no such thing.
        limits: what must be reached: (rival, the largest ratio allowed of backend cpu to it).
    """

    name: str
    sample: Sample
    hidden: Table | None
    limits: tuple[tuple[str, float], ...]


def gated_mlp(tokens: int, d_model: int, d_ff: int, routes: Routes, sites: MLPSites) -> Sample:
    sizes = testing.Sizes(d_model=d_model, d_ff=d_ff)
    call = testing.sample("routed_gated_mlp", tokens=tokens, sizes=sizes, bias=False)
    return call.with_routes(routes).with_sites(sites)


def block_case(share: float, limits: tuple[tuple[str, float], ...]) -> Case:
    """Two routes; tokens of the second, anywhere in the batch, train the last 64 of the hidden units."""
    tokens, d_model, d_ff = 8192, 256, 1024
    ids = (torch.rand(tokens, generator=torch.Generator().manual_seed(0)) < share).long()
    table = localize(2, d_ff, {1: slice(d_ff - 64, d_ff)})
    sample = gated_mlp(tokens, d_model, d_ff, Routes.of(ids, 2), MLPSites(hidden=table))
    return Case(f"gated MLP, {share:.1%} of tokens train 64 of {d_ff} units", sample, table, limits)


def quarters_case(in_order: bool, limits: tuple[tuple[str, float], ...]) -> Case:
    """Four routes with equal shares of the tokens, each confined to its quarter, parameters too."""
    tokens, d_model, d_ff = 4096, 512, 2048
    ids = torch.arange(tokens) % 4
    routes = Routes.of(ids.sort()[0] if in_order else ids, 4)
    quarter = d_ff // 4
    table = localize(4, d_ff, {route: slice(quarter * route, quarter * (route + 1)) for route in range(4)})
    sample = gated_mlp(tokens, d_model, d_ff, routes, MLPSites(hidden=table, update=table))
    return Case(
        f"gated MLP, four routes, quarters, tokens {'sorted' if in_order else 'mixed'}", sample, table, limits
    )


def linear_case() -> Case:
    """Parameter routing in a mixed batch: one token in sixteen may not update the weight."""
    tokens, width = 8192, 1024
    ids = (torch.arange(tokens) % 16 == 0).long()
    sizes = testing.Sizes(d_model=width, d_ff=width)
    call = testing.sample("routed_linear", tokens=tokens, sizes=sizes)
    sites = LinearSites(update_rows=Table([[1.0], [0.0]]))
    sample = call.with_routes(Routes.of(ids, 2)).with_sites(sites)
    return Case("linear, one token in 16 may not update", sample, None, ())


def op_case(op: str) -> Case:
    """An op alone, on what the automatic choice between `cpu` and `torch` rests."""
    sizes = testing.Sizes(d_model=1024, d_ff=1024, vocabulary=8192)
    return Case(op, testing.sample(op, tokens=8192, sizes=sizes, num_routes=2, tables="blocks"), None, ())


ALONE = (
    "route_grad",
    "routed_activation",
    "routed_glu",
    "routed_rms_norm",
    "routed_layer_norm",
    "routed_embedding",
)

CASES: tuple[Callable[[], Case], ...] = (
    lambda: block_case(0.037, (("unmasked", 0.95), ("detach", 0.78))),
    lambda: block_case(0.5, (("unmasked", 0.95), ("detach", 0.78))),
    lambda: quarters_case(False, (("unmasked", 0.55),)),
    lambda: quarters_case(True, (("unmasked", 0.55),)),
    linear_case,
    *(partial(op_case, op) for op in ALONE),
)


def variants(case: Case, rivals: tuple[str, ...]) -> dict[str, Step]:
    """The steps to time: the rivals', then every backend's."""
    call = case.sample
    leaves = call.leaves()
    steps: dict[str, Callable[[], Tensor]] = {"unmasked": lambda: call.with_routes(None).call_plain(leaves)}
    if case.hidden is not None and call.routes is not None:
        mask = case.hidden.weights[call.routes.ids.long()]  # [T, d_ff]
        steps["detach"] = lambda: eager(leaves, lambda h: mask * h + (1 - mask) * h.detach())
        steps["hook"] = lambda: eager(leaves, lambda h: hooked(h, mask))
    if "compiled" in rivals:
        steps |= {f"{name}, compiled": torch.compile(step) for name, step in steps.items() if name != "hook"}
    for backend in ("torch", "cpu"):
        if backend in backends.available_backends(call.op, "cpu"):
            steps[backend] = lambda backend=backend: call.call(leaves, backend)
    return {name: lambda step=step: backward(step(), leaves, call.upstream) for name, step in steps.items()}


def eager(leaves: dict[str, Any], masked: Callable[[Tensor], Tensor]) -> Tensor:
    h = F.silu(F.linear(leaves["x"], leaves["w_gate"])) * F.linear(leaves["x"], leaves["w_up"])
    return F.linear(masked(h), leaves["w_down"])


def hooked(h: Tensor, mask: Tensor) -> Tensor:
    h.register_hook(lambda g: mask * g)
    return h


def backward(output: Tensor, leaves: dict[str, Any], upstream: Tensor) -> tuple[Tensor, ...]:
    wanted = [leaf for leaf in leaves.values() if leaf is not None and leaf.requires_grad]
    return torch.autograd.grad(output, wanted, upstream)


def check(case: Case) -> None:
    """A variant is timed only after its numbers were found right, in this process and on these inputs."""
    call = case.sample
    exact, plain = call.in_float64().run("reference"), call.run_plain()
    for backend in ("torch", "cpu"):
        if backend in backends.available_backends(call.op, "cpu"):
            testing.assert_result_within_budget(call.run(backend), exact, plain, f"{case.name} on {backend}")


def run(rounds: int, rivals: tuple[str, ...] = ()) -> dict[str, Any]:
    """Checks and times every case.

    Returns:
        By case and variant: milliseconds, and the ratios to the rivals of the same rounds; the limits; the environment.
    """
    results: dict[str, Any] = {}
    for make in CASES:
        case = make()
        check(case)
        milliseconds = timing.interleaved(variants(case, rivals), rounds, case.name)
        results[case.name] = {
            "limits": dict(case.limits),
            "variants": {
                name: {
                    "milliseconds": timing.timing(times)._asdict(),
                    "ratios": {
                        rival: timing.ratio(times, milliseconds[rival])
                        for rival in ("unmasked", "detach")
                        if rival in milliseconds
                    },
                }
                for name, times in milliseconds.items()
            },
        }
    return {"suite": "cpu", "rounds": rounds, "environment": timing.environment(), "cases": results}


def lines(report: dict[str, Any]) -> list[str]:
    """The report as text."""
    text = []
    for name, case in report["cases"].items():
        text += ["", name]
        for variant, measured in case["variants"].items():
            p50, p20, p80 = timing.Timing(**measured["milliseconds"])
            ratios = "   ".join(f"{value:.3f} × {rival}" for rival, value in measured["ratios"].items())
            text.append(f"  {variant:<20} {p50:8.1f} ms ({p20:.1f}–{p80:.1f})   {ratios}")
        for rival, limit in case["limits"].items():
            got = case["variants"].get("cpu", {}).get("ratios", {}).get(rival)
            if got is not None:
                verdict = "reached" if got <= limit else "MISSED"
                text.append(f"  cpu must be at most {limit} × {rival}: {got:.3f}, {verdict}")
    return text
