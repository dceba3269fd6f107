"""Says token by token what a routed checkpoint has that an unrouted one has not, and where their weights differ.

The routed one is ERA's of era_unlearning.py with all labels (Cloud et al. 2024, arXiv 2410.04332, section 4.2.2), the
control the ordinary model, trained on the same rows from the same weights. Both read the same held-out texts, before
the added units are taken out, after it, and after both were tuned on retain text. The figures are those that
`python -m gradroute.recipes compare` reports. In what any two trainings differ shows a second control, from other
weights. Exit code 1 when what moved most does not lie in licences, or lies there between two controls too.
"""

import dataclasses
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import era_unlearning
import numpy as np
from era_unlearning import FORGET_FRACTION, Training
from experiment import Check, Experiment, main, median, spread
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from transformers import PreTrainedModel
from unlearning.corpus import FORGET, ROUTE_NAMES, mixture, pack
from unlearning.labelled import LENGTH, Documents, labelled_documents, load_documents, texts_of, train_rows
from unlearning.report import LEAST_GAP
from unlearning.training import ROWS

from gradroute import era
from gradroute.recipes.evaluation import differences, token_losses, weight_differences
from gradroute.recipes.evaluation.rows import Row, as_rows
from gradroute.recipes.report.text import token, visible

BEFORE, AFTER, TUNED = "routed, before ablation", "routed, after ablation", "routed, ablated and tuned"
OTHER = "a second control, other weights"
PAIRS = (BEFORE, AFTER, TUNED, OTHER)
COLOURS = {BEFORE: "#9cc9dc", AFTER: "#5fa8c4", TUNED: "#0b6e99", OTHER: "#8a8a8a"}
SET_COLOURS = {"retain": "#0b6e99", "forget": "#b5651d"}
# The tokens that moved most, as shares of all; all of them say what chance would have.
MOST, TENTH, ALL = 0.01, 0.1, 1.0
# The second control's weights are those of a seed that no experiment has.
OTHER_WEIGHTS = 1000

Run = dict[str, Any]
Figures = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Sizes of a run.

    Attributes:
        training: those of the trainings.
        documents: held-out documents of each set, at most.
        top: how many tokens and contexts are kept.
        context: tokens that are shown on each side of a token.
    """

    training: era_unlearning.Settings
    documents: int
    top: int
    context: int


# There are about 40 held-out licences: as many other documents make chance about a half.
SETTINGS = Settings(era_unlearning.SETTINGS, documents=40, top=10, context=6)
QUICK = Settings(era_unlearning.QUICK, documents=3, top=3, context=3)


def run(seed: int, quick: bool) -> Run:
    settings = QUICK if quick else SETTINGS
    sizes = settings.training
    documents = load_documents(sizes.shape.vocabulary, seed)
    texts = texts_of(documents, sizes.held_out_rows)
    retain = pack(mixture(texts.train, 0.0, seed + 1), sizes.tuning_steps * ROWS, LENGTH)
    labelled = labelled_documents(len(texts.train[FORGET]), 1.0, seed)
    data = train_rows(texts.train, labelled, FORGET_FRACTION, seed, sizes.steps * ROWS)
    training = Training(sizes, texts, retain, seed)
    comparison = Comparison(rows_of(documents, settings.documents), documents.tokenizer, settings)

    control = training.trained(data, "control")
    routed, block = training.expanded(data)
    pairs = {BEFORE: comparison.of(control, routed)}
    era.ablate(routed, block, how="slice")
    pairs[AFTER] = comparison.of(control, routed)
    for model in (control, routed):
        training.tune(model)
    pairs[TUNED] = comparison.of(control, routed)
    other = dataclasses.replace(training, seed=seed + OTHER_WEIGHTS).plain(data, "second control")
    pairs[OTHER] = comparison.of(control, other)
    return {
        "settings": dataclasses.asdict(settings),
        "documents": [sum(row.source == name for row in comparison.rows) for name in ROUTE_NAMES],
        "pairs": pairs,
    }


def rows_of(documents: Documents, most: int) -> list[Row]:
    """Held-out documents of both sets."""
    return as_rows(
        {"input_ids": ids, "source": name}
        for name, of_set in zip(ROUTE_NAMES, documents.held_out, strict=True)
        for ids in of_set[:most]
    )


@dataclasses.dataclass
class Comparison:
    """What is compared of two models.

    Attributes:
        rows: the documents that both read.
        tokenizer: it says how tokens are written.
        settings: of the run.
    """

    rows: list[Row]
    tokenizer: Any
    settings: Settings

    def of(self, before: PreTrainedModel, after: PreTrainedModel) -> Figures:
        """`after` less `before`, in losses of tokens, and relative to `before` in weights."""
        first, second = (token_losses(model, self.rows) for model in (before, after))
        top, context = self.settings.top, self.settings.context
        found = differences(first, second, self.rows, self.tokenizer, top=top, context=context)
        kept = ("sources", "tokens", "contexts", "histogram", "concentration")
        return {
            **{name: found[name] for name in kept},
            "moved": moved(first, second, self.rows),
            "weights": weight_differences(before, after),
        }


def moved(
    before: Sequence[NDArray[np.float32]], after: Sequence[NDArray[np.float32]], rows: Sequence[Row]
) -> Figures:
    """Of the tokens that moved most, by their share: how many stand in licences, and how many became harder."""
    changes = [new.astype(np.float64) - old for old, new in zip(before, after, strict=True)]
    change = np.concatenate(changes)
    in_licences = np.repeat([row.source == ROUTE_NAMES[FORGET] for row in rows], list(map(len, changes)))
    order = np.argsort(-np.abs(change), kind="stable")
    found = {}
    for share in (MOST, TENTH, ALL):
        first = order[: max(1, round(share * len(order)))]
        found[str(share)] = {
            "forget": float(in_licences[first].mean()),
            "harder": float((change[first] > 0).mean()),
        }
    return found


def change(run: Run, pair: str, of_set: str) -> float:
    """The mean difference of a set's tokens, in nats."""
    return float(run["pairs"][pair]["sources"][of_set]["difference"])


def concentration(run: Run, pair: str, share: float) -> float:
    """The share of all absolute difference that the tokens have which moved most."""
    return float(run["pairs"][pair]["concentration"][str(share)])


def in_licences(run: Run, pair: str, share: float) -> float:
    """The share of the tokens that moved most which stand in licences."""
    return float(run["pairs"][pair]["moved"][str(share)]["forget"])


def beyond_chance(run: Run, pair: str, share: float) -> float:
    """The same between 0, where licences have as much of them as of all tokens, and 1, where they have them all."""
    chance = in_licences(run, pair, ALL)
    return (in_licences(run, pair, share) - chance) / (1 - chance)


def weights(run: Run, pair: str) -> dict[str, float]:
    """The relative change of the parameters by module, the mean of its layers."""
    found = run["pairs"][pair]["weights"]
    inside = {
        name: [ratio for ratio in ratios if ratio is not None]
        for name, ratios in zip(found["modules"], found["change"], strict=True)
    }
    means = {name: statistics.fmean(ratios) for name, ratios in inside.items() if ratios}
    outside = {name: ratio for name, ratio in found["outside"].items() if ratio is not None}
    return means | outside


def table(runs: list[Run]) -> list[dict[str, str]]:
    rows = []
    for pair in PAIRS:
        row = {"beside the control": pair}
        for of_set in reversed(ROUTE_NAMES):
            row[f"{of_set} loss, difference"] = spread([change(run, pair, of_set) for run in runs])
        for share in (MOST, TENTH):
            tokens = f"{100 * share:.0f} % of tokens"
            row[f"{tokens}: share of the difference"] = spread(
                [concentration(run, pair, share) for run in runs]
            )
            row[f"{tokens}: in licences"] = spread([in_licences(run, pair, share) for run in runs])
        row["all tokens: in licences"] = spread([in_licences(run, pair, ALL) for run in runs])
        rows.append(row)
    return rows


def checks(runs: list[Run]) -> list[Check]:
    return [
        Check(
            "after ablation: rise over the control of the loss on licences, less that on the rest, in the worst seed "
            "(half a nat, the demo's limit)",
            min(change(run, AFTER, "forget") - change(run, AFTER, "retain") for run in runs),
            LEAST_GAP,
        ),
        Check(
            "that rise on licences after ablation, less the one before it, in the worst seed (half a nat: what moved "
            "lay in the added units)",
            min(change(run, AFTER, "forget") - change(run, BEFORE, "forget") for run in runs),
            LEAST_GAP,
        ),
        Check(
            "ablated and tuned: of the tenth of the tokens that moved most, the share in licences, median (0: as of "
            "all tokens, 1: all of them; at least halfway)",
            median([beyond_chance(run, TUNED, TENTH) for run in runs]),
            0.5,
        ),
        Check(
            "the same between two controls, median (no more than half of that: else it would be said of any two "
            "trainings)",
            median([beyond_chance(run, OTHER, TENTH) for run in runs]),
            0.25,
            at_least=False,
        ),
    ]


def found(runs: list[Run]) -> str:
    def nats(pair: str, of_set: str) -> str:
        return f"{median([change(run, pair, of_set) for run in runs]):+.2f}"

    def percent(values: list[float]) -> str:
        return f"{100 * median(values):.0f} %"

    def has(pair: str, share: float) -> str:
        return percent([concentration(run, pair, share) for run in runs])

    def lies(pair: str, share: float) -> str:
        return percent([in_licences(run, pair, share) for run in runs])

    ratios = middle(runs, TUNED)
    ranked = sorted(ratios, key=lambda name: -ratios[name])
    modules = ", ".join(f"{name} {ratios[name]:.2f}" for name in ranked[:3])
    return (
        f"beside the control's, the routed model's loss is {nats(BEFORE, 'forget')} nats a token on licences and "
        f"{nats(BEFORE, 'retain')} on the rest; {nats(AFTER, 'forget')} and {nats(AFTER, 'retain')} once the added "
        f"units are taken out; {nats(TUNED, 'forget')} and {nats(TUNED, 'retain')} after both were tuned. Then the 1 % "
        f"of the tokens that moved most have {has(TUNED, MOST)} of all absolute difference, and the 10 % "
        f"{has(TUNED, TENTH)}; {lies(TUNED, MOST)} and {lies(TUNED, TENTH)} of them stand in licences, where "
        f"{lies(TUNED, ALL)} of all tokens stand. Two controls of other weights differ too: there they have "
        f"{has(OTHER, MOST)} and {has(OTHER, TENTH)} of the difference, and {lies(OTHER, MOST)} and "
        f"{lies(OTHER, TENTH)} of them stand in licences. With seed 0 the tokens whose mean moved most surely are "
        f"{tokens_of(runs[0])}, and the single ones that moved most {contexts_of(runs[0])}. Relative to the control's "
        f"the weights differ most in {modules}, and least in {ranked[-1]} ({ratios[ranked[-1]]:.2f}); those of two "
        f"controls by {min(middle(runs, OTHER).values()):.2f} to {max(middle(runs, OTHER).values()):.2f}."
    )


def middle(runs: list[Run], pair: str) -> dict[str, float]:
    """The seeds' median of the weights' relative change by module."""
    return {
        name: median([weights(run, pair)[name] for run in runs if name in weights(run, pair)])
        for name in weights(runs[0], pair)
    }


def tokens_of(run: Run, most: int = 5) -> str:
    """The tokens that moved, in nats."""
    listed = run["pairs"][TUNED]["tokens"][:most]
    return (
        ", ".join(f"{quoted(token(entry['text']))} ({entry['difference']:+.1f})" for entry in listed)
        or "none"
    )


def contexts_of(run: Run, most: int = 3) -> str:
    """The single occurrences that moved, with the text around them."""
    listed = run["pairs"][TUNED]["contexts"][:most]
    texts = (visible(f"{entry['left']}▸{entry['text']}◂{entry['right']}") for entry in listed)
    return ", ".join(
        f"{quoted(text)} ({entry['source']}, {entry['difference']:+.1f})"
        for text, entry in zip(texts, listed, strict=True)
    )


def quoted(text: str) -> str:
    """A text as code, which Markdown leaves alone."""
    return "`" + text.replace("`", "’") + "`"


def plot(runs: list[Run], figure: Figure) -> None:
    spectrum, places, modules = figure.subplots(1, 3)
    plot_histogram(spectrum, runs[0]["pairs"][TUNED]["histogram"])
    plot_places(places, runs)
    plot_weights(modules, runs)
    for axis in (spectrum, places, modules):
        axis.spines[["top", "right"]].set_visible(False)


def plot_histogram(axis: Axes, histogram: Figures) -> None:
    for of_set, counts in histogram["counts"].items():
        total = sum(counts) or 1
        axis.stairs(
            [count / total for count in counts], histogram["edges"], color=SET_COLOURS[of_set], label=of_set
        )
    axis.axvline(0, color="black", linewidth=0.6)
    axis.set_yscale("log")
    axis.set(
        title="Differences, ablated and tuned, seed 0",
        xlabel="nats beside the control",
        ylabel="share of tokens",
    )
    axis.legend(frameon=False)


def plot_places(axis: Axes, runs: list[Run]) -> None:
    """Draws how much of what moved most stands in licences; dotted, of all tokens."""
    width = 0.8 / len(PAIRS)
    for at, pair in enumerate(PAIRS):
        for group, share in enumerate((MOST, TENTH)):
            values = [in_licences(run, pair, share) for run in runs]
            place = group + (at - (len(PAIRS) - 1) / 2) * width
            label = pair if group == 0 else None
            axis.bar(place, median(values), width, color=COLOURS[pair], label=label)
            axis.plot([place] * len(values), values, "o", color="black", markersize=3, alpha=0.6)
    axis.axhline(median([in_licences(run, TUNED, ALL) for run in runs]), color="black", linestyle=":")
    axis.set_xticks(range(2), ["1 % of tokens", "10 % of tokens"])
    axis.set(title="Of those that moved most, in licences", ylabel="share", ylim=(0, 1.35))
    axis.legend(frameon=False, fontsize=8, loc="upper center")


def plot_weights(axis: Axes, runs: list[Run]) -> None:
    for at, pair in enumerate((TUNED, OTHER)):
        ratios = middle(runs, pair)
        axis.barh(
            [place + 0.4 * (at - 0.5) for place in range(len(ratios))],
            list(ratios.values()),
            0.4,
            color=COLOURS[pair],
        )
    names = list(middle(runs, TUNED))
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.invert_yaxis()
    axis.set(title="Relative change of the weights", xlabel="‖after − control‖ / ‖control‖")


EXPERIMENT = Experiment(
    name="checkpoint_differences",
    title="Where two checkpoints differ",
    paper=(
        "taking out what ERA routed raises the loss on what is to be forgotten by much, and that on the rest by little "
        "(Cloud et al. 2024, arXiv 2410.04332, section 4.2.2); the losses there are means of sets."
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
