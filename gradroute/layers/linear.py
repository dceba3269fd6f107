"""RoutedLinear: torch.nn.Linear with routed gradients."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..arguments import check_bool, check_int
from ..backends import check_backend
from ..checks import is_plain
from ..linear import LinearSites, routed_linear
from ..route_grad import route_grad
from ..routes import Routes
from .module import Device, RoutedModule, check_plain, share
from .reading import is_dtensor

if TYPE_CHECKING:
    from typing_extensions import Self


class RoutedLinear(RoutedModule, nn.Linear):
    """torch.nn.Linear with routed gradients: `gradroute.routed_linear`.

    Args:
        in_features: I, the width of the input.
        out_features: O, the width of the output.
        bias: whether there is a bias.
        device: the parameters' device.
        dtype: the parameters' dtype.
        sites: where to mask.
        backend: see `gradroute.use_backend`.

    Raises:
        TypeError: sites of another layer.
        ValueError: a table does not fit the layer, or `update_bias` without a bias.
    """

    sites_type = LinearSites
    routes_are_second = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        sites: LinearSites | None = None,
        backend: str | None = None,
    ) -> None:
        in_features = check_int("in_features", in_features, 0)
        out_features = check_int("out_features", out_features, 0)
        bias = check_bool("bias", bias)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.backend = check_backend(backend)
        self.sites = sites

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, sites: LinearSites | None = None, *, backend: str | None = None
    ) -> Self:
        """A routed layer that shares the parameters of `linear`; its hooks are not copied.

        Raises:
            TypeError: `linear` is not a torch.nn.Linear itself but, say, a LoRA or quantised one.
            ValueError: a table does not fit the layer.
        """
        check_plain("linear", linear, nn.Linear, "call it, and mask around it with gradroute.route_grad")
        bias = linear.bias is not None
        layer = cls(linear.in_features, linear.out_features, bias, device="meta", backend=backend)
        return share(layer, linear, sites)

    def _widths(self) -> Mapping[str, int | str]:
        return LinearSites.widths(self.in_features, self.out_features, self.bias)

    def forward(self, x: Tensor, routes: Routes | None = None, *, sites: LinearSites | None = None) -> Tensor:
        """x `[*tokens, I]` → `[*tokens, O]`.

        Args:
            x: the input.
            routes: the routes of the tokens; None: the ordinary layer.
            sites: masks of this call in the place of the layer's own: those of a layer that this one is a part of.
        """
        sites = self._sites if sites is None else sites
        weight: Any = self.weight
        bias: Any = self.bias
        if routes is not None and sites is not None and not is_plain(weight):
            return self._masked_around(x, routes, sites, weight, bias)
        return routed_linear(x, weight, bias, routes, sites, backend=self.backend)

    def _masked_around(self, x: Tensor, routes: Routes, sites: LinearSites, weight: Any, bias: Any) -> Tensor:
        """The same with a weight that is distributed, or that its class multiplies with, as quantised ones are."""
        if is_dtensor(weight):
            # Here, because importing DTensor takes longer than all of gradroute.
            from .sharded import sharded_linear

            return sharded_linear(x, weight, bias, routes, sites, self.backend)
        updates = [name for name in sites.tables if name.startswith("update")]
        if updates and any(parameter.requires_grad for parameter in self.parameters()):
            raise TypeError(
                f"{', '.join(updates)}: got tables beside a weight that is a {type(weight).__name__} and is trained, "
                "expected none, because its class makes its gradient; mask activations (output, input), or freeze it"
            )
        if sites.input is not None:
            x = route_grad(x, routes, sites.input, backend=self.backend)
        y = F.linear(x, weight, bias)
        return y if sites.output is None else route_grad(y, routes, sites.output, backend=self.backend)
