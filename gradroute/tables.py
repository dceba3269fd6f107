"""Tables: what a token of each route does to each feature of one site."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Union

import numpy as np
import torch
from torch import Tensor

from .arguments import (
    as_device,
    as_tensor,
    check_int,
    check_is,
    check_number,
    check_values,
    is_int,
    ordinary_tensors,
)
from .fake_tensors import in_fake_mode

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

    Host fp32 constants, immutable: checked and classified once, copied to a device when first used there. They are the
    fp32 of what is given, whatever the default dtype and device are, and ordinary tensors also where they are made
    under autocast, torch.inference_mode, a FakeTensorMode or a transform of torch.func.
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
        least: the smallest weight.
        digest: the same for tables of the same weights, and different for others.

    Raises:
        TypeError: `weights` are not real numbers.
        ValueError: `weights` are not two-dimensional, are empty, are not finite, or have no values, as on meta.
    """

    __slots__ = (
        "__weakref__",
        "_copies",
        "binary",
        "density",
        "digest",
        "kind",
        "least",
        "segments",
        "values",
        "weights",
    )

    def __init__(self, weights: TableLike) -> None:
        with ordinary_tensors():
            self.weights: Tensor = _host_weights(weights.weights if isinstance(weights, Table) else weights)
            self._classify()
        self._copies: dict[torch.device, Tensor] = {}

    def _classify(self) -> None:
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
        self.least: float = values[0]
        unsigned = self.weights + 0.0  # without negative zeros
        self.digest = hashlib.sha256(
            repr(self.weights.shape).encode() + unsigned.numpy().tobytes()
        ).hexdigest()

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
        if type(device) is not torch.device:
            device = as_device("device", device)
        weights = in_fake_mode(self.weights)
        if weights is not self.weights:
            return weights.to(device)
        if device.type == "cpu":
            return weights
        copy = self._copies.get(device)
        if copy is not None:
            return copy
        # A traced program may not write to a cache; layers fill it when they are made or moved.
        if torch.compiler.is_compiling():
            return self.weights.to(device)
        with ordinary_tensors():
            copy = self._copies[device] = self.weights.to(device)
        return copy

    def __deepcopy__(self, memo: dict[int, Any]) -> Table:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Table, (self.weights.numpy(),)  # an array, which torch.load's map_location leaves alone

    def __repr__(self) -> str:
        rows, features = self.weights.shape
        return f"Table([{rows}, {features}], {self.kind})"


def _host_weights(weights: object) -> Tensor:  # [R, F]
    tensor = as_tensor(weights, "weights, numbers in rows of one length, [routes, features] or [routes, 1]")
    check_values(tensor, "weights")
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
            `off`. `[5]` is the one feature of index 5, `slice(5)` are the first five, `slice(-5, None)` the last; a
            bare 5 could be any of these, and is refused. Rows of routes not named are ones.
        on: weight inside.
        off: weight outside.

    Raises:
        TypeError: features are neither a slice, integers nor booleans; a number is of another kind.
        ValueError: a route is not in `[0, num_routes)`, an index not in `[-features, features)`, a weight not finite; a
            slice lies outside of the features, or chooses none of them (only `slice(0)` and `[]` say that).
    """
    num_routes = check_int("num_routes", num_routes, 1)
    features = check_int("features", features, 1)
    on, off = check_number("on", on), check_number("off", off)
    if not isinstance(where, Mapping):
        raise TypeError(f"where: got a {type(where).__name__}, expected a dict {{route: features}}")
    weights = np.ones((num_routes, features))
    for route, features_of_route in where.items():
        if not is_int(route):
            raise TypeError(f"where: got route {route!r}, expected an int")
        if not 0 <= route < num_routes:
            raise ValueError(f"where: got route {route!r}, expected 0 <= route < num_routes = {num_routes}")
        weights[route] = off
        weights[route, indices_of(features_of_route, features, f"where[{route}]")] = on
    return Table(weights)


def indices_of(chosen: Features, features: int, name: str) -> list[int]:
    """The indices of features, each in `[0, features)`.

    Nothing is chosen by `slice(0)`, by an empty list and by booleans that are all False, but by no other slice: one
    that lies outside of the features, or ends before it starts, is a mistake.

    Raises:
        TypeError: they are not what Features may be; errors name the argument `name`.
        ValueError: an index is not in `[-features, features)`, a bound of a slice not in `[-features, features]`, a
            slice chooses nothing, or there are more or fewer booleans than features.
    """
    if isinstance(chosen, slice):
        _check_slice(name, chosen)
        return _indices_of_slice(chosen, features, name)
    indices = _as_indices(name, chosen)
    listed = indices.tolist()
    if indices.dtype == torch.bool:
        if len(listed) != features:
            raise ValueError(
                f"{name}: got {len(listed)} booleans, expected one for each of {features} features"
            )
        return [index for index, is_chosen in enumerate(listed) if is_chosen]
    for index in listed:
        if not -features <= index < features:
            raise ValueError(
                f"{name}: got index {index}, expected -{features} <= index < {features} = features"
            )
    return [index % features for index in listed]


def check_features(name: str, chosen: Any) -> None:
    """Raises where features are wrong whatever their number is: of another kind, or none; see `indices_of`."""
    if isinstance(chosen, slice):
        _check_slice(name, chosen)
    elif not _as_indices(name, chosen).numel():
        raise ValueError(f"{name}: got none, expected at least one")


def _as_indices(name: str, chosen: Features) -> Tensor:  # [n] integers or booleans
    try:
        with ordinary_tensors():
            indices = as_tensor(chosen, "a slice, indices, or a boolean for each feature")
            check_values(indices, "indices")
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None
    if indices.dim() == 0:
        raise TypeError(
            f"{name}: got {indices.item()!r}, expected a slice or indices: [i] is one feature, slice(n) the first n"
        )
    if indices.dim() > 1:
        raise ValueError(f"{name}: got indices of shape {list(indices.shape)}, expected one dimension")
    if indices.numel() and (indices.is_floating_point() or indices.is_complex()):
        raise TypeError(f"{name}: got indices of dtype {indices.dtype}, expected integers")
    return indices


def _check_slice(name: str, chosen: slice) -> None:
    if not all(bound is None or is_int(bound) for bound in (chosen.start, chosen.stop, chosen.step)):
        raise TypeError(f"{name}: got {chosen}, expected a slice of integers")
    if chosen.step == 0:
        raise ValueError(f"{name}: got {chosen}, expected a step that is not 0")


def _indices_of_slice(chosen: slice, features: int, name: str) -> list[int]:
    if any(not -features <= (bound or 0) <= features for bound in (chosen.start, chosen.stop)):
        raise ValueError(f"{name}: got {chosen}, expected bounds from -{features} to {features} = features")
    indices = list(range(features)[chosen])
    if not indices and (chosen.start or 0, chosen.stop) != (0, 0):
        raise ValueError(
            f"{name}: got {chosen}, which chooses none of {features} features, expected at least one"
        )
    return indices


def heads(weights: TableLike, head_dim: int) -> Table:
    """A per-head table `[R, H]` expanded to the features of its heads, `[R, H * head_dim]`.

    Feature `h * head_dim + d` of head h gets the weight of head h, as projections of attention lay them out.
    """
    head_dim = check_int("head_dim", head_dim, 1)
    of_heads = Table.of(weights, "weights").weights
    with ordinary_tensors():
        return Table(of_heads.repeat_interleave(head_dim, dim=1))


def concatenate(parts: Sequence[Table | None], widths: Sequence[int]) -> Table | None:
    """Tables of adjacent features as one, `[R, sum(widths)]`; None is ones, and all of None is None.

    Args:
        parts: of each part's features its table, `[R, width]` or `[R, 1]`, or None.
        widths: each part's number of features.

    Raises:
        TypeError: a part that is no Table, a width that is no integer.
        ValueError: another number of widths than of parts, tables of different numbers of routes, or one that has
            not its part's width.
    """
    check_is("parts", parts, (list, tuple), "a list of tables or None")
    check_is("widths", widths, (list, tuple), "a list of numbers of features")
    if len(widths) != len(parts):
        raise ValueError(f"widths: got {len(widths)}, expected {len(parts)}, one for each of parts")
    num_routes = None
    for i, (part, width) in enumerate(zip(parts, widths, strict=True)):
        width = check_int(f"widths[{i}]", width, 0)
        if part is None:
            continue
        check_is(f"parts[{i}]", part, Table, "a gradroute.Table or None")
        num_routes = part.num_routes if num_routes is None else num_routes
        if part.num_routes != num_routes or part.features not in (1, width):
            raise ValueError(
                f"parts[{i}]: got a table [{part.num_routes}, {part.features}], expected [{num_routes}, {width}] or "
                f"[{num_routes}, 1]"
            )
    if num_routes is None:
        return None
    with ordinary_tensors():
        weights = [
            torch.ones(num_routes, width, dtype=torch.float32, device="cpu")
            if part is None
            else part.weights.expand(num_routes, width)
            for part, width in zip(parts, widths, strict=True)
        ]
        return Table(torch.cat(weights, dim=1))
