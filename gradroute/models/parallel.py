"""Tensor parallelism on torch's own engine: styles of parallelize_module for MLPs and attention of some families.

Linear layers become DTensors as under torch's ColwiseParallel and RowwiseParallel: those that make hidden units, q, k
and v by rows, those that read hidden units and heads by columns. The ops take plain tensors (a custom op has no
sharding strategy), so a sharded layer's `weight` and `bias` *read* as this rank's part, while `parameters()`,
optimizers, state_dict and torch.distributed.checkpoint see the DTensors. Tables are sliced alike, so that a rank masks
its own hidden units and heads.

Inputs and outputs of attention and of the MLP are plain tensors that are the same on every rank. Forward sums the
outputs of all ranks and backward the gradients of the inputs: two all-reduces for each. A parameter that every rank
reads whole gets its gradient summed too: norms of the query and the key, whose heads are on several ranks. The bias of
an output is read on the first rank, and as zeros on the others, so that it counts once.

Where one linear layer makes q, k and v head by head, as in GPT-NeoX, a rank's rows are whole heads. Where it makes all
of q, then k, then v, as in Phi-3 and GPT-2, or all of gate, then up, they are not. A DTensor could not say that a rank
has the others: torch's private `_StridedShard` needs parts of one size, and torch.distributed.checkpoint saves a shard
as one block. So the rows stay consecutive, and the ranks exchange outputs: an all-to-all in forward and in backward.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, ClassVar

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from ..arguments import shown
from ..layers.module import names_of
from .architectures import ARCHITECTURES, inner_model, submodule
from .attention import Attention, NeoAttention
from .fused_attention import FusedAttention, GPT2Attention
from .gated_mlp import GatedMLP
from .linear import Conv1D, Linear, is_conv1d, is_transposed
from .mlp import MLP
from .modules import AnyModule
from .routing import Model
from .sharded import (
    ColumnShard,
    Conv1DColumnShard,
    Conv1DExchangingRowShard,
    Conv1DRowShard,
    Exchange,
    ExchangingRowShard,
    ParallelAttention,
    ParallelMLP,
    Rank,
    RankConfig,
    RowShard,
    ShardedLinear,
    WholeNorm,
)

if TYPE_CHECKING:
    from typing_extensions import Self

_FAMILIES = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma3_text"),
    *("phi3", "gpt2", "gpt_neo", "gpt_neox"),
)


def tensor_parallel(model: Model, mesh: DeviceMesh) -> Model:
    """Shards the MLPs and the attention of a model over a mesh, in place, by torch's parallelize_module.

    For Llama, Mistral, Qwen2, Qwen3, Gemma 3, Phi-3, GPT-2, GPT-Neo and GPT-NeoX (Pythia), routed or not. Call it after
    `route`, and before `fully_shard` (over another dimension of the mesh) and torch.compile. All ranks of the mesh are
    given the same batch. Embeddings, norms and the head stay as they are, so every rank must have made the same ones:
    seed before the model is made. Their parameters are ordinary tensors beside DTensors, which
    `torch.nn.utils.clip_grad_norm_` cannot mix, but `gradroute.optim.RoutedAdamW.clip_grad_norm_` can. Dropout of the
    residual stream must be the same on every rank, so seed all ranks alike where a configuration asks for it.
    Where eager attention returns probabilities, they are those of this rank's heads.

    Args:
        model: a causal language model of transformers, or its base model.
        mesh: a mesh of one dimension, such as `init_device_mesh("cuda", (2, 4), mesh_dim_names=("dp", "tp"))["tp"]`.

    Returns:
        The same model.

    Raises:
        TypeError: a model of another family; linear layers that are not torch.nn.Linear, or GPT-2's Conv1D; a sharded
            model.
        ValueError: heads or hidden units that cannot be divided by the mesh, or a mesh of several dimensions.
    """
    inner = inner_model(model)
    if not hasattr(mesh, "ndim") or not hasattr(mesh, "get_group"):
        raise TypeError(f"mesh: got {shown(mesh)}, expected a torch.distributed.device_mesh.DeviceMesh")
    architecture = ARCHITECTURES[_checked_model_type(inner)]
    paths = {module: path for path, module in inner.named_modules()}
    plan: dict[str, ParallelStyle] = {}
    for layer in submodule(inner, architecture.layers):
        mixins = architecture.layer
        attention, mlp = mixins.attention_of(layer), getattr(layer, mixins.mlp_name)
        plan[paths[attention]] = RoutedAttentionParallel.of(mixins.attention_mixin)
        plan[paths[mlp]] = RoutedMLPParallel.of(mixins.mlp_mixin)
    for path, style in plan.items():  # all of it before anything changes
        style.check(inner.get_submodule(path), mesh)  # type: ignore[attr-defined]
    parallelize_module(inner, mesh, plan)
    return model


def _checked_model_type(model: nn.Module) -> str:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in _FAMILIES:
        raise TypeError(
            f"model: got a {type(model).__name__} of model_type {model_type!r}, expected one of {', '.join(_FAMILIES)}"
        )
    return model_type


class _RoutedParallel(ParallelStyle):
    """Base of both styles: shards the linear layers of attention or of an MLP, and makes it serve its rank.

    Attributes:
        routed_by: the mixin that routes such a module; it names the linear submodules, the outer one last.
        mixin: the class that makes the module serve its rank.
    """

    routed_by: type[Attention] | type[MLP]
    mixin: ClassVar[type]

    @classmethod
    def of(cls, routed_by: type[Attention] | type[MLP]) -> Self:
        """The style of the modules that a mixin routes."""
        style = cls()
        style.routed_by = routed_by
        return style

    def check(self, module: nn.Module, mesh: DeviceMesh) -> None:
        """Raises unless this style can shard a module over a mesh."""
        what = type(module).__name__
        if mesh.ndim != 1:
            raise ValueError(
                f"mesh: got {mesh.ndim} dimensions, expected one; take it by its name, mesh['tp']"
            )
        children = dict(module.named_children())
        for name in self.routed_by.names:
            linear = children.get(name)
            if isinstance(linear, ShardedLinear) or isinstance(getattr(linear, "weight", None), DTensor):
                raise TypeError(
                    f"{what}.{name}: got a sharded weight, expected tensor parallelism to come first, and once"
                )
            if not _is_plain(linear):
                raise TypeError(f"{what}.{name}: got a {type(linear).__name__}, expected a torch.nn.Linear")
        self._check_sizes(module, mesh.size())

    def _check_sizes(self, module: nn.Module, ranks: int) -> None:
        raise NotImplementedError

    def _parts_of(self, module: nn.Module) -> list[int]:
        """How many outputs an inner linear layer makes of each part before it makes the next."""
        raise NotImplementedError

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        self.check(module, device_mesh)
        parts = self._parts_of(module)
        *inner, outer = (getattr(module, name) for name in self.routed_by.names)
        for linear in inner:
            mixin = RowShard if len(parts) == 1 else ExchangingRowShard
            self._shard(linear, device_mesh, mixin)
            if mixin is ExchangingRowShard:
                linear._exchange = Exchange.of(parts, linear._rank)
        self._shard(outer, device_mesh, ColumnShard)
        for norm in (getattr(module, name, None) for name in ("q_norm", "k_norm")):
            if norm is not None:
                _swap(norm, WholeNorm, device_mesh)
        _swap(module, self.mixin, device_mesh)
        return module

    def _shard(self, linear: AnyModule, mesh: DeviceMesh, mixin: type[ShardedLinear]) -> None:
        mixin = _OF_CONV1D[mixin] if is_transposed(linear) else mixin
        for name, parameter in list(linear.named_parameters(recurse=False)):
            placements = [mixin.placements[name]]
            sharded = distribute_tensor(parameter, mesh, placements, src_data_rank=self.src_data_rank)
            linear.register_parameter(name, nn.Parameter(sharded, requires_grad=parameter.requires_grad))
        _swap(linear, mixin, mesh)


class RoutedMLPParallel(_RoutedParallel):
    """The ParallelStyle of a gated MLP: a rank has d_ff / ranks hidden units, and their columns of the tables.

    Of the MLPs of other models by `of`.
    """

    routed_by: type[MLP] = GatedMLP
    mixin = ParallelMLP

    def _check_sizes(self, module: nn.Module, ranks: int) -> None:
        d_ff = self.routed_by.size_of(module)[0]
        if d_ff % ranks:
            raise ValueError(
                f"{type(module).__name__}: got {d_ff} hidden units, expected a multiple of the mesh's {ranks} ranks"
            )

    def _parts_of(self, module: nn.Module) -> list[int]:
        return [self.routed_by.size_of(module)[0]] * self.routed_by.fused_branches


class RoutedAttentionParallel(_RoutedParallel):
    """The ParallelStyle of attention: a rank has heads / ranks query heads with their key and value heads.

    For submodules q_proj, k_proj, v_proj and o_proj; of the attention of other models by `of`.
    """

    routed_by: type[Attention] = Attention
    mixin = ParallelAttention

    def _check_sizes(self, module: nn.Module, ranks: int) -> None:
        heads = self.routed_by.heads_of(module)
        for number, what in ((heads.queries, "query heads"), (heads.groups, "key and value heads")):
            if number % ranks:
                raise ValueError(
                    f"{type(module).__name__}: got {number} {what}, expected a multiple of the mesh's {ranks} ranks"
                )

    def _parts_of(self, module: nn.Module) -> list[int]:
        routed_by: type[Attention] | type[FusedAttention] = self.routed_by
        return routed_by.parts_of(module) if issubclass(routed_by, FusedAttention) else [1]

    def _apply(self, module: AnyModule, device_mesh: DeviceMesh) -> nn.Module:
        super()._apply(module, device_mesh)
        ranks = device_mesh.size()
        # What the modules' own forwards split q, k and v by.
        if self.routed_by is NeoAttention:
            module.num_heads //= ranks
        elif self.routed_by is GPT2Attention:
            module.split_size //= ranks
        elif self.routed_by is FusedAttention:
            module.config = RankConfig(module.config, ranks)
            module.num_key_value_heads //= ranks
        return module


def _is_plain(linear: AnyModule) -> bool:
    """Whether a module is a linear layer itself, routed or not."""
    return (
        type(linear) is nn.Linear
        or getattr(type(linear), "mixin", None) in (Linear, Conv1D)
        or (is_conv1d(linear) and not hasattr(type(linear), "mixin"))
    )


_OF_CONV1D: dict[type[ShardedLinear], type[ShardedLinear]] = {
    RowShard: Conv1DRowShard,
    ExchangingRowShard: Conv1DExchangingRowShard,
    ColumnShard: Conv1DColumnShard,
}


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
    return type(whole.__name__, (mixin, whole), names_of(whole) | {"whole": whole})
