"""RoutedMLP, and what it shares with RoutedGatedMLP: sites, activation, and how linear layers fit together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..activations import check_activation, name_of_module
from ..arguments import check_bool, check_int
from ..backends import check_backend
from ..mlp import MLPSites, routed_mlp
from ..routes import Routes
from .module import Device
from .submodules import LinearsModule, check_no_dropout

if TYPE_CHECKING:
    from typing_extensions import Self


class AnyRoutedMLP(LinearsModule):
    """Base of both MLPs: all linear submodules but the last make hidden units, and the last one reads them."""

    sites_type = MLPSites
    activation: str

    @classmethod
    def from_mlp(
        cls,
        mlp: nn.Module,
        sites: MLPSites | None = None,
        *,
        names: Sequence[str] | None = None,
        activation: str | None = None,
        backend: str | None = None,
    ) -> Self:
        """A routed MLP that shares the linear submodules of `mlp` under their names, and so has its state_dict keys.

        The forward of `mlp` must be that of the op: linear layers and an activation, nothing else. Hooks are not
        copied, and those of the submodules do not run, because the submodules are read and not called.

        Args:
            mlp: the existing module.
            sites: where to mask.
            names: its linear submodules in the order of the op's weights; default: those of this class.
                nanoGPT's MLP has `("c_fc", "c_proj")`.
            activation: its activation; default: that of this class.
            backend: see `gradroute.use_backend`.

        Raises:
            TypeError: a submodule is not a torch.nn.Linear itself but, say, a LoRA or quantised one.
            ValueError: `mlp` has other parameters, dropout, or another activation; a table does not fit.
        """
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.activation = cls.activation if activation is None else activation
        layer.backend = check_backend(backend)
        check_activation(layer.activation)
        instead = (
            "call such modules, with gradroute.routed_activation (gated: gradroute.routed_glu) between them"
        )
        layer._take_linears("mlp", mlp, cls.names if names is None else names, instead)
        dropout = "a routed MLP has no dropout; apply it to the output yourself and set p = 0"
        check_no_dropout("mlp", mlp, dropout)
        _check_activations(mlp, layer.activation)
        layer._check_linears()
        layer.sites = sites
        return layer

    def _make_linears(
        self, d_model: int, d_ff: int, bias: bool, device: Device, dtype: torch.dtype | None
    ) -> None:
        d_model, d_ff = check_int("d_model", d_model, 0), check_int("d_ff", d_ff, 0)
        bias = check_bool("bias", bias)
        *inner, outer = self.names
        for name in inner:
            self.add_module(name, nn.Linear(d_model, d_ff, bias, device, dtype))
        self.add_module(outer, nn.Linear(d_ff, d_model, bias, device, dtype))

    def _check_linears(self) -> None:
        """Raises unless the layers fit together."""
        *inner, outer = self._linears()
        for name, linear in zip(self.names, inner, strict=False):
            if (linear.out_features, linear.in_features) != (outer.in_features, inner[0].in_features):
                raise ValueError(
                    f"names: got {name} of shape {[linear.out_features, linear.in_features]}, "
                    f"expected {[outer.in_features, inner[0].in_features]}: "
                    f"{self.names[-1]} is {[outer.out_features, outer.in_features]}"
                )

    def _widths(self) -> Mapping[str, int | str]:
        outer = self._linears()[-1]
        return MLPSites.widths(outer.out_features, outer.in_features, outer.bias)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, {super().extra_repr()}"


def _check_activations(mlp: nn.Module, activation: str) -> None:
    for name, module in mlp.named_modules():
        known = name_of_module(module)
        if known not in (None, activation):
            raise ValueError(f"activation: got {activation!r}, expected {known!r}, which mlp.{name} is")


class RoutedMLP(AnyRoutedMLP):
    """Linear, activation, linear, with routed gradients: `gradroute.routed_mlp`. Submodules fc_in and fc_out.

    Args:
        d_model: width of the input and the output.
        d_ff: width of the hidden layer.
        sites: where to mask.
        activation: "silu", "gelu" (erf), "gelu_tanh", "gelu_new", "gelu_fast" (both tanh too, with the rounding of
            transformers' modules of these names), "relu" or "relu2" (squared ReLU).
        bias: whether the linear layers have a bias.
        device: the parameters' device.
        dtype: the parameters' dtype.
        backend: see `gradroute.use_backend`.

    Raises:
        TypeError: sites of another layer.
        ValueError: no such activation, or a table does not fit the layer.
    """

    names = ("fc_in", "fc_out")
    activation = "gelu"

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        *,
        sites: MLPSites | None = None,
        activation: str = "gelu",
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_activation(activation)
        self.activation = activation
        self.backend = check_backend(backend)
        self._make_linears(d_model, d_ff, bias, device, dtype)
        self.sites = sites

    def forward(self, x: Tensor, routes: Routes | None = None) -> Tensor:
        fc_in, fc_out = self._linears()
        return routed_mlp(
            x,
            fc_in.weight,
            fc_in.bias,
            fc_out.weight,
            fc_out.bias,
            routes,
            self.sites,
            self.activation,
            backend=self.backend,
        )
