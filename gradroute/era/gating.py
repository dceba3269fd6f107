"""gate: a block whose influence is scaled for inference."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..arguments import check_number
from ..blocks import Block
from ..models.inspection import inner_model, stored
from .checks import check_block, check_parameters
from .surgery import homes

if TYPE_CHECKING:
    from typing_extensions import Self


def gate(model: nn.Module, block: Block, scale: float) -> Gate:
    """Scales what a block adds to the model, for inference: 0 takes it out, more than 1 steers toward what it learnt.

    The output weights are scaled in place, so that nothing is computed twice and any code that reads the weights sees
    the scaled ones; the gate keeps the block's original output weights, and nothing else of the model. In a `with`
    statement they are put back at its end:

        with era.gate(model, block, 3.0):
            model.generate(...)

    Args:
        model: the model, routed or not.
        block: units and heads, whole ones.
        scale: the factor, any finite number.

    Raises:
        TypeError: quantised parameters, or offloaded ones that cannot be written to.
        ValueError: the block is not one of units and heads; the scale is not finite; the model is not of its shape, or
            on the meta device.
    """
    check_block(block)
    if not block.is_whole:
        raise ValueError(f"block: got {block}, expected one of units or heads (Block.units, Block.heads)")
    check_parameters(block, inner_model(model))
    return Gate(model, block, scale)


class Gate:
    """The scale of a block's output weights, see `gate`."""

    def __init__(self, model: nn.Module, block: Block, scale: float) -> None:
        inner_model(model)  # raises where it is no module
        check_block(block)
        check_number("scale", scale)
        self._model = model
        block.parameters(model)  # raises where the model is not of its shape
        outputs = [pair for pair in homes(inner_model(model), block.pieces) if pair[0].role == "output"]
        self._outputs = [(piece, home, home.parameter) for piece, home in outputs]
        self._original = [piece.of(home.values()) for piece, home in outputs]
        self._scale = 1.0
        self.scale = scale

    @property
    def scale(self) -> float:
        """The factor; assigning it changes the model. 1 is the original, bit for bit."""
        return self._scale

    @scale.setter
    def scale(self, scale: float) -> None:
        scale = check_number("scale", scale)
        self._check_unchanged()
        for (piece, _, _), values in zip(self._outputs, self._original, strict=True):
            if scale != 1 and not torch.isfinite(values * scale).all():
                raise ValueError(
                    f"scale: got {scale}, by which {piece.parameter} is not finite in {values.dtype}, expected a "
                    "smaller one"
                )
        for (piece, home, _), values in zip(self._outputs, self._original, strict=True):
            home.write(piece, _scaled(values, scale))
        self._scale = float(scale)

    def remove(self) -> None:
        """Puts the original weights back."""
        self.scale = 1.0

    def merge(self) -> None:
        """Makes the scale permanent: the scaled weights are the original ones from now on."""
        self._check_unchanged()
        for i, values in enumerate(self._original):
            self._original[i] = _scaled(values, self._scale)
        self._scale = 1.0

    def _check_unchanged(self) -> None:
        named = stored(inner_model(self._model))
        for (piece, home, parameter), values in zip(self._outputs, self._original, strict=True):
            now = named[piece.parameter].parameter if piece.parameter in named else None
            same = now is parameter or (
                home.is_offloaded and now is not None and now.shape == parameter.shape
            )
            if not same or not torch.equal(piece.of(home.values()), _scaled(values, self._scale)):
                raise RuntimeError(
                    f"scale: {piece.parameter} was changed by something else since, by training or another gate, which "
                    "would be undone; remove gates in reverse order, and merge() one before training"
                )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"Gate({self._scale}, {len(self._outputs)} modules)"


def _scaled(values: Tensor, scale: float) -> Tensor:
    return values if scale == 1 else values * scale
