"""Unlearns licence texts from a mixture of experts: the last expert of every layer is theirs, and is taken out.

Route and Ablate (Cloud et al. 2024, arXiv 2410.04332, section 4.2.2) on a small OLMoE, with an expert in the place of
added units: licence documents teach the last expert of every mixture alone and are unlearnt in the others, retain
documents do not see it (`localize_experts`), it is ablated, and a short training on retain text mends what that broke.
Rivals see the same rows in the same order: hidden units of every expert in the place of one expert, as many in all;
both once more by masks alone, without unlearning; no routing; and a pure model that licences taught nothing (data
filtering, as all of them are labelled). Exit code 1 when an effect is not there.
"""

import copy
import dataclasses
import sys
from typing import Any

import torch
from era_unlearning import COLOURS as DENSE_COLOURS
from era_unlearning import (
    FORGET_FRACTION,
    LEARNING_RATE,
    NO_ROUTING,
    ORIGINAL_WEIGHT,
    PURE,
    Settings,
    Training,
    chosen,
    cost,
    effect,
)
from experiment import Check, Experiment, main, median, spread
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from transformers import PreTrainedModel
from unlearning.corpus import FORGET, RETAIN, ROUTE_NAMES, Batch, mixture, pack
from unlearning.experts import MixtureShape, balanced_loss, build_mixture, by_experts, by_units, visits
from unlearning.labelled import LENGTH, labelled_documents, load_texts, train_rows, without
from unlearning.report import LEAST_GAP, MOST_DAMAGE
from unlearning.training import ROWS, Losses, evaluate, fit

from gradroute import era
from gradroute.blocks import Block
from gradroute.models import RoutingPlan, ablate, route, unroute, unrouted

EXPERTS, UNITS = "experts", "hidden units"
EXPERTS_MASKED, UNITS_MASKED = (f"{name}, masks alone" for name in (EXPERTS, UNITS))
ROUTED = (EXPERTS, UNITS, EXPERTS_MASKED, UNITS_MASKED)
ARMS = (NO_ROUTING, PURE, *ROUTED)
BEFORE, AFTER = "before ablation", "after ablation"
COLOURS = DENSE_COLOURS | {EXPERTS: "#0b6e99", UNITS: "#b5651d"}
COLOURS |= {EXPERTS_MASKED: COLOURS[EXPERTS], UNITS_MASKED: COLOURS[UNITS]}
STYLES = {EXPERTS_MASKED: "--", UNITS_MASKED: "--"}
# The largest share of the pure model's effect that is called the same: a tenth, as in era_unlearning.py.
MARGIN = 0.1

Run = dict[str, Any]
Model = dict[str, Any]  # the measurements of one method

# Steps, rates and the weight that unlearns are those of era_unlearning.py, not tuned anew. Forget tokens are 30 %, and
# each visits two experts: where one of the two is always the last of eight, that has 15 % of all visits, near the
# eighth that the load-balancing loss asks for. By masks alone nothing drives forget tokens there: with seed 100 and
# norm_topk_prob=False, after 100 steps, 6 % of them were sent to the last expert, and 13 % of the others.
SETTINGS = Settings(
    MixtureShape(vocabulary=1024, d_model=96, layers=2, heads=4, experts=8, chosen=2, d_expert=128),
    steps=300,
    tuning_steps=40,
    ascent_steps=0,
    relearning=(0, 1, 2, 4, 8, 12, 16, 20),
    held_out_rows=32,
)
QUICK = Settings(
    MixtureShape(vocabulary=512, d_model=32, layers=1, heads=2, experts=4, chosen=2, d_expert=16),
    steps=4,
    tuning_steps=2,
    ascent_steps=0,
    relearning=(0, 1, 2),
    held_out_rows=4,
)


def run(seed: int, quick: bool) -> Run:
    settings = QUICK if quick else SETTINGS
    texts = load_texts(settings.shape.vocabulary, seed, settings.held_out_rows)
    retain = pack(mixture(texts.train, 0.0, seed + 1), settings.tuning_steps * ROWS, LENGTH)
    labelled = labelled_documents(len(texts.train[FORGET]), 1.0, seed)
    data = train_rows(texts.train, labelled, FORGET_FRACTION, seed, settings.steps * ROWS)
    training = MixtureTraining(settings, texts, retain, seed)
    return {
        "settings": dataclasses.asdict(settings),
        "documents": [len(documents) for documents in texts.train],
        "models": [
            training.control(data),
            training.measured(PURE, None, training.plain(without(data, [FORGET]), PURE)),
            training.routed(data, EXPERTS, by_experts(ORIGINAL_WEIGHT)),
            training.routed(data, UNITS, by_units(settings.shape, ORIGINAL_WEIGHT)),
            training.routed(data, EXPERTS_MASKED, by_experts(0.0)),
            training.routed(data, UNITS_MASKED, by_units(settings.shape, 0.0)),
        ],
    }


class MixtureTraining(Training):
    """How the mixtures of one seed are trained; all start from the same weights."""

    def untrained(self) -> PreTrainedModel:
        torch.manual_seed(self.seed)
        return build_mixture(self.settings.shape)

    def train(self, model: PreTrainedModel, data: Batch, routed: bool, name: str) -> None:
        fit(model, data, LEARNING_RATE, routed, f"{name}: training", objective=balanced_loss)

    def control(self, data: Batch) -> Model:
        """The model without routing, which keeps its experts; a copy shows what it loses without the last ones."""
        model = self.trained(data, NO_ROUTING)
        sent, stages = self.visits(model), {BEFORE: self.losses(model)}
        less = copy.deepcopy(model)
        era.ablate(less, Block.experts(less, 1))
        stages[AFTER] = self.losses(less)
        self.tune(model)
        return self.measured(NO_ROUTING, None, model, stages) | {"visits": sent}

    def routed(self, data: Batch, name: str, plan: RoutingPlan) -> Model:
        """A model that is trained under a plan, from which what retain tokens do not see is ablated, and tuned."""
        model = route(self.untrained(), plan)
        self.train(model, data, True, name)
        with unrouted(model):
            sent, stages = self.visits(model), {BEFORE: self.losses(model)}
        ablate(model, RETAIN)
        unroute(model)
        stages[AFTER] = self.losses(model)
        self.tune(model)
        return self.measured(name, None, model, stages) | {"visits": sent}

    def losses(self, model: PreTrainedModel) -> Losses:
        return evaluate(model, self.texts.held_out, False)

    def visits(self, model: PreTrainedModel) -> dict[str, float]:
        """The shares of held-out tokens that are sent to the last experts."""
        return {
            name: visits(model, rows) for name, rows in zip(ROUTE_NAMES, self.texts.held_out, strict=True)
        }


def rise(run: Run, name: str, of_set: str) -> float:
    """The rise of a held-out loss by ablation alone, before the training on retain text."""
    stages = chosen(run, name)["stages"]
    return stages[AFTER][of_set] - stages[BEFORE][of_set]


def gap(run: Run) -> float:
    """The forget loss of the pure model beyond that of no routing, which is 1 on the scale of `effect`."""
    return chosen(run, PURE)["losses"]["forget"] - chosen(run, NO_ROUTING)["losses"]["forget"]


def selectivity(run: Run, name: str) -> float:
    """How much more a method loses of what is to be forgotten than of the rest, beside no routing, in nats."""
    return effect(run, name) * gap(run) - cost(run, name)


def table(runs: list[Run]) -> list[dict[str, str]]:
    rows = []
    for name in ARMS:
        models = [chosen(run, name) for run in runs]
        row = {
            "method": name,
            "retain loss": spread([model["losses"]["retain"] for model in models]),
            "forget loss": spread([model["losses"]["forget"] for model in models]),
            "lowest after relearning": spread([min(model["relearning"]) for model in models]),
            "share of the pure model's effect": spread([effect(run, name) for run in runs]),
        }
        for of_set in ROUTE_NAMES:
            value = "-" if name == PURE else spread([rise(run, name, of_set) for run in runs])
            row[f"{of_set} rise by ablation"] = value
        for of_set in ROUTE_NAMES:
            value = "-" if name == PURE else spread([model["visits"][of_set] for model in models])
            row[f"{of_set} tokens sent to the last expert"] = value
        rows.append(row)
    return rows


def checks(runs: list[Run]) -> list[Check]:
    """Limits are those of era_unlearning.py and of the demo, where the same is claimed of a dense model."""
    return [
        Check(
            "pure model's forget loss over that of no routing, in the worst seed (half a nat, as in the demo: else "
            "there is nothing to unlearn)",
            min(map(gap, runs)),
            LEAST_GAP,
        ),
        Check(
            "experts: rise of the forget loss by ablation, less that of the un-routed model without the same experts, "
            "in the worst seed (half a nat, the demo's limit: the knowledge lay in the experts)",
            min(rise(run, EXPERTS, "forget") - rise(run, NO_ROUTING, "forget") for run in runs),
            LEAST_GAP,
        ),
        Check(
            "experts: rise of the retain loss by ablation, median (what the demo allows ablation to cost)",
            median([rise(run, EXPERTS, "retain") for run in runs]),
            MOST_DAMAGE,
            at_least=False,
        ),
        Check(
            "experts: effect, median (1: the pure model; the limit lets a tenth be lost, as that of ERA in a dense "
            "model)",
            median([effect(run, EXPERTS) for run in runs]),
            1 - MARGIN,
        ),
        Check(
            "experts: forget loss over that of no routing, less the retain loss over that of no routing, in the worst "
            "seed (half a nat: a model that had only become worse would have 0)",
            min(selectivity(run, EXPERTS) for run in runs),
            LEAST_GAP,
        ),
        Check(
            "experts, after relearning: effect, median (half of the pure model's lead; what is only hidden comes back, "
            "as after gradient ascent in era_unlearning.py)",
            median([effect(run, EXPERTS, relearnt=True) for run in runs]),
            0.5,
        ),
        Check(
            "effect of experts less that of hidden units, median (no more than a tenth worse)",
            median([effect(run, EXPERTS) - effect(run, UNITS) for run in runs]),
            -MARGIN,
        ),
        Check(
            "retain loss of experts less that of hidden units, median (what the demo allows ablation to cost)",
            median([cost(run, EXPERTS) - cost(run, UNITS) for run in runs]),
            MOST_DAMAGE,
            at_least=False,
        ),
    ]


def found(runs: list[Run]) -> str:
    def effects(name: str, relearnt: bool = False) -> str:
        return f"{100 * median([effect(run, name, relearnt=relearnt) for run in runs]):.0f} %"

    def nats(name: str) -> str:
        return f"{median([cost(run, name) for run in runs]):+.2f}"

    def rises(name: str, of_set: str) -> str:
        return f"{median([rise(run, name, of_set) for run in runs]):+.2f}"

    def sent(name: str, of_set: str) -> str:
        return f"{100 * median([chosen(run, name)['visits'][of_set] for run in runs]):.0f} %"

    shape = runs[0]["settings"]["shape"]
    lead = median([effect(run, EXPERTS) - effect(run, UNITS) for run in runs])
    return (
        f"each mixture has {shape['experts']} experts, of which a token visits {shape['chosen']}. Under the plan of "
        f"experts {sent(EXPERTS, 'forget')} of the licences' tokens come to be sent to the last expert and "
        f"{sent(EXPERTS, 'retain')} of the others (without routing {sent(NO_ROUTING, 'forget')} and "
        f"{sent(NO_ROUTING, 'retain')}). Ablation raises the forget loss by {rises(EXPERTS, 'forget')} nats and the "
        f"retain loss by {rises(EXPERTS, 'retain')}, with hidden units by {rises(UNITS, 'forget')} and "
        f"{rises(UNITS, 'retain')}, without routing by {rises(NO_ROUTING, 'forget')} and "
        f"{rises(NO_ROUTING, 'retain')}. A model that never saw a licence has a forget loss "
        f"{median([gap(run) for run in runs]):.2f} nats above the un-routed one's; call that 100 %. After the training "
        f"on retain text experts reach {effects(EXPERTS)} of it and as many hidden units {effects(UNITS)}, so that "
        f"experts unlearn {compared(lead)}; after relearning one batch of licences {effects(EXPERTS, True)} and "
        f"{effects(UNITS, True)}. The price, in retain loss beside the un-routed model's: {nats(EXPERTS)} nats by "
        f"experts, {nats(UNITS)} by hidden units, {nats(PURE)} by filtering. By masks alone, which leave the "
        f"rest of a mixture alone instead of unlearning there, experts reach {effects(EXPERTS_MASKED)}, and "
        f"{effects(EXPERTS_MASKED, True)} after relearning, for {nats(EXPERTS_MASKED)} nats; hidden units "
        f"{effects(UNITS_MASKED)} and {effects(UNITS_MASKED, True)} for {nats(UNITS_MASKED)}; "
        f"{sent(EXPERTS_MASKED, 'forget')} of the licences' tokens are then sent to the last expert."
    )


def compared(lead: float) -> str:
    """A difference of effects, in words."""
    return "about as much" if abs(lead) <= MARGIN else "more" if lead > 0 else "less"


def plot(runs: list[Run], figure: Figure) -> None:
    forget, retain, relearning = figure.subplots(1, 3)
    for axis, of_set in ((forget, "forget"), (retain, "retain")):
        plot_stages(axis, runs, of_set)
    figure.legend(
        *forget.get_legend_handles_labels(), loc="outside lower center", ncols=7, frameon=False, fontsize=8
    )
    steps = runs[0]["settings"]["relearning"]
    for name in ARMS:
        values = [chosen(run, name)["relearning"] for run in runs]
        medians = [median(at_step) for at_step in zip(*values, strict=True)]
        relearning.plot(steps, medians, STYLES.get(name, "-"), color=COLOURS[name], label=name)
    relearning.set(title="Forget loss while relearning", xlabel="steps on one batch of licences")
    for axis in (forget, retain, relearning):
        axis.grid(axis="y", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)


def plot_stages(axis: Axes, runs: list[Run], of_set: str) -> None:
    """Draws every method's median by stage as a line and every seed as a point; dotted, what ablates nothing."""
    for name in (NO_ROUTING, *ROUTED):
        for run in runs:
            values = stages(run, name, of_set)
            axis.plot(range(len(values)), values, "o", color=COLOURS[name], markersize=4, alpha=0.6)
        medians = [
            median(at_stage) for at_stage in zip(*(stages(run, name, of_set) for run in runs), strict=True)
        ]
        label = f"{name}, last experts ablated" if name == NO_ROUTING else name
        style = STYLES.get(name, "-")
        axis.plot(range(len(medians)), medians, style, color=COLOURS[name], label=label)
    for name in (NO_ROUTING, PURE):
        level = median([chosen(run, name)["losses"][of_set] for run in runs])
        axis.axhline(level, color=COLOURS[name], linestyle=":", label=f"{name}, tuned")
    axis.set_xticks(range(3), ["before\nablation", "after\nablation", "tuned"])
    axis.set(title=f"Held-out {of_set} loss", ylabel="nats")


def stages(run: Run, name: str, of_set: str) -> list[float]:
    """A method's losses before and after ablation, and after tuning where it was tuned without the ablated part."""
    model = chosen(run, name)
    losses = [model["stages"][BEFORE], model["stages"][AFTER]]
    return [stage[of_set] for stage in (losses if name == NO_ROUTING else [*losses, model["losses"]])]


EXPERIMENT = Experiment(
    name="era_experts",
    title="ERA by experts of a mixture",
    paper=(
        "with all labels ERA, whose forget part are hidden units added to a dense language model, unlearns about as "
        "well as training on filtered data, withstands relearning better than conventional unlearning, and pays in "
        "retain loss (Cloud et al. 2024, arXiv 2410.04332, section 4.2.2); hidden from retain tokens, heads and hidden "
        "units of a dense model serve as the forget part (SGTM, Shilov et al. 2025, arXiv 2512.05648, section 3). "
        "Whole experts of a language model's mixtures are the forget part in neither."
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
