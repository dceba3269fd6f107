"""The suite `cuda`: bandwidth of the fused kernels beside a device copy of as many bytes, in one run."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gradroute import MLPSites, Routes, Table, backends, composed
from gradroute.tables import localize

from . import timing

TOKENS, D_FF = 16384, 14336


class Case(NamedTuple):
    """One kernel to time.

    Attributes:
        name: what it shows.
        op: of the table of backends.
        call: a backend's leaf computations → its outputs.
        moved_bytes: what it must read and write.
        limit: the share of a copy's bandwidth that must be reached.
    """

    name: str
    op: str
    call: Callable[[Any], tuple[Tensor, ...]]
    moved_bytes: int
    limit: float


def cases() -> list[Case]:
    """bf16, two routes; 3.7 % of the tokens, anywhere in the batch, keep the last 64 features."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(TOKENS, D_FF, generator=generator, device="cuda", dtype=torch.bfloat16)

    ids = (torch.rand(TOKENS, generator=generator, device="cuda") < 0.037).int()
    routes, table = Routes.of(ids, 2), localize(2, D_FF, {1: slice(D_FF - 64, D_FF)})
    dense = Table(torch.rand(2, D_FF, generator=torch.Generator().manual_seed(0)))
    dz, gate, up = normal(), normal(), normal()
    sites = MLPSites(hidden=table).effective
    size = dz.nbytes
    unread = int((table.weights[ids.cpu().long()] == 0).sum()) * dz.element_size()

    def glu(kernels: Any) -> tuple[Tensor, ...]:
        outputs = kernels.glu_backward(dz, gate, up, routes, sites, "silu", want_z=True, want_bias=False)
        return tuple(output for output in outputs if output is not None)

    return [
        Case(
            "route_grad backward",
            "route_grad",
            lambda k: (k.masked_product(dz, routes, table),),
            2 * size - unread,
            0.9,
        ),
        Case(
            "route_grad backward, dense table",
            "route_grad",
            lambda k: (k.masked_product(dz, routes, dense),),
            2 * size,
            0.9,
        ),
        Case("gated activation backward", "routed_glu", glu, 6 * size, 0.85),
    ]


def check(case: Case, backend: str) -> None:
    """A kernel is timed only after its numbers were found right: within two roundings of backend torch's."""
    for got, expected in zip(case.call(backends.kernels(backend)), case.call(composed), strict=True):
        scale = expected.float().abs().max()
        error = (got.float() - expected.float()).abs().max()
        allowed = 2 * torch.finfo(expected.dtype).eps * scale
        if not error <= allowed:
            raise AssertionError(
                f"{case.name} on {backend}: got an error of {error}, expected at most {allowed}"
            )


def run(rounds: int, rivals: tuple[str, ...] = ()) -> dict[str, Any]:
    """Checks and times every case on every backend with kernels, interleaved with a copy of as many bytes."""
    clock = timing.device_clock()
    results: dict[str, Any] = {}
    for case in cases():
        source = torch.empty(case.moved_bytes // 2, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        steps: dict[str, Callable[[], Any]] = {
            "copy": lambda target=target, source=source: target.copy_(source)
        }
        for backend in backends.available_backends(case.op, "cuda"):
            if backend in ("triton", "cuda"):
                check(case, backend)
                steps[backend] = partial(case.call, backends.kernels(backend))
        times = timing.interleaved(steps, rounds, case.name, clock)
        results[case.name] = {
            "moved_bytes": case.moved_bytes,
            "limit": case.limit,
            "variants": {
                name: {
                    "milliseconds": timing.timing(own)._asdict(),
                    "bytes_per_second": case.moved_bytes / timing.timing(own).p50 * 1e3,
                    "share_of_copy": timing.ratio(times["copy"], own),
                }
                for name, own in times.items()
            },
        }
    environment = timing.environment() | {"gpu": torch.cuda.get_device_name()}
    return {"suite": "cuda", "rounds": rounds, "environment": environment, "cases": results}


def lines(report: dict[str, Any]) -> list[str]:
    """The report as text."""
    text = []
    for name, case in report["cases"].items():
        text += ["", name]
        for variant, measured in case["variants"].items():
            share, rate = measured["share_of_copy"], measured["bytes_per_second"] / 1e12
            verdict = "" if variant == "copy" else "reached" if share >= case["limit"] else "MISSED"
            text.append(f"  {variant:<8} {rate:6.2f} TB/s   {share:.3f} × copy   {verdict}")
    return text
