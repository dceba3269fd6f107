"""Gated MLPs of existing models, routed in place."""

from __future__ import annotations

from torch import Tensor

from ..gated_mlp import routed_gated_mlp
from ..routes import Routes
from .linear import call_linear, matrix
from .mlp import MLP


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
            self._op_sites.fused,
            self._activation(),
            gate.bias,
            up.bias,
            down.bias,
            backend=self.backend,
        )

    def _called(self, x: Tensor, routes: Routes) -> Tensor:
        sites = self._op_sites
        gate, up, down = self._linears()
        a = (call_linear(branch, x, routes, sites.inner, self.backend) for branch in (gate, up))
        return call_linear(down, self._hidden(routes, *a), routes, sites.outer, self.backend)


class PhiMLP(GatedMLP):
    """The MLP of Phi-3: gate and up are one linear layer, which stays one product."""

    names = ("gate_up_proj", "down_proj")
    activation_name = "activation_fn"
    fused_branches = 2

    def _fused(self, x: Tensor, routes: Routes) -> Tensor:
        return self._called(x, routes)

    def _called(self, x: Tensor, routes: Routes) -> Tensor:
        sites = self._op_sites
        gate_up, down = self._linears()
        gate, up = call_linear(gate_up, x, routes, sites.inner, self.backend).chunk(2, dim=-1)
        return call_linear(down, self._hidden(routes, gate, up), routes, sites.outer, self.backend)
