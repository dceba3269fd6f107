"""A model's blocks and the rest of its parameters, and sums over each of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from ..blocks import Block, check_disjoint
from ..models.inspection import is_dtensor
from .sums import wide, zeros


class Regions:
    """A model's parameters, divided into regions.

    Regions 0 to K - 1 are the blocks. Region K is the rest of the parameters of which a block has a piece, and region
    K + 1 all other parameters.

    Raises:
        TypeError: an entry of `blocks` is no Block.
        ValueError: blocks that overlap, or are not of the model's shape.
    """

    def __init__(self, model: nn.Module, blocks: Mapping[str, Block]) -> None:
        for name, block in blocks.items():
            if not isinstance(block, Block):
                raise TypeError(
                    f"blocks[{name!r}]: got a {type(block).__name__}, expected a gradroute.blocks.Block"
                )
        check_disjoint(blocks, model)
        self.names = tuple(blocks)
        self._model = model
        self._blocks = tuple(blocks.values())
        self._indices: dict[tuple[int, torch.device], Tensor] = {}  # kept: a copy to a device may wait

    def parameters(self) -> list[nn.Parameter]:
        """All parameters of the model; raises TypeError where one is sharded."""
        parameters = list(self._model.parameters())
        sharded = [name for name, one in self._model.named_parameters() if is_dtensor(one)]
        if sharded:
            raise TypeError(
                f"{sharded[0]}: got a sharded parameter (DTensor), expected an ordinary one; without an optimizer "
                "step measures losses and shares alone"
            )
        return parameters

    def trained(self) -> list[nn.Parameter]:
        """The parameters that require a gradient."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def split(
        self, tensors: Iterable[tuple[nn.Parameter, Tensor]], rest: bool = True
    ) -> Iterator[tuple[int, nn.Parameter, Tensor]]:
        """The elements of tensors in each region.

        Args:
            tensors: parameters, each with a tensor of its shape.
            rest: whether to yield the elements outside of all blocks, too.

        Yields:
            The region, the parameter and the elements. In region K they are a copy of the tensor with zeros in the
            blocks, in region K + 1 the tensor itself.
        """
        pieces = self._pieces()
        blocks = len(self._blocks)
        for parameter, tensor in tensors:
            of_parameter = pieces.get(parameter, [])
            indices = [(block, dim, self._on(index, tensor.device)) for block, dim, index in of_parameter]
            for block, dim, index in indices:
                yield block, parameter, tensor.index_select(dim, index)
            if rest and not indices:
                yield blocks + 1, parameter, tensor
            elif rest:
                outside = tensor.clone()
                for _, dim, index in indices:
                    outside.index_fill_(dim, index, 0)
                yield blocks, parameter, outside

    def squares(self, tensors: Iterable[tuple[nn.Parameter, Tensor]]) -> Tensor:
        """The squared norm of each region's elements, fp64 `[K + 2]`."""
        return self.sum_squares((region, values) for region, _, values in self.split(tensors))

    @torch.no_grad()
    def sum_squares(self, values: Iterable[tuple[int, Tensor]]) -> Tensor:
        """The sums of squares of values, given with their regions; fp64 `[K + 2]`."""
        device = self._device()
        squares = [[zeros((), device)] for _ in range(len(self._blocks) + 2)]
        for region, one in values:
            norm = torch.linalg.vector_norm(one, dtype=wide(one))
            squares[region].append(norm.to(device, torch.float64).square())
        return torch.stack([torch.stack(of_region).sum() for of_region in squares])

    def nonzeros(self, tensors: Iterable[tuple[nn.Parameter, Tensor]]) -> Tensor:
        """How many elements of each block are not zero, `[K]`; squares of small ones could underflow to zero."""
        device = self._device()
        counts = [[torch.zeros((), dtype=torch.int64, device=device)] for _ in self._blocks]
        for region, _, values in self.split(tensors, rest=False):
            counts[region].append(values.count_nonzero().to(device))
        if not counts:
            return torch.zeros(0, dtype=torch.int64, device=device)
        return torch.stack([torch.stack(of_block).sum() for of_block in counts])

    def _pieces(self) -> dict[nn.Parameter, list[tuple[int, int, Tensor]]]:
        """The pieces of blocks by parameter, each a block's number, dimension and index. Parameters may be replaced."""
        pieces: dict[nn.Parameter, list[tuple[int, int, Tensor]]] = {}
        for i, block in enumerate(self._blocks):
            for piece, parameter in block.parameters(self._model):
                pieces.setdefault(parameter, []).append((i, piece.dim, piece.index))
        return pieces

    def _on(self, index: Tensor, device: torch.device) -> Tensor:
        key = (id(index), device)
        if key not in self._indices:
            self._indices[key] = index.to(device)
        return self._indices[key]

    def _device(self) -> torch.device:
        parameter = next(self._model.parameters(), None)
        return torch.device("cpu") if parameter is None else parameter.device
