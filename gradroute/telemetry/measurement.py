"""The sums of one step, by route: of gradients of activations, and of losses."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from .batches import BatchRoutes
from .losses import TokenLosses, cross_entropies
from .regions import Regions
from .sums import ALL, REST, wide, zeros


class Measurement:
    """The sums that a measured step has collected, all of them on the device.

    Attributes:
        reads_forward: whether ids and losses come from the model's forward, which ends when ids are given.
        batch: the ids of the current batch.
        snapshot: the parameters before the update, by region; None: the update has not begun.
    """

    def __init__(self, routes: int, modules: list[str], reads_forward: bool) -> None:
        self.reads_forward = reads_forward
        self.batch: BatchRoutes | None = None
        self.snapshot: list[tuple[int, Tensor]] | None = None
        self._routes = routes
        self._present: list[Tensor] = []  # one [R] a batch
        self._squares: dict[str, list[Tensor]] = {name: [] for name in modules}  # one [R] a backward
        self._losses: list[tuple[Tensor, Tensor]] = []  # sums [R] and counts [R], a pair a forward
        self._gradient: tuple[Tensor, Tensor] | None = None  # squares [K + 2], nonzeros [K]
        self._before: Tensor | None = None  # squares [K + 2]
        self._update: Tensor | None = None  # squares [K + 2]

    def take(self, batch: BatchRoutes | None) -> None:
        """Takes the ids of the forwards to come."""
        self.batch = batch
        if batch is not None:
            self._present.append(batch.counts())

    def batch_of(self, what: str) -> BatchRoutes:
        """The ids of the current batch; raises where there are none for `what`."""
        if self.batch is None:
            raise ValueError(
                f"route_ids: got none for {what}, expected telemetry.step(route_ids), or route_ids in the model's "
                "forward"
            )
        return self.batch

    @torch.no_grad()
    def add_gradient(self, name: str, gradient: Tensor | None, belongs: Tensor) -> None:
        """Adds the gradient `[*tokens, F]` that arrived at an output, whose tokens belong to routes `[R, *tokens]`."""
        if gradient is not None:
            squares = torch.linalg.vector_norm(gradient, dim=-1, dtype=wide(gradient)).square()
            self._squares[name].append(_by_route(squares, belongs))

    @torch.no_grad()
    def add_logits(self, logits: Tensor, labels: Tensor, *, shift: bool, align: str) -> None:
        """Adds the cross-entropy of a forward's tokens, see `cross_entropies`."""
        batch = self.batch_of("losses")
        self.add_losses(cross_entropies(logits.detach(), labels, batch, shift=shift, align=align))

    def add_losses(self, tokens: TokenLosses) -> None:
        """Adds the losses of tokens to their routes."""
        mine = tokens.belongs & tokens.counted
        losses = tokens.losses.to(wide(tokens.losses))
        self._losses.append((_by_route(losses, mine), mine.flatten(1).sum(1)))

    def before_update(self, regions: Regions, rest: bool) -> None:
        """Sums gradients and parameters by region, and keeps the parameters of blocks, with `rest` all of them."""
        gradients = [(p, p.grad) for p in regions.parameters() if p.grad is not None]
        self._gradient = regions.squares(gradients), regions.nonzeros(gradients)
        trained = [(p, p.detach()) for p in regions.trained()]
        self.snapshot = [
            (region, values.clone() if region == len(regions.names) + 1 else values)
            for region, _, values in regions.split(trained, rest)
        ]
        self._before = regions.sum_squares(self.snapshot)

    @torch.no_grad()
    def after_update(self, regions: Regions) -> None:
        """Sums the difference to the first `before_update`, so that several optimizers are one update."""
        snapshot = self.snapshot or []
        rest = any(region >= len(regions.names) for region, _ in snapshot)
        after = regions.split([(p, p.detach()) for p in regions.trained()], rest)
        self._update = regions.sum_squares(
            (region, values.to(wide(values)) - before.to(wide(before)))
            for (region, before), (_, _, values) in zip(snapshot, after, strict=True)
        )

    def results(
        self, routes: tuple[str, ...], blocks: tuple[str, ...], homes: Mapping[str, list[int]], rest: bool
    ) -> list[tuple[list[str], Tensor]]:
        """Lists of names, each with the values `[n]` of these names.

        Args:
            routes: the names of the routes.
            blocks: the names of the blocks.
            homes: block → the routes whose home it is.
            rest: whether the parameters outside of blocks were kept.
        """
        results = [*self._mean_losses(routes), *self._shares(routes)]
        if self._gradient is not None:
            squares, nonzeros = self._gradient
            names = [*blocks, REST]
            results.append(([f"block_grad_norm/{name}" for name in names], _joined_rest(squares).sqrt()))
            results.append(([f"protected/{name}" for name in blocks], self._protected(nonzeros, homes)))
        if self._update is not None and self._before is not None:
            names = [*blocks, REST] if rest else list(blocks)
            update, before = (_joined_rest(one)[: len(names)] for one in (self._update, self._before))
            results.append(([f"update_norm/{name}" for name in names], update.sqrt()))
            results.append(([f"update_ratio/{name}" for name in names], (update / before).sqrt()))
        return results

    def _mean_losses(self, routes: tuple[str, ...]) -> Iterator[tuple[list[str], Tensor]]:
        if not self._losses:
            return
        device = self._losses[0][0].device
        sums, counts = (
            torch.stack([one.to(device) for one in column]).sum(0)
            for column in zip(*self._losses, strict=True)
        )
        yield [f"loss/{route}" for route in routes], sums / counts
        yield [f"tokens/{route}" for route in routes], counts.double()

    def _shares(self, routes: tuple[str, ...]) -> Iterator[tuple[list[str], Tensor]]:
        if not self._squares:
            return
        found = [squares.device for lists in self._squares.values() for squares in lists]
        device = found[0] if found else torch.device("cpu")
        by_module = {
            name: sum((one.to(device, torch.float64) for one in lists), zeros(self._routes, device))
            for name, lists in self._squares.items()
        }
        by_module[ALL] = torch.stack(list(by_module.values())).sum(0)
        for name, squares in by_module.items():
            yield [f"grad_norm/{name}/{route}" for route in routes], squares.sqrt()
            yield [f"grad_share/{name}/{route}" for route in routes], squares / squares.sum()

    def _protected(self, nonzeros: Tensor, homes: Mapping[str, list[int]]) -> Tensor:  # [K] → [K]
        """Whether blocks whose routes had no token have no gradient, 1 or 0; NaN for the other blocks."""
        if not self._present:
            return torch.full_like(nonzeros, math.nan, dtype=torch.float64)
        present = torch.stack([one.to(nonzeros.device) for one in self._present]).sum(0)  # [R]
        applies = [
            present[homes[block]].sum() == 0 if homes[block] else present.new_zeros((), dtype=torch.bool)
            for block in homes
        ]
        untouched = (nonzeros == 0).double()
        return torch.where(torch.stack(applies), untouched, math.nan) if applies else untouched


def _by_route(values: Tensor, belongs: Tensor) -> Tensor:
    """Sums of values `[*tokens]` by route, `[R]`, one after the other: adding by index has no fixed order on a GPU."""
    return torch.where(belongs, values, 0.0).flatten(1).sum(1)


def _joined_rest(squares: Tensor) -> Tensor:  # [K + 2] → [K + 1]
    """The sums by region with the two regions outside of blocks as one."""
    return torch.cat((squares[:-2], squares[-2:].sum(0, keepdim=True)))
