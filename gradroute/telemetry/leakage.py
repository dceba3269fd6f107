"""The leakage probe: how much of each route's gradient is outside of its block."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .losses import TokenLosses
from .regions import Regions


@contextmanager
def evaluation(model: nn.Module) -> Iterator[None]:
    """Puts a model in eval mode, and forgets the random numbers that are drawn."""
    training = {module: module.training for module in model.modules()}
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    try:
        with torch.random.fork_rng(list(devices)):
            model.eval()
            yield
    finally:
        for module, was in training.items():
            module.training = was


def leakages(
    regions: Regions, routes: Sequence[str], home: Mapping[str, str], tokens: TokenLosses
) -> dict[str, float]:
    """The values of the probe, see `gradroute.telemetry.Telemetry.leakage`; one backward for each route with tokens."""
    losses, mine = tokens.losses, tokens.belongs & tokens.counted
    parameters = regions.trained()
    present = mine.flatten(1).any(1).tolist()
    squares, counts = [], []
    for of_route, is_present in zip(mine, present, strict=True):
        found: list[tuple[nn.Parameter, Tensor]] = []
        if is_present:
            total = torch.where(of_route, losses, 0.0).sum() / of_route.sum()
            gradients = torch.autograd.grad(total, parameters, retain_graph=True, allow_unused=True)
            found = [(p, g) for p, g in zip(parameters, gradients, strict=True) if g is not None]
        squares.append(regions.squares(found))
        counts.append(regions.nonzeros(found))
    values: dict[str, float] = {}
    for route, row, is_present in zip(routes, torch.stack(squares).tolist(), present, strict=True):
        row = row if is_present else [math.nan] * len(row)
        values |= _ratios(route, home.get(route), row, regions.names)
    return values | _protected(routes, home, torch.stack(counts).tolist(), present, regions.names)


def _ratios(
    route: str, home: str | None, squares: Sequence[float], blocks: Sequence[str]
) -> dict[str, float]:
    """The shares of one route's gradient inside and outside of blocks, of its squared norms `[K + 2]` by region."""
    values = {f"leakage/grad_norm/{route}": math.sqrt(sum(squares))}
    for suffix, regions in (("", squares), ("_routed", squares[:-1])):
        total = sum(regions)
        if home is not None:
            own = blocks.index(home)
            outside = sum(square for i, square in enumerate(regions) if i != own)
            values[f"leakage/outside{suffix}/{route}"] = _root_ratio(outside, total)
        for name, square in zip(blocks, regions, strict=False):
            values[f"leakage/inside{suffix}/{name}/{route}"] = _root_ratio(square, total)
    return values


def _protected(
    routes: Sequence[str],
    home: Mapping[str, str],
    nonzeros: Sequence[Sequence[int]],
    present: Sequence[bool],
    blocks: Sequence[str],
) -> dict[str, float]:
    """Whether the routes of other homes leave each block alone, of nonzero elements `[R][K]`."""
    values = {}
    for i, name in enumerate(blocks):
        others = [
            nonzeros[r][i] == 0 for r, route in enumerate(routes) if present[r] and home.get(route) != name
        ]
        is_home = name in home.values()
        values[f"leakage/protected/{name}"] = float(all(others)) if others and is_home else math.nan
    return values


def _root_ratio(part: float, whole: float) -> float:
    return math.sqrt(part / whole) if whole != 0 else math.nan
