"""Takes the language of licences out of SmolLM2, a pretrained model, by ERA under several plans.

EleutherAI's trial of ERA (arXiv 2410.04332, section 4.2.2) on a model of 6.9 billion parameters unlearnt little where
routing began after pretraining. Here the published recipe and other plans have the same steps, tokens and learning
rate, beside fine-tuning on the texts to keep (filtering), gradient ascent and RMU. Each run is the recipe `unlearn`;
its figures stay in examples/results/era_pretrained, and a stopped run goes on there. A pilot of 20 steps with seed 0
chose -3 from -0.75 and -3. Exit code 1 when no plan is better than the published recipe, or the better one is no better
than gradient ascent after an attack.
"""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiment import RESULTS, Check, Experiment, main, median, spread
from matplotlib.figure import Figure
from pretrained.runs import Figures, figures

FOLDER, QUICK_FOLDER = RESULTS / "era_pretrained", Path("build/era_pretrained")
FORGET, RETAIN = "licences", ("manuals", "code")
FIRST_LAYERS = "[0, 1, 2, 3, 4, 5, 6, 7]"

PUBLISHED, MASKED, UPDATES, STRONG, LATE = (
    "hidden units, -0.75, layers 0 to 7",
    "hidden units, 0, all layers",
    "updates, -0.75, all layers",
    "updates, -3, all layers",
    "updates, -3, the last ten layers",
)
#: Plan → what it sets beside the shipped config.
PLANS: Mapping[str, Sequence[str]] = {
    PUBLISHED: ("route.off=-0.75", f"route.layers={FIRST_LAYERS}", "route.site=hidden"),
    MASKED: ("route.off=0", "route.layers=null", "route.site=hidden"),
    UPDATES: ("route.off=-0.75", "route.layers=null", "route.site=update"),
    STRONG: ("route.off=-3", "route.layers=null", "route.site=update"),
    LATE: ("route.off=-3", f"route.layers={list(range(20, 30))}", "route.site=update"),
}
#: The plans that are also run with fewer labels, and the shares of documents that keep theirs.
PARTLY, SHARES = (PUBLISHED, STRONG), (0.5, 0.1)
#: Neither generations nor checkpoints inside a training.
LOSSES_ALONE = ("evaluate.prompts=[]", "evaluate.prompts_each=0", "train.save_every=0")
BASELINES = ("filtering", "gradient_ascent", "rmu")
COLOURS = ("#8a8a8a", "#c4c4c4", "#0b6e99", "#5fa8c4", "#7b5ea7", "#b5651d", "#d08c4f", "#9c9c3c")

Run = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Sizes of a run.

    Attributes:
        steps: of every training of a plan.
        plans: those that are run.
        shares: those of documents that keep their labels, besides all.
        more: what else the config is given.
    """

    steps: int = 30
    plans: tuple[str, ...] = tuple(PLANS)
    shares: tuple[float, ...] = SHARES
    more: tuple[str, ...] = LOSSES_ALONE


SETTINGS = Settings()
QUICK = Settings(
    2,
    (PUBLISHED, STRONG),
    (),
    (
        *(*LOSSES_ALONE, "train.batch_tokens=64"),
        *("evaluate.documents=1", "relearning.steps=1", "relearning.documents=1", "relearning.heldout=1"),
        *(
            "baselines.gradient_ascent.steps=1",
            "baselines.rmu.steps=1",
            "coherence.steps=1",
            "train.log_every=1",
        ),
    ),
)


def run(seed: int, quick: bool) -> Run:
    settings = QUICK if quick else SETTINGS
    found: dict[str, Any] = {"settings": dataclasses.asdict(settings), "plans": {}, "partly": {}}
    for plan in settings.plans:
        given = () if plan == settings.plans[0] else ("baselines.names=[]",)
        made = made_by(plan, 1.0, seed, settings, quick, given)
        found["plans"][plan] = outcome(made, "coherent")
        if plan == settings.plans[0]:
            found["base"] = {source: of["loss"] for source, of in made["losses"]["base"].items()}
            found["baselines"] = {name: outcome(made, name) for name in BASELINES}
    for plan in PARTLY:
        for share in settings.shares:
            made = made_by(plan, share, seed, settings, quick, ("baselines.names=[]",))
            found["partly"].setdefault(plan, {})[str(share)] = outcome(made, "coherent")
    return found


def made_by(
    plan: str, share: float, seed: int, settings: Settings, quick: bool, more: Sequence[str]
) -> Figures:
    """The figures of one run of the recipe."""
    folder = (QUICK_FOLDER if quick else FOLDER) / f"{list(PLANS).index(plan)}-{share}-{seed}"
    given = (*PLANS[plan], f"labels.share={share}", f"seed={seed}", f"train.steps={settings.steps}")
    return figures("unlearn", [*given, *settings.more, *more], folder)


def outcome(made: Figures, checkpoint: str) -> dict[str, Any]:
    """A checkpoint's losses and changes since the base model, and what an attack makes of it."""
    changes = made["changes"][checkpoint]
    attack = made["curves"]["relearning"][checkpoint]
    return {
        "losses": {source: of["loss"] for source, of in made["losses"][checkpoint].items()},
        "changes": {source: of["change"] for source, of in changes.items()},
        "errors": {source: of["standard_error"] for source, of in changes.items()},
        "attack": [{"step": point["step"], "loss": point["loss"][FORGET]} for point in attack],
    }


def rise(outcome: Mapping[str, Any]) -> float:
    """The change of the loss on what is to be forgotten, in nats a token."""
    return float(outcome["changes"][FORGET])


def price(outcome: Mapping[str, Any]) -> float:
    """The mean change of the losses on what is kept."""
    return sum(outcome["changes"][source] for source in RETAIN) / len(RETAIN)


def left(outcome: Mapping[str, Any]) -> float:
    """The change of the loss on what is to be forgotten after the attack, since the base model, in nats a token.

    The attack measures fewer documents than the changes are of: what it takes away is that of its own.
    """
    curve = outcome["attack"]
    return float(curve[-1]["loss"] - curve[0]["loss"]) + rise(outcome)


def best(runs: list[Run]) -> str:
    """The plan of the largest median rise of those that cost at most a tenth of a nat more than the published one."""
    costs = {plan: median([price(run["plans"][plan]) for run in runs]) for plan in runs[0]["plans"]}
    allowed = [plan for plan in costs if costs[plan] <= costs[PUBLISHED] + 0.1]
    return max(allowed, key=lambda plan: median([rise(run["plans"][plan]) for run in runs]))


def outcomes(runs: list[Run]) -> dict[str, list[Any]]:
    """Everything that was trained, by its name in tables."""
    found = {plan: [run["plans"][plan] for run in runs] for plan in runs[0]["plans"]}
    for plan, shares in runs[0]["partly"].items():
        for share in shares:
            found[f"{plan}, {100 * float(share):.0f} % labelled"] = [
                run["partly"][plan][share] for run in runs
            ]
    return found | {name: [run["baselines"][name] for run in runs] for name in BASELINES}


def table(runs: list[Run]) -> list[dict[str, str]]:
    return [
        {
            "method": name,
            "forget change": spread([rise(one) for one in of_seeds]),
            "retain change": spread([price(one) for one in of_seeds]),
            "forget change after the attack": spread([left(one) for one in of_seeds]),
        }
        for name, of_seeds in outcomes(runs).items()
    ]


def checks(runs: list[Run]) -> list[Check]:
    chosen = best(runs)
    ours, published = ([rise(run["plans"][plan]) for run in runs] for plan in (chosen, PUBLISHED))
    ascent = [run["baselines"]["gradient_ascent"] for run in runs]
    found = [
        Check(
            "forget loss, best plan of ERA less the published recipe, median (a quarter of a nat: EleutherAI's trial "
            "had 0.26 in all)",
            median([a - b for a, b in zip(ours, published, strict=True)]),
            0.25,
        ),
        Check(
            "forget loss after the attack, best plan less gradient ascent, both since the base model, median (0)",
            median([left(run["plans"][chosen]) - left(one) for run, one in zip(runs, ascent, strict=True)]),
            0.0,
        ),
    ]
    if "0.5" in runs[0]["partly"].get(STRONG, {}):
        shares = [run["partly"][STRONG]["0.5"] for run in runs]
        found.append(
            Check(
                f"forget change with half of the labels over that with all, {STRONG}, median (a half: in proportion "
                "to the labels)",
                median(
                    [rise(half) / rise(run["plans"][STRONG]) for half, run in zip(shares, runs, strict=True)]
                ),
                0.5,
            )
        )
    return found


def found(runs: list[Run]) -> str:
    def of(name: str) -> str:
        values = outcomes(runs)[name]
        return (
            f"{median([rise(one) for one in values]):+.2f} nats on licences and "
            f"{median([price(one) for one in values]):+.2f} on what is kept"
        )

    chosen = best(runs)
    attacked = ", ".join(
        f"{name} {median([left(one) for one in values]):+.2f}"
        for name, values in outcomes(runs).items()
        if name in (PUBLISHED, chosen, *BASELINES)
    )
    partly = "; ".join(
        f"with {100 * float(share):.0f} % of the labels {of(f'{plan}, {100 * float(share):.0f} % labelled')}"
        for plan, shares in runs[0]["partly"].items()
        if plan == chosen
        for share in shares
    )
    rest = f" {partly[0].upper()}{partly[1:]}." if partly else ""
    return (
        f"the published recipe ({PUBLISHED}) changes losses by {of(PUBLISHED)}; the plan of those tried that forgets "
        f"most at about its price ({chosen}) by {of(chosen)}. Filtering: {of('filtering')}; gradient ascent: "
        f"{of('gradient_ascent')}; RMU: {of('rmu')}.{rest} After an attack by a few documents the change on licences "
        f"is: {attacked}."
    )


def plot(runs: list[Run], figure: Figure) -> None:
    trade, attack = figure.subplots(1, 2)
    shown = [name for name in outcomes(runs) if "labelled" not in name]
    for name, colour in zip(shown, COLOURS, strict=False):
        values = outcomes(runs)[name]
        trade.plot(
            [price(one) for one in values], [rise(one) for one in values], "o", color=colour, label=name
        )
        for one in values:
            start = one["attack"][0]["loss"] - rise(one)
            steps = [point["step"] for point in one["attack"]]
            attack.plot(
                steps, [point["loss"] - start for point in one["attack"]], color=colour, linewidth=1.2
            )
    trade.set(xlabel="change on what is kept (nats a token)", ylabel="change on licences (nats a token)")
    attack.set(xlabel="step of the attack", ylabel="change on licences (nats a token)")
    trade.legend(frameon=False, fontsize=7)
    for axis in (trade, attack):
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)


EXPERIMENT = Experiment(
    name="era_pretrained",
    title="ERA on a pretrained model",
    paper=(
        "from scratch ERA unlearns about as well as filtering (Cloud et al. 2024, arXiv 2410.04332, section 4.2.2); "
        "EleutherAI's trial on a GPT-NeoX of 6.9 billion parameters had +0.26 nats on what was to be forgotten where "
        "routing began after pretraining, and +1.78 from scratch."
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
