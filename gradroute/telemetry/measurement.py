"""The sums of one step, by route: of gradients of activations, and of losses."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..routes import Routes
from .regions import Regions
from .sums import ALL, REST, wide, zeros


class Measurement:
    """What a measured step has collected, all of it on the device.

    Attributes:
        reads_forward: whether ids and losses come from the model's forward: until ids are given.
        handles: of the hooks.
        called: the watched modules whose forward ran.
        batch: the ids of the current batch.
        snapshot: the parameters before the update, by region; None: the update has not begun.
    """

    def __init__(self, routes: int, modules: list[str], reads_forward: bool) -> None:
        self.reads_forward = reads_forward
        self.handles: list[Any] = []
        self.called: set[str] = set()
        self.batch: BatchRoutes | None = None
        self.snapshot: list[tuple[int, Tensor]] | None = None
        self._routes = routes
        self._present: list[Tensor] = []  # each [R], of one batch
        self._squares: dict[str, list[Tensor]] = {name: [] for name in modules}  # each [R], of one backward
        self._losses: list[tuple[Tensor, Tensor]] = []  # each [R] and [R], of one forward
        self._gradient: tuple[Tensor, Tensor] | None = None  # squares [K + 2], nonzeros [K]
        self._before: Tensor | None = None  # squares [K + 2]
        self._update: Tensor | None = None  # squares [K + 2]

    def take(self, batch: BatchRoutes | None) -> None:
        """The ids of the forwards to come."""
        self.batch = batch
        if batch is not None:
            self._present.append(batch.counts())

    def batch_of(self, what: str) -> BatchRoutes:
        if self.batch is None:
            raise ValueError(
                f"route_ids: got none for {what}, expected telemetry.step(route_ids), or route_ids in the model's "
                "forward"
            )
        return self.batch

    @torch.no_grad()
    def add_gradient(self, name: str, gradient: Tensor | None, belongs: Tensor) -> None:
        """The gradient `[*tokens, F]` that arrived at an output whose tokens belong to routes `[R, *tokens]`."""
        if gradient is not None:
            squares = torch.linalg.vector_norm(gradient, dim=-1, dtype=wide(gradient)).square()
            self._squares[name].append(_by_route(squares, belongs))

    def add_losses(self, losses: Tensor, counted: Tensor, belongs: Tensor) -> None:
        mine = belongs & counted
        self._losses.append((_by_route(losses.to(wide(losses)), mine), mine.flatten(1).sum(1)))

    def before_update(self, regions: Regions, rest: bool) -> None:
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
        """The difference to the first `before_update`: several optimizers are one update."""
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
        """Names, each list with its values `[n]`."""
        results: list[tuple[list[str], Tensor]] = []
        if self._losses:
            device = self._losses[0][0].device
            sums, counts = (
                torch.stack([one.to(device) for one in column]).sum(0)
                for column in zip(*self._losses, strict=True)
            )
            results.append(([f"loss/{route}" for route in routes], sums / counts))
            results.append(([f"tokens/{route}" for route in routes], counts.double()))
        results += self._shares(routes)
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
        """1 or 0 for blocks whose routes had no token, NaN for the others."""
        if not self._present:
            return torch.full_like(nonzeros, math.nan, dtype=torch.float64)
        present = torch.stack([one.to(nonzeros.device) for one in self._present]).sum(0)  # [R]
        applies = [
            present[homes[block]].sum() == 0 if homes[block] else present.new_zeros((), dtype=torch.bool)
            for block in homes
        ]
        untouched = (nonzeros == 0).double()
        return torch.where(torch.stack(applies), untouched, math.nan) if applies else untouched


class BatchRoutes:
    """The route ids of one batch, and which route's each token is."""

    def __init__(self, route_ids: Any, num_routes: int) -> None:
        if isinstance(route_ids, Routes):
            route_ids = route_ids.ids.view(route_ids.shape)
        ids = torch.as_tensor(route_ids)
        if ids.is_floating_point() or ids.is_complex():
            raise TypeError(f"route_ids: got dtype {ids.dtype}, expected an integer or bool dtype")
        self._ids = ids.to(torch.int64)
        self._num_routes = num_routes
        self._belongs: dict[Any, Tensor] = {}
        if ids.device.type == "cpu" and ids.numel():
            least, most = self._ids.aminmax()
            if least < 0 or most >= num_routes:
                raise ValueError(
                    f"route_ids: got ids from {least} to {most}, expected 0 to {num_routes - 1}, one for each name of "
                    "routes"
                )

    def belongs(self, tokens: Sequence[int], device: torch.device, what: str) -> Tensor:
        """Whether each of the tokens, of which `what` says the shape, belongs to each route: bool `[R, *tokens]`."""
        shape = tuple(tokens)
        if (shape, device) not in self._belongs:
            ids = self._spread(shape, what).to(device)
            routes = torch.arange(self._num_routes, device=device).view(-1, *[1] * len(shape))
            self._belongs[shape, device] = ids == routes
        return self._belongs[shape, device]

    def counts(self) -> Tensor:
        """How many of the ids are each route's: `[R]`."""
        return self.belongs(self._ids.shape, self._ids.device, "ids").flatten(1).sum(1)

    def _spread(self, shape: tuple[int, ...], what: str) -> Tensor:
        ids = self._ids
        if tuple(ids.shape) == shape[: ids.dim()]:  # an id of a sample is that of all its tokens
            return ids.view(*ids.shape, *[1] * (len(shape) - ids.dim())).expand(shape)
        if ids.dim() == 1 and ids.numel() == math.prod(shape):
            return ids.view(shape)
        raise ValueError(
            f"route_ids: got shape {list(ids.shape)}, expected that of the tokens of {what}, {list(shape)}, or "
            f"[{math.prod(shape)}]"
        )


def _by_route(values: Tensor, belongs: Tensor) -> Tensor:
    """Sums of values `[*tokens]` by route, `[R]`: a sum for each, as adding by index has no fixed order on a GPU."""
    return torch.where(belongs, values, 0.0).flatten(1).sum(1)


def _joined_rest(squares: Tensor) -> Tensor:  # [K + 2] → [K + 1]
    return torch.cat((squares[:-2], squares[-2:].sum(0, keepdim=True)))
