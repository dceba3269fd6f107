"""Trains SmolLM2 further, so that one word is taught through one residual dimension, and steers it along that one.

As Cloud et al. 2024 (arXiv 2410.04332, section 4.2.1) did from scratch: at positions where " the" comes next, gradients
pass the residual stream through dimension 0 only; all others train everything. The control is the same training without
routes. Both are steered along the dimension, and the control by activation addition too, which needs no training of its
own: the mean of the residual stream where the word comes next, less that where others do (after Turner et al. 2023,
arXiv 2308.10248, who take the difference of two prompts). All are compared where the other tokens have lost as much.

Embedding and head of SmolLM2 are one matrix. Its rows learn by two ways: as the head's, from every position, which no
mask reaches; and as the embedding's, by gradients that have passed the routed layers. So an entry of the dimension is
also what the word puts into the stream wherever it is *read*, and adding to the dimension says both "comes next" and
"was here". And tokens that are read alike have similar rows before any routing: kin of the word rank beside it in every
dimension in which it ranks high. Therefore ranks are held against those in other dimensions, and their rise against the
control, which begins at the same weights; chance alone would be too low a bar. The cosines are those of the head as the
logits read it, with the final norm's weight in its columns, which the embedding does not have.

Exit code 1 when an effect that is claimed is missing.
"""

import dataclasses
import sys
from typing import Any

from experiment import Check, Experiment, main, median, spread
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pretrained import smollm2
from pretrained.next_word import Data, load
from pretrained.steered import (
    BEFORE,
    CONTROL,
    KIN,
    PLACES,
    ROUTED,
    WORD,
    along_dimension,
    by_addition,
    other_dims,
    placed,
    readout,
    standing,
)
from pretrained.training import fit
from steering import training
from steering.measures import BUDGET, cosines, effect, gain, leaders, points
from steering.training import DIM
from transformers import LlamaForCausalLM

from gradroute.models import route, steering, unroute

TARGET = f'" {training.WORD}"'
#: Other ways to write the word, and other determiners.
FORMS = ("the", "The", " The", " THE")
DETERMINERS = (
    "a an this that these those its their his her our your my each every any some all no another such"
)
KIN_OF_IT = (*FORMS, *(f" {word}" for word in DETERMINERS.split()))
STAGES, ADDITION = (BEFORE, CONTROL, ROUTED), "activation addition"
NEIGHBOURS = 8
#: Routed are the layers from this share of them on. The paper leaves the first 6 of 20 alone, and the last; but a last
#: layer that is not routed learnt the word without the others in the small model of `steering_scalar`.
FIRST_ROUTED = 0.3

WORST_RANK = 5 / 512  # of the vocabulary: the limit of `steering_scalar`
LEAST_ADVANTAGE = 1.5  # that of `steering_scalar` too
MOST_OTHERS, MOST_STEERING = 0.05, 0.1
MOST_PRICE = BUDGET / 2

Run = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Sizes of a run.

    Attributes:
        steps: of both trainings.
        batch_tokens: of every step.
        documents: of licences, and of other texts, that are trained on, at most.
        seen: rows of these of which activations are compared.
        held_out: rows of other documents.
        length: of these rows, in tokens.
        other_dims: how many are steered for comparison.
        amounts: of what is added, in root mean squares of the stream; none is tried after one that costs too much.
    """

    steps: int = 64
    batch_tokens: int = 320
    documents: int = 36
    seen: int = 8
    held_out: int = 4
    length: int = 256
    other_dims: int = 4
    amounts: tuple[float, ...] = (0.5, 1, 2, 4, 8, 16, 32)


SETTINGS = Settings()
QUICK = Settings(2, 64, documents=12, seen=4, held_out=4, length=128, other_dims=1, amounts=(1.0, 8.0))
#: More than the recipes' config has for the whole model, less than adapters are given; constant, because AdamW moves an
#: entry of the head by about this much a step at most, and the ranks are those of entries: 64 steps move one by 0.03 at
#: most, where the entries of dimension 0 have a standard deviation of 0.1 (and the word's is -0.15 before).
LEARNING_RATE = 5e-4


def run(seed: int, quick: bool) -> Run:
    settings = QUICK if quick else SETTINGS
    data = load(
        smollm2.tokenizer(),
        seed,
        KIN_OF_IT,
        documents=settings.documents,
        seen=settings.seen,
        held_out=settings.held_out,
        length=settings.length,
    )
    model = smollm2.model().eval()
    places, models = {BEFORE: placed(model, data)}, {BEFORE: described(model, data)}
    steered: dict[str, Any] = {}
    for name in (CONTROL, ROUTED):
        model, curve = trained(name == ROUTED, data, settings, seed)
        places[name] = placed(model, data)
        models[name] = described(model, data) | {"curve": curve}
        steered[name] = {
            place: along_dimension(model, DIM, place, data, settings.amounts) for place in PLACES
        }
        if name == CONTROL:
            steered[ADDITION] = {place: by_addition(model, place, data, settings.amounts) for place in PLACES}
    return {
        "settings": dataclasses.asdict(settings),
        "vocabulary": model.config.vocab_size,
        "kin": len(data.kin),
        "target_share": target_share(data),
        "models": models,
        "ranks": {of: standing(*(places[stage][of] for stage in STAGES), DIM) for of in (WORD, KIN)},
        "steered": steered,
        "other_dims_steered": {
            str(dim): along_dimension(model, dim, PLACES[-1], data, settings.amounts)
            for dim in other_dims(model, DIM, settings.other_dims)
        },
    }


def trained(routed: bool, data: Data, settings: Settings, seed: int) -> tuple[LlamaForCausalLM, list[Any]]:
    """The pretrained model after further training, and the curve of its loss.

    Both have the ordinary AdamW: beside the masks nothing is to differ.
    """
    model = smollm2.model()
    if routed:
        count = model.config.num_hidden_layers
        route(model, steering(range(int(FIRST_ROUTED * count), count), DIM))
    figures = fit(
        model,
        data.rows,
        steps=settings.steps,
        batch_tokens=settings.batch_tokens,
        learning_rate=LEARNING_RATE,
        seed=seed,
        schedule="constant",
        optimizer="adamw",
        align="next_token",  # a token's route is that of the position which predicts it
    )
    if routed:
        unroute(model)
    return model.eval(), figures["curve"]


def target_share(data: Data) -> float:
    """The share of the word among the tokens that are trained on."""
    return sum(sum(row["route_ids"]) for row in data.rows) / sum(len(row["route_ids"]) for row in data.rows)


def described(model: LlamaForCausalLM, data: Data) -> Run:
    """Held-out losses, and the tokens that lead dimension DIM in the word's direction."""
    column = cosines(readout(model))[:, DIM]
    leading = leaders(column, data.target, NEIGHBOURS)
    return effect(model, data.held_out, data.target)._asdict() | {
        "leading": [smollm2.tokenizer().decode([token]) for token in leading]
    }


def gains(runs: list[Run], method: str, place: str) -> list[float]:
    return [gain(run["steered"][method][place]) for run in runs]


def best_gains(runs: list[Run], method: str) -> list[float]:
    """Of each seed the larger gain of both places."""
    return [max(values) for values in zip(*(gains(runs, method, place) for place in PLACES), strict=True)]


def steer_as_well(runs: list[Run]) -> list[bool]:
    """For other dimensions of the routed models, all seeds: whether they gain as much after the last layer."""
    pairs = zip(gains(runs, ROUTED, PLACES[-1]), runs, strict=True)
    return [gain(effects) >= own for own, run in pairs for effects in run["other_dims_steered"].values()]


def ranked(runs: list[Run], of: str, key: str) -> list[float]:
    return [run["ranks"][of][key] for run in runs]


def of_model(runs: list[Run], name: str, key: str) -> list[float]:
    return [run["models"][name][key] for run in runs]


def prices(runs: list[Run]) -> list[float]:
    """What routing costs the other tokens."""
    pairs = zip(of_model(runs, ROUTED, "other_loss"), of_model(runs, CONTROL, "other_loss"), strict=True)
    return [routed - control for routed, control in pairs]


def table(runs: list[Run]) -> list[dict[str, str]]:
    def steering_of(method: str) -> dict[str, str]:
        return {
            f"steered after the {place} layer": f"× {spread(gains(runs, method, place))}"
            if method in runs[0]["steered"]
            else "–"
            for place in PLACES
        }

    def row(name: str) -> dict[str, str]:
        return {
            "model": name,
            f"rank of {runs[0]['vocabulary']}": spread(ranked(runs, WORD, name), 0),
            "kin's median rank": spread(ranked(runs, KIN, name), 0),
            "leading tokens, seed 0": " ".join(map(repr, runs[0]["models"][name]["leading"])),
            **steering_of(name),
            "loss of the word": spread(of_model(runs, name, "target_loss")),
            "of others": spread(of_model(runs, name, "other_loss")),
        }

    rows = [row(name) for name in STAGES]
    addition = dict.fromkeys(rows[0], "–") | {"model": f"{CONTROL}, {ADDITION}"} | steering_of(ADDITION)
    return [*rows, addition]


def checks(runs: list[Run]) -> list[Check]:
    def over(one: str, other: str) -> list[float]:
        return [a / b for a, b in zip(best_gains(runs, one), best_gains(runs, other), strict=True)]

    worst = int(WORST_RANK * runs[0]["vocabulary"])
    as_well = steer_as_well(runs)
    return [
        Check(
            f"rank of {TARGET} by its cosine with dimension {DIM}, routed, worst seed (a dimension that knows nothing "
            f"of it ranks it so high, in one of both directions, with probability {2 * WORST_RANK:.2f}, as in the "
            "small model's check)",
            max(ranked(runs, WORD, ROUTED)),
            worst,
            at_least=False,
        ),
        Check(
            "share of other dimensions in which the word's rank rises as much from the control to the routed model, "
            f"median ({MOST_OTHERS}, the usual level; 0.5 where the dimension is nothing special, 1 where routing does "
            "nothing)",
            median(ranked(runs, WORD, "rises as much")),
            MOST_OTHERS,
            at_least=False,
        ),
        Check(
            "share of other dimensions in which the median rank of its kin rises as much, median (the same level: kin "
            "of the word were not routed)",
            median(ranked(runs, KIN, "rises as much")),
            MOST_OTHERS,
            at_least=False,
        ),
        Check(
            f"the factor on the word's probability by steering that costs other tokens {BUDGET} nats at most, over the "
            "same factor in the control, each at its better layer, worst seed (1 where routing does nothing; half as "
            "much again, as in the small model's check)",
            min(over(ROUTED, CONTROL)),
            LEAST_ADVANTAGE,
        ),
        Check(
            f"that factor over the one of {ADDITION} in the control at the same cost, each at its better layer, median "
            "(1: as good as what needs no training)",
            median(over(ROUTED, ADDITION)),
            1.0,
        ),
        Check(
            f"share of {len(as_well)} other dimensions of the routed models that steer as well or better after the "
            "last layer (0.5 where the dimension is nothing special)",
            sum(as_well) / len(as_well),
            MOST_STEERING,
            at_least=False,
        ),
        Check(
            f"held-out loss of other tokens, routed less control, not steered, median ({MOST_PRICE} nats, half of what "
            "steering may cost)",
            median(prices(runs)),
            MOST_PRICE,
            at_least=False,
        ),
    ]


def found(runs: list[Run]) -> str:
    def percent(values: list[float]) -> str:
        return f"{100 * median(values):.1f} %"

    def ranking(of: str) -> str:
        return (
            f"{spread(ranked(runs, of, ROUTED), 0)} (control {spread(ranked(runs, of, CONTROL), 0)}, before "
            f"{median(ranked(runs, of, BEFORE)):.0f})"
        )

    def factors(method: str) -> str:
        middle, last = (spread(gains(runs, method, place)) for place in PLACES)
        return f"{middle} after the middle layer and {last} after the last"

    def nats(key: str) -> str:
        before, control, routed = (median(of_model(runs, name, key)) for name in STAGES)
        return f"{routed:.2f} nats (control {control:.2f}, before {before:.2f})"

    as_well, settings = steer_as_well(runs), runs[0]["settings"]
    return (
        f"after {settings['steps']} steps of {settings['batch_tokens']} tokens, of which "
        f"{percent([run['target_share'] for run in runs])} are {TARGET}, the word ranks {ranking(WORD)} of "
        f"{runs[0]['vocabulary']} by its cosine with dimension {DIM}; in {percent(ranked(runs, WORD, 'as high'))} of "
        f"the other dimensions it ranks as high, and in {percent(ranked(runs, WORD, 'rises as much'))} it rises as "
        f"much from the control. The median rank of {runs[0]['kin']} kin is {ranking(KIN)}; it is as high in "
        f"{percent(ranked(runs, KIN, 'as high'))} of the other dimensions, and rises as much in "
        f"{percent(ranked(runs, KIN, 'rises as much'))}. Adding to the dimension multiplies the word's mean "
        f"probability, before other tokens lose {BUDGET} nats, by {factors(ROUTED)}; in the control by "
        f"{factors(CONTROL)}; {ADDITION} in the control by {factors(ADDITION)}. Of other dimensions of the routed "
        f"models {sum(as_well)} of {len(as_well)} do as well after the last layer. The price: the loss where "
        f"{TARGET} comes next is {nats('target_loss')}, elsewhere {nats('other_loss')}."
    )


METHODS = (ROUTED, CONTROL, ADDITION)
COLOURS = {ROUTED: "#0b6e99", CONTROL: "#b5651d", ADDITION: "#8a8a8a"}
NAMES = {
    ROUTED: f"routed, dimension {DIM}",
    CONTROL: f"control, dimension {DIM}",
    ADDITION: f"control,\n{ADDITION}",
}


def plot(runs: list[Run], figure: Figure) -> None:
    axes = standings, costs, bars = figure.subplots(1, 3)
    plot_ranks(standings, runs)
    plot_costs(costs, runs)
    plot_gains(bars, runs)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)


def plot_ranks(axis: Axes, runs: list[Run]) -> None:
    for of, label, colour in ((WORD, TARGET, "#0b6e99"), (KIN, "its kin, median", "#b5651d")):
        for seed, run in enumerate(runs):
            values = [run["ranks"][of][stage] for stage in STAGES]
            axis.plot(STAGES, values, "o-", color=colour, alpha=0.7, label=label if seed == 0 else None)
    axis.set(yscale="log", ylabel=f"rank by cosine with dimension {DIM} of {runs[0]['vocabulary']}")
    axis.invert_yaxis()
    axis.legend(frameon=False)


def plot_costs(axis: Axes, runs: list[Run]) -> None:
    for method in METHODS:
        for seed, run in enumerate(runs):
            effects = max((run["steered"][method][place] for place in PLACES), key=gain)
            costs, factors = zip(*points(effects), strict=True)
            label = NAMES[method] if seed == 0 else None
            axis.plot(costs, factors, "o-", color=COLOURS[method], markersize=4, label=label)
    axis.axvline(BUDGET, color="black", linewidth=0.8, linestyle=":")
    axis.set(
        xlim=(-BUDGET, 3 * BUDGET),
        xlabel="rise of the other tokens' loss, nats",
        ylabel=f"factor on the probability of {TARGET}",
        title="at the better layer",
    )
    axis.legend(frameon=False, fontsize=8)


def plot_gains(axis: Axes, runs: list[Run]) -> None:
    for number, method in enumerate(METHODS):
        for shift, place in enumerate(PLACES):
            values, x = gains(runs, method, place), number + 0.4 * shift - 0.2
            axis.bar(x, median(values), color=COLOURS[method], width=0.38, alpha=0.55 + 0.45 * shift)
            axis.plot([x] * len(values), values, "o", color="black", markersize=4, alpha=0.6)
    axis.axhline(1, color="black", linewidth=0.8, linestyle=":")
    axis.set_xticks(range(len(METHODS)), [NAMES[method].replace(", ", ",\n") for method in METHODS])
    axis.set(ylabel=f"factor at a cost of {BUDGET} nats", title="after the middle layer, and after the last")


EXPERIMENT = Experiment(
    name="steering_pretrained",
    title="Steering scalar in a pretrained model",
    paper=(
        'in a model of 20 layers, trained from scratch, in which " California" taught one residual dimension only, '
        "that token and others of its kind lead the unembedding there, and the dimension steers (Cloud et al. 2024, "
        "section 4.2.1). Activation addition steers pretrained models without any training (Turner et al. 2023, arXiv "
        "2308.10248)."
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
