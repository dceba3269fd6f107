"""Measures of what the halves of a code know of each digit, on held-out images."""

from typing import Any

import torch
from sklearn.linear_model import RidgeClassifier
from torch import Tensor, nn

from .model import GROUPS, HALVES, PIXELS, Digits, absolute_error

OWN = dict(zip(HALVES, GROUPS, strict=True))  # the digits that teach each half

Run = dict[str, Any]


def by_digit(images: Tensor, data: Digits) -> list[float]:
    """The error of reconstructions [N, 64], averaged over each digit."""
    errors = absolute_error(images, data.images)
    return [errors[data.labels == digit].mean().item() for digit in range(10)]


def probe(codes: Tensor, labels: Tensor, held_out_codes: Tensor, held_out_labels: Tensor) -> float:
    """The accuracy of a linear classifier of digits by their code, on held-out ones: whether anything is left."""
    center, scale = codes.mean(0), codes.std(0) + 1e-12  # L1 makes codes small, which is no hiding place
    classifier = RidgeClassifier().fit((codes - center) / scale, labels)
    return float(classifier.score((held_out_codes - center) / scale, held_out_labels))


@torch.no_grad()
def probes(encoder: nn.Module, train: Digits, held_out: Digits) -> dict[str, dict[str, float]]:
    """Each half of the code, each group of digits: how often a linear classifier tells the five of them apart."""
    codes = encoder(train.images), encoder(held_out.images)
    accuracy: dict[str, dict[str, float]] = {}
    for half, which in HALVES.items():
        accuracy[half] = {}
        for route, group in enumerate(GROUPS):
            kept, held = (data.labels // 5 == route for data in (train, held_out))
            accuracy[half][group] = probe(
                codes[0][kept][:, which],
                train.labels[kept],
                codes[1][held][:, which],
                held_out.labels[held],
            )
    return accuracy


@torch.no_grad()
def measured(
    model: nn.ModuleDict, certificates: dict[str, nn.Sequential], held_out: Digits, shown: Tensor
) -> Run:
    """Errors of all decoders on held-out digits, and some of their images."""
    code = model["encoder"](held_out.images)
    images = {half: decoder(code[:, HALVES[half]]) for half, decoder in certificates.items()}
    images["both"] = model["decoder"](code)
    return {
        name: {"error": by_digit(made, held_out), "images": as_text(made[shown])}
        for name, made in images.items()
    }


def as_text(images: Tensor) -> list[str]:
    """[N, 64] in [-1, 1] → hexadecimal digits, one a pixel: 16 levels, about as many as the data has."""
    levels = ((images + 1) * 7.5).round().clamp(0, 15).int()
    return ["".join(f"{level:x}" for level in image) for image in levels.tolist()]


def as_image(text: str) -> list[list[int]]:
    levels = [int(level, 16) for level in text]
    return [levels[row : row + 8] for row in range(0, PIXELS, 8)]


def of_group(by_digit: list[float], group: str) -> float:
    """The mean over the digits of a group, of one error a digit."""
    return sum(by_digit[digit] for digit in GROUPS[group]) / len(GROUPS[group])


def error(run: Run, variant: str, decoder: str, group: str) -> float:
    return of_group(run["variants"][variant]["decoders"][decoder]["error"], group)


def recovered(run: Run, variant: str, half: str, group: str) -> float:
    """How far a certificate comes from the constant image's error (0) to that of the decoder of both halves (1)."""
    constant = of_group(run["constant"], group)
    gain = constant - error(run, variant, "both", group)
    return (constant - error(run, variant, half, group)) / gain


def other(group: str) -> str:
    return next(name for name in GROUPS if name != group)


def ratios(runs: list[Run], variant: str) -> list[float]:
    """The certificate's error on the other half's digits over that on its own, for all seeds and halves."""
    return [
        error(run, variant, half, other(own)) / error(run, variant, half, own)
        for run in runs
        for half, own in OWN.items()
    ]


def shares(runs: list[Run], variant: str, own: bool) -> list[float]:
    """The share that the certificate recovers of its own digits, or of the other half's, for all seeds and halves."""
    return [
        recovered(run, variant, half, group if own else other(group))
        for run in runs
        for half, group in OWN.items()
    ]


def whole(run: Run, variant: str) -> float:
    """The error of the decoder of both halves, on all digits."""
    return sum(error(run, variant, "both", group) for group in GROUPS) / len(GROUPS)


def foreign_accuracies(runs: list[Run], variant: str) -> list[float]:
    """The linear classifier's accuracy on the other half's digits, for all seeds and halves."""
    return [run["variants"][variant]["probes"][half][other(own)] for run in runs for half, own in OWN.items()]
