"""Linear layers of existing models: routed in place, called, or read instead of being called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..layers.reading import full_name, is_dtensor, is_patched, is_watched
from ..linear import LinearSites, routed_linear, routed_linears
from ..route_grad import route_grad
from ..routes import Routes
from ..tables import Table
from .computed import unknown_forward
from .dtensors import replicated
from .modules import AnyModule, Argument, refuse_dtensors, refuse_replaced, special_parameters
from .swapped import Swapped


class CalledLinear(Swapped):
    """A linear layer that is called whatever it is, such as a quantised one, and masked around.

    Who may update a weight is decided where its gradient is formed, and that is the layer's own business here.
    """

    sites_type = LinearSites
    owns_sites = True
    computes = False
    bias: Tensor | None

    @classmethod
    def check_module(cls, module: nn.Module) -> None:
        if not isinstance(module, nn.Linear):
            raise TypeError(f"got a {full_name(module)}, expected a torch.nn.Linear")

    def _widths(self) -> Mapping[str, int | str]:
        outputs, inputs = features(self)
        return LinearSites.widths(inputs, outputs, self.bias)

    def _sites_of_ops(self, sites: LinearSites) -> tuple[LinearSites, ...]:
        self._refuse_updates(sites, TypeError)
        return super()._sites_of_ops(sites)

    def _refuse_updates(self, sites: LinearSites, error: type[Exception]) -> None:
        """Raises where sites say who may update a layer that forms its weight's gradient itself, if it has one."""
        masking = sites.effective.tables  # where a table of ones, which masks nothing, is missing
        names = [name for name in sites.tables if name.startswith("update") and name in masking]
        if names:
            special = special_parameters(self)
            raise error(
                f"{', '.join(names)}: got tables for {full_name(self)}{' with ' if special else ''}{special}, expected "
                "none: it is frozen, or its own class forms its gradient; mask activations instead (hidden, pre, "
                "output, heads), or train adapters around it (LoRA)"
            )

    def forward(self, x: Tensor, *args: Argument, routes: Routes | None = None, **kwargs: Argument) -> Tensor:
        if routes is None or self._sites is None:
            return super().forward(x, *args, **kwargs)
        sites = self._op_sites[0]
        y = super().forward(self._masked(x, sites.input, routes), *args, **kwargs)
        return self._masked(y, sites.output, routes)

    def _masked(self, x: Tensor, table: Table | None, routes: Routes) -> Tensor:
        return x if table is None else route_grad(x, routes, table, backend=self.backend)


class Linear(CalledLinear):
    """torch.nn.Linear: `gradroute.routed_linear`; with a weight that is not an ordinary tensor it is called."""

    computes = True
    weight: Tensor
    in_features: int
    out_features: int

    @classmethod
    def check_module(cls, module: nn.Module) -> None:
        if type(module) is not nn.Linear:
            raise TypeError(f"got a {full_name(module)}, expected a torch.nn.Linear itself")

    def matrix(self) -> Tensor:  # [O, I]
        """The weight as torch.nn.Linear lays it out."""
        return self.weight

    def _refuse_updates(self, sites: LinearSites, error: type[Exception]) -> None:
        if special_parameters(self):
            super()._refuse_updates(sites, error)

    def forward(self, x: Tensor, routes: Routes | None = None) -> Tensor:  # type: ignore[override]
        if routes is None or self._sites is None:
            return super().forward(x)
        refuse_dtensors(self)
        if special_parameters(self):
            self._refuse_updates(self._sites, RuntimeError)  # it was quantised since it was routed
            return super().forward(x, routes=routes)
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
    if not is_transposed(linear):
        raise TypeError(
            f"got a {full_name(linear)}, expected a linear layer with in_features and out_features"
        )
    inputs, outputs = linear.weight.shape
    return outputs, inputs


def call_linear(
    linear: AnyModule, x: Tensor, routes: Routes, sites: LinearSites | None, backend: str | None
) -> Tensor:
    """A linear submodule's output; it must take the routes where something of it is routed.

    An ordinary linear layer that stands in the place of a routed one is routed like it.
    """
    if isinstance(linear, Swapped):
        return linear(x, routes=routes)
    if hasattr(linear, "base_layer"):
        raise RuntimeError(
            f"{full_name(linear)}: got an adapter around a linear layer of a routed model, whose own parameters are "
            "not routed; expected route() after the adapter was added"
        )
    if sites is None:
        return linear(x)
    if not is_readable(linear):
        refuse_replaced(linear)
        return linear(x, routes=routes)
    return routed_linear(x, matrix(linear), linear.bias, routes, sites, backend=backend)


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
    plain = made is nn.Linear or (is_conv1d(linear) and _is_known(made))
    swapped = getattr(made, "mixin", None) in (Linear, Conv1D) and "mixin" in made.__dict__
    return (
        (plain or swapped)
        and not getattr(type(linear), "is_called", False)
        and not is_patched()
        and not is_watched(linear)
        and not is_dtensor(linear.weight)
        and not special_parameters(linear)
    )


def _is_known(conv1d: type[nn.Module]) -> bool:
    return torch.compiler.is_compiling() or unknown_forward(conv1d) is None


def scale_rows(linear: AnyModule, weights: Tensor) -> None:
    """Scales a linear layer's outputs, in place, by weights `[O]`."""
    rows = matrix(linear)
    weights = weights.to(rows.dtype).to(rows.device)
    rows.mul_(replicated(weights[:, None], rows))
    if linear.bias is not None:
        linear.bias.mul_(replicated(weights, linear.bias))


def scale_columns(linear: AnyModule, weights: Tensor) -> None:
    """Scales what a linear layer reads, in place, by weights `[I]`."""
    columns = matrix(linear)
    columns.mul_(replicated(weights.to(columns.dtype).to(columns.device), columns))
