"""The demo's findings: a table, a verdict, a JSON file and a plot."""

import json
from pathlib import Path
from typing import Any

from .corpus import ROUTE_NAMES

MODELS = ("routed", "control")
STAGES = ("before ablation", "after ablation", "after fine-tuning")
ROUTES_UNKNOWN = "before, routes unknown"
LEAST_GAP = 0.5  # nats of forget loss after ablation, beyond the control's
MOST_DAMAGE = 0.1  # nats of retain loss that ablation may cost the routed model

COLOURS = {"routed": "#0b6e99", "control": "#b5651d"}
COST_COLOURS = ("#8a8a8a", "#0b6e99", "#6fb1cf", "#7b4173")

StageLosses = dict[str, dict[str, float]]  # stage → set → held-out nats per token


def verdict(losses: dict[str, StageLosses]) -> dict[str, Any]:
    routed, control = losses["routed"], losses["control"]
    rise, control_rise = (
        m["after ablation"]["forget"] - m["before ablation"]["forget"] for m in (routed, control)
    )
    gap = routed["after ablation"]["forget"] - control["after ablation"]["forget"]
    # Against the better of both readings of "before": with the routes given, and without.
    before = min(routed["before ablation"]["retain"], routed[ROUTES_UNKNOWN]["retain"])
    damage = routed["after ablation"]["retain"] - before
    return {
        "forget_rise": rise,
        "control_rise": control_rise,
        "forget_gap": gap,
        "retain_damage": damage,
        "localised": gap >= LEAST_GAP and damage <= MOST_DAMAGE,
    }


def print_report(results: dict[str, Any]) -> None:
    print_losses(results["losses"])
    print_cost(results["cost"])
    print_verdict(results["verdict"])


def print_losses(losses: dict[str, StageLosses]) -> None:
    print("\nHeld-out loss, nats per token")
    print(f"{'':28}" + "".join(f"{f'{model}: {name}':>18}" for model in MODELS for name in ROUTE_NAMES))
    for stage in losses["routed"]:
        row = [losses[model].get(stage, {}).get(name) for model in MODELS for name in ROUTE_NAMES]
        print(f"{stage:28}" + "".join(f"{'-' if loss is None else f'{loss:.3f}':>18}" for loss in row))
    print(
        "Retain tokens were trained without the forget block, and are evaluated so before ablation;\n"
        f'"{ROUTES_UNKNOWN}" leaves in the block, which was trained on licences alone.'
    )


def print_cost(cost: dict[str, dict[str, Any]]) -> None:
    print(
        "\nForward and backward on one mixed batch (median of interleaved steps), and bytes saved for backward"
    )
    unrouted = cost["unrouted"]
    for name, measured in cost.items():
        milliseconds, saved = measured["step_milliseconds"], measured["saved_bytes"]
        print(
            f"{name:28}{milliseconds:10.1f} ms{measured['times_unrouted']:8.2f} x"
            f"{saved / 2**20:12.1f} MiB{saved / unrouted['saved_bytes']:8.2f} x"
        )
    print(
        "Detach masks stop gradients of activations; they cannot confine the update of a parameter to some tokens of\n"
        "a batch. The last two rows mask what both can, the hidden units of the MLPs, and have the same gradients."
    )


def print_verdict(found: dict[str, Any]) -> None:
    print("\nLocalised." if found["localised"] else "\nNOT LOCALISED.")
    rise, control_rise = found["forget_rise"], found["control_rise"]
    print(f"Forget loss: {rise:+.3f} by ablation, the control's {control_rise:+.3f}.")
    gap, damage = found["forget_gap"], found["retain_damage"]
    print(f"Forget loss after ablation, against the control's: {gap:+.3f} (at least {LEAST_GAP:+.3f})")
    print(f"Retain loss after ablation, against before:        {damage:+.3f} (at most {MOST_DAMAGE:+.3f})")


def save_json(results: dict[str, Any], path: Path) -> None:
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(f"saved {path}")


def save_plot(results: dict[str, Any], path: Path) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no plot: matplotlib is not installed")
        return
    figure = Figure(figsize=(16, 4.4), layout="constrained")
    forget, retain, time, memory = figure.subplots(1, 4, width_ratios=(3, 3, 2.8, 2.8))
    plot_losses(forget, results["losses"], "forget", "Forget set: licence texts")
    plot_losses(retain, results["losses"], "retain", "Retain set: Python's help and sources")
    plot_routes_unknown(retain, results["losses"]["routed"][ROUTES_UNKNOWN]["retain"])
    retain.sharey(forget)
    forget.set_ylabel("held-out loss, nats per token")
    forget.legend(frameon=False, loc="center right")
    cost = results["cost"]
    plot_bars(time, {name: row["step_milliseconds"] for name, row in cost.items()}, "Forward and backward")
    time.set_ylabel("median milliseconds per step")
    plot_bars(memory, {name: row["saved_bytes"] / 2**20 for name, row in cost.items()}, "Saved for backward")
    memory.set_ylabel("MiB")
    figure.savefig(path, dpi=150)
    print(f"saved {path}")


def plot_losses(axis: Any, losses: dict[str, StageLosses], name: str, title: str) -> None:
    values = {model: [losses[model][stage][name] for stage in STAGES] for model in MODELS}
    for model in MODELS:
        axis.plot(range(len(STAGES)), values[model], "o-", color=COLOURS[model], label=model, linewidth=2)
    for place, pair in enumerate(zip(*values.values(), strict=True)):
        for model, value in zip(MODELS, pair, strict=True):
            offset = (-8, 8) if value == max(pair) else (-8, -16)  # clear of a line that rises to the right
            axis.annotate(
                f"{value:.2f}",
                (place, value),
                offset,
                textcoords="offset points",
                ha="center",
                color=COLOURS[model],
            )
    axis.set_title(title)
    axis.set_xticks(range(len(STAGES)), [stage.replace(" ", "\n", 1) for stage in STAGES])
    axis.margins(x=0.15, y=0.15)
    axis.grid(axis="y", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)


def plot_routes_unknown(axis: Any, loss: float) -> None:
    axis.plot(0, loss, "o", markerfacecolor="none", color=COLOURS["routed"])
    axis.annotate(
        f"{loss:.2f} routed, routes unknown",
        (0, loss),
        (8, -4),
        textcoords="offset points",
        color=COLOURS["routed"],
    )


def plot_bars(axis: Any, values: dict[str, float], title: str) -> None:
    bars = axis.bar(range(len(values)), list(values.values()), color=COST_COLOURS, width=0.65)
    axis.bar_label(bars, fmt="%.0f", padding=2)
    axis.set_xticks(
        range(len(values)),
        [name.replace(", ", ",\n").replace("hidden units", "hidden\nunits") for name in values],
    )
    axis.margins(y=0.1)
    axis.set_title(title)
    axis.spines[["top", "right"]].set_visible(False)
