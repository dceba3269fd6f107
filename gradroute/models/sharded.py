"""Modules of a tensor-parallel model, as they serve one rank: sharded linear layers, and sums over the ranks.

`gradroute.models.parallel` makes them, and explains them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import torch
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


class Exchange(NamedTuple):
    """How ranks that each have consecutive features of several parts exchange them for their share of every part.

    Attributes:
        order: the rank's consecutive features, as runs from a first to before a last, in the order of the ranks that
            they go to.
        sent: how many features go to each rank.
        received: how many come from each rank; they come in the order of the parts.
    """

    order: tuple[tuple[int, int], ...]
    sent: tuple[int, ...]
    received: tuple[int, ...]

    @classmethod
    def of(cls, parts: Sequence[int], rank: Rank) -> Exchange:
        """The exchange of a rank's outputs, of parts of these widths, each of which the ranks can divide."""
        width = sum(parts) // rank.ranks
        consecutive = [(number * width, (number + 1) * width) for number in range(rank.ranks)]
        first = consecutive[rank.number][0]
        going = [
            _runs_within(_share_of(parts, number, rank.ranks), *consecutive[rank.number])
            for number in range(rank.ranks)
        ]
        coming = [_runs_within(_share_of(parts, rank.number, rank.ranks), *each) for each in consecutive]
        order = tuple((start - first, stop - first) for runs in going for start, stop in runs)
        return cls(order, tuple(map(_length, going)), tuple(map(_length, coming)))

    def of_outputs(self, y: Tensor, group: str) -> Tensor:
        """A rank's share of every part, `[*tokens, features]`, of consecutive features of the same shape."""
        ordered = torch.cat([y[..., start:stop] for start, stop in self.order], dim=-1)
        by_feature = ordered.flatten(0, -2).t().contiguous()  # [features, T]
        share = Exchanged.apply(by_feature, self.received, self.sent, group)
        return share.t().contiguous().view(y.shape)


def _share_of(parts: Sequence[int], number: int, ranks: int) -> list[tuple[int, int]]:
    """The features of a rank's share of every part, as runs from a first to before a last."""
    runs, first = [], 0
    for width in parts:
        share = width // ranks
        runs.append((first + number * share, first + (number + 1) * share))
        first += width
    return runs


def _runs_within(runs: list[tuple[int, int]], first: int, last: int) -> list[tuple[int, int]]:
    within = [(max(start, first), min(stop, last)) for start, stop in runs]
    return [(start, stop) for start, stop in within if start < stop]


def _length(runs: list[tuple[int, int]]) -> int:
    return sum(stop - start for start, stop in runs)


class ShardedLinear:
    """A linear layer whose parameters are DTensors and read as this rank's part of them; its sites are global.

    Attributes:
        placements: how each parameter is sharded.
        sharded_widths: the widths of LinearSites that are sharded.
        is_called: whether the layer must be called, because it does more than its parameters say.
    """

    placements: ClassVar[dict[str, Any]]
    sharded_widths: ClassVar[tuple[str, ...]]
    is_called: ClassVar[bool] = False
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
    """A rank makes its own outputs of the whole input: hidden units, q, k, v."""

    placements: ClassVar[dict[str, Any]] = {"weight": Shard(0), "bias": Shard(0)}
    sharded_widths = ("outputs", "bias")


class ExchangingRowShard(RowShard):
    """A layer of several parts, all of one before the next: q, k and v, or gate and up.

    Consecutive rows, which a rank has of it as of every layer, make outputs that are not of the rank's own heads or
    units. So the ranks exchange outputs, and each gets its share of every part.
    """

    is_called = True
    _exchange: Exchange

    def forward(self, x: Tensor, *args: Argument, **kwargs: Argument) -> Tensor:
        y = super().forward(x, *args, **kwargs)  # type: ignore[misc]
        return self._exchange.of_outputs(y, self._rank.group)


class ColumnShard(ShardedLinear):
    """A rank makes its summand of all outputs, of its own inputs: down, o."""

    placements: ClassVar[dict[str, Any]] = {"weight": Shard(1), "bias": Replicate()}
    sharded_widths = ("inputs",)

    def _local_bias(self, bias: DTensor) -> Tensor:
        return summed_gradient(bias.to_local(), self._rank) * float(self._rank.number == 0)


class _ShardedConv1D(ShardedLinear):
    """The Conv1D of transformers' GPT-2, whose weight is stored transposed."""

    @property
    def in_features(self) -> int:  # type: ignore[override]
        """The number of inputs on all ranks."""
        return int(vars(self)["nx"])

    @property
    def out_features(self) -> int:  # type: ignore[override]
        """The number of outputs on all ranks."""
        return int(vars(self)["nf"])

    @property
    def nf(self) -> int:
        """The number of this rank's outputs, as the layer's own forward asks for it."""
        return self.weight.shape[1]


class Conv1DRowShard(_ShardedConv1D, RowShard):
    """A Conv1D of whose outputs a rank makes its own."""

    placements: ClassVar[dict[str, Any]] = {"weight": Shard(1), "bias": Shard(0)}


class Conv1DExchangingRowShard(_ShardedConv1D, ExchangingRowShard):
    """A Conv1D that makes several parts."""

    placements: ClassVar[dict[str, Any]] = Conv1DRowShard.placements


class Conv1DColumnShard(_ShardedConv1D, ColumnShard):
    """A Conv1D that reads a rank's own inputs."""

    placements: ClassVar[dict[str, Any]] = {"weight": Shard(0), "bias": Replicate()}


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


class RankConfig:
    """A model's configuration with the numbers of heads of one rank, for a forward that asks it for them.

    Everything else is read of the configuration itself, when it is asked for.
    """

    def __init__(self, config: Any, ranks: int) -> None:
        self.whole = config
        self.num_attention_heads = config.num_attention_heads // ranks
        self.num_key_value_heads = config.num_key_value_heads // ranks

    def __getattr__(self, name: str) -> Any:
        if name == "whole" or name.startswith("__"):  # of a copy that has nothing yet
            raise AttributeError(name)
        return getattr(self.whole, name)


_HIDDEN_WIDTHS = ("d_ff",)
_HEAD_WIDTHS = ("heads", "kv_heads")


class ParallelMLP(ParallelSublayer):
    """An MLP of this rank's hidden units."""

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


class ExchangeContext(GroupContext, Protocol):
    """The context of Exchanged.

    Attributes:
        received: how many rows came from each rank.
        sent: how many went to each.
    """

    received: tuple[int, ...]
    sent: tuple[int, ...]


class Exchanged(Function):
    """All-to-all of rows, forward and backward."""

    @staticmethod
    def forward(x: Tensor, received: tuple[int, ...], sent: tuple[int, ...], group: str) -> Tensor:
        return _all_to_all(x, received, sent, group)

    @staticmethod
    def setup_context(ctx: ExchangeContext, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.received, ctx.sent, ctx.group = inputs

    @staticmethod
    def backward(ctx: ExchangeContext, dy: Tensor) -> tuple[Any, ...]:
        dx = _all_to_all(dy.contiguous(), ctx.sent, ctx.received, ctx.group)
        return dx, None, None, None  # received, sent, group


def _all_to_all(x: Tensor, received: tuple[int, ...], sent: tuple[int, ...], group: str) -> Tensor:
    return funcol.wait_tensor(funcol.all_to_all_single(x, list(received), list(sent), group))


def _all_reduce(x: Tensor, group: str) -> Tensor:
    return funcol.wait_tensor(funcol.all_reduce(x, "sum", group))
