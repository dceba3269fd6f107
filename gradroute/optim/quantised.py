"""Moments of one byte: torchao's 8-bit quantisation with dynamic maps (Dettmers et al. 2022, arXiv 2110.02861).

A moment is a code for each element and a scale for every few elements: value = map[code] scale. The elements that share
a scale lie side by side along one dimension of the parameter, which is not the one that the optimizer's own blocks are
counted along. So they are all of one row, or all of one column, and what no gradient touches keeps codes and scales.
Scales have the parameter's dimensions, and are sharded as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..arguments import ordinary_tensors
from ..fake_tensors import has_data, in_fake_mode
from .shards import local_part, sharded_like, shards

#: The value of the option `state_dtype`.
EIGHT_BITS = "8bit"

#: The fewest elements of a parameter whose moments are quantised: that of torchao and bitsandbytes.
SMALLEST = 4096

#: The most elements that share a scale, as in torchao, and the fewest: 4 bytes for 16 elements are a quarter byte each.
MOST, LEAST = 256, 16

#: So many elements to a scale are as good as more: the last dimension, along which memory lies, is then taken.
ENOUGH = 64

#: So many elements are quantised at a time, because torchao's search makes integers of 8 bytes of all of them, in each
#: of its ten steps.
PIECE = 2**20

#: What follows a moment's name in a parameter's state.
CODES, SCALES = "_codes", "_scales"


class Layout(NamedTuple):
    """Which elements share a scale: `size` of them, one after the other along the dimension `dim`."""

    dim: int
    size: int

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the scales of a tensor."""
        return tuple(extent // self.size if dim == self.dim else extent for dim, extent in enumerate(shape))


class Quantised(NamedTuple):
    """One moment of a parameter, or of this rank's part of it.

    Attributes:
        codes: uint8, of the parameter's shape.
        scales: fp32, of the same shape but for the dimension along which elements share a scale.
        layout: which elements share one.
        signed: whether the values may be negative.
    """

    codes: Tensor
    scales: Tensor
    layout: Layout
    signed: bool

    @classmethod
    def of(cls, state: Mapping[str, Any], name: str) -> Quantised:
        """A moment in a parameter's state: this rank's part of it, in the same memory."""
        codes, scales = state[name + CODES], state[name + SCALES]
        layout = layout_in(codes.shape, scales.shape)
        assert layout is not None
        return cls(local_part(codes), local_part(scales), layout, is_signed(name))

    def values(self) -> Tensor:
        """The moment in fp32, contiguous."""
        from torchao.optim.quant_utils import dequant_with_qmap

        table = dynamic_map(self.signed, self.codes)
        values = torch.empty(self.codes.shape, dtype=torch.float32, device=self.codes.device)
        for codes, scales, part in self._pieces(self.codes, self.scales, values):
            part.copy_(dequant_with_qmap(codes.contiguous(), table, scales.reshape(-1)))
        return values

    def write(self, values: Tensor, touched: Tensor) -> None:
        """Stores fp32 `values` where `touched`, which broadcasts against them, is true; elsewhere every bit stays.

        A second moment that is not 0 does not become 0, as it would by torchao's rounding alone where it is less than
        1.6e-7 of the largest beside it. The first moment of that element, which its root divides, may well not be 0.
        """
        from torchao.optim.quant_utils import quantize_8bit_with_qmap, scale_tensor

        dim, size = self.layout
        table = dynamic_map(self.signed, self.codes)
        shape = list(self.codes.shape)
        shape[dim] = 1
        for codes, scales, part, mask in self._pieces(self.codes, self.scales, values, touched.expand(shape)):
            scaled, new_scales = scale_tensor(part.contiguous(), size)
            new_codes = quantize_8bit_with_qmap(scaled, table)
            if not self.signed:
                new_codes = torch.where(scaled > 0, new_codes.clamp(min=1), new_codes)
            codes.copy_(torch.where(mask, new_codes, codes))
            scales.copy_(torch.where(mask, new_scales.view(scales.shape), scales))

    def _pieces(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Parts of tensors that belong to the same elements, with the dimension of the layout last."""
        if self.codes.numel() == 0:  # torchao's functions cannot view nothing as blocks
            return
        arranged = [tensor.movedim(self.layout.dim, -1) for tensor in tensors]
        first = arranged[0]
        if (
            first.dim() == 1 or torch.compiler.is_compiling()
        ):  # compiled code makes no temporaries of these sizes
            yield tuple(arranged)
            return
        rows = max(1, PIECE * len(first) // first.numel())
        yield from zip(*(tensor.split(rows) for tensor in arranged), strict=True)


def is_signed(name: str) -> bool:
    """Whether a moment may be negative."""
    return name == "exp_avg"


def layout_of(parameter: Tensor, block_dim: int | None) -> Layout | None:
    """Which elements of a parameter's moments share a scale; None: they are not quantised.

    They are not where the parameter is small, or where no dimension but `block_dim` can be divided into groups of at
    least `LEAST`. Of a sharded parameter every rank has whole groups, and all ranks find the same layout.
    """
    if parameter.numel() < SMALLEST:
        return None
    found = [
        Layout(dim, _largest_divisor(_common_extent(parameter, dim)))
        for dim in range(parameter.dim())
        if dim != block_dim
    ]
    best = max(found, key=lambda layout: (min(layout.size, ENOUGH), layout.dim), default=None)
    return best if best is not None and best.size >= LEAST else None


def layout_in(codes: Sequence[int], scales: Sequence[int]) -> Layout | None:
    """Which elements share a scale, from the shapes of codes and scales; None: these do not belong together."""
    if len(codes) != len(scales):
        return None
    pairs = zip(codes, scales, strict=True)
    dims = [dim for dim, (elements, groups) in enumerate(pairs) if elements != groups]
    if len(dims) != 1 or scales[dims[0]] == 0 or codes[dims[0]] % scales[dims[0]]:
        return None
    return Layout(dims[0], codes[dims[0]] // scales[dims[0]])


def _largest_divisor(extent: int) -> int:
    """The largest divisor of a number that is at most `MOST`."""
    return next(size for size in range(min(MOST, extent), 0, -1) if extent % size == 0)


def _common_extent(parameter: Tensor, dim: int) -> int:
    """The size of each shard of a parameter along a dimension; 1 where they differ."""
    whole, ranks = (
        parameter.shape[dim],
        math.prod(group.size for cut, group in shards(parameter) if cut == dim),
    )
    return whole // ranks if whole % ranks == 0 else 1


def new_codes(name: str, parameter: Tensor, layout: Layout) -> dict[str, Tensor]:
    """A moment of zeros as it is stored; DTensors where the parameter is one."""
    codes = torch.zeros_like(parameter, dtype=torch.uint8, memory_format=torch.preserve_format)
    shape = layout.shape(local_part(parameter).shape)
    scales = torch.zeros(shape, dtype=torch.float32, device=parameter.device)
    whole = torch.Size(layout.shape(parameter.shape))
    return {name + CODES: codes, name + SCALES: sharded_like(parameter, scales, whole)}


def quantise(name: str, parameter: Tensor, layout: Layout, values: Tensor) -> dict[str, Tensor]:
    """A moment as it is stored, of values that are placed as the parameter is."""
    stored = new_codes(name, parameter, layout)
    local = local_part(values).to(parameter.device, torch.float32)
    everywhere = torch.ones((), dtype=torch.bool, device=parameter.device)
    Quantised.of(stored, name).write(local, everywhere)
    return stored


def dequantise(name: str, saved: Mapping[str, Any], device: torch.device) -> Tensor:
    """The values of a moment in a saved state, in fp32 on a device; a DTensor where it is saved as one."""
    codes = saved[name + CODES]
    stored = {key: saved[key].to(device) for key in (name + CODES, name + SCALES)}
    return sharded_like(codes, Quantised.of(stored, name).values(), codes.shape)


# The maps on each device: they are no part of a state, and to copy one to a GPU would wait for it in every step.
_MAPS: dict[tuple[bool, torch.device], Tensor] = {}


def dynamic_map(signed: bool, like: Tensor) -> Tensor:
    """torchao's dynamic map, the values of the 256 codes in ascending order, on the device of a tensor."""
    device = like.device
    if not torch.compiler.is_compiling() and not has_data(like):
        return in_fake_mode(_map_on(signed, torch.device("cpu"))).to(device)
    return _map_on(signed, device)


def _map_on(signed: bool, device: torch.device) -> Tensor:
    found = _MAPS.get((signed, device))
    if found is None:
        from torchao.optim.quant_utils import create_dynamic_map

        with (
            ordinary_tensors(),
            torch.device("cpu"),
        ):  # torchao computes it on the default device, and reads it
            found = torch.tensor(create_dynamic_map(signed), dtype=torch.float32, device=device)
        _MAPS[signed, device] = found
    return found


def prepare(parameters: Sequence[Tensor]) -> None:
    """Loads torchao and its maps, so that steps, which may be compiled, need not; raises ImportError without it."""
    require_torchao()
    for parameter in parameters:
        for signed in (True, False):
            dynamic_map(signed, parameter)


def require_torchao() -> None:
    """Raises ImportError where torchao is missing, or has not the functions that quantise."""
    try:
        from torchao.optim.quant_utils import (  # noqa: F401
            create_dynamic_map,
            dequant_with_qmap,
            quantize_8bit_with_qmap,
            scale_tensor,
        )
    except ImportError as error:
        raise ImportError(
            f"state_dtype: got {EIGHT_BITS!r} without the package torchao, which quantises the moments, expected it "
            f"installed: pip install 'gradroute[torchao]' ({error})"
        ) from error


def is_quantised(state: Mapping[str, Any]) -> bool:
    """Whether a parameter's state has moments of one byte."""
    return "exp_avg" + CODES in state
