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
from typing import ClassVar, cast

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from ..arguments import shown
from ..layers.module import names_of
from .architectures import ARCHITECTURES, inner_model
from .attention import Attention
from .gated_mlp import GatedMLP
from .linear import Linear
from .modules import AnyModule
from .routing import Model
from .sharded import (
    ColumnShard,
    ParallelAttention,
    ParallelMLP,
    Rank,
    RowShard,
    ShardedLinear,
    WholeNorm,
)

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
    if not hasattr(mesh, "ndim") or not hasattr(mesh, "get_group"):
        raise TypeError(f"mesh: got {shown(mesh)}, expected a torch.distributed.device_mesh.DeviceMesh")
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
    mixin = ParallelMLP

    def _check_sizes(self, module: nn.Module, ranks: int) -> None:
        d_ff = getattr(module, self.names[-1]).in_features
        if d_ff % ranks:
            raise ValueError(
                f"{type(module).__name__}: got {d_ff} hidden units, expected a multiple of the mesh's {ranks} ranks"
            )


class RoutedAttentionParallel(_RoutedParallel):
    """The ParallelStyle of attention: a rank has heads / ranks query heads with their key and value heads."""

    names = Attention.names
    mixin = ParallelAttention

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
    return type(whole.__name__, (mixin, whole), names_of(whole) | {"whole": whole})
