"""Batches of one label each, as code trains that masks a whole step."""

import random
from typing import Any

from torch.utils.data import Dataset

from gradroute.recipes.batches import Batches


class OneLabel(Dataset[dict[str, Any]]):
    """Batches of documents that all have the same route, the routes in random order.

    Args:
        by_route: the documents of each route.
        tokens: the most tokens of a batch.
        count: how many batches; each route has its share of them, by its tokens.
        seed: the seed of all orders.
    """

    def __init__(self, by_route: list[list[dict[str, Any]]], *, tokens: int, count: int, seed: int) -> None:
        sizes = [sum(len(row["input_ids"]) for row in rows) for rows in by_route]
        second = max(1, round(count * sizes[1] / sum(sizes)))
        self._parts = [
            Batches(rows, tokens=tokens, count=part, seed=seed + number)
            for number, (rows, part) in enumerate(zip(by_route, (count - second, second), strict=True))
        ]
        which = [number for number, part in enumerate(self._parts) for _ in range(len(part))]
        random.Random(seed).shuffle(which)
        seen = [0, 0]
        self._order = []
        for number in which:
            self._order.append((number, seen[number]))
            seen[number] += 1

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number, place = self._order[index]
        return self._parts[number][place]

    @property
    def tokens(self) -> int:
        """The tokens of all batches together."""
        return sum(part.tokens for part in self._parts)
