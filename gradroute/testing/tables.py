"""Tables of every table kind, for the sites of sample calls."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import Tensor

from ..tables import Table

#: The table kinds that `sample(tables=...)` takes, see `make_table`.
TABLE_KINDS = ("ones", "zeros", "blocks", "fractional", "negative", "dense", "sparse", "unused", "broadcast")


def make_table(kind: str, num_routes: int, features: int, seed: int = 0) -> Table:
    """A table of one of TABLE_KINDS.

    "ones"; "zeros"; "blocks", "fractional" and "negative": up to four constant pieces of weights in {0, 1}, {0.5, 1},
    {-0.75, 1}; "dense" and "unused": any feature any of {0, 1, 0.5, -0.75} (for "unused", `sample` gives the last
    route no token); "sparse": the same, three quarters of it 0; "broadcast": the same, `[R, 1]`.
    """
    generator = torch.Generator("cpu").manual_seed(seed)

    def one_of(values: Iterable[float], columns: int) -> Tensor:
        choice = torch.tensor(tuple(values), dtype=torch.float32, device="cpu")
        return choice[torch.randint(len(choice), (num_routes, columns), generator=generator, device="cpu")]

    mixed = (0.0, 1.0, 0.5, -0.75)
    pieces = {"blocks": (0.0, 1.0), "fractional": (0.5, 1.0), "negative": (-0.75, 1.0)}
    if kind in ("ones", "zeros"):
        weights = torch.full((num_routes, features), float(kind == "ones"), dtype=torch.float32, device="cpu")
    elif kind in pieces:
        bounds = [piece * features // 4 for piece in range(5)]
        weights = torch.cat(
            [one_of(pieces[kind], 1).expand(-1, stop - start) for start, stop in pairwise(bounds)],
            dim=1,
        )
    elif kind in ("dense", "unused"):
        weights = one_of(mixed, features)
    elif kind == "sparse":
        weights = one_of((*mixed, *(0.0,) * 8), features)
    elif kind == "broadcast":
        weights = one_of(mixed, 1)
    else:
        raise ValueError(f"tables: got {kind!r}, expected one of {', '.join(TABLE_KINDS)}")
    return Table(weights)
