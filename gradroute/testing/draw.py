"""Random values for the inputs of sample calls, in many layouts."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

#: The layouts that `sample(gradient=..., inputs=...)` takes: the strides of the upstream gradient and activations.
LAYOUTS = ("contiguous", "sliced", "transposed", "zero_stride")


class Sizes(NamedTuple):
    """Widths of the sample inputs, odd enough to leave partial tiles."""

    d_model: int = 20
    d_ff: int = 37
    vocabulary: int = 11
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8


class Draw:
    """Random values, the same on every device and in every dtype up to rounding, for one call of an op.

    Attributes:
        generator: the source of the values. It is on the CPU, or with `on_device` on the device of the values: large
            ones come sooner then, and differ from device to device.
        tokens: the activations' leading shape.
        sizes: the widths.
        layout: the layout of activations, one of LAYOUTS.
    """

    def __init__(
        self,
        seed: int,
        dtype: torch.dtype,
        device: torch.device | str,
        tokens: tuple[int, ...],
        sizes: Sizes,
        layout: str = "contiguous",
        with_bias: bool = True,
        on_device: bool = False,
    ) -> None:
        self.generator = torch.Generator(device if on_device else "cpu").manual_seed(seed)
        self.dtype, self.device = dtype, device
        self.tokens, self.sizes, self.layout, self.with_bias = tokens, sizes, layout, with_bias

    def normal(self, *shape: int, scale: float = 1.0, layout: str = "contiguous") -> Tensor:
        """Normally distributed values in one of LAYOUTS."""
        if layout == "zero_stride":
            return self._values((), scale).expand(shape)
        if layout == "sliced":
            return self._values((*shape[:-1], 2 * shape[-1] + 1), scale)[..., 1::2]
        if layout == "transposed":
            return self._values((shape[-1], *shape[:-1]), scale).movedim(0, -1)
        if layout != "contiguous":
            raise ValueError(f"layout: got {layout!r}, expected one of {', '.join(LAYOUTS)}")
        return self._values(shape, scale)

    def activation(self, width: int) -> Tensor:  # [*tokens, width]
        """An activation in the layout asked for."""
        return self.normal(*self.tokens, width, layout=self.layout)

    def weight(self, outputs: int, inputs: int) -> Tensor:  # [outputs, inputs]
        """A weight that keeps the size of what it multiplies."""
        return self.normal(outputs, inputs, scale=inputs**-0.5)

    def bias(self, width: int) -> Tensor | None:  # [width]
        """A bias; None where calls without biases are drawn."""
        return self.normal(width) if self.with_bias else None

    def integers(self, high: int, *shape: int) -> Tensor:
        """Integers in [0, high)."""
        source = self.generator.device
        return torch.randint(high, shape, generator=self.generator, device=source).to(self.device)

    def _values(self, shape: tuple[int, ...], scale: float) -> Tensor:
        source = self.generator.device
        dtype = torch.float64 if source.type == "cpu" else torch.float32
        values = torch.randn(shape, generator=self.generator, dtype=dtype, device=source) * scale
        return values.to(device=self.device, dtype=self.dtype)
