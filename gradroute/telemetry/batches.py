"""The route ids of a batch, and which tokens belong to which route."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..arguments import as_tensor
from ..routes import Routes

#: Route ids: integers of the shape of the tokens, flat integers, or one integer a sample.
RouteIds = Routes | Tensor | np.ndarray | Sequence[object]


class BatchRoutes:
    """The route ids of one batch, and which tokens belong to which route.

    Args:
        route_ids: the ids.
        num_routes: R, the number of routes.

    Raises:
        TypeError: ids that are no integers.
        ValueError: ids on the CPU that are out of range.
    """

    def __init__(self, route_ids: RouteIds, num_routes: int) -> None:
        if isinstance(route_ids, Routes):
            route_ids = route_ids.ids.view(route_ids.shape)
        try:
            ids = as_tensor(route_ids, "integers in rows of one length")
        except (TypeError, ValueError) as error:
            raise type(error)(f"route_ids: {error}") from None
        if ids.is_floating_point() or ids.is_complex():
            raise TypeError(f"route_ids: got dtype {ids.dtype}, expected an integer or bool dtype")
        self._ids = ids.to(torch.int64)
        self._num_routes = num_routes
        self._belongs: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}
        if ids.device.type == "cpu" and ids.numel():
            least, most = self._ids.aminmax()
            if least < 0 or most >= num_routes:
                raise ValueError(
                    f"route_ids: got ids from {least} to {most}, expected 0 to {num_routes - 1}, one for each name of "
                    "routes"
                )

    def belongs(self, tokens: Sequence[int], device: torch.device, what: str) -> Tensor:
        """Whether each token belongs to each route, bool `[R, *tokens]`.

        Args:
            tokens: the shape of the tokens.
            device: the device of the result.
            what: what has tokens of this shape, for the error where the ids have another.
        """
        shape = tuple(tokens)
        if (shape, device) not in self._belongs:
            ids = self._spread(shape, what).to(device)
            routes = torch.arange(self._num_routes, device=device).view(-1, *[1] * len(shape))
            self._belongs[shape, device] = ids == routes
        return self._belongs[shape, device]

    def counts(self) -> Tensor:
        """How many of the ids are each route's, `[R]`."""
        return self.belongs(self._ids.shape, self._ids.device, "ids").flatten(1).sum(1)

    def _spread(self, shape: tuple[int, ...], what: str) -> Tensor:
        """The ids in the shape of the tokens of `what`."""
        ids = self._ids
        if tuple(ids.shape) == shape[: ids.dim()]:  # a sample's id is the id of all its tokens
            return ids.view(*ids.shape, *[1] * (len(shape) - ids.dim())).expand(shape)
        if ids.dim() == 1 and ids.numel() == math.prod(shape):
            return ids.view(shape)
        raise ValueError(
            f"route_ids: got shape {list(ids.shape)}, expected that of the tokens of {what}, {list(shape)}, or "
            f"[{math.prod(shape)}]"
        )
