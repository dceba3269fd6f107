"""Tensor parallelism on torch's own engine: styles of parallelize_module for MLPs and attention of Llama's family.

Linear layers become DTensors as under torch's ColwiseParallel and RowwiseParallel: gate, up, q, k and v by rows, down
and o by columns. The ops take plain tensors (a custom op has no sharding strategy), so a sharded layer's `weight` and
`bias` *read* as this rank's part, while `parameters()`, optimizers, state_dict and torch.distributed.checkpoint see
the DTensors. Tables are sliced alike, so that a rank masks its own hidden units and heads.

Inputs and outputs of attention and of the MLP are plain tensors that are the same on every rank. Forward sums the
outputs of all ranks and backward the gradients of the inputs: two all-reduces for each. A parameter that every rank
reads whole gets its gradient summed too: norms of the query and the key, whose heads are on several ranks. The bias of
an output is read on the first rank, and as zeros on the others, so that it counts once.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar, cast

import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from ..function import Function
from ..linear import LinearSites
from ..sites import Sites
from ..tables import Table
from .architectures import ARCHITECTURES, inner_model
from .attention import Attention
from .gated_mlp import GatedMLP
from .linear import Linear
from .mlp import MLPOps
from .modules import AnyModule, Argument
from .routing import Model

GivenSites = TypeVar("GivenSites", bound=Sites | None)

_FAMILY = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")

# The reason why another architecture, which can be routed, cannot be sharded by the styles below.
_REFUSED = {
    "phi3": "one linear layer makes q, k and v, another gate and up: a rank's rows would not be whole heads of each",
    "gpt_neox": "one linear layer makes q, k and v",
    "gpt2": "a Conv1D makes q, k and v, and its weight is stored transposed",
    "gpt_neo": "its attention reshapes by the configured number of heads, not by those of a rank",
}


def tensor_parallel(model: Model, mesh: DeviceMesh) -> Model:
    """Shards the MLPs and the attention of a model over a mesh, in place, by torch's parallelize_module.

    For Llama, Mistral, Qwen2, Qwen3 and Gemma 3, routed or not. Call it after `route`, and before `fully_shard` (over
    another dimension of the mesh) and torch.compile. All ranks of the mesh are given the same batch. Embeddings, norms
    and the head stay as they are, so every rank must have made the same ones: seed before the model is made. Their
    parameters are ordinary tensors beside DTensors, which `torch.nn.utils.clip_grad_norm_` cannot mix, but
    `gradroute.optim.RoutedAdamW.clip_grad_norm_` can.
    Where eager attention returns probabilities, they are those of this rank's heads.

    Args:
        model: a causal language model of transformers, or its base model.
        mesh: a mesh of one dimension, such as `init_device_mesh("cuda", (2, 4), mesh_dim_names=("dp", "tp"))["tp"]`.

    Returns:
        The same model.

    Raises:
        TypeError: a model of another family; linear layers that are not torch.nn.Linear; a sharded model.
        ValueError: heads or hidden units that cannot be divided by the mesh, or a mesh of several dimensions.
    """
    inner = inner_model(model)
    architecture = ARCHITECTURES[_checked_model_type(inner)]
    layers = next(path for path in (architecture.layers, "layers") if _has(inner, path))
    plan: dict[str, ParallelStyle] = {}
    for i in range(len(inner.get_submodule(layers))):  # type: ignore[arg-type]
        plan[f"{layers}.{i}.{architecture.layer.attention_name}"] = RoutedAttentionParallel()
        plan[f"{layers}.{i}.{architecture.layer.mlp_name}"] = RoutedMLPParallel()
    for path, style in plan.items():  # all of it before anything changes
        style.check(inner.get_submodule(path), mesh)  # type: ignore[attr-defined]
    parallelize_module(inner, mesh, plan)
    return model


def _checked_model_type(model: nn.Module) -> str:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in _FAMILY:
        why = f" ({_REFUSED[model_type]})" if model_type in _REFUSED else ""
        raise TypeError(
            f"model: got a {type(model).__name__} of model_type {model_type!r}{why}, expected one of "
            f"{', '.join(_FAMILY)}"
        )
    return model_type


def _has(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True


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


class _RoutedParallel(ParallelStyle):
    """Base of both styles: shards the linear layers of attention or of an MLP, and makes it serve its rank.

    Attributes:
        names: the linear submodules, the outer one last.
        mixin: the class that makes the module serve its rank.
    """

    names: ClassVar[tuple[str, ...]]
    mixin: ClassVar[type]

    def check(self, module: nn.Module, mesh: DeviceMesh) -> None:
        """Raises unless this style can shard a module over a mesh."""
        what = type(module).__name__
        if mesh.ndim != 1:
            raise ValueError(
                f"mesh: got {mesh.ndim} dimensions, expected one; take it by its name, mesh['tp']"
            )
        children = dict(module.named_children())
        for name in self.names:
            linear = children.get(name)
            if type(linear) is not nn.Linear and getattr(type(linear), "mixin", None) is not Linear:
                raise TypeError(f"{what}.{name}: got a {type(linear).__name__}, expected a torch.nn.Linear")
            if isinstance(linear.weight, DTensor) or isinstance(linear, ShardedLinear):  # type: ignore[union-attr]
                raise TypeError(
                    f"{what}.{name}: got a sharded weight, expected tensor parallelism to come first, and once"
                )
        self._check_sizes(module, mesh.size())

    def _check_sizes(self, module: nn.Module, ranks: int) -> None:
        raise NotImplementedError

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        self.check(module, device_mesh)
        *inner, outer = (getattr(module, name) for name in self.names)
        for linear in inner:
            self._shard(linear, device_mesh, RowShard)
        self._shard(outer, device_mesh, ColumnShard)
        for norm in (getattr(module, name, None) for name in ("q_norm", "k_norm")):
            if norm is not None:
                _swap(norm, WholeNorm, device_mesh)
        _swap(module, self.mixin, device_mesh)
        return module

    def _shard(self, linear: AnyModule, mesh: DeviceMesh, mixin: type[ShardedLinear]) -> None:
        for name, parameter in list(linear.named_parameters(recurse=False)):
            placements = [mixin.placements[name]]
            sharded = distribute_tensor(parameter, mesh, placements, src_data_rank=self.src_data_rank)
            linear.register_parameter(name, nn.Parameter(sharded, requires_grad=parameter.requires_grad))
        _swap(linear, mixin, mesh)


class RoutedMLPParallel(_RoutedParallel):
    """The ParallelStyle of a gated MLP: a rank has d_ff / ranks hidden units, and their columns of the tables."""

    names = GatedMLP.names

    def _check_sizes(self, module: nn.Module, ranks: int) -> None:
        d_ff = getattr(module, self.names[-1]).in_features
        if d_ff % ranks:
            raise ValueError(
                f"{type(module).__name__}: got {d_ff} hidden units, expected a multiple of the mesh's {ranks} ranks"
            )


class RoutedAttentionParallel(_RoutedParallel):
    """The ParallelStyle of attention: a rank has heads / ranks query heads with their key and value heads."""

    names = Attention.names

    def _check_sizes(self, module: nn.Module, ranks: int) -> None:
        head_dim = cast(int, module.head_dim)
        for name, what in (("q_proj", "query heads"), ("k_proj", "key and value heads")):
            heads = getattr(module, name).out_features // head_dim
            if heads % ranks:
                raise ValueError(
                    f"{type(module).__name__}: got {heads} {what}, expected a multiple of the mesh's {ranks} ranks"
                )


def _swap(module: AnyModule, mixin: type, mesh: DeviceMesh) -> None:
    """Gives a module the class that makes it serve its rank, and its rank's part of its tables."""
    module.__class__ = _parallel_class(mixin, type(module))  # type: ignore[arg-type]
    module._rank = Rank(mesh.get_local_rank(), mesh.size(), mesh.get_group().group_name)
    if getattr(module, "_sites", None) is not None:
        module._op_sites = module._sites_of_ops(module._sites)
        module._copy_tables()


@functools.cache
def _parallel_class(mixin: type, whole: type[nn.Module]) -> type:
    """The subclass of a module's class that serves one rank; `whole` is what it was. It keeps the name."""
    names = {name: getattr(whole, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(whole.__name__, (mixin, whole), names | {"whole": whole})


class ShardedLinear:
    """A linear layer whose parameters are DTensors and read as this rank's part of them; its sites are global.

    Attributes:
        placements: how each parameter is sharded.
        sharded_sites: the sites of LinearSites along the sharded features.
    """

    placements: ClassVar[dict[str, Any]]
    sharded_sites: ClassVar[tuple[str, ...]]
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
        return (_rank_sites(sites, self.sharded_sites, self._rank),)


def _is_resharded(parameter: DTensor) -> bool:
    """Whether FSDP2 has it sharded over another mesh dimension too: outside of forward, where it reads it itself."""
    return len(parameter.placements) > 1


class RowShard(ShardedLinear):
    """A rank makes its own outputs of the whole input: gate, up, q, k, v."""

    placements: ClassVar[dict[str, Any]] = {"weight": Shard(0), "bias": Shard(0)}
    sharded_sites = ("output", "update_rows", "update_bias")


class ColumnShard(ShardedLinear):
    """A rank makes its summand of all outputs, of its own inputs: down, o."""

    placements: ClassVar[dict[str, Any]] = {"weight": Shard(1), "bias": Replicate()}
    sharded_sites = ("input", "update_cols")

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


_HIDDEN_UNIT_SITES = ("pre", "hidden", "forward", "update", "update_in", "update_out")
_HEAD_SITES = ("query", "key", "value", "heads", "forward_heads")


class ParallelMLP(ParallelSublayer):
    """A gated MLP of this rank's hidden units."""

    def _sites_of_ops(self, sites: Sites) -> MLPOps:
        ops: MLPOps = super()._sites_of_ops(sites)  # type: ignore[misc]
        return MLPOps(
            fused=_rank_sites(ops.fused, _HIDDEN_UNIT_SITES, self._rank),
            inner=_rank_sites(ops.inner, RowShard.sharded_sites, self._rank),
            middle=_rank_sites(ops.middle, _HIDDEN_UNIT_SITES, self._rank),
            outer=_rank_sites(ops.outer, ColumnShard.sharded_sites, self._rank),
        )


class ParallelAttention(ParallelSublayer):
    """Attention of this rank's heads."""

    def _sites_of_ops(self, sites: Sites) -> tuple[Any, ...]:
        *inner, output, attention = super()._sites_of_ops(sites)  # type: ignore[misc]
        return (
            *(_rank_sites(linear, RowShard.sharded_sites, self._rank) for linear in inner),
            _rank_sites(output, ColumnShard.sharded_sites, self._rank),
            _rank_sites(attention, _HEAD_SITES, self._rank),
        )


RoutedMLPParallel.mixin = ParallelMLP
RoutedAttentionParallel.mixin = ParallelAttention


def _rank_sites(sites: GivenSites, names: Sequence[str], rank: Rank) -> GivenSites:
    """Sites whose tables `names` have this rank's features alone; `[R, 1]` is for all of them."""
    if sites is None:
        return sites
    tables = {
        name: _columns(table, rank) if name in names and table.features > 1 else table
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


class SummedGradient(Function):
    """Identity forward, all-reduce backward."""

    @staticmethod
    def forward(x: Tensor, group: str) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        return _all_reduce(dy, ctx.group), None  # group


class Sum(Function):
    """All-reduce forward, identity backward."""

    @staticmethod
    def forward(x: Tensor, group: str) -> Tensor:
        return _all_reduce(x, group)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        return dy, None  # group


def _all_reduce(x: Tensor, group: str) -> Tensor:
    return funcol.wait_tensor(funcol.all_reduce(x, "sum", group))  # type: ignore[arg-type]
