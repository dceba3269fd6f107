"""Trains SGTM with mixed batches, whose tokens are routed one by one, and with steps of one label each.

Shilov et al. 2025 (arXiv 2512.05648) give a whole optimizer step one label, because their masks zero gradients of
parameters after the backward pass. Here both see the same documents, as many tokens of each label, and as many steps;
one mixes labels in every batch. Licence texts are what is to be localised, Python's help and sources the rest. Exit
code 1 when mixed batches localise less, or take longer to learn as much.
"""

import copy
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from operator import truediv
from typing import Any

import torch
from experiment import Check, Experiment, main, median, spread
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from transformers import LlamaForCausalLM
from unlearning.corpus import FORGET, RETAIN, ROUTE_NAMES, Batch, mixture, pack
from unlearning.homogeneous import OneLabelSteps
from unlearning.labelled import LENGTH, Texts, load_texts, one_label_steps, optimizer_of
from unlearning.model import Shape, build, loss_of, routing_plan
from unlearning.training import ROWS, Losses, evaluate, fit

from gradroute.models import ablate, route, unroute

FORGET_FRACTION = 0.4
# Each training is shown at the better rate of its seed: the rival gains more by the larger one, at which some seeds
# stall for a while. With seed 0 the final loss (`together`) at 2e-3, 3e-3, 4e-3 and 6e-3 was 4.62, 4.58, 4.76 and 5.35
# nats with mixed batches, and 4.78, 4.64, 5.30 and 5.37 with one label a step.
LEARNING_RATES = (2e-3, 3e-3)
MIXED, ONE_LABEL, CONTROL = "mixed batches", "one label a step", "not routed"
COLOURS = {MIXED: "#0b6e99", ONE_LABEL: "#b5651d", CONTROL: "#8a8a8a"}
# The largest relative difference in the rise of forget loss; and the largest retain damage in nats, which is what the
# demo allows ablation to cost.
LOCALISATION_MARGIN = 0.1
DAMAGE_MARGIN = 0.1

Run = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Sizes of a run.

    Attributes:
        shape: the shape of the model.
        steps: the steps of each training.
        evaluations: how often held-out losses are taken in each.
        held_out_rows: of each set, at most.
        rounds: of interleaved timed steps, after as many as a tenth to warm up.
    """

    shape: Shape
    steps: int
    evaluations: int
    held_out_rows: int
    rounds: int


SETTINGS = Settings(
    Shape(vocabulary=1024, d_model=96, layers=2, heads=4, d_ff=384, forget_units=64), 300, 15, 32, 30
)
QUICK = Settings(Shape(vocabulary=512, d_model=32, layers=1, heads=2, d_ff=64, forget_units=16), 10, 2, 4, 2)


def run(seed: int, quick: bool) -> Run:
    settings = QUICK if quick else SETTINGS
    texts = load_texts(settings.shape.vocabulary, seed, settings.held_out_rows)
    data = {
        MIXED: pack(mixture(texts.train, FORGET_FRACTION, seed), settings.steps * ROWS, LENGTH),
        ONE_LABEL: one_label_steps(texts.train, FORGET_FRACTION, seed, settings.steps),
    }
    data[CONTROL] = data[MIXED]
    return {
        "settings": dataclasses.asdict(settings),
        "tokens": {name: tokens_by_route(batch) for name, batch in data.items()},
        "models": {name: best(name, batch, texts, settings, seed) for name, batch in data.items()},
        "milliseconds": timed(settings, data, seed),
    }


def tokens_by_route(data: Batch) -> list[int]:
    return torch.bincount(data.route_ids.flatten(), minlength=2).tolist()


def best(name: str, data: Batch, texts: Texts, settings: Settings, seed: int) -> dict[str, Any]:
    """The training of the lowest final loss of all learning rates; the control's is of the smallest."""
    rates = LEARNING_RATES if name != CONTROL else LEARNING_RATES[:1]
    models = [trained(name, data, texts, settings, seed, rate) for rate in rates]
    chosen = min(models, key=lambda model: together(model["curve"][-1]))
    return chosen | {"finals": [together(model["curve"][-1]) for model in models]}


def trained(
    name: str, data: Batch, texts: Texts, settings: Settings, seed: int, learning_rate: float
) -> dict[str, Any]:
    """Losses in the course of training, with routes as they were given in it; then without, and after ablation."""
    routed = name != CONTROL
    torch.manual_seed(seed)
    model = build(settings.shape)
    route(model, routing_plan(model, settings.shape))
    curve: list[dict[str, float]] = []
    every = settings.steps // settings.evaluations

    def measure(step: int) -> None:
        if step % every == 0:
            curve.append({"step": step, **evaluate(model, texts.held_out, routed)})

    optimizer = optimizer_of(model, learning_rate)
    fit(model, data, learning_rate, routed, f"{name}, {learning_rate}", optimizer, measure)
    before = evaluate(model, texts.held_out, routed=False)
    ablate(model, RETAIN)
    unroute(model)
    after = evaluate(model, texts.held_out, routed=False)
    return {"learning_rate": learning_rate, "curve": curve, "before": before, "after": after}


def timed(settings: Settings, data: dict[str, Batch], seed: int) -> dict[str, list[float]]:
    """Milliseconds of forward and backward on a step's rows, interleaved: one of each kind a round."""
    torch.manual_seed(seed)
    ordinary = build(settings.shape)
    routed = route(copy.deepcopy(ordinary), routing_plan(ordinary, settings.shape))
    rival = OneLabelSteps(copy.deepcopy(ordinary), settings.shape.forget_units)
    retain, forget = (step_of(data[ONE_LABEL], label) for label in (RETAIN, FORGET))
    for batch in (retain, forget):
        check_same_gradients(routed, rival, batch)
    mixed = data[MIXED].rows(0, ROWS)
    kinds: dict[str, tuple[torch.nn.Module, Callable[[], Any]]] = {
        "mixed": (routed, lambda: loss_of(routed, mixed, True).backward()),
        "retain": (rival.model, lambda: rival.backward(retain)),
        "forget": (rival.model, lambda: rival.backward(forget)),
        "unrouted": (ordinary, lambda: loss_of(ordinary, mixed, False).backward()),
    }
    milliseconds: dict[str, list[float]] = {name: [] for name in kinds}
    warming = max(1, settings.rounds // 10)
    for turn in range(warming + settings.rounds):
        for name, (model, step) in kinds.items():
            model.zero_grad()
            start = time.perf_counter()
            step()
            if turn >= warming:
                milliseconds[name].append(1e3 * (time.perf_counter() - start))
    return milliseconds


def step_of(data: Batch, label: int) -> Batch:
    """The rows of the first step of a label."""
    labels = data.route_ids[::ROWS, 0]
    return data.rows(int((labels == label).nonzero()[0]) * ROWS, ROWS)


def check_same_gradients(routed: LlamaForCausalLM, rival: OneLabelSteps, batch: Batch) -> None:
    """A race says something only where both compute the same."""
    for model in (routed, rival.model):
        model.zero_grad()
    loss_of(routed, batch, True).backward()
    rival.backward(batch)
    for one, other in zip(routed.parameters(), rival.model.parameters(), strict=True):
        # Sums over a thousand tokens in another order: a thousand roundings of 6e-8 at the worst.
        tolerance = 1e-4 * other.grad.abs().max().item()
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=tolerance)


def rise(run: Run, name: str) -> float:
    """The rise of the forget loss by ablation."""
    model = run["models"][name]
    return model["after"]["forget"] - model["before"]["forget"]


def damage(run: Run, name: str) -> float:
    """The rise of the retain loss by ablation, against the better of both readings before it."""
    model = run["models"][name]
    return model["after"]["retain"] - min(model["before"]["retain"], model["curve"][-1]["retain"])


def together(losses: Losses | dict[str, float]) -> float:
    """Both held-out losses, weighted as the training tokens are."""
    return (1 - FORGET_FRACTION) * losses["retain"] + FORGET_FRACTION * losses["forget"]


def final(run: Run, name: str) -> float:
    return together(run["models"][name]["curve"][-1])


def steps_to(run: Run, name: str, target: float) -> float:
    """Steps until the loss of `together` is at most the target, linear between evaluations; all of them, if never."""
    curve = [(point["step"], together(point)) for point in run["models"][name]["curve"]]
    previous = None
    for step, loss in curve:
        if loss <= target:
            if previous is None:
                return step
            before, loss_before = previous
            return before + (step - before) * (loss_before - target) / (loss_before - loss)
        previous = step, loss
    return curve[-1][0]


def steps_ratio(run: Run) -> float:
    """Steps of mixed batches until the loss that one label a step has at its end, over all steps of that."""
    return steps_to(run, MIXED, final(run, ONE_LABEL)) / run["settings"]["steps"]


def time_ratio(run: Run) -> float:
    """The time of a mixed step over that of steps of one label, weighted by their shares; median of paired rounds."""
    times = run["milliseconds"]
    rival = [
        (1 - FORGET_FRACTION) * retain + FORGET_FRACTION * forget
        for retain, forget in zip(times["retain"], times["forget"], strict=True)
    ]
    return statistics.median(map(truediv, times["mixed"], rival))


def table(runs: list[Run]) -> list[dict[str, str]]:
    rows = []
    for name in (MIXED, ONE_LABEL, CONTROL):
        models = [run["models"][name] for run in runs]
        rates = sorted({model["learning_rate"] for model in models})
        row = {"training": name, "learning rate": ", ".join(f"{rate:g}" for rate in rates)}
        for of_set in ROUTE_NAMES:
            row[f"{of_set} loss, trained"] = spread([model["curve"][-1][of_set] for model in models])
            row[f"{of_set} loss, ablated"] = spread([model["after"][of_set] for model in models])
        row["forget rise"] = spread([rise(run, name) for run in runs])
        row["retain damage"] = spread([damage(run, name) for run in runs])
        target = [steps_to(run, name, final(run, ONE_LABEL)) for run in runs]
        row["steps to target"] = "-" if name == CONTROL else spread(target, 0)
        rows.append(row)
    return rows


def checks(runs: list[Run]) -> list[Check]:
    rises = [rise(run, MIXED) / rise(run, ONE_LABEL) for run in runs]
    return [
        Check(
            "mixed batches: forget loss after ablation over the un-routed model's after the same, in the worst seed "
            "(the demo's limit, half a nat)",
            min(
                run["models"][MIXED]["after"]["forget"] - run["models"][CONTROL]["after"]["forget"]
                for run in runs
            ),
            0.5,
        ),
        Check(
            "rise of the forget loss by ablation, mixed batches over one label a step, median (the same, less a margin "
            "of a tenth)",
            median(rises),
            1 - LOCALISATION_MARGIN,
        ),
        Check(
            "retain damage by ablation, mixed batches less one label a step, median (the same, and a margin of what "
            "the demo allows ablation to cost)",
            median([damage(run, MIXED) - damage(run, ONE_LABEL) for run in runs]),
            DAMAGE_MARGIN,
            at_least=False,
        ),
        Check(
            "steps of mixed batches until the final loss of one label a step, over all its steps, median (1: none "
            "saved, also where it is never reached; at least a twentieth)",
            median([steps_ratio(run) for run in runs]),
            0.95,
            at_least=False,
        ),
        Check(
            "time until then: that, times the ratio of the times of a step's forward and backward, median (1: none "
            "saved)",
            median([steps_ratio(run) * time_ratio(run) for run in runs]),
            1.0,
            at_least=False,
        ),
    ]


def found(runs: list[Run]) -> str:
    def nats(value: Callable[[Run, str], float], name: str) -> str:
        return f"{median([value(run, name) for run in runs]):+.2f}"

    steps = runs[0]["settings"]["steps"]
    ahead = sum(final(run, MIXED) < final(run, ONE_LABEL) for run in runs)
    lead = median([final(run, ONE_LABEL) - final(run, MIXED) for run in runs])
    unrouted = median(
        [
            statistics.median(map(truediv, r["milliseconds"]["mixed"], r["milliseconds"]["unrouted"]))
            for r in runs
        ]
    )
    return (
        f"ablation raises the forget loss by {nats(rise, MIXED)} nats after mixed batches and {nats(rise, ONE_LABEL)} "
        f"after steps of one label (un-routed {nats(rise, CONTROL)}), and the retain loss by {nats(damage, MIXED)} and "
        f"{nats(damage, ONE_LABEL)}. With as many tokens, each at its better learning rate, mixed batches end "
        f"{abs(lead):.2f} nats {'lower' if lead >= 0 else 'higher'} (lower in {ahead} of {len(runs)} seeds); the "
        f"final loss of one label a step is reached in {100 * median([steps_ratio(run) for run in runs]):.0f} % of its "
        f"{steps} steps. A mixed step's forward and backward take "
        f"{median([time_ratio(run) for run in runs]):.2f} times one of one label in SGTM's form "
        f"({unrouted:.2f} times an un-routed one), so that loss takes "
        f"{100 * median([steps_ratio(run) * time_ratio(run) for run in runs]):.0f} % of the time."
    )


def plot(runs: list[Run], figure: Figure) -> None:
    forget, retain, ablated = figure.subplots(1, 3, width_ratios=(3, 3, 2.4))
    for axis, of_set in ((forget, "forget"), (retain, "retain")):
        for name in (MIXED, ONE_LABEL):
            curves = [run["models"][name]["curve"] for run in runs]
            plot_curves(axis, curves, of_set, name)
        axis.set(title=f"Held-out {of_set} loss, in training", xlabel="steps", ylabel="nats")
    forget.legend(frameon=False)
    for place, name in enumerate((MIXED, ONE_LABEL, CONTROL)):
        values = [rise(run, name) for run in runs]
        ablated.bar(place, median(values), color=COLOURS[name], width=0.65)
        ablated.plot([place] * len(values), values, "o", color="black", markersize=4, alpha=0.6)
    ablated.set_xticks(range(3), ["mixed\nbatches", "one label\na step", "not\nrouted"])
    ablated.set(title="Rise of the forget loss by ablation", ylabel="nats")
    for axis in (forget, retain, ablated):
        axis.grid(axis="y", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)


def plot_curves(axis: Axes, curves: list[list[dict[str, float]]], of_set: str, name: str) -> None:
    """Draws every seed as a thin line and their median as a thick one."""
    steps = [point["step"] for point in curves[0]]
    values = [[point[of_set] for point in curve] for curve in curves]
    for of_seed in values:
        axis.plot(steps, of_seed, color=COLOURS[name], linewidth=0.7, alpha=0.5)
    medians = [median(at_step) for at_step in zip(*values, strict=True)]
    axis.plot(steps, medians, color=COLOURS[name], linewidth=2, label=name)


EXPERIMENT = Experiment(
    name="sgtm_mixed",
    title="SGTM in mixed batches",
    paper=(
        "SGTM localises what is to be removed better than earlier gradient routing, with one label for a whole "
        "optimizer step (Shilov et al. 2025, arXiv 2512.05648, section 3); it does not mix labels in a batch."
    ),
    run=run,
    table=table,
    checks=checks,
    found=found,
    plot=plot,
    seeds=3,
)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT, __doc__))
