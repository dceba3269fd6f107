"""The suite `attention`: routed_attention beside unmasked attention and other ways to mask it, on CUDA or the CPU."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from gradroute import testing

from . import attention_check, memory, timing
from .attention_cases import CASES, DTYPES, SHAPES, Case, Limit, Shape, Variant, calls, warm_step_on_cpu
from .timing import Step

FORWARD, BACKWARD = "forward", "forward and backward"
PASSES = {"cpu": (BACKWARD,), "cuda": (FORWARD, BACKWARD)}

FLOPS = "2 B H S² D forward, 3.5 times that with backward: causal attention unmasked, whatever a variant leaves out"


def flops(shape: Shape, pass_: str) -> float:
    """What FLOPS says."""
    forward = 2 * shape.batch * shape.heads * shape.length**2 * shape.head_dim
    return forward if pass_ == FORWARD else 3.5 * forward


def run(
    rounds: int,
    rivals: tuple[str, ...] = (),
    device: torch.device | None = None,
    shape: Shape | None = None,
) -> dict[str, Any]:
    """Checks and times every case of a device; default: CUDA where there is one.

    Returns:
        By case and pass: the limits, and by variant milliseconds, the ratios to rivals of the same rounds, TFLOP/s and
        the peak of extra memory; or why it was not timed: "error", or "wrong". Beside them how all this was measured,
        and under "failures" what is wrong and may not be.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = shape or SHAPES[device.type]
    clock = timing.device_clock() if device.type == "cuda" else timing.host_seconds
    the_calls = calls(shape, device)
    results: dict[str, Any] = {}
    failures: list[str] = []
    for name, make in CASES[device.type].items():
        case = make(the_calls)
        found = examined(name, case)
        failures += [
            one["wrong"]
            for variant, one in found.items()
            if "wrong" in one and not case.variants[variant].may_be_wrong
        ]
        for variant, step in steps(case, found, BACKWARD).items():
            found[variant]["extra_bytes"] = extra_bytes(device, shape, name, variant, step)
        for pass_ in PASSES[device.type]:
            milliseconds = timing.interleaved(steps(case, found, pass_), rounds, f"{name}, {pass_}", clock)
            results[f"{name}, {pass_}"] = summary(case, found, milliseconds, shape, pass_)
    return {
        "suite": "attention",
        "rounds": rounds,
        "environment": timing.environment() | device_environment(device),
        "shape": shape._asdict(),
        "dtype": str(DTYPES[device.type]).removeprefix("torch."),
        "checked": attention_check.HOW,
        "flops": FLOPS,
        "cases": results,
        "failures": failures,
    }


def device_environment(device: torch.device) -> dict[str, Any]:
    if device.type == "cpu":
        return {}
    return {
        "gpu": torch.cuda.get_device_name(),
        "cudnn": torch.backends.cudnn.version(),
    }


def examined(name: str, case: Case) -> dict[str, dict[str, Any]]:
    """By variant: the plan of routed_attention, and why it is not timed, if so."""
    found: dict[str, dict[str, Any]] = {}
    by_call: dict[int, list[str]] = {}
    for variant, one in case.variants.items():
        by_call.setdefault(id(one.call), []).append(variant)
    for variants in by_call.values():
        exact, plain = attention_check.exact_and_plain(case.variants[variants[0]].call)
        for variant in variants:
            found[variant] = examine(case.variants[variant], exact, plain, f"{name}, {variant}")
    return {variant: found[variant] for variant in case.variants}


def examine(variant: Variant, exact: testing.Result, plain: testing.Result, name: str) -> dict[str, Any]:
    """A variant is timed only after its numbers were found right, in this process and on these inputs."""
    found: dict[str, Any] = {}
    try:
        if variant.explain is not None:
            found["plan"] = variant.explain()._asdict()
        got = attention_check.result(variant.call, variant.forward)
    except (
        Exception
    ) as error:  # a machine may refuse a variant in any way, and the report is there to tell it
        return found | {"error": f"{type(error).__name__}: {error}"}
    try:
        testing.assert_result_within_budget(got, exact, plain, name)
    except AssertionError as error:
        return found | {"wrong": str(error)}
    return found


def steps(case: Case, found: Mapping[str, Mapping[str, Any]], pass_: str) -> dict[str, Step]:
    """The steps to time: of the variants that run and are right."""
    return {
        name: variant.forward_step() if pass_ == FORWARD else variant.backward_step()
        for name, variant in case.variants.items()
        if "error" not in found[name] and "wrong" not in found[name]
    }


def extra_bytes(device: torch.device, shape: Shape, case: str, variant: str, step: Step) -> int | None:
    """The peak of a step's memory beyond its inputs; on the CPU in a process of its own."""
    if device.type == "cuda":
        return memory.on_device(step)
    return memory.on_cpu(partial(warm_step_on_cpu, shape, case, variant))


def summary(
    case: Case,
    found: Mapping[str, Mapping[str, Any]],
    milliseconds: Mapping[str, list[float]],
    shape: Shape,
    pass_: str,
) -> dict[str, Any]:
    """One entry of the report's cases."""
    variants = {name: dict(one) for name, one in found.items()}
    for name, times in milliseconds.items():
        measured = timing.timing(times)
        variants[name] |= {
            "milliseconds": measured._asdict(),
            "ratios": {
                rival: timing.ratio(times, milliseconds[rival])
                for rival in case.rivals
                if rival in milliseconds
            },
            "tflops_per_second": flops(shape, pass_) / measured.p50 / 1e9,
        }
    limits = [verdict(limit, variants) for limit in case.limits] if pass_ == BACKWARD else []
    return {"base": case.rivals[0], "limits": limits, "variants": variants}


def verdict(limit: Limit, variants: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The limit, what was got, and whether that is enough."""
    own, rival = variants[limit.variant], variants[limit.rival]
    if limit.quantity == "time":
        got = own.get("ratios", {}).get(limit.rival)
    else:
        sizes = own.get("extra_bytes"), rival.get("extra_bytes")
        got = None if None in sizes else sizes[0] / sizes[1]
    words = "not measured" if got is None else "reached" if got <= limit.most else "MISSED"
    return limit._asdict() | {"got": got, "verdict": words}


def lines(report: dict[str, Any]) -> list[str]:
    """The report as text."""
    text = []
    for name, case in report["cases"].items():
        text += ["", name]
        for variant, measured in case["variants"].items():
            text.append(f"  {variant:<24} {measured_text(measured)}")
        for limit in case["limits"]:
            got = "" if limit["got"] is None else f" {limit['got']:.3f},"
            text.append(
                f"  {limit['variant']} must be at most {limit['most']:.3f} × {limit['rival']} in "
                f"{limit['quantity']}:{got} {limit['verdict']}"
            )
    return text


def measured_text(measured: dict[str, Any]) -> str:
    for reason in ("error", "wrong"):
        if reason in measured:
            return f"{reason}: {measured[reason]}"
    p50, p20, p80 = timing.Timing(**measured["milliseconds"])
    ratios = "   ".join(f"{value:.3f} × {rival}" for rival, value in measured["ratios"].items())
    size = measured["extra_bytes"]
    megabytes = "" if size is None else f"{size / 1e6:8.0f} MB"
    rate = measured["tflops_per_second"]
    return f"{p50:9.2f} ms ({p20:.2f}–{p80:.2f}) {rate:8.3f} TFLOP/s {megabytes}   {ratios}"
