"""Linear layers of existing models: routed in place, called, or read instead of being called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from ..linear import LinearSites, routed_linear, routed_linears
from ..routes import Routes
from .modules import AnyModule, full_name, is_dtensor, is_watched, refuse_dtensor
from .swapped import Swapped


class Linear(Swapped):
    """torch.nn.Linear: `gradroute.routed_linear`."""

    sites_type = LinearSites
    owns_sites = True
    weight: Tensor
    bias: Tensor | None
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


def is_transposed(linear: nn.Module) -> bool:
    """Whether a linear layer's weight is [I, O], as the Conv1D of transformers stores it, routed or not."""
    return is_conv1d(linear) or isinstance(linear, Conv1D)


def matrix(linear: AnyModule) -> Tensor:  # [O, I]
    """The weight of a readable linear layer as torch.nn.Linear lays it out."""
    return linear.weight.t() if is_transposed(linear) else linear.weight


def features(linear: AnyModule) -> tuple[int, int]:
    """The number of outputs and of inputs of a linear layer, or of what stands for one."""
    if hasattr(linear, "out_features"):
        return linear.out_features, linear.in_features
    inputs, outputs = linear.weight.shape  # transformers' Conv1D
    return outputs, inputs


def call_linear(linear: nn.Module, x: Tensor, routes: Routes, sites: LinearSites | None) -> Tensor:
    """A linear submodule's output; it must take the routes where something of it is routed."""
    if isinstance(linear, Swapped):
        return linear(x, routes=routes)
    if hasattr(linear, "base_layer"):
        raise RuntimeError(
            f"{full_name(linear)}: got an adapter around a linear layer of a routed model, whose own parameters are "
            "not routed; expected route() after the adapter was added"
        )
    return linear(x) if sites is None else linear(x, routes=routes)


def is_fusible(linear: nn.Module) -> bool:
    """Whether a linear layer is routed, and may be computed together with others of the same input."""
    return isinstance(linear, Linear) and linear._sites is not None and is_readable(linear)


def call_linears(
    linears: Sequence[Linear], x: Tensor, routes: Routes, backend: str | None
) -> tuple[Tensor, ...]:
    """The outputs of fusible linear layers of one input."""
    layers = [(linear.matrix(), linear.bias, linear._op_sites[0]) for linear in linears]
    return routed_linears(x, layers, routes, backend=backend)


def is_readable(linear: AnyModule) -> bool:
    """Whether a linear layer's parameters may be read instead of calling it: nothing else happens in a call."""
    # A tensor-parallel layer's shard reads like the layer.
    made = getattr(type(linear), "whole", type(linear))
    plain = made is nn.Linear or is_conv1d(linear)
    swapped = getattr(made, "mixin", None) in (Linear, Conv1D) and "mixin" in made.__dict__
    return (plain or swapped) and not is_watched(linear) and not is_dtensor(linear.weight)


def scale_rows(linear: AnyModule, weights: Tensor) -> None:
    """Scales a linear layer's outputs, in place, by weights `[O]`."""
    rows = matrix(linear)
    weights = weights.to(rows)
    rows.mul_(weights[:, None])
    if linear.bias is not None:
        linear.bias.mul_(weights)


def scale_columns(linear: AnyModule, weights: Tensor) -> None:
    """Scales what a linear layer reads, in place, by weights `[I]`."""
    columns = matrix(linear)
    columns.mul_(weights.to(columns))
