"""Linear layers, embeddings and norms of existing models, routed in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..embedding import EmbeddingSites, routed_embedding
from ..layers import check_embedding
from ..linear import LinearSites, routed_linear, routed_linears
from ..norm import NormSites, routed_layer_norm, routed_rms_norm
from ..routes import Routes
from ..sites import Sites
from .swapped import Swapped, swap

# Who has distributed parameters has imported what makes them; a torch without torch.distributed has nothing to import.
_DTensor: Any = ()
if torch.distributed.is_available():
    from torch.distributed.tensor import DTensor as _DTensor


class Linear(Swapped):
    """torch.nn.Linear: `gradroute.routed_linear`."""

    sites_type = LinearSites
    is_leaf = True
    weight: Any
    bias: Any
    in_features: int
    out_features: int

    @classmethod
    def check_module(cls, module: nn.Module) -> None:
        if type(module) is not nn.Linear:
            raise TypeError(f"got a {full_name(module)}, expected a torch.nn.Linear itself")

    def matrix(self) -> Tensor:  # [O, I]
        """The weight as torch.nn.Linear lays it out."""
        return self.weight

    def _widths(self) -> Mapping[str, int | str]:
        outputs, inputs = self.matrix().shape
        return LinearSites.widths(inputs, outputs, self.bias)

    def forward(self, x: Tensor, routes: Routes | None = None) -> Tensor:
        if routes is None or self._sites is None:
            return super().forward(x)
        refuse_dtensor(self)
        return routed_linear(x, self.matrix(), self.bias, routes, self._op_sites[0], backend=self.backend)


class Conv1D(Linear):
    """The Conv1D of transformers' GPT-2: a linear layer whose weight is stored transposed."""

    @classmethod
    def check_module(cls, module: nn.Module) -> None:
        if not is_conv1d(module):
            raise TypeError(f"got a {full_name(module)}, expected the Conv1D of transformers")

    def matrix(self) -> Tensor:
        return self.weight.t()


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is the Conv1D of transformers, which need not be imported for that."""
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def linear_kind(module: nn.Module) -> type[Swapped]:
    """The kind that routes a linear layer; what cannot be one is refused when it is swapped."""
    from . import lora

    if lora.is_adapter(module):
        return lora.LoRALinear if lora.is_lora(module) else lora.Adapter
    return Conv1D if is_conv1d(module) else Linear


def swap_linear(module: nn.Module, sites: LinearSites | None, backend: str | None) -> None:
    """Routes a linear layer that a routed module calls; where nothing of it is routed it may be of any class.

    Raises:
        TypeError: something is routed, and it is neither a torch.nn.Linear nor a Conv1D nor PEFT's LoRA of one.
    """
    from . import lora

    if sites is not None or lora.is_adapter(module):
        swap(module, linear_kind(module), sites, backend)


def call_linear(linear: Any, x: Tensor, routes: Routes, sites: LinearSites | None) -> Tensor:
    """A linear submodule's output; it must take the routes where something of it is routed."""
    if isinstance(linear, Swapped):
        return linear(x, routes=routes)
    if hasattr(linear, "base_layer"):
        raise RuntimeError(
            f"{full_name(linear)}: got an adapter around a linear layer of a routed model, whose own parameters are "
            "not routed; expected route() after the adapter was added"
        )
    return linear(x) if sites is None else linear(x, routes=routes)


def is_fusible(linear: Any) -> bool:
    """Whether a linear layer is routed, and may be computed together with others of the same input."""
    return isinstance(linear, Linear) and linear._sites is not None and is_readable(linear)


def call_linears(
    linears: Sequence[Linear], x: Tensor, routes: Routes, backend: str | None
) -> tuple[Tensor, ...]:
    """The outputs of fusible linear layers of one input."""
    layers = [(linear.matrix(), linear.bias, linear._op_sites[0]) for linear in linears]
    return routed_linears(x, layers, routes, backend=backend)


def is_readable(linear: Any) -> bool:
    """Whether a linear layer's parameters may be read instead of calling it: nothing else happens in a call."""
    # A tensor-parallel layer's shard reads like the layer.
    made = getattr(type(linear), "whole", type(linear))
    plain = made is nn.Linear or is_conv1d(linear)
    swapped = getattr(made, "kind", None) in (Linear, Conv1D) and "kind" in made.__dict__
    return (plain or swapped) and not is_watched(linear) and not is_dtensor(linear.weight)


def is_watched(module: nn.Module) -> bool:
    """Whether calling a module does more than its class says: hooks, or another forward."""
    return "forward" in vars(module) or bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def is_transposed(linear: Any) -> bool:
    """Whether a linear layer's weight is [I, O], as the Conv1D of transformers stores it, routed or not."""
    return is_conv1d(linear) or isinstance(linear, Conv1D)


def matrix(linear: Any) -> Tensor:  # [O, I]
    """The weight of a readable linear layer as torch.nn.Linear lays it out."""
    return linear.weight.t() if is_transposed(linear) else linear.weight


def scale_rows(linear: Any, weights: Tensor) -> None:
    """Scales a linear layer's outputs, in place, by weights `[O]`."""
    rows = matrix(linear)
    weights = weights.to(rows)
    rows.mul_(weights[:, None])
    if linear.bias is not None:
        linear.bias.mul_(weights)


def scale_columns(linear: Any, weights: Tensor) -> None:
    """Scales what a linear layer reads, in place, by weights `[I]`."""
    columns = matrix(linear)
    columns.mul_(weights.to(columns))


def is_dtensor(tensor: Any) -> bool:
    """Whether a parameter is distributed."""
    return isinstance(tensor, _DTensor)


def refuse_dtensor(module: nn.Module) -> None:
    """Raises where a module's parameters are distributed: the ops take local tensors."""
    for name, parameter in module._parameters.items():
        if is_dtensor(parameter) and is_dtensor(getattr(module, name)):  # a shard reads as a local tensor
            raise TypeError(
                f"{full_name(module)}.{name}: got a DTensor, expected a local tensor; use "
                "gradroute.models.tensor_parallel, which hands the ops local tensors and rank-sliced tables"
            )


def full_name(module: nn.Module) -> str:
    """A module's class, with the Python module that defines it."""
    return f"{type(module).__module__}.{type(module).__name__}"


class Embedding(Swapped):
    """torch.nn.Embedding: `gradroute.routed_embedding`."""

    sites_type = EmbeddingSites
    is_leaf = True
    weight: Any
    padding_idx: int | None

    @classmethod
    def check_module(cls, module: nn.Module) -> None:
        if not isinstance(module, nn.Embedding):
            raise TypeError(f"got a {full_name(module)}, expected a torch.nn.Embedding")
        check_embedding(module.max_norm, module.scale_grad_by_freq, module.sparse)

    def _widths(self) -> Mapping[str, int | str]:
        return {"update": self.weight.shape[1]}

    def forward(self, tokens: Tensor, routes: Routes | None = None) -> Tensor:
        if routes is None or self._sites is None:
            return super().forward(tokens)
        return self._routed(tokens, routes)

    def _routed(self, tokens: Tensor, routes: Routes) -> Tensor:
        refuse_dtensor(self)
        return routed_embedding(
            tokens, self.weight, routes, self._sites, self.padding_idx, backend=self.backend
        )


class ScaledEmbedding(Embedding):
    """That of Gemma 3, which multiplies its output."""

    def _routed(self, tokens: Tensor, routes: Routes) -> Tensor:
        scale: Tensor = self.embed_scale
        return super()._routed(tokens, routes) * scale.to(self.weight.dtype)


class PositionEmbedding(Embedding):
    """Learnt positions: one row of them may serve the whole batch, whose tokens take different routes."""

    def _routed(self, tokens: Tensor, routes: Routes) -> Tensor:
        return super()._routed(tokens.expand(routes.shape), routes)


class Norm(Swapped):
    """What all norms share. A norm of heads `[B, S, H, D]` masks each head with its token's route."""

    sites_type = NormSites
    is_leaf = True
    weight: Any

    @classmethod
    def check_module(cls, module: nn.Module) -> None:
        weight: Any = getattr(module, "weight", None)
        if weight is None or weight.dim() != 1:
            raise TypeError(f"got a {full_name(module)}, expected a norm with a weight of one dimension")

    def _widths(self) -> Mapping[str, int | str]:
        return {"update": self.weight.shape[0]}

    def forward(self, x: Tensor, routes: Routes | None = None) -> Tensor:
        if routes is None or self._sites is None:
            return super().forward(x)
        refuse_dtensor(self)
        if x.dim() > len(routes.shape) + 1:
            routes = routes.repeat(x.shape[-2])
        return self._routed(x, routes)

    def _routed(self, x: Tensor, routes: Routes) -> Tensor:
        raise NotImplementedError


class LlamaNorm(Norm):
    """The RMS norms of Llama, Mistral, Qwen and Phi-3."""

    variance_epsilon: float

    def _routed(self, x: Tensor, routes: Routes) -> Tensor:
        return routed_rms_norm(
            x,
            self.weight,
            routes,
            self._sites,
            self.variance_epsilon,
            casting_mode="llama",
            backend=self.backend,
        )


class GemmaNorm(Norm):
    """The RMS norm of Gemma 3, which stores its weight less one."""

    eps: float

    def _routed(self, x: Tensor, routes: Routes) -> Tensor:
        return routed_rms_norm(
            x, self.weight, routes, self._sites, self.eps, 1.0, "gemma", backend=self.backend
        )


class LayerNorm(Norm):
    """torch.nn.LayerNorm."""

    bias: Any
    eps: float

    def _routed(self, x: Tensor, routes: Routes) -> Tensor:
        return routed_layer_norm(
            x, self.weight, self.bias, routes, self._sites, self.eps, backend=self.backend
        )


def call(module: Any, x: Tensor, routes: Routes, sites: Sites | None) -> Tensor:
    """A submodule's output; it takes the routes where something of it is routed."""
    return module(x) if sites is None else module(x, routes=routes)
