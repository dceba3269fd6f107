"""RoutedGatedMLP: a gated MLP with routed gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from ..activations import check_activation
from ..backends import check_backend
from ..gated_mlp import routed_gated_mlp, routed_glu
from ..mlp import ActivationSites, MLPSites
from ..routes import Routes
from .mlp import AnyRoutedMLP
from .module import Device
from .submodules import AnyModule


class RoutedGatedMLP(AnyRoutedMLP):
    """A gated MLP (SwiGLU, GeGLU) with routed gradients: `gradroute.routed_gated_mlp`.

    Submodules gate_proj, up_proj and down_proj, as in Llama.

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

    names = ("gate_proj", "up_proj", "down_proj")
    activation = "silu"

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        *,
        sites: MLPSites | None = None,
        activation: str = "silu",
        bias: bool = False,
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

    def _fused(self, linears: list[AnyModule], x: Tensor, routes: Routes | None) -> Tensor:
        gate, up, down = linears
        return routed_gated_mlp(
            x,
            gate.weight,
            up.weight,
            down.weight,
            routes,
            self._sites,
            self.activation,
            gate.bias,
            up.bias,
            down.bias,
            backend=self.backend,
        )

    def _middle(self, a: list[Tensor], routes: Routes | None, sites: ActivationSites | None) -> Tensor:
        gate, up = a
        return routed_glu(gate, up, routes, sites, self.activation, backend=self.backend)
