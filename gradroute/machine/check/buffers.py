"""Tensors surrounded by guards: what a kernel reads outside of them shows in its results, and what it writes in them.

Inputs are copied into larger memory whose other elements, those between rows too, are guards; so is what own kernels
are given for their results, because launchers allocate through the functions of `ALLOCATING`. A call is made twice.
In the first one guards are NaN, which no result survives. In the second they are a finite number, which a product
changes, because a NaN that is read, multiplied and written back keeps its bits. Tensors have guards of different bits,
so that those of one show when they are copied into those of another.

It finds what lies within GUARD elements of a tensor. It does not find what is read and then thrown away, nor what is
read of integers, whose guards are 0, because an id that no route has would end the process; nor what an own kernel does
around memory that torch allocated, such as that of a product which it masks in place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

GUARD = 4096  # elements on either side
#: 16 bits of which any number of copies are, in every dtype, a NaN; or a finite number.
NAN, FINITE = 0x7FF9, 0x4D51
# So many tensors have guards of their own.
KINDS_OF_GUARDS = 7
#: The functions of torch through which launchers allocate, by where they are.
ALLOCATING: tuple[tuple[Any, str], ...] = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "zeros"),
    (torch, "zeros_like"),
    (torch.Tensor, "new_empty"),
    (torch.Tensor, "new_zeros"),
)
_empty = torch.empty


class Guarded(NamedTuple):
    """A tensor in the midst of guards.

    Attributes:
        name: what it is.
        tensor: itself.
        memory: all of it, in the tensor's dtype `[n]`.
        outside: which of the memory's elements are guards, bool `[n]`.
        before: the memory as it was.
        is_input: whether its own elements are only read.
    """

    name: str
    tensor: Tensor
    memory: Tensor
    outside: Tensor
    before: Tensor
    is_input: bool

    def written(self) -> str | None:
        """Which guards were written to, or elements of what is only read, in words; None where none was."""
        changed = (_lanes(self.memory) != _lanes(self.before)).any(1)
        if self.is_input and (changed & ~self.outside).any():
            return f"{int((changed & ~self.outside).sum())} elements of {self.name} were written to"
        where = (changed & self.outside).nonzero()[:, 0]
        if not len(where):
            return None
        inside = (~self.outside).nonzero()[:, 0]
        first, last = (int(inside[0]), int(inside[-1])) if len(inside) else (GUARD, GUARD)
        at = int(where[0])
        place = f"{first - at} before it" if at < first else f"{at - last} behind it"
        place = "between its rows" if first < at < last else place
        return (
            f"{len(where)} elements outside of {self.name} {list(self.tensor.shape)} {self.tensor.dtype} were written "
            f"to, the first {place}"
        )


class Guards:
    """Everything that one call is surrounded by.

    Args:
        bits: NAN or FINITE.
        shift: how many elements every tensor lies behind an address that is a multiple of 64 bytes.
        changing: the names of the tensors that the call changes.
    """

    def __init__(self, bits: int, shift: int = 0, changing: Collection[str] = ()) -> None:
        self.bits, self.shift, self.changing = bits, shift, changing
        self.held: list[Guarded] = []

    def hold(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of the same values and strides in the midst of guards; those of integers are 0."""
        bits = self._next_bits() if tensor.is_floating_point() else 0
        guarded = self._surrounded(tensor, bits)
        _once(guarded).copy_(_once(tensor))
        self._remember(name, guarded, is_input=name not in self.changing)
        return guarded

    def check(self) -> None:
        """Raises AssertionError where a guard was written to."""
        written = [found for found in map(Guarded.written, self.held) if found is not None]
        assert not written, "; ".join(written)

    @contextmanager
    def allocating(self) -> Iterator[None]:
        """Within it what is allocated by the functions of ALLOCATING is surrounded too, and filled with the bits."""
        originals = [(owner, name, getattr(owner, name)) for owner, name in ALLOCATING]
        try:
            for owner, name, original in originals:
                setattr(owner, name, self._surrounding(original, is_empty="empty" in name))
            yield
        finally:
            for owner, name, original in originals:
                setattr(owner, name, original)

    def _surrounding(self, original: Callable[..., Any], is_empty: bool) -> Callable[..., Any]:
        """A function that allocates as the original does, and puts guards around it."""

        @functools.wraps(original)
        def allocate(*args: Any, **keywords: Any) -> Any:
            made = original(*args, **keywords)
            if type(made) is not Tensor or made.is_meta or made.requires_grad or made.layout != torch.strided:
                return made
            guarded = self._surrounded(made, self._next_bits())
            if not is_empty:
                guarded.copy_(made)
            self._remember("an allocation", guarded, is_input=False)
            return guarded

        return allocate

    def _next_bits(self) -> int:
        return self.bits + len(self.held) % KINDS_OF_GUARDS

    def _surrounded(self, like: Tensor, bits: int) -> Tensor:
        """A tensor of like's shape, strides and dtype in memory that is full of these bits."""
        extent = 0
        if like.numel():
            extent = 1 + sum((n - 1) * step for n, step in zip(like.shape, like.stride(), strict=True))
        memory = _empty(2 * GUARD + self.shift + extent, dtype=like.dtype, device=like.device)
        _lanes(memory).fill_(bits if like.element_size() > 1 else 0)
        start = GUARD + self.shift
        # set_ and not as_strided: what a launcher allocates is no view of anything.
        empty = _empty(0, dtype=like.dtype, device=like.device)
        return empty.set_(memory.untyped_storage(), start, like.shape, like.stride())

    def _remember(self, name: str, tensor: Tensor, is_input: bool) -> None:
        length = tensor.untyped_storage().nbytes() // tensor.element_size()
        memory = _empty(0, dtype=tensor.dtype, device=tensor.device)
        memory.set_(tensor.untyped_storage(), 0, (length,), (1,))
        outside = torch.ones_like(memory, dtype=torch.bool)
        _once(outside.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())).fill_(False)
        self.held.append(Guarded(name, tensor, memory, outside, memory.clone(), is_input))


def _once(tensor: Tensor) -> Tensor:
    """The tensor without the dimensions along which it repeats itself."""
    for dimension, step in enumerate(tensor.stride()):
        if step == 0 and tensor.shape[dimension] > 1:
            tensor = tensor.narrow(dimension, 0, 1)
    return tensor


def _lanes(memory: Tensor) -> Tensor:
    """The bits of every element `[n, lanes]`: 16 of them a lane, of bytes 8."""
    narrow = torch.int16 if memory.element_size() > 1 else torch.uint8
    return memory.view(narrow).view(len(memory), -1)
