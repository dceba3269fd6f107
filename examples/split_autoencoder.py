"""Trains an autoencoder of digits whose code is split: 0 to 4 teach its top half, 5 to 9 its bottom half.

Cloud et al. 2024 (arXiv 2410.04332, section 4.1) on the 8x8 digits of scikit-learn. A decoder trained from scratch on
one frozen half of the code, the *certificate*, says what that half knows of each digit. The control has the same
penalties and no routes. Exit code 1 when a half knows what it should not, or the control does not.
"""

import sys

import torch
from experiment import Check, Experiment, main, median, spread
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from splitting.measures import (
    Run,
    as_image,
    as_text,
    by_digit,
    error,
    foreign_accuracies,
    measured,
    of_group,
    probes,
    ratios,
    shares,
    whole,
)
from splitting.model import GROUPS, HALVES, Variant, by_detaching, certificate, digits, trained
from torch import nn

EPOCHS, QUICK_EPOCHS = 200, 1
RATIO = 1.5
DECODERS = {
    "both": "decoder of both halves",
    "top": "certificate, top half",
    "bottom": "certificate, bottom half",
}
COLOURS = {"top": "#0b6e99", "bottom": "#b5651d"}

VARIANTS = {
    "routed": Variant(routed=True),
    "control": Variant(routed=False),
    "routed, no correlation penalty": Variant(routed=True, correlation=0.0),
    "routed, no penalty": Variant(routed=True, l1=0.0, correlation=0.0),
}


def run(seed: int, quick: bool) -> Run:
    epochs = QUICK_EPOCHS if quick else EPOCHS
    train, held_out = digits(seed)
    shown = torch.stack([(held_out.labels == digit).nonzero()[0, 0] for digit in range(10)])
    models = {name: trained(variant, train, epochs, seed) for name, variant in VARIANTS.items()}
    results = {}
    for name, model in models.items():
        certificates = {
            half: certificate(model["encoder"], which, train, epochs, seed) for half, which in HALVES.items()
        }
        results[name] = {
            "decoders": measured(model, certificates, held_out, shown),
            "probes": probes(model["encoder"], train, held_out),
        }
    # The image that minimises the absolute error where nothing is known of a digit.
    constant = train.images.median(0).values.expand_as(held_out.images)
    detached = trained(VARIANTS["routed"], train, epochs, seed, by_detaching)
    return {
        "epochs": epochs,
        "variants": results,
        "constant": by_digit(constant, held_out),
        "originals": as_text(held_out.images[shown]),
        "detach_difference": largest_difference(models["routed"], detached),
    }


def largest_difference(model: nn.Module, other: nn.Module) -> float:
    """The largest difference between any two elements of the parameters."""
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return max((one - two).abs().max().item() for one, two in pairs)


def table(runs: list[Run]) -> list[dict[str, str]]:
    """A row for each training and group of digits."""
    rows = []
    for variant in VARIANTS:
        for group in GROUPS:
            row = {"training": variant, "digits": group}
            for decoder, column in DECODERS.items():
                row[column] = spread([error(run, variant, decoder, group) for run in runs], 3)
            rows.append(row)
    for group in GROUPS:
        value = spread([of_group(run["constant"], group) for run in runs], 3)
        rows.append({"training": "constant image", "digits": group} | dict.fromkeys(DECODERS.values(), value))
    return rows


def checks(runs: list[Run]) -> list[Check]:
    kept = median(shares(runs, "control", own=True))
    leak = median(shares(runs, "routed", own=False)) / median(shares(runs, "control", own=False))
    return [
        Check(
            "routed: the error of a half's certificate on the other half's digits, over that on its own, in the worst "
            f"seed and half (1 where nothing is split; one limit, {RATIO}, divides routed and control)",
            min(ratios(runs, "routed")),
            RATIO,
        ),
        Check(
            "control: the same ratio, in the worst seed and half",
            max(ratios(runs, "control")),
            RATIO,
            at_least=False,
        ),
        Check(
            "what routed halves recover of the other half's digits, over what the control's do (1 where routing does "
            "nothing; the limit is half of that)",
            leak,
            0.5,
            at_least=False,
        ),
        Check(
            "what routed halves recover of their own digits, worst seed and half (0: the constant image, 1: the "
            f"decoder of both halves; {kept:.2f} in the control; the limit lets a tenth be lost)",
            min(shares(runs, "routed", own=True)),
            0.9,
        ),
        Check(
            "largest difference of a parameter when trained with the idiom m*x + (1-m)*x.detach() instead (masks of 0 "
            "and 1 are exact: none)",
            max(run["detach_difference"] for run in runs),
            0.0,
            at_least=False,
        ),
    ]


def found(runs: list[Run]) -> str:
    def errors(variant: str, decoder: str) -> str:
        return " and ".join(
            f"{median([error(r, variant, decoder, group) for r in runs]):.3f}" for group in GROUPS
        )

    def percent(values: list[float]) -> str:
        return f"{100 * median(values):.0f} %"

    def whole_code(variant: str) -> float:
        return median([whole(run, variant) for run in runs])

    constant = " and ".join(
        f"{median([of_group(r['constant'], group) for r in runs]):.3f}" for group in GROUPS
    )
    cost = [whole(run, "routed") / whole(run, "control") - 1 for run in runs]
    return (
        f"on 0 to 4 and on 5 to 9 the held-out absolute errors of the bottom half's certificate are "
        f"{errors('routed', 'bottom')}, of the top half's {errors('routed', 'top')}; without routing they are "
        f"{errors('control', 'bottom')}, and {errors('control', 'top')}; a constant image has {constant}. "
        f"Of what lies between that and the decoder of both halves, a routed half recovers "
        f"{percent(shares(runs, 'routed', own=False))} for the other half's digits, an unrouted one "
        f"{percent(shares(runs, 'control', own=False))}. The price: {percent(cost)} more error with both halves. "
        f"The wrong half is not empty: a linear classifier still tells its five foreign digits apart with "
        f"{percent(foreign_accuracies(runs, 'routed'))} accuracy (control "
        f"{percent(foreign_accuracies(runs, 'control'))}, chance 20 %). Routing needs the paper's penalties: "
        f"with both halves the error is {whole_code('routed'):.3f}, without the penalty on correlation "
        f"{whole_code('routed, no correlation penalty'):.3f}, without both {whole_code('routed, no penalty'):.3f} "
        f"(constant image {median([sum(run['constant']) / 10 for run in runs]):.3f})."
    )


def plot(runs: list[Run], figure: Figure) -> None:
    pictures, bars = figure.subfigures(1, 2, width_ratios=(5, 4))
    rows = {"original": runs[0]["originals"]}
    for variant in ("routed", "control"):
        for half in HALVES:
            rows[f"{variant},\n{half} half"] = runs[0]["variants"][variant]["decoders"][half]["images"]
    for row, (name, images) in zip(pictures.subplots(len(rows), 10), rows.items(), strict=True):
        for axis, image in zip(row, images, strict=True):
            axis.imshow(as_image(image), cmap="gray_r", vmin=0, vmax=15)
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(name, rotation=0, ha="right", va="center")
    pictures.suptitle("Held-out digits, and what the certificates of each half make of them")
    for axis, variant in zip(bars.subplots(1, 2, sharey=True), ("routed", "control"), strict=True):
        plot_errors(axis, runs, variant)
    bars.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)


def plot_errors(axis: Axes, runs: list[Run], variant: str) -> None:
    """Draws the errors of both certificates by digit: the seeds' medians as bars, each seed as a dot."""
    for place, (half, colour) in enumerate(COLOURS.items()):
        by_seed = [run["variants"][variant]["decoders"][half]["error"] for run in runs]
        places = [digit + 0.4 * place - 0.2 for digit in range(10)]
        axis.bar(
            places, [median(values) for values in zip(*by_seed, strict=True)], 0.4, color=colour, label=half
        )
        for values in by_seed:
            axis.plot(places, values, ".", color="black", markersize=2)
    constant = [median(values) for values in zip(*(run["constant"] for run in runs), strict=True)]
    axis.step(range(10), constant, where="mid", color="gray", label="constant image")
    axis.axvline(4.5, color="gray", linestyle=":")
    axis.set(
        title=variant, xlabel="digit", xticks=range(10), ylabel="held-out absolute error of certificates"
    )
    axis.spines[["top", "right"]].set_visible(False)
    axis.label_outer()


EXPERIMENT = Experiment(
    name="split_autoencoder",
    title="Split autoencoder",
    paper="on MNIST, a decoder trained on the bottom half of the code, which 5 to 9 taught, reconstructs 5 to 9 and "
    "not 0 to 4; without routing it reconstructs all (Cloud et al. 2024, section 4.1).",
    run=run,
    table=table,
    checks=checks,
    found=found,
    plot=plot,
)

if __name__ == "__main__":
    sys.exit(main(EXPERIMENT, __doc__))
