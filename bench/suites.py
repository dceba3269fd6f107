"""The cases: suites by what they time, and the groups `cpu` and `h200`, which have the targets of their machines."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import product
from typing import Any

import torch

from . import attention, busy, end_to_end, labels, launch, model, moe, ops, optim
from .cases import BACKWARD, FORWARD, FULL, Limit, Plan
from .op_table import OPS
from .ops import Options, automatic, copy_name
from .settings import TWO_ROUTES, Axes, Setting

#: The point from which an axis departs while the others stay, by device.
BASE_POINTS: dict[str, dict[str, Any]] = {
    "cpu": {"tokens": 4096, "d_model": 256, "d_ff": 1024, "dtype": "float32"},
    "cuda": {"tokens": 16384, "d_model": 4096, "d_ff": 14336, "dtype": "bfloat16"},
}

#: The cases of a suite of ops where the command names no values: one axis at a time.
SWEEPS: dict[str, tuple[Any, ...]] = {
    "density": (0.125, 0.25, 0.5, 1.0),
    "tables": ("block", "fractional"),
    "strength": ("token",),
    "order": ("sorted", "runs"),
}
SWEEPS_BY_DEVICE: dict[str, dict[str, tuple[Any, ...]]] = {
    "cpu": {"tokens": (512, 2048, 8192), "dtype": ("bfloat16",)} | SWEEPS,
    "cuda": {"tokens": (1024, 4096, 16384), "dtype": ("float16",)} | SWEEPS,
}
START = {"tables": "interval", "density": 0.25}


def suite_plans(suite: str, options: Options, axes: Axes | None = None) -> list[Plan]:
    """The cases of a suite: those with targets first, then its sweeps; or the product of the values of some axes.

    Raises:
        ValueError: a value that its axis does not have, or axes that the suite does not have.
    """
    if suite in ops.SUITES:
        if axes:
            return chosen_plans(suite, options, axes)
        of_limits = [plan for plan in limit_plans(options) if plan.suite == suite]
        return unique(of_limits + sweep_plans(suite, options))
    rest = {
        axis: values
        for axis, values in (axes or {}).items()
        if not (suite in ("attention", "labels") and axis == "tokens")
    }
    if rest:
        has = "tokens alone" if suite in ("attention", "labels") else "none"
        raise ValueError(f"{', '.join(rest)}: got an axis that the suite {suite} lacks, expected {has}")
    lengths = tuple((axes or {}).get("tokens", ()))
    if suite == "labels":
        return labels.plans(options.device, lengths)
    if suite == "attention":
        return attention.plans(options.device, lengths, options.with_compiled)
    return {"launch": launch, "model": model, "moe": moe, "end-to-end": end_to_end, "optim": optim}[
        suite
    ].plans(options.device)


SUITES = (*ops.SUITES, "attention", "launch", "model", "moe", "end-to-end", "labels", "optim")
NEED_PACKAGES = {"model": model, "moe": moe, "end-to-end": end_to_end, "optim": optim}


def why_missing(suite: str) -> str | None:
    """The reason why a suite cannot run on this machine; None where it can."""
    return NEED_PACKAGES[suite].why_missing() if suite in NEED_PACKAGES else None


def chosen_plans(suite: str, options: Options, axes: Axes) -> list[Plan]:
    """The product of the values; axes that are not named stay at their base point."""
    chosen = {"op": list(ops.SUITES[suite])} | axes
    strange = [op for op in chosen["op"] if op not in ops.SUITES[suite]]
    if strange:
        raise ValueError(f"op: got {', '.join(strange)}, expected one of {', '.join(ops.SUITES[suite])}")
    start = BASE_POINTS[options.device.type] | START
    if "share" in axes and "tables" not in axes:
        start["tables"] = "block"
    check_meaning(axes, axes.get("tables", [start["tables"]]))
    x = next((axis for axis in ("density", "share", "tokens") if len(axes.get(axis, ())) > 1), "tokens")
    settings = [
        Setting(**(start | dict(zip(chosen, values, strict=True)))) for values in product(*chosen.values())
    ]
    return unique([plan_of(setting, options, x) for setting in map(with_sites, settings)])


def check_meaning(axes: Axes, tables: list[str]) -> None:
    """Refuses values of an axis that none of the tables reads, for they would be ignored."""
    for axis, readers in {"density": ("interval",), "share": TWO_ROUTES}.items():
        if axis in axes and not set(tables) & set(readers):
            raise ValueError(
                f"{axis}: got {axes[axis]} with tables {', '.join(tables)}, which ignore it, "
                f"expected tables {' or '.join(readers)}"
            )


def with_sites(setting: Setting) -> Setting:
    """The setting with sites that its op has: norms and the embedding have updates alone."""
    if setting.site_names or setting.sites != "activation":
        return setting
    return setting._replace(sites="update")


def plan_of(setting: Setting, options: Options, x: str) -> Plan:
    setting.check()
    return ops.plan(setting, options, x=x if x in setting.axes else "tokens")


def sweep_plans(suite: str, options: Options) -> list[Plan]:
    """Cases of every op of a suite, one axis at a time from the base point."""
    device = options.device.type
    plans = []
    for op in ops.SUITES[suite]:
        start = with_sites(Setting(op, **(BASE_POINTS[device] | START)))
        plans.append(plan_of(start, options, "tokens"))
        for axis, values in SWEEPS_BY_DEVICE[device].items():
            x = axis if axis == "density" else "tokens"
            plans += [plan_of(start._replace(**{axis: value}), options, x) for value in values]
    return plans


def unique(plans: list[Plan]) -> list[Plan]:
    """The cases, each once, where it comes first."""
    return list({plan.name: plan for plan in reversed(plans)}.values())[::-1]


def limit_plans(options: Options) -> list[Plan]:
    """The cases of ops that have targets on a device."""
    return cpu_limits(options) if options.device.type == "cpu" else cuda_limits(options)


def cpu_limits(options: Options) -> list[Plan]:
    own = automatic("routed_gated_mlp", options.device)
    block = Setting("routed_gated_mlp", 8192, 256, 1024)
    quarters = Setting("routed_gated_mlp", 4096, 512, 2048, tables="interval", density=0.25, sites="both")
    linear = Setting("routed_linear", 8192, 1024, 1024, tables="refuse", share=1 / 16, sites="update")
    of_block = (Limit(own, "unmasked", 0.85), Limit(own, "detach", 0.78))
    of_compiled = Limit(own, "unmasked, compiled", 0.95)
    small = "gated MLP, 3.7% of tokens train 64 of 1024 units"
    beside = f"{small}, beside a busy process"
    half = "gated MLP, 50% of tokens train 64 of 1024 units"

    def plan(setting: Setting, name: str, *limits: Limit) -> Plan:
        # Compiled rivals take as long as everything else together, so cases that differ in tokens alone leave them out.
        compiled = options.with_compiled and name not in (half, beside) and setting.order != "sorted"
        own_options = dataclasses.replace(options, with_compiled=compiled)
        return ops.plan(setting, own_options, (FULL,), limits, name)

    return [
        plan(block, small, *of_block, of_compiled),
        beside_busy_process(plan(block, beside, Limit(own, "unmasked", 1.0))),
        plan(block._replace(share=0.5), half, *of_block),
        *(
            plan(
                quarters._replace(order=order),
                f"gated MLP, four routes, quarters, tokens {order}",
                Limit(own, "unmasked", 0.55),
            )
            for order in ("mixed", "sorted")
        ),
        plan(linear, "linear, one token in 16 may not update", Limit(own, "unmasked", 1.05)),
    ]


def beside_busy_process(quiet: Plan) -> Plan:
    """The case as it is timed while another process wants a core too."""
    return dataclasses.replace(quiet, make=lambda: dataclasses.replace(quiet.make(), beside=busy.process))


def cuda_limits(options: Options) -> list[Plan]:
    """The cases with targets on an H200: bf16, 16384 tokens, d_model 4096, d_ff 14336."""
    own = automatic("routed_gated_mlp", options.device)
    block = Setting("routed_gated_mlp", **BASE_POINTS["cuda"])
    quarters = block._replace(tables="interval", density=0.25, sites="both")
    fractional = block._replace(tables="fractional", strength="token")

    def plan(setting: Setting, name: str, *limits: Limit) -> Plan:
        # Compiling rivals takes longest, so only those are compiled that a target is about.
        compiled = any("compiled" in limit.rival for limit in limits)
        own_options = dataclasses.replace(options, with_compiled=compiled and options.with_compiled)
        return ops.plan(setting, own_options, (FORWARD, FULL), limits, name)

    return [
        route_grad_limits(options),
        plan(
            block,
            "gated MLP, 3.7% of tokens train the last 64 units",
            Limit(own, "unmasked", 1.0),
            Limit(own, "unmasked, compiled", 1.02),
            Limit(own, "detach", 0.92),
            Limit(own, "unmasked", 0.6, "saved"),
        ),
        plan(
            block._replace(sites="both"),
            "gated MLP, the same with parameter routing",
            Limit(own, "unmasked", 1.02),
        ),
        *(
            plan(
                quarters._replace(order=order),
                f"gated MLP, four routes, quarters, tokens {order}",
                Limit(own, "unmasked", most),
            )
            for order, most in (("sorted", 0.6), ("mixed", 0.7))
        ),
        plan(
            fractional,
            "gated MLP, fractional dense table with strength",
            Limit(own, "unmasked", 1.03),
        ),
    ]


def route_grad_limits(options: Options) -> Plan:
    own = automatic("route_grad", options.device)
    point = BASE_POINTS["cuda"] | {"d_model": BASE_POINTS["cuda"]["d_ff"]}
    limits = (
        Limit(own, "detach", 0.0, "memory", FORWARD),
        Limit(own, copy_name(BACKWARD), 1 / 0.9, mode=BACKWARD),
        Limit(own, "detach", 0.45, added="unmasked"),
    )
    modes = (FORWARD, BACKWARD, FULL)
    return ops.plan(Setting("route_grad", **point), options, modes, limits, "route_grad, 3.7% of tokens")


def alone_plans(options: Options) -> list[Plan]:
    options = dataclasses.replace(options, with_compiled=False)
    return [
        ops.plan(
            with_sites(Setting(op, 8192, 1024, 1024, tables="blocks")),
            options,
            (FORWARD, BACKWARD),
            name=f"{op} alone",
        )
        for op, entry in OPS.items()
        if entry.alone
    ]


def curve_plans(options: Options) -> list[Plan]:
    """The gated MLP over density and over tokens, without compiled rivals, which would take most of the time."""
    options = dataclasses.replace(options, with_compiled=False)
    start = Setting("routed_gated_mlp", **(BASE_POINTS[options.device.type] | START))
    axes = SWEEPS_BY_DEVICE[options.device.type]
    return [
        ops.plan(start._replace(**{axis: value}), options, (FULL,), x=axis)
        for axis in ("density", "tokens")
        for value in axes[axis]
    ]


def cpu_group(options: Options) -> list[Plan]:
    """The targets of two cores, and cases that show where the time goes there."""
    plans = limit_plans(options) + suite_plans("end-to-end", options) + suite_plans("attention", options)
    plans += suite_plans("model", options) + suite_plans("moe", options) + suite_plans("launch", options)
    plans += suite_plans("labels", options)
    plans += alone_plans(options) + curve_plans(options)
    return unique(plans)


def h200_group(options: Options) -> list[Plan]:
    """The targets of an H200, in minutes."""
    plans = limit_plans(options) + suite_plans("attention", options) + suite_plans("model", options)
    return unique(plans + suite_plans("launch", options) + curve_plans(options))


#: Groups by name, with the device that each is for and the function that makes its cases.
GROUPS: dict[str, tuple[str, Callable[[Options], list[Plan]]]] = {
    "cpu": ("cpu", cpu_group),
    "h200": ("cuda", h200_group),
}


def available(name: str, options: Options, axes: Axes | None = None) -> list[Plan]:
    """The cases of a suite or group on this machine; of a suite also those at other values of its axes.

    Raises:
        ValueError: no such suite, or a group of another kind of device.
    """
    if name in GROUPS:
        kind, make = GROUPS[name]
        if options.device.type != kind:
            raise ValueError(f"suite: got {name!r}, which is for {kind}, on {options.device.type}")
        return make(options)
    if name not in SUITES:
        raise ValueError(f"suite: got {name!r}, expected one of {', '.join((*SUITES, *GROUPS))}")
    return suite_plans(name, options, axes)


def device_of(name: str, asked: str | None) -> torch.device:
    """The device that a suite runs on: the one asked for, a group's own kind, else CUDA where there is one."""
    if asked is not None:
        return torch.device(asked)
    if name in GROUPS:
        return torch.device(GROUPS[name][0])
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
