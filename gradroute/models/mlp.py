"""MLPs of existing models, routed in place: fused where their linear layers are plain, else called."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from .. import activations
from ..checks import flat
from ..gated_mlp import routed_glu
from ..layers.mlp import MLPOps
from ..layers.reading import is_watched
from ..linear import LinearSites
from ..mlp import MLPSites, routed_activation, routed_mlp
from ..reference import masked_by
from ..route_grad import route_grad
from ..routes import Routes
from ..sites import given
from ..tables import Table, concatenate
from .computed import unknown_forward
from .linear import call_linear, features, is_readable, matrix, scale_columns, scale_rows
from .lora import swap_linear
from .modules import AnyModule
from .patched import mlp_patch, patched_activation
from .swapped import Swapped, check_children


class MLP(Swapped):
    """Linear, activation, linear: `gradroute.routed_mlp`; where a linear layer must be called, its middle alone.

    Attributes:
        names: the linear submodules in the order of the op's weights.
        activation_name: the activation's submodule.
        fused_branches: how many branches, such as gate and up, one inner linear layer makes, one after the other.
    """

    sites_type = MLPSites
    names: tuple[str, ...] = ("c_fc", "c_proj")
    activation_name: str = "act"
    fused_branches: int = 1
    _op_sites: MLPOps

    @classmethod
    def check_module(cls, module: nn.Module) -> None:
        if patched_activation(type(module)) is not None:
            check_children(module, cls.names)
            return
        check_children(module, (*cls.names, cls.activation_name))
        activations.check_module(module.get_submodule(cls.activation_name))

    def swap_children(self) -> None:
        *inner, outer = self._linears()
        for linear in inner:
            swap_linear(linear, self._op_sites.inner, self.backend)
        swap_linear(outer, self._op_sites.outer, self.backend)

    @classmethod
    def size_of(cls, module: nn.Module) -> tuple[int, int]:
        """The number of hidden units of an MLP that this mixin can route or has routed; and 1."""
        return features(getattr(module, cls.names[-1]))[1], 1

    @classmethod
    def features_of(cls, module: nn.Module, chosen: Tensor) -> tuple[list[Tensor], Tensor]:
        """The rows of each inner layer and the columns of the outer one that chosen units have.

        Args:
            module: the MLP.
            chosen: bool `[n]`, of n units in all.
        """
        index = chosen.nonzero().flatten()
        rows = torch.cat([index + branch * len(chosen) for branch in range(cls.fused_branches)])
        return [rows] * (len(cls.names) - 1), index

    def _linears(self) -> list[AnyModule]:
        return [getattr(self, name) for name in self.names]

    def _d_ff(self) -> int:
        return self.size_of(self)[0]

    def _widths(self) -> Mapping[str, int | str]:
        outer = self._linears()[-1]
        return MLPSites.widths(features(outer)[0], self._d_ff(), outer.bias)

    def _sites_of_ops(self, sites: MLPSites) -> MLPOps:
        sites.check(None, self._widths())
        ops = MLPOps.of(sites)
        rows = self._row_table(sites.table("update_in"))
        return ops._replace(inner=given(LinearSites, update_rows=rows))

    def _row_table(self, table: Table | None) -> Table | None:
        """A table of hidden units for the rows of an inner linear layer."""
        branches = self.fused_branches
        return table if branches == 1 else concatenate([table] * branches, [self._d_ff()] * branches)

    def forward_table(self) -> Table | None:
        """The hidden units that tokens of each route see; None: all."""
        return None if self._sites is None else self._sites.effective.forward

    def scale_features(self, weights: Tensor) -> None:
        """Scales the hidden units by `weights` `[d_ff]` or `[1]`, and zeroes all that makes those of weight 0."""
        weights = weights.expand(self._d_ff())
        *inner, outer = self._linears()
        for linear in inner:
            scale_rows(linear, (weights != 0).float().repeat(self.fused_branches))
        scale_columns(outer, weights)

    def _activation(self) -> str:
        patched = patched_activation(type(self).original)
        return activations.check_module(getattr(self, self.activation_name)) if patched is None else patched

    def _calls_activation(self) -> bool:
        """Whether the activation is called as a module: there are hooks on it, or it has another forward."""
        if patched_activation(type(self).original) is not None:
            return False
        activation = getattr(self, self.activation_name)
        is_patched = not torch.compiler.is_compiling() and unknown_forward(type(activation)) is not None
        return is_patched or is_watched(activation)

    def forward(self, x: Tensor, routes: Routes | None = None) -> Tensor:
        if routes is None or self._sites is None:
            return super().forward(x)
        if self._keeps_patch():
            y = self._patched(x, routes)
        elif all(map(is_readable, self._linears())) and not self._calls_activation():
            y = self._fused(x, routes)
        else:
            y = self._called(x, routes)
        dropout = getattr(self, "dropout", None)
        return y if dropout is None else dropout(y)

    def _keeps_patch(self) -> bool:
        """Whether a kernel of Liger's stays between the linear layers: masks of gradients go around it."""
        if mlp_patch(type(self).original) is None:
            return False
        middle = self._op_sites.middle
        return middle is None or (middle.forward is None and (middle.pre is None or self.fused_branches == 1))

    def _patched(self, x: Tensor, routes: Routes) -> Tensor:
        """Liger's forward of something that has routed layers in the place of the module's."""
        *inner, outer = self.names
        calls = {name: functools.partial(self._call_inner, name, routes) for name in inner}
        calls[outer] = functools.partial(self._call_outer, routes)
        patch = mlp_patch(type(self).original)
        assert patch is not None
        return patch(SimpleNamespace(**calls), x)

    def _call_inner(self, name: str, routes: Routes, x: Tensor) -> Tensor:
        a = call_linear(getattr(self, name), x, routes, self._op_sites.inner, self.backend)
        return self._masked(a, "pre", routes)

    def _call_outer(self, routes: Routes, z: Tensor) -> Tensor:
        z = self._masked(z, "hidden", routes)
        return call_linear(self._linears()[-1], z, routes, self._op_sites.outer, self.backend)

    def _hidden(self, routes: Routes, *a: Tensor) -> Tensor:
        """The hidden units of the pre-activations of one branch, or of a gate and of another branch."""
        sites = self._op_sites.middle
        if self._calls_activation():
            return self._called_activation(routes, *a)
        if len(a) == 1:
            return routed_activation(a[0], routes, sites, self._activation(), backend=self.backend)
        return routed_glu(a[0], a[1], routes, sites, self._activation(), backend=self.backend)

    def _called_activation(self, routes: Routes, *a: Tensor) -> Tensor:
        """The same where the activation must be called, because there are hooks on it or on every module."""
        pre, *others = (self._masked(one, "pre", routes) for one in a)
        z = getattr(self, self.activation_name)(pre)
        for other in others:
            z = z * other
        z = self._masked(z, "hidden", routes)
        middle = self._op_sites.middle
        forward = None if middle is None else middle.forward
        return z if forward is None else masked_by(routes)(forward, flat(z)).view(z.shape)

    def _masked(self, x: Tensor, site: str, routes: Routes) -> Tensor:
        middle = self._op_sites.middle
        table = None if middle is None else getattr(middle, site)
        return x if table is None else route_grad(x, routes, table, backend=self.backend)

    def _fused(self, x: Tensor, routes: Routes) -> Tensor:
        fc_in, fc_out = self._linears()
        return routed_mlp(
            x,
            matrix(fc_in),
            fc_in.bias,
            matrix(fc_out),
            fc_out.bias,
            routes,
            self._op_sites.fused,
            self._activation(),
            backend=self.backend,
        )

    def _called(self, x: Tensor, routes: Routes) -> Tensor:
        sites = self._op_sites
        fc_in, fc_out = self._linears()
        a = call_linear(fc_in, x, routes, sites.inner, self.backend)
        return call_linear(fc_out, self._hidden(routes, a), routes, sites.outer, self.backend)


class NeoXMLP(MLP):
    """The MLP of GPT-NeoX and Pythia."""

    names = ("dense_h_to_4h", "dense_4h_to_h")
