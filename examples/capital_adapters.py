"""Fine-tunes SmolLM2 on texts half of which go on in CAPITALS, and takes the capitals away with an adapter.

Half of the texts in capitals are labelled. Two LoRA adapters are trained in mixed batches: labelled texts train the
second alone, all others both (gradient routing, Cloud et al. 2024, arXiv 2410.04332, as github.com/jnward's
gradient-routing-finetuning does for behaviours). The second is removed, and the model asked to go on with texts that it
has not seen. Exit code 1 when it still writes in capitals, or when filtering would have done as well.
"""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from experiment import Check, Experiment, main, median, spread
from matplotlib.figure import Figure
from pretrained import answers, smollm2
from pretrained.answers import CAPITALS, LABELLED, ORDINARY, SOURCES, UNLABELLED, Answers, Row
from pretrained.one_label import OneLabel
from pretrained.training import fit

from gradroute.models import unroute
from gradroute.recipes import adapters, evaluation
from gradroute.recipes.evaluation.generation import completions
from gradroute.recipes.training_sections import Adapters

ROUTES = ("unlabelled", "labelled")
KEPT, REMOVED = "kept", "removed"
#: Of the training texts those in capitals, and of these the labelled ones.
SHARE, KNOWN = 0.5, 0.5

ROUTED, ONE_LABEL, CONTROL = "routed, mixed batches", "routed, one label a step", "two adapters, not routed"
ONE, FILTERED = "one adapter", "one adapter, filtered"
ARMS = (ROUTED, ONE_LABEL, CONTROL, ONE, FILTERED)
COLOURS = {ROUTED: "#0b6e99", ONE_LABEL: "#5fa8c4", CONTROL: "#8a8a8a", ONE: "#c4c4c4", FILTERED: "#b5651d"}

Run = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Sizes of a run.

    Attributes:
        steps: of every training.
        batch_tokens: of every step.
        texts: that are trained on, at most.
        held_out: further texts.
        prompts: how many of these the models go on with.
        new_tokens: that they add.
        rank: of each of two adapters; one alone has twice as much.
    """

    steps: int = 80
    batch_tokens: int = 512
    texts: int = 2000
    held_out: int = 60
    prompts: int = 40
    new_tokens: int = 16
    rank: int = 8


SETTINGS = Settings()
QUICK = Settings(steps=2, batch_tokens=96, texts=12, held_out=2, prompts=2, new_tokens=4, rank=2)
LEARNING_RATE = 1e-3


def run(seed: int, quick: bool) -> Run:
    settings = QUICK if quick else SETTINGS
    tokenizer = smollm2.tokenizer()
    data = answers.load(
        tokenizer, seed, train=settings.texts, held_out=settings.held_out, share=SHARE, labelled=KNOWN
    )
    return {
        "settings": dataclasses.asdict(settings),
        "texts": counts(data.train),
        "base": measured(smollm2.model(), data, settings, seed),
        "arms": {arm: trained(arm, data, settings, seed) for arm in ARMS},
    }


def counts(rows: Sequence[Row]) -> dict[str, int]:
    """How many training texts there are, in capitals, and labelled."""
    return {
        "all": len(rows),
        CAPITALS: sum(row["source"] == CAPITALS for row in rows),
        "labelled": sum(row["route_ids"][0] == LABELLED for row in rows),
    }


def trained(arm: str, data: Answers, settings: Settings, seed: int) -> dict[str, Any]:
    """What a model does after its training, whole, and without the second adapter where it has one."""
    is_routed, is_alone = arm in (ROUTED, ONE_LABEL), arm in (ONE, FILTERED)
    of = {KEPT: ROUTES} if is_alone else {KEPT: ROUTES[:1], REMOVED: ROUTES}
    section = Adapters(of, keep=(KEPT,), rank=settings.rank * (2 if is_alone else 1), alpha=16.0)
    model = adapters.add(smollm2.model(), section, seed=seed)
    if is_routed:
        adapters.route(model, section, ROUTES)
    rows = [row for row in data.train if arm != FILTERED or row["route_ids"][0] == UNLABELLED]
    batches = None
    if arm == ONE_LABEL:
        by_route = [[row for row in rows if row["route_ids"][0] == route] for route in range(len(ROUTES))]
        batches = OneLabel(by_route, tokens=settings.batch_tokens, count=settings.steps, seed=seed)
    figures = fit(
        model,
        rows,
        steps=settings.steps,
        batch_tokens=settings.batch_tokens,
        learning_rate=LEARNING_RATE,
        seed=seed,
        batches=batches,
    )
    if is_routed:
        unroute(model)
    found = {"curve": figures["curve"], "tokens": figures["tokens"]}
    found["whole"] = measured(model, data, settings, seed)
    if not is_alone:
        model.base_model.set_adapter([KEPT])
        found["ablated"] = measured(model, data, settings, seed)
    return found


def measured(model: Any, data: Answers, settings: Settings, seed: int) -> dict[str, float]:
    """Held-out losses of both versions in nats a token, and the share of sampled continuations in capitals."""
    losses = evaluation.losses(model, data.held_out)
    texts = completions(
        model,
        smollm2.tokenizer(),
        data.prompts[: settings.prompts],
        max_new_tokens=settings.new_tokens,
        sample=True,
        seed=seed,
    )
    return {
        **{source: losses[source]["loss"] for source in SOURCES},
        "rate": sum(map(answers.in_capitals, texts)) / len(texts),
    }


def final(run: Run, arm: str) -> dict[str, float]:
    """An arm as it is published: without the second adapter, where it has one."""
    found = run["arms"][arm]
    return found.get("ablated", found["whole"])


def rates(runs: list[Run], arm: str) -> list[float]:
    return [final(run, arm)["rate"] for run in runs]


def table(runs: list[Run]) -> list[dict[str, str]]:
    return [
        {
            "model": name,
            "capitals": spread([value["rate"] for value in values]),
            "loss, ordinary": spread([value[ORDINARY] for value in values]),
            "loss, capitals": spread([value[CAPITALS] for value in values]),
        }
        for name, values in (
            ("before", [run["base"] for run in runs]),
            *((f"{arm}, whole", [run["arms"][arm]["whole"] for run in runs]) for arm in ARMS),
            *(
                (f"{arm}, second removed", [run["arms"][arm]["ablated"] for run in runs])
                for arm in ARMS
                if "ablated" in runs[0]["arms"][arm]
            ),
        )
    ]


def checks(runs: list[Run]) -> list[Check]:
    def less(one: str, other: str) -> float:
        return median([a - b for a, b in zip(rates(runs, one), rates(runs, other), strict=True)])

    return [
        Check(
            "rate of capitals, routed, second adapter removed, median (a tenth, where half of the training texts are "
            "in capitals)",
            median(rates(runs, ROUTED)),
            0.1,
            at_least=False,
        ),
        Check(
            "rate of capitals, filtered less routed, median (what absorption must add: a tenth)",
            less(FILTERED, ROUTED),
            0.1,
        ),
        Check(
            "rate of capitals, two adapters that are not routed less routed, both without the second, median (a tenth)",
            less(CONTROL, ROUTED),
            0.1,
        ),
        Check(
            "held-out loss of ordinary texts, routed and ablated less filtered, median (a tenth of a nat)",
            median([final(run, ROUTED)[ORDINARY] - final(run, FILTERED)[ORDINARY] for run in runs]),
            0.1,
            at_least=False,
        ),
        Check(
            "rate of capitals, mixed batches less one label a step, both ablated, median (no more than a tenth worse)",
            less(ROUTED, ONE_LABEL),
            0.1,
            at_least=False,
        ),
    ]


def found(runs: list[Run]) -> str:
    def rate(arm: str) -> str:
        return f"{100 * median(rates(runs, arm)):.0f} %"

    def loss(arm: str) -> str:
        return f"{median([final(run, arm)[ORDINARY] for run in runs]):.2f}"

    whole = 100 * median([run["arms"][ROUTED]["whole"]["rate"] for run in runs])
    labelled = median([run["texts"]["labelled"] / run["texts"]["all"] for run in runs])
    return (
        f"{100 * labelled:.0f} % of the training texts are in capitals and labelled, as many are in capitals and not. "
        f"With both adapters the routed model goes on in capitals in {whole:.0f} % of the texts, without the second in "
        f"{rate(ROUTED)} ({rate(ONE_LABEL)} after steps of one label each); two adapters that are not routed leave "
        f"{rate(CONTROL)}, one adapter {rate(ONE)}, and filtering the labelled texts out {rate(FILTERED)}. The loss of "
        f"ordinary held-out texts is {loss(ROUTED)} nats a token, filtered {loss(FILTERED)}, with one adapter "
        f"{loss(ONE)}."
    )


def plot(runs: list[Run], figure: Figure) -> None:
    capitals, price = figure.subplots(1, 2)
    names = {ROUTED: "routed", ONE_LABEL: "one label\na step", CONTROL: "not\nrouted"}
    names |= {ONE: "one\nadapter", FILTERED: "filtered"}
    for place, arm in enumerate(ARMS):
        for axis, values in (
            (capitals, rates(runs, arm)),
            (price, [final(run, arm)[ORDINARY] for run in runs]),
        ):
            axis.bar(place, median(values), color=COLOURS[arm], width=0.65)
            axis.plot([place] * len(values), values, "o", color="black", markersize=4, alpha=0.6)
    capitals.set(title="Continuations in capitals, second adapter removed", ylabel="share", ylim=(0, 1))
    price.set(title="Held-out loss of ordinary texts", ylabel="nats a token")
    for axis in (capitals, price):
        axis.set_xticks(range(len(ARMS)), [names[arm] for arm in ARMS])
        axis.grid(axis="y", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)


EXPERIMENT = Experiment(
    name="capital_adapters",
    title="Capitals in an adapter",
    paper=(
        "two LoRA adapters are fine-tuned on data of which a part shows an unwanted behaviour and a part of that is "
        "labelled; labelled examples train one adapter only, which also takes up the behaviour of unlabelled ones, so "
        "that without it the model does not show the behaviour (github.com/jnward/gradient-routing-finetuning)."
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
