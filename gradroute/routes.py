"""Routes: which route each token of a batch takes. One object per batch, shared by every layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from .arguments import as_device, as_tensor, check_bool, check_int, shown
from .fake_tensors import has_data, in_fake_mode
from .transforms import check_batched

MAX_ROUTES = 32768

# What a Routes holds beside what was derived of it.
_FIELDS = ("ids", "num_routes", "shape", "strength", "order", "counts", "host_counts", "in_order")

Derived = TypeVar("Derived")

_WIDE_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)  # torch compares these only after a cast


class Routes:
    """The route of every token of one batch, and all that kernels derive from it. Made by `Routes.of`.

    A plain class on purpose: FSDP2 rebuilds dataclass arguments and casts their fields.

    Attributes:
        ids: `[T]` int32, contiguous: the tokens' routes in row-major order of `shape`.
        num_routes: R.
        shape: the tokens' shape, `[*tokens]`.
        strength: None, 0-dim, or `[T]`: floating point, on the device of `ids`.
        order: `[T]` int32: the tokens sorted by route, stable.
        counts: `[R]` int32 on the device of `ids`: tokens per route.
        host_counts: the same as a tuple, where the ids came from the host; else None.
        in_order: whether the tokens are known, on the host, to be sorted already.
    """

    def __init__(
        self,
        ids: Tensor,  # [T] int32
        num_routes: int,
        shape: tuple[int, ...],
        strength: Tensor | None,
        host_counts: tuple[int, ...] | None = None,
    ) -> None:
        self.ids = ids
        self.num_routes = num_routes
        self.shape = shape
        self.strength = strength
        ordered, order = torch.sort(ids, stable=True)
        self.order = order.to(torch.int32)
        # searchsorted, not bincount: bincount waits for the device to learn its output's size.
        bounds = torch.arange(num_routes + 1, dtype=torch.int32, device=ids.device)
        self.counts = torch.searchsorted(ordered, bounds, out_int32=True).diff()
        on_host = ids.device.type == "cpu" and not torch.compiler.is_compiling() and has_data(ids)
        if host_counts is None and on_host:
            host_counts = tuple(self.counts.tolist())
        self.host_counts = host_counts
        self.in_order = on_host and torch.equal(ordered, ids)
        self._derived: dict[Any, Any] = {}

    @staticmethod
    def of(
        ids: Any, num_routes: int, strength: Tensor | float | None = None, validate: bool = True
    ) -> Routes:
        """Routes of one batch.

        Args:
            ids: any integer or bool dtype, shaped `[*tokens]` like the activations (usually `[B, S]`) or
                flat `[T]`; every id in `[0, num_routes)`.
            num_routes: R, 1 to 32768.
            strength: None, a number, a 0-dim tensor, or floating point `[*tokens]`: how far a token's mask
                goes from route 0's row (0) to its own route's (1). Any finite number: 2 goes as far again beyond
                the route's own row, -1 as far the other way. A 0-dim tensor of dtype fp32 or fp64 on the
                ids' device is kept, not copied: writing to it in place changes the strength of later backwards
                without recompilation.
            validate: check ranges and finiteness. This waits for the device once; under tracing it becomes
                `torch._assert_async`, and under a FakeTensorMode, where ids have no values, nothing. False skips it:
                ids out of range are then undefined behaviour.

        Raises:
            TypeError: ids are not integers, num_routes is not an int, or strength is not floating point.
            ValueError: ids out of range; strength of another shape or device, or not finite.
            RuntimeError: torch.func.vmap has batched the ids or the strength.
        """
        if type(num_routes) is not int or not 1 <= num_routes <= MAX_ROUTES:
            num_routes = check_num_routes(num_routes)  # apart: under tracing, NumPy is not looked at
        if not isinstance(ids, Tensor):
            try:
                ids = as_tensor(ids, "integers in rows of one length")
            except (TypeError, ValueError) as error:
                raise type(error)(f"ids: {error}") from None
        _check_dense("ids", ids)
        if not torch.compiler.is_compiling():
            check_batched(("ids", ids), ("strength", strength))
            ids = in_fake_mode(ids)
        if ids.is_floating_point() or ids.is_complex():
            raise TypeError(f"ids: got dtype {ids.dtype}, expected an integer or bool dtype")
        if ids.dtype in _WIDE_UNSIGNED:
            ids = ids.to(torch.int64)
        strength = _checked_strength(strength, ids)
        check_bool("validate", validate)
        if validate:
            _validate(ids, num_routes, strength)
        # A copy: the order and the counts that follow must not be those of ids that somebody writes to.
        flat = ids.reshape(-1).to(torch.int32, copy=True).contiguous()
        if strength is not None and strength.dim() > 0:
            strength = strength.reshape(-1).contiguous()
        return Routes(flat, num_routes, tuple(ids.shape), strength)

    @property
    def device(self) -> torch.device:
        """Where the ids are."""
        return self.ids.device

    def __len__(self) -> int:
        """T, the number of tokens."""
        return self.ids.shape[0]

    def __getitem__(self, index: Any) -> Routes:
        """The routes of a part of the batch: `index` indexes the tokens' shape, as in `activations[index]`."""
        return self._like(self._shaped(self.ids)[index], index)

    def select(self, index: Tensor) -> Routes:
        """The routes of the tokens at `index`: int `[n]` into, or bool `[T]` over, the flattened tokens."""
        self._check_index(index)
        flat = self.reshape(-1)
        return flat[index]

    def _check_index(self, index: object) -> None:
        if not isinstance(index, Tensor):
            raise TypeError(f"index: got {shown(index)}, expected a tensor of integers or bools")
        if index.is_floating_point() or index.is_complex() or index.dim() != 1:
            raise TypeError(
                f"index: got {index.dtype} of shape {list(index.shape)}, expected integers [n] or bools [{len(self)}]"
            )
        if index.dtype == torch.bool and len(index) != len(self):
            raise ValueError(f"index: got {len(index)} bools, expected {len(self)}, one for each token")
        if index.device.type == "cpu" and index.dtype != torch.bool and not torch.compiler.is_compiling():
            outside = (index < -len(self)) | (index >= len(self))
            if outside.any():
                raise ValueError(
                    f"index: got {int(index[outside][0])}, expected integers from {-len(self)} to {len(self) - 1}"
                )

    def pad(self, n: int) -> Routes:
        """`n` more tokens of route 0 (strength 1) at the end of the last token dimension."""
        n = check_int("n", n, 0)
        ids = torch.nn.functional.pad(self._shaped(self.ids), (0, n))
        strength = self.strength
        if strength is not None and strength.dim() > 0:
            strength = torch.nn.functional.pad(self._shaped(strength), (0, n), value=1.0).reshape(-1)
        return Routes(ids.reshape(-1), self.num_routes, tuple(ids.shape), strength)

    def repeat(self, n: int) -> Routes:
        """Each token `n` times, in a new last dimension `[*tokens, n]`: a token's heads, say. Made once a batch."""
        if type(n) is not int or n < 0:
            n = check_int("n", n, 0)
        return self.derived(("repeat", n), lambda: self._repeated(n))

    def _repeated(self, n: int) -> Routes:
        ids = self.ids.repeat_interleave(n)
        strength = self.strength
        if strength is not None and strength.dim() > 0:
            strength = strength.repeat_interleave(n)
        return Routes(ids, self.num_routes, (*self.shape, n), strength)

    def reshape(self, *shape: Any) -> Routes:
        """The same tokens in another shape, given as to Tensor.reshape; order and counts are not derived again."""
        return self._copy(shape=tuple(self.ids.reshape(*shape).shape))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Routes:
        """The routes on another device; host counts stay known.

        Raises:
            ValueError: they are on the meta device, where they have no values.
        """
        device = as_device("device", device)
        check_bool("non_blocking", non_blocking)
        if device == self.device:
            return self
        if self.ids.is_meta:
            raise ValueError(f"device: got {device}, expected meta: routes on the meta device have no values")
        if self.strength is not None and self.strength.dim() == 0:
            # A 0-dim strength may be written to, so no copy of it is kept.
            return self._moved(device, non_blocking)
        return self.derived(("device", device), lambda: self._moved(device, non_blocking))

    def _moved(self, device: torch.device, non_blocking: bool) -> Routes:
        tensors = {
            name: value.to(device, non_blocking=non_blocking)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return self._copy(**tensors)

    def alias(self) -> Routes:
        """Another object of the same routes, which shares all that was derived of them."""
        return self._copy(_derived=self._derived)

    def _at(self, tokens: slice | Tensor) -> Routes:
        """The ids and strength of some of the flattened tokens, for kernels: nothing else is derived again."""
        strength = self.strength
        if strength is not None and strength.dim() > 0:
            strength = strength[tokens]
        ids = self.ids[tokens]
        derived = {"order": None, "counts": None, "host_counts": None, "in_order": False}
        return self._copy(ids=ids, strength=strength, shape=tuple(ids.shape), **derived)

    def _crossed(self, tokens: Tensor, groups: Tensor, count: int) -> Routes:
        """Routes of the flattened tokens at `tokens`, which are in groups: `id * count + group`, with their strength.

        For kernels and tables `[R * count, F]`; nothing else is derived again.

        Args:
            tokens: `[n]`, integers.
            groups: `[n]`, each one's group, from 0 to count - 1.
            count: the number of groups.
        """
        routes = self._at(tokens)
        ids = (routes.ids * count + groups).to(torch.int32)
        return routes._copy(ids=ids, num_routes=self.num_routes * count)

    def _of_ids(self, ids: Tensor, num_routes: int) -> Routes:
        """Other tokens of these ids `[n]` int32, without strength, for kernels: nothing is derived of them."""
        derived = {"order": None, "counts": None, "host_counts": None, "in_order": False}
        return self._copy(ids=ids, num_routes=num_routes, shape=tuple(ids.shape), strength=None, **derived)

    def derived(self, key: Any, derive: Callable[[], Derived]) -> Derived:
        """The result of `derive`, kept under `key` for the batch's other layers.

        A traced program may not write to a cache: there it is made again, and the compiler removes what is the same.
        """
        if torch.compiler.is_compiling():
            return derive()
        if key not in self._derived:
            self._derived[key] = derive()
        return self._derived[key]

    def derived_from(
        self, key: Any, tensors: tuple[Tensor | None, ...], derive: Callable[[], Derived]
    ) -> Derived:
        """The result of `derive`, which reads these tensors, kept under `key` as long as they come as they are now.

        What other tensors give takes its place, and so does what these give after they were written to: nothing piles
        up. It is made again in every call where nobody can tell whether it still holds: in traced code, under the
        capture of a graph, which is replayed with other values in the same tensors, and of tensors made under
        inference_mode, whose changes nobody counts.
        """
        if torch.compiler.is_compiling() or not all(map(_counts_changes, tensors)):
            return derive()
        versions = [None if tensor is None else tensor._version for tensor in tensors]
        held = self._derived.get(key)
        if held is None or held[1] != versions or not all(map(_is_same, held[0], tensors)):
            held = self._derived[key] = (tensors, versions, derive())
        found: Derived = held[2]
        return found

    def check(self, x: Tensor, name: str) -> None:
        """Raises unless the activation `x [*tokens, F]` has these tokens, on this device."""
        tokens = x.shape[:-1]
        if tokens != self.shape or x.device != self.ids.device:
            self.check_tokens(tokens, x, name, "leading shape")

    def check_tokens(self, tokens: Sequence[int], x: Tensor, name: str, what: str = "tokens") -> None:
        """Raises unless `tokens`, which `what` of the tensor x says, are of these routes' shape, on their device."""
        if tuple(tokens) != self.shape and self.shape != (math.prod(tokens),):
            flat = "" if len(tokens) == 1 else f" or [{math.prod(tokens)}]"
            raise ValueError(
                f"routes: got ids of shape {list(self.shape)}, expected {name}'s {what} {list(tokens)}{flat} "
                f"({name} is {list(x.shape)})"
            )
        if x.device != self.device:
            raise ValueError(
                f"routes: got ids on {self.device}, expected {name}'s device {x.device}; "
                f"move them once per batch with routes.to({str(x.device)!r})"
            )

    def _shaped(self, flat: Tensor) -> Tensor:
        return flat.view(self.shape)

    def _like(self, ids: Tensor, index: Any) -> Routes:
        strength = self.strength
        if strength is not None and strength.dim() > 0:
            strength = self._shaped(strength)[index].reshape(-1).contiguous()
        return Routes(ids.reshape(-1).contiguous(), self.num_routes, tuple(ids.shape), strength)

    def _copy(self, **changes: Any) -> Routes:
        other = object.__new__(Routes)
        for name in _FIELDS:  # one by one: Dynamo of torch 2.11 does not follow a union of dicts
            setattr(other, name, changes[name] if name in changes else getattr(self, name))
        other._derived = changes.get("_derived", {})
        return other

    def __repr__(self) -> str:
        counts = "" if self.host_counts is None else f", counts={list(self.host_counts)}"
        strength = "" if self.strength is None else f", strength={list(self.strength.shape)}"
        return f"Routes({list(self.shape)}, num_routes={self.num_routes}{counts}{strength}, {self.device})"


def _counts_changes(tensor: Tensor | None) -> bool:
    """Whether the version of a tensor says that it is as it was."""
    if tensor is None:
        return True
    return not (tensor.is_inference() or (tensor.is_cuda and torch.cuda.is_current_stream_capturing()))


def _is_same(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two tensors are one, or the same view of one: a model's layers may each make a view of its mask."""
    if one is other or one is None or other is None:
        return one is other
    return (
        one._base is not None
        and one._base is other._base
        and one.dtype == other.dtype
        and one.shape == other.shape
        and one.stride() == other.stride()
        and one.storage_offset() == other.storage_offset()
    )


def check_num_routes(num_routes: Any) -> int:
    """`num_routes` as an int of Python; raises unless it is a number of routes."""
    return int(check_int("num_routes", num_routes, 1, MAX_ROUTES))


def _check_dense(name: str, tensor: Tensor) -> None:
    """Raises TypeError for a sparse, a nested or a quantised tensor."""
    if tensor.is_quantized:
        raise TypeError(f"{name}: got dtype {tensor.dtype}, expected an ordinary dense tensor")
    if tensor.is_nested or tensor.layout is not torch.strided:
        kind = "nested tensor" if tensor.is_nested else f"tensor of layout {tensor.layout}"
        raise TypeError(f"{name}: got a {kind}, expected an ordinary dense tensor")


def _checked_strength(strength: Tensor | float | None, ids: Tensor) -> Tensor | None:
    if strength is None:
        return None
    if not isinstance(strength, Tensor):
        try:
            strength = as_tensor(strength, "a number or numbers of the ids' shape")
        except (TypeError, ValueError) as error:
            raise type(error)(f"strength: {error}") from None
        if strength.is_complex() or strength.dtype == torch.bool:
            raise TypeError(f"strength: got dtype {strength.dtype}, expected real numbers")
        strength = in_fake_mode(strength).to(dtype=torch.float32, device=ids.device, copy=True)
    _check_dense("strength", strength)
    if not strength.is_floating_point():
        raise TypeError(f"strength: got dtype {strength.dtype}, expected floating point")
    if strength.dim() > 0 and strength.shape != ids.shape:
        raise ValueError(
            f"strength: got shape {list(strength.shape)}, expected the ids' {list(ids.shape)} or 0-dim"
        )
    if strength.device != ids.device:
        raise ValueError(
            f"strength: got a tensor on {strength.device}, expected the ids' device {ids.device}"
        )
    strength = strength.detach()
    return strength if strength.dtype == torch.float64 else strength.to(torch.float32)


def _validate(ids: Tensor, num_routes: int, strength: Tensor | None) -> None:
    if ids.is_meta:
        return
    valid = ((ids >= 0) & (ids < num_routes)).all()
    finite = None if strength is None else torch.isfinite(strength).all()
    if torch.compiler.is_compiling():
        torch._assert_async(
            valid, f"ids: some are out of range, expected 0 <= id < num_routes = {num_routes}"
        )
        if finite is not None:
            torch._assert_async(finite, "strength: some values are not finite")
        return
    if not has_data(valid):
        return
    if not bool(valid if finite is None else valid & finite):
        _raise_invalid(ids, num_routes, strength)


def _raise_invalid(ids: Tensor, num_routes: int, strength: Tensor | None) -> None:
    wrong = (ids < 0) | (ids >= num_routes)
    if wrong.any():
        values = ids[wrong].unique().tolist()
        shown = ", ".join(str(value) for value in values[:5]) + (", ..." if len(values) > 5 else "")
        raise ValueError(
            f"ids: got {int(wrong.sum())} of {ids.numel()} out of range, the first at "
            f"{wrong.nonzero()[0].tolist()}, values {shown}; expected 0 <= id < num_routes = {num_routes}"
        )
    assert strength is not None
    wrong = ~torch.isfinite(strength)
    raise ValueError(
        f"strength: got {int(wrong.sum())} of {strength.numel()} values that are not finite, "
        f"the first at {wrong.nonzero()[0].tolist()}; expected finite numbers"
    )
