"""The split autoencoder: data, model, losses and training."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from gradroute import Routes, route_grad
from gradroute.tables import localize

PIXELS, CODE = 64, 32
HIDDEN = (256, 64)
HALVES = {"top": slice(CODE // 2), "bottom": slice(CODE // 2, CODE)}  # in the order of the routes
GROUPS = {"0-4": range(5), "5-9": range(5, 10)}  # in the order of the routes too
TABLE = localize(2, CODE, dict(enumerate(HALVES.values())))
HELD_OUT = 500
BATCH = 128
# The paper's weights for MNIST: its code is as wide, and its pixels are in [-1, 1] too.
L1, CORRELATION = 3e-3, 0.1
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 5e-5


@dataclass(frozen=True)
class Variant:
    """A variant of the training: whether it is routed, and the weights of both penalties."""

    routed: bool
    l1: float = L1
    correlation: float = CORRELATION


class Digits(NamedTuple):
    images: Tensor  # [N, 64] fp32 in [-1, 1]
    labels: Tensor  # [N] int64

    def at(self, index: Tensor) -> "Digits":
        return Digits(self.images[index], self.labels[index])

    @property
    def routes(self) -> Routes:
        """Route 0 for 0 to 4, route 1 for 5 to 9: one a sample, in mixed batches."""
        return Routes.of(self.labels >= 5, num_routes=2)


Masked = Callable[[Tensor, Routes], Tensor]


def by_route(code: Tensor, routes: Routes) -> Tensor:
    return route_grad(code, routes, TABLE)


def by_detaching(code: Tensor, routes: Routes) -> Tensor:
    """The code with the published idiom, to compare with."""
    mask = TABLE.weights[routes.ids.long()]  # [N, 32]
    return mask * code + (1 - mask) * code.detach()


def digits(seed: int) -> tuple[Digits, Digits]:
    """Digits to train on and held-out ones, drawn anew by every seed."""
    images, labels = load_digits(return_X_y=True)
    data = Digits(torch.tensor(images / 8 - 1, dtype=torch.float32), torch.tensor(labels))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return data.at(order[HELD_OUT:]), data.at(order[:HELD_OUT])


def layers(*widths: int, bias: bool = True) -> nn.Sequential:
    """Linear layers with ReLU between them; the last has a bias or not."""
    made: list[nn.Module] = []
    for width, following in itertools.pairwise(widths):
        made += [nn.Linear(width, following), nn.ReLU()]
    made[-2:] = [nn.Linear(*widths[-2:], bias=bias)]
    return nn.Sequential(*made)


def autoencoder() -> nn.ModuleDict:
    encoder = layers(PIXELS, *HIDDEN, CODE, bias=False)
    return nn.ModuleDict({"encoder": encoder, "decoder": layers(CODE, *reversed(HIDDEN), PIXELS)})


def absolute_error(images: Tensor, expected: Tensor) -> Tensor:
    """The absolute error, [N, 64] twice → [N], which is the mean over pixels."""
    return (images - expected).abs().mean(1)


def correlation_penalty(code: Tensor) -> Tensor:
    """The mean size of the correlation over the batch, of a unit of the top half with one of the bottom half."""
    code = (code - code.mean(0)) / (code.std(0) + 1e-6)
    top, bottom = (code[:, half] for half in HALVES.values())
    return (top.T @ bottom / len(code)).abs().mean()


def loss_of(model: nn.ModuleDict, batch: Digits, variant: Variant, masked: Masked = by_route) -> Tensor:
    """Only the loss of reconstruction is routed: penalties hold each half down on every digit, as in the paper."""
    code = model["encoder"](batch.images)
    seen = masked(code, batch.routes) if variant.routed else code
    loss = absolute_error(model["decoder"](seen), batch.images).mean()
    if variant.l1:
        loss = loss + variant.l1 * code.abs().mean(0).sum()
    if variant.correlation:
        loss = loss + variant.correlation * correlation_penalty(code)
    return loss


def batches(data: Digits, epochs: int, seed: int) -> Iterator[Digits]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(len(data.labels), generator=generator)
        for index in order.split(BATCH):
            yield data.at(index)


def fit(module: nn.Module, data: Digits, epochs: int, seed: int, loss: Callable[[Digits], Tensor]) -> None:
    optimizer = torch.optim.Adam(module.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    for batch in batches(data, epochs, seed):
        optimizer.zero_grad()
        loss(batch).backward()
        optimizer.step()


def trained(
    variant: Variant, train: Digits, epochs: int, seed: int, masked: Masked = by_route
) -> nn.ModuleDict:
    torch.manual_seed(seed)  # all variants start from the same weights
    model = autoencoder()
    fit(model, train, epochs, seed, lambda batch: loss_of(model, batch, variant, masked))
    return model


def certificate(encoder: nn.Module, half: slice, train: Digits, epochs: int, seed: int) -> nn.Sequential:
    """A decoder [N, 16] → [N, 64] of one half of the frozen code, trained from scratch on all digits."""
    torch.manual_seed(seed)
    decoder = layers(CODE // 2, *reversed(HIDDEN), PIXELS)
    with torch.no_grad():
        codes = encoder(train.images)[:, half]
    pairs = Digits(torch.cat((train.images, codes), 1), train.labels)

    def loss(batch: Digits) -> Tensor:
        return absolute_error(decoder(batch.images[:, PIXELS:]), batch.images[:, :PIXELS]).mean()

    fit(decoder, pairs, epochs, seed, loss)
    return decoder
