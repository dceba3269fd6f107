"""Parameters that are sharded over processes: DTensors, as FSDP2 and tensor parallelism make them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeGuard

import torch
from torch import Tensor
from torch.nn import Parameter

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor, Placement


class Ranks(NamedTuple):
    """The processes that have the shards of a parameter along one dimension.

    Attributes:
        name: the name of their process group.
        size: how many processes there are.
        number: the number of this process among them.
    """

    name: str
    size: int
    number: int


# To find no attribute takes ten times as long as to find a type, and a step asks for every tensor of a model.
_ORDINARY = frozenset({Tensor, Parameter})


def shards(parameter: Tensor) -> Iterator[tuple[int, Ranks]]:
    """The dimensions along which a parameter is sharded, each with the processes that have the shards."""
    if not is_distributed(parameter):
        return
    mesh = parameter.device_mesh
    for mesh_dim, placement in enumerate(parameter.placements):
        dim, ranks = getattr(placement, "dim", None), mesh.size(mesh_dim)
        if dim is not None and ranks > 1:
            yield dim, Ranks(mesh.get_group(mesh_dim).group_name, ranks, mesh.get_local_rank(mesh_dim))


def reduced(tensor: Tensor, operation: str, group: Ranks) -> Tensor:
    """The sum ("sum") or the largest values ("max") of a tensor over some processes."""
    from torch.distributed import _functional_collectives as collectives

    return collectives.wait_tensor(collectives.all_reduce(tensor, operation, group.name))


def is_distributed(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is a DTensor, found out without that class, whose import takes a second."""
    return type(tensor) not in _ORDINARY and hasattr(tensor, "to_local")


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, in the same memory."""
    return tensor.to_local() if is_distributed(tensor) else tensor


def sharded_like(
    like: Tensor, local: Tensor, shape: torch.Size, placements: Sequence[Placement] | None = None
) -> Tensor:
    """A DTensor of `shape` whose part on this rank is `local`, where `like` is a DTensor; else `local` itself.

    Args:
        like: the tensor whose mesh it has.
        local: this rank's part.
        shape: the shape of the whole.
        placements: how it is sharded; default: as `like` is.
    """
    if not is_distributed(like):
        return local
    from torch.distributed.tensor import DTensor

    stride = torch.empty(shape, dtype=local.dtype, device="meta").stride()
    placements = like.placements if placements is None else placements
    return DTensor.from_local(
        local, like.device_mesh, placements, run_check=False, shape=shape, stride=stride
    )
