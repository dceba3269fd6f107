"""Modules of a tensor-parallel model, as they serve one rank: sharded linear layers, and sums over the ranks.

`gradroute.models.parallel` makes them, and explains them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import torch.distributed._functional_collectives as funcol
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from ..function import Context, Function
from ..layers.mlp import MLPOps
from ..linear import LinearSites
from ..sites import Sites
from ..tables import Table
from .modules import Argument

GivenSites = TypeVar("GivenSites", bound=Sites | None)


class Rank(NamedTuple):
    """A rank's place in a mesh, as a module keeps it: torch.compile cannot save a DeviceMesh in a checkpoint.

    Attributes:
        number: this rank's number in the mesh.
        ranks: how many ranks there are.
        group: the name of their process group.
    """

    number: int
    ranks: int
    group: str


class ShardedLinear:
    """A linear layer whose parameters are DTensors and read as this rank's part of them; its sites are global.

    Attributes:
        placements: how each parameter is sharded.
        sharded_widths: the widths of LinearSites that are sharded.
    """

    placements: ClassVar[dict[str, Any]]
    sharded_widths: ClassVar[tuple[str, ...]]
    in_features: int
    out_features: int
    _rank: Rank
    _parameters: dict[str, Any]

    @property
    def weight(self) -> Tensor:
        """This rank's rows or columns; its gradient is a DTensor of the parameter's placement."""
        weight = self._parameters["weight"]
        return weight if _is_resharded(weight) else weight.to_local()

    @property
    def bias(self) -> Tensor | None:
        """This rank's part of the bias."""
        bias = self._parameters["bias"]
        return bias if bias is None or _is_resharded(bias) else self._local_bias(bias)

    def _local_bias(self, bias: DTensor) -> Tensor:
        return bias.to_local()

    def _widths(self) -> dict[str, int | str]:
        return LinearSites.widths(self.in_features, self.out_features, self._parameters["bias"])

    def _sites_of_ops(self, sites: LinearSites) -> tuple[Any, ...]:
        (sites,) = super()._sites_of_ops(sites)  # type: ignore[misc]
        return (_rank_sites(sites, self.sharded_widths, self._rank),)


def _is_resharded(parameter: DTensor) -> bool:
    """Whether FSDP2 has it sharded over another mesh dimension too: outside of forward, where it reads it itself."""
    return len(parameter.placements) > 1


class RowShard(ShardedLinear):
    """A rank makes its own outputs of the whole input: gate, up, q, k, v."""

    placements: ClassVar[dict[str, Any]] = {"weight": Shard(0), "bias": Shard(0)}
    sharded_widths = ("outputs", "bias")


class ColumnShard(ShardedLinear):
    """A rank makes its summand of all outputs, of its own inputs: down, o."""

    placements: ClassVar[dict[str, Any]] = {"weight": Shard(1), "bias": Replicate()}
    sharded_widths = ("inputs",)

    def _local_bias(self, bias: DTensor) -> Tensor:
        return summed_gradient(bias.to_local(), self._rank) * float(self._rank.number == 0)


class WholeNorm:
    """A norm of heads: every rank has its weight, for its own heads, so the weight's gradient is summed."""

    _rank: Rank
    _parameters: dict[str, Any]

    @property
    def weight(self) -> Tensor:
        """The whole weight."""
        weight = self._parameters["weight"]
        return weight if isinstance(weight, DTensor) else summed_gradient(weight, self._rank)


class ParallelSublayer:
    """Attention or an MLP, of whose output to the residual stream this rank makes a summand."""

    _rank: Rank

    def forward(self, *args: Argument, **kwargs: Argument) -> Argument:
        if args:
            args = (summed_gradient(args[0], self._rank), *args[1:])
        else:
            kwargs["hidden_states"] = summed_gradient(kwargs["hidden_states"], self._rank)
        y = super().forward(*args, **kwargs)  # type: ignore[misc]
        return (summed(y[0], self._rank), *y[1:]) if isinstance(y, tuple) else summed(y, self._rank)


_HIDDEN_WIDTHS = ("d_ff",)
_HEAD_WIDTHS = ("heads", "kv_heads")


class ParallelMLP(ParallelSublayer):
    """A gated MLP of this rank's hidden units."""

    def _sites_of_ops(self, sites: Sites) -> MLPOps:
        ops: MLPOps = super()._sites_of_ops(sites)  # type: ignore[misc]
        return MLPOps(
            fused=_rank_sites(ops.fused, _HIDDEN_WIDTHS, self._rank),
            inner=_rank_sites(ops.inner, RowShard.sharded_widths, self._rank),
            middle=_rank_sites(ops.middle, _HIDDEN_WIDTHS, self._rank),
            outer=_rank_sites(ops.outer, ColumnShard.sharded_widths, self._rank),
        )


class ParallelAttention(ParallelSublayer):
    """Attention of this rank's heads."""

    def _sites_of_ops(self, sites: Sites) -> tuple[Any, ...]:
        *inner, output, attention = super()._sites_of_ops(sites)  # type: ignore[misc]
        return (
            *(_rank_sites(linear, RowShard.sharded_widths, self._rank) for linear in inner),
            _rank_sites(output, ColumnShard.sharded_widths, self._rank),
            _rank_sites(attention, _HEAD_WIDTHS, self._rank),
        )


def _rank_sites(sites: GivenSites, widths: Sequence[str], rank: Rank) -> GivenSites:
    """Sites whose tables of these widths have this rank's features alone; `[R, 1]` is for all of them."""
    if sites is None:
        return sites
    tables = {
        name: _columns(table, rank)
        if sites.declared[name]["width"] in widths and table.features > 1
        else table
        for name, table in sites.tables.items()
    }
    return type(sites)(**tables)


def _columns(table: Table, rank: Rank) -> Table:
    return Table(table.weights.chunk(rank.ranks, dim=1)[rank.number])


def summed_gradient(x: Tensor, rank: Rank) -> Tensor:
    """The same tensor, which is that of every rank; its gradient is the sum over the ranks."""
    return SummedGradient.apply(x, rank.group)


def summed(x: Tensor, rank: Rank) -> Tensor:
    """The sum over the ranks; the gradient of every summand is the sum's."""
    return Sum.apply(x, rank.group)


class GroupContext(Context, Protocol):
    """The context of the Functions below.

    Attributes:
        group: the name of the ranks' process group.
    """

    group: str


class SummedGradient(Function):
    """Identity forward, all-reduce backward."""

    @staticmethod
    def forward(x: Tensor, group: str) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: GroupContext, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx: GroupContext, dy: Tensor) -> tuple[Any, ...]:
        return _all_reduce(dy, ctx.group), None  # group


class Sum(Function):
    """All-reduce forward, identity backward."""

    @staticmethod
    def forward(x: Tensor, group: str) -> Tensor:
        return _all_reduce(x, group)

    @staticmethod
    def setup_context(ctx: GroupContext, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: GroupContext, dy: Tensor) -> tuple[Any, ...]:
        return dy, None  # group


def _all_reduce(x: Tensor, group: str) -> Tensor:
    return funcol.wait_tensor(funcol.all_reduce(x, "sum", group))
