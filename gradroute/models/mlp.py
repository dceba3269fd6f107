"""MLPs of existing models, routed in place: fused where their linear layers are plain, else called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..gated_mlp import routed_gated_mlp, routed_glu
from ..linear import LinearSites
from ..mlp import ActivationSites, MLPSites, routed_activation, routed_mlp
from ..routes import Routes
from ..sites import given
from ..tables import Table, concatenate
from .modules import (
    call_linear,
    is_readable,
    is_watched,
    matrix,
    scale_columns,
    scale_rows,
    swap_linear,
)
from .swapped import Swapped, check_children

# The activation of an MLP by its class: torch.nn's, and those of transformers.
_ACTIVATIONS = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELU": "gelu",
    "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    # The same formula, but with eager PyTorch's rounding of every step.
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "ReLU": "relu",
    "ReLUSquaredActivation": "relu2",
}


class MLP(Swapped):
    """Linear, activation, linear: `gradroute.routed_mlp`; where a linear layer must be called, its middle alone.

    Attributes:
        names: the linear submodules in the order of the op's weights.
        activation_name: the activation's submodule.
        blocks: how many values of every hidden unit an inner linear layer makes, one block after the other.
    """

    sites_type = MLPSites
    names: tuple[str, ...] = ("c_fc", "c_proj")
    activation_name: str = "act"
    blocks: int = 1

    @classmethod
    def check_module(cls, module: nn.Module) -> None:
        check_children(module, (*cls.names, cls.activation_name))
        _activation_of(module.get_submodule(cls.activation_name))

    def swap_children(self) -> None:
        *inner, outer = self._linears()
        for linear in inner:
            swap_linear(linear, self._op_sites[1], self.backend)
        swap_linear(outer, self._op_sites[3], self.backend)

    @classmethod
    def size_of(cls, module: Any) -> tuple[int, int]:
        """The number of hidden units of an MLP that this kind routes, whether it does already or not; and 1."""
        return features(getattr(module, cls.names[-1]))[1], 1

    @classmethod
    def features_of(cls, module: Any, chosen: Tensor) -> tuple[list[Tensor], Tensor]:
        """Of chosen units, bool `[n]` of n in all, the rows of each inner layer and the columns of the outer one."""
        index = chosen.nonzero().flatten()
        rows = torch.cat([index + block * len(chosen) for block in range(cls.blocks)])
        return [rows] * (len(cls.names) - 1), index

    def _linears(self) -> list[Any]:
        return [getattr(self, name) for name in self.names]

    def _d_ff(self) -> int:
        return self.size_of(self)[0]

    def _widths(self) -> Mapping[str, int | str]:
        outer = self._linears()[-1]
        return MLPSites.widths(features(outer)[0], self._d_ff(), outer.bias)

    def _sites_of_ops(self, sites: MLPSites) -> tuple[Any, ...]:
        """Of the fused op, and, where linear layers are called, of the inner ones, the middle and the outer one."""
        sites.check(None, self._widths())
        tables = sites.tables
        update_in, update_out = (
            tables.get(name, tables.get("update")) for name in ("update_in", "update_out")
        )
        middle = {name: tables.get(name) for name in ("pre", "hidden", "forward")}
        return (
            sites,
            given(LinearSites, update_rows=self._rows(update_in)),
            given(ActivationSites, **middle),
            given(
                LinearSites,
                output=tables.get("output"),
                update_cols=update_out,
                update_bias=tables.get("update_output_bias"),
            ),
        )

    def _rows(self, table: Table | None) -> Table | None:
        """A table of hidden units for the rows of an inner linear layer."""
        return table if self.blocks == 1 else concatenate([table] * self.blocks, [self._d_ff()] * self.blocks)

    def forward_table(self) -> Table | None:
        """What tokens of each route see of the hidden units; None: all."""
        return None if self._sites is None else self._sites.effective.forward

    def scale_features(self, weights: Tensor) -> None:
        """Scales the hidden units by `weights` `[d_ff]` or `[1]`, and zeroes all that makes those of weight 0."""
        weights = weights.expand(self._d_ff())
        *inner, outer = self._linears()
        for linear in inner:
            scale_rows(linear, (weights != 0).float().repeat(self.blocks))
        scale_columns(outer, weights)

    def _activation(self) -> str:
        activation = getattr(self, self.activation_name)
        if is_watched(activation):
            raise RuntimeError(
                f"{type(self).__name__}.{self.activation_name}: got hooks or another forward, expected none beside "
                "routes: the activation is part of a fused op; put hooks on the MLP or on its linear layers"
            )
        return _activation_of(activation)

    def forward(self, x: Tensor, routes: Routes | None = None) -> Tensor:
        if routes is None or self._sites is None:
            return super().forward(x)
        y = self._fused(x, routes) if all(map(is_readable, self._linears())) else self._called(x, routes)
        dropout = getattr(self, "dropout", None)
        return y if dropout is None else dropout(y)

    def _fused(self, x: Tensor, routes: Routes) -> Tensor:
        fc_in, fc_out = self._linears()
        return routed_mlp(
            x,
            matrix(fc_in),
            fc_in.bias,
            matrix(fc_out),
            fc_out.bias,
            routes,
            self._op_sites[0],
            self._activation(),
            backend=self.backend,
        )

    def _called(self, x: Tensor, routes: Routes) -> Tensor:
        _, inner_sites, middle, outer_sites = self._op_sites
        fc_in, fc_out = self._linears()
        a = call_linear(fc_in, x, routes, inner_sites)
        z = routed_activation(a, routes, middle, self._activation(), backend=self.backend)
        return call_linear(fc_out, z, routes, outer_sites)


class NeoXMLP(MLP):
    """That of GPT-NeoX and Pythia."""

    names = ("dense_h_to_4h", "dense_4h_to_h")


class GatedMLP(MLP):
    """A gated MLP (SwiGLU, GeGLU): `gradroute.routed_gated_mlp`."""

    names: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")
    activation_name = "act_fn"

    def _fused(self, x: Tensor, routes: Routes) -> Tensor:
        gate, up, down = self._linears()
        return routed_gated_mlp(
            x,
            matrix(gate),
            matrix(up),
            matrix(down),
            routes,
            self._op_sites[0],
            self._activation(),
            gate.bias,
            up.bias,
            down.bias,
            backend=self.backend,
        )

    def _called(self, x: Tensor, routes: Routes) -> Tensor:
        _, inner_sites, middle, outer_sites = self._op_sites
        gate, up, down = self._linears()
        z = routed_glu(
            call_linear(gate, x, routes, inner_sites),
            call_linear(up, x, routes, inner_sites),
            routes,
            middle,
            self._activation(),
            backend=self.backend,
        )
        return call_linear(down, z, routes, outer_sites)


class PhiMLP(GatedMLP):
    """That of Phi-3: gate and up are one linear layer, which stays one product."""

    names = ("gate_up_proj", "down_proj")
    activation_name = "activation_fn"
    blocks = 2

    def _fused(self, x: Tensor, routes: Routes) -> Tensor:
        return self._called(x, routes)

    def _called(self, x: Tensor, routes: Routes) -> Tensor:
        _, inner_sites, middle, outer_sites = self._op_sites
        gate_up, down = self._linears()
        gate, up = call_linear(gate_up, x, routes, inner_sites).chunk(2, dim=-1)
        z = routed_glu(gate, up, routes, middle, self._activation(), backend=self.backend)
        return call_linear(down, z, routes, outer_sites)


def features(linear: Any) -> tuple[int, int]:
    """The number of outputs and of inputs of a linear layer, or of what stands for one."""
    if hasattr(linear, "out_features"):
        return linear.out_features, linear.in_features
    inputs, outputs = linear.weight.shape  # transformers' Conv1D
    return outputs, inputs


def _activation_of(module: nn.Module) -> str:
    name = type(module).__name__
    if name == "GELU" and getattr(module, "approximate", "none") == "tanh":
        return "gelu_tanh"
    if name not in _ACTIVATIONS:
        raise TypeError(f"got the activation {name}, expected one of {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]
