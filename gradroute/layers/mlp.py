"""RoutedMLP, and what it shares with RoutedGatedMLP: sites, activation, and how linear layers fit together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from ..activations import check_activation, name_of_module
from ..arguments import check_bool, check_int
from ..backends import check_backend
from ..checks import unrouted
from ..linear import LinearSites
from ..mlp import ActivationSites, MLPSites, routed_activation, routed_mlp
from ..routes import Routes
from ..sites import given
from .children import call_linear, check_whole
from .module import Device
from .reading import is_readable
from .submodules import NO_FEATURES, AnyModule, LinearsModule, check_no_dropout, features

if TYPE_CHECKING:
    from typing_extensions import Self


class MLPOps(NamedTuple):
    """The sites of the ops that an MLP runs as: all of it fused, or its middle between linear layers that are called.

    Attributes:
        fused: the fused op's sites.
        inner: the sites of each linear layer that makes hidden units.
        middle: the activation's sites.
        outer: the sites of the linear layer that reads the hidden units.
    """

    fused: MLPSites | None
    inner: LinearSites | None
    middle: ActivationSites | None
    outer: LinearSites | None

    @classmethod
    def of(cls, sites: MLPSites) -> MLPOps:
        """Splits the sites of an MLP each of whose inner linear layers makes one branch of hidden units."""
        tables = sites.tables
        middle = {name: tables.get(name) for name in ("pre", "hidden", "forward")}
        return cls(
            fused=sites,
            inner=given(LinearSites, update_rows=sites.table("update_in")),
            middle=given(ActivationSites, **middle),
            outer=given(
                LinearSites,
                output=tables.get("output"),
                update_cols=sites.table("update_out"),
                update_bias=tables.get("update_output_bias"),
            ),
        )


_NO_OPS = MLPOps(None, None, None, None)


class AnyRoutedMLP(LinearsModule):
    """Base of both MLPs: all linear submodules but the last make hidden units, and the last one reads them."""

    sites_type = MLPSites
    activation: str
    _op_sites: MLPOps | tuple[()]

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
        copied; those of the submodules run, because a submodule that has some is called.

        Args:
            mlp: the existing module.
            sites: where to mask.
            names: its linear submodules in the order of the op's weights; default: those of this class.
                nanoGPT's MLP has `("c_fc", "c_proj")`.
            activation: its activation; default: that of this class, unless `mlp` has a module that may be another.
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
        _check_activations(mlp, layer.activation, is_named=activation is not None)
        layer._check_linears("names")
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

    def _check_linears(self, argument: str) -> list[AnyModule]:
        """The linear layers; raises unless they fit together, with a message that names `argument`."""
        linears = self._linears()
        d_ff = features(linears[-1])[1]
        d_model = features(linears[0])[1]
        for linear in linears[:-1]:
            if features(linear) != (d_ff, d_model):
                self._refuse_shapes(argument)
        return linears

    def _refuse_shapes(self, argument: str) -> None:
        *inner, outer = map(features, self._linears())
        expected = (outer[1], inner[0][1])
        for name, got in zip(self.names, inner, strict=False):
            if got != expected and NO_FEATURES not in (got, outer, inner[0]):
                raise ValueError(
                    f"{argument}: got {name} of shape {list(got)}, expected {list(expected)}: "
                    f"{self.names[-1]} is {list(outer)}"
                )

    def _sites_of_ops(self, sites: MLPSites) -> MLPOps:
        sites.check(None, self._widths())
        return MLPOps.of(sites)

    def forward(self, x: Tensor, routes: Routes | None = None) -> Tensor:
        """x `[*tokens, d_model]` → `[*tokens, d_model]`.

        Args:
            x: the input.
            routes: the routes of the tokens; None: the ordinary layer.
        """
        linears = self._check_linears(type(self).__name__)
        for linear in linears:
            if not is_readable(linear):
                return self._called(x, routes)
        return self._fused(linears, x, routes)

    def _fused(self, linears: list[AnyModule], x: Tensor, routes: Routes | None) -> Tensor:
        """All of it as one op, which reads the linear layers."""
        raise NotImplementedError

    def _middle(self, a: list[Tensor], routes: Routes | None, sites: ActivationSites | None) -> Tensor:
        """The hidden units of the pre-activations of the inner linear layers."""
        raise NotImplementedError

    def _called(self, x: Tensor, routes: Routes | None) -> Tensor:
        """The middle alone, between linear layers that are called."""
        unrouted(routes, self._sites, MLPSites)  # raises where routes are none, before anything is called
        *inner, outer = self.names
        ops: MLPOps = self._op_sites or _NO_OPS
        d_ff = features(self._linears()[-1])[1]
        a = [call_linear(self, name, x, routes, ops.inner) for name in inner]
        for name, branch in zip(inner, a, strict=True):
            check_whole(self, name, branch, d_ff, None if routes is None else ops.middle)
        return call_linear(self, outer, self._middle(a, routes, ops.middle), routes, ops.outer)

    def _widths(self) -> Mapping[str, int | str]:
        outer = self._linears()[-1]
        return MLPSites.widths(*features(outer), getattr(outer, "bias", None))

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}, {super().extra_repr()}"


def _check_activations(mlp: nn.Module, activation: str, is_named: bool) -> None:
    for name, module in mlp.named_modules():
        known = name_of_module(module)
        if known is None and not is_named and _may_be_activation(module):
            raise ValueError(
                f"activation: got None, expected the name of what mlp.{name} computes, a {type(module).__name__}"
            )
        if known not in (None, activation):
            raise ValueError(f"activation: got {activation!r}, expected {known!r}, which mlp.{name} is")


def _may_be_activation(module: nn.Module) -> bool:
    is_leaf = next(module.children(), None) is None and next(module.parameters(), None) is None
    return is_leaf and not isinstance(module, (nn.Dropout, nn.Identity))


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

    def _fused(self, linears: list[AnyModule], x: Tensor, routes: Routes | None) -> Tensor:
        fc_in, fc_out = linears
        return routed_mlp(
            x,
            fc_in.weight,
            fc_in.bias,
            fc_out.weight,
            fc_out.bias,
            routes,
            self._sites,
            self.activation,
            backend=self.backend,
        )

    def _middle(self, a: list[Tensor], routes: Routes | None, sites: ActivationSites | None) -> Tensor:
        return routed_activation(a[0], routes, sites, self.activation, backend=self.backend)
