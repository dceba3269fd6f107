"""Tables: what a token of each route does to each feature of one site."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, Union

import numpy as np
import torch
from torch import Tensor

# A table of more constant pieces than this is handled as dense: beyond it, a pass per piece costs more
# than one pass with a gathered mask.
MAX_SEGMENTS = 16

# Tables with more distinct weights leave `values` empty.
MAX_VALUES = 8

#: Features of a site: a slice, indices, or a boolean for each.
Features = slice | Sequence[int] | Tensor | np.ndarray

TableLike = Union["Table", Tensor, np.ndarray, Sequence[Sequence[float]]]


class Table:
    """Weights `[R, F]` (or `[R, 1]`, broadcast over features): row r masks the gradient of tokens of route r.

    Host fp32 constants, immutable: checked and classified once, copied to a device when first used there.
    They carry no gradient, are not part of a state_dict and are untouched by a module's `.to(dtype)`.
    Route 0 is the base route, from which a strength interpolates.

    Attributes:
        weights: `[R, F]` or `[R, 1]`, fp32, on the CPU.
        kind: "ones" (the site costs nothing), "blocks" (piecewise constant along features) or "dense".
        segments: for "blocks", the maximal runs `(start, stop)` of features on which every row is constant,
            without those that are one in every row: nothing changes there.
        density: the share of weights that are not zero.
        binary: whether every weight is 0 or 1.
        values: the different weights in ascending order, if they are at most MAX_VALUES; else none.

    Raises:
        TypeError: `weights` are not real numbers.
        ValueError: `weights` are not two-dimensional, are empty, or are not finite.
    """

    __slots__ = ("__weakref__", "_copies", "binary", "density", "kind", "segments", "values", "weights")

    def __init__(self, weights: TableLike) -> None:
        self.weights: Tensor = _host_weights(weights.weights if isinstance(weights, Table) else weights)
        segments = _segments(self.weights)
        changed = [bool((self.weights[:, start] != 1).any()) for start, _ in segments[: MAX_SEGMENTS + 1]]
        self.segments: tuple[tuple[int, int], ...] = ()
        if len(segments) > MAX_SEGMENTS:
            self.kind = "dense"
        elif not any(changed):
            self.kind = "ones"
        else:
            self.kind = "blocks"
            self.segments = tuple(
                segment for segment, changes in zip(segments, changed, strict=True) if changes
            )
        self.density = float((self.weights != 0).float().mean())
        self.binary = bool(((self.weights == 0) | (self.weights == 1)).all())
        values = self.weights.unique().tolist()
        self.values: tuple[float, ...] = tuple(values) if len(values) <= MAX_VALUES else ()
        self._copies: dict[torch.device, Tensor] = {}

    @classmethod
    def of(cls, weights: TableLike, name: str = "table") -> Table:
        """`weights` as a Table: itself when it is one, else converted; errors name the argument `name`."""
        if isinstance(weights, Table):
            return weights
        if torch.compiler.is_compiling():
            raise TypeError(
                f"{name}: got a {type(weights).__name__} inside compiled code, expected a gradroute.Table; "
                "make the Table outside the compiled function"
            )
        try:
            return cls(weights)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from None

    @property
    def num_routes(self) -> int:
        """R, the number of rows."""
        return self.weights.shape[0]

    @property
    def features(self) -> int:
        """F, the number of columns; 1 is broadcast over any number of features."""
        return self.weights.shape[1]

    def on(self, device: torch.device) -> Tensor:
        """The weights on `device`, fp32; copied once per device."""
        if device.type == "cpu":
            return self.weights
        copy = self._copies.get(device)
        if copy is None:
            copy = self.weights.to(device)
            # A traced program may not write to a cache; layers fill it when they are made or moved.
            if not torch.compiler.is_compiling():
                self._copies[device] = copy
        return copy

    def __deepcopy__(self, memo: dict[int, Any]) -> Table:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Table, (self.weights.numpy(),)  # an array, which torch.load's map_location leaves alone

    def __repr__(self) -> str:
        rows, features = self.weights.shape
        return f"Table([{rows}, {features}], {self.kind})"


def as_tensor(values: object, expected: str) -> Tensor:
    """A tensor as it is, detached; numbers of any other kind as a tensor on the CPU.

    Raises:
        TypeError: `values` are not numbers; the message says what was `expected`.
        ValueError: likewise, where they are not of one shape.
    """
    # torch.as_tensor would move a tensor to an ambient device, such as meta while a model is being built.
    if isinstance(values, Tensor):
        return values.detach()
    try:
        return torch.as_tensor(values, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        kind = ValueError if isinstance(error, ValueError) else TypeError
        raise kind(f"got {reprlib.repr(values)}, expected {expected}: {error}") from None


def _host_weights(weights: object) -> Tensor:  # [R, F]
    tensor = as_tensor(weights, "numbers in rows of one length, [routes, features] or [routes, 1]")
    if tensor.is_meta:
        raise ValueError("got weights on the meta device, which have no values; expected values")
    if tensor.is_complex():
        raise TypeError(f"got weights of dtype {tensor.dtype}, expected real numbers")
    if tensor.dim() != 2 or 0 in tensor.shape:
        raise ValueError(
            f"got weights of shape {list(tensor.shape)}, expected [routes, features] or [routes, 1]"
        )
    host = tensor.to(device="cpu", dtype=torch.float32, copy=True).contiguous()
    finite = torch.isfinite(host)
    if not finite.all():
        row, feature = (~finite).nonzero()[0].tolist()
        raise ValueError(
            f"got {int((~finite).sum())} weights that are not finite in fp32, the first at [{row}, {feature}] "
            f"({tensor[row, feature].item()}); expected finite numbers"
        )
    return host


def _segments(weights: Tensor) -> tuple[tuple[int, int], ...]:
    changes = (weights[:, 1:] != weights[:, :-1]).any(0).nonzero().flatten() + 1
    starts = [0, *changes.tolist()]
    stops = [*changes.tolist(), weights.shape[1]]
    return tuple(zip(starts, stops, strict=True))


def localize(
    num_routes: int,
    features: int,
    where: Mapping[int, Features],
    on: float = 1.0,
    off: float = 0.0,
) -> Table:
    """A table that confines each named route to its features (Cloud et al. 2024, arXiv 2410.04332, section 3).

    Args:
        num_routes: R, the number of routes.
        features: F, the site's width.
        where: route → the features (a slice, indices or booleans) where its tokens weigh `on`; elsewhere they weigh
            `off`. Rows of routes not named are ones.
        on: weight inside.
        off: weight outside.

    Raises:
        TypeError: features are neither a slice, integers nor booleans.
        ValueError: a route is not in `[0, num_routes)`, an index not in `[-features, features)`, a weight not finite.
    """
    for name, weight in (("on", on), ("off", off)):
        if not math.isfinite(weight):
            raise ValueError(f"{name}: got {weight}, expected a finite weight")
    weights = torch.ones(num_routes, features, device="cpu")
    for route, features_of_route in where.items():
        if not isinstance(route, int | np.integer) or not 0 <= route < num_routes:
            raise ValueError(f"where: got route {route!r}, expected 0 <= route < num_routes = {num_routes}")
        weights[route] = off
        weights[route, indices_of(features_of_route, features, f"where[{route}]")] = on
    return Table(weights)


def indices_of(chosen: Features, features: int, name: str) -> slice | Tensor:
    """Features as an index of a row: slices as they are, indices and booleans checked.

    Raises:
        TypeError: they are not what Features may be; errors name the argument `name`.
        ValueError: an index is not in `[-features, features)`, or there are more or fewer booleans than features.
    """
    if isinstance(chosen, slice):
        return chosen
    try:
        indices = as_tensor(chosen, "a slice, indices, or a boolean for each feature").flatten()
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None
    if indices.is_meta:
        raise ValueError(f"{name}: got indices on the meta device, which have no values; expected values")
    indices = indices.cpu()
    if indices.dtype == torch.bool:
        if len(indices) != features:
            raise ValueError(
                f"{name}: got {len(indices)} booleans, expected one for each of {features} features"
            )
        return indices
    if indices.numel() and (indices.is_floating_point() or indices.is_complex()):
        raise TypeError(f"{name}: got indices of dtype {indices.dtype}, expected integers")
    outside = (indices < -features) | (indices >= features)
    if outside.any():
        raise ValueError(
            f"{name}: got index {int(indices[outside][0])}, expected -{features} <= index < {features} = features"
        )
    return indices.long()


def heads(weights: TableLike, head_dim: int) -> Table:
    """A per-head table `[R, H]` expanded to the features of its heads, `[R, H * head_dim]`.

    Feature `h * head_dim + d` of head h gets the weight of head h, as projections of attention lay them out.
    """
    if head_dim < 1:
        raise ValueError(f"head_dim: got {head_dim}, expected a positive number of features per head")
    return Table(Table.of(weights, "weights").weights.repeat_interleave(head_dim, dim=1))


def concatenate(parts: Sequence[Table | None], widths: Sequence[int]) -> Table | None:
    """Tables of adjacent features as one, `[R, sum(widths)]`; None is ones, and all of None is None.

    Args:
        parts: of each part's features its table, `[R, width]` or `[R, 1]`, or None.
        widths: each part's number of features.
    """
    num_routes = next((part.num_routes for part in parts if part is not None), None)
    if num_routes is None:
        return None
    weights = [
        torch.ones(num_routes, width, device="cpu")
        if part is None
        else part.weights.expand(num_routes, width)
        for part, width in zip(parts, widths, strict=True)
    ]
    return Table(torch.cat(weights, dim=1))
