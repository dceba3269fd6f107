"""RoutedRMSNorm and RoutedLayerNorm: norms with routed updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..arguments import check_bool, check_choice, check_int, check_number, is_int, shown
from ..backends import check_backend
from ..norm import CASTING_MODES, NormSites, routed_layer_norm, routed_rms_norm
from ..routes import Routes
from .module import Device, RoutedModule, check_plain, share
from .reading import refuse_dtensor

if TYPE_CHECKING:
    from typing_extensions import Self


def _check_shape(normalized_shape: int | Sequence[int]) -> None:
    sizes: Any = [normalized_shape] if is_int(normalized_shape) else normalized_shape
    if isinstance(sizes, str) or not isinstance(sizes, Sequence):
        raise TypeError(f"normalized_shape: got {shown(normalized_shape)}, expected an int or one in a list")
    for size in sizes:
        check_int("normalized_shape", size, 1)


class _RoutedNorm(RoutedModule):
    """Base of both norms: one normalised dimension, with a weight."""

    sites_type = NormSites
    routes_are_second = True
    normalized_shape: tuple[int, ...]
    weight: nn.Parameter

    def _check_affine(self) -> None:
        if self.weight is None:
            raise ValueError(
                "elementwise_affine: got False, expected True: a norm without a weight has nothing to route"
            )
        if len(self.normalized_shape) != 1:
            raise ValueError(f"normalized_shape: got {self.normalized_shape}, expected one dimension")

    def _widths(self) -> Mapping[str, int | str]:
        return {"features": self.weight.shape[0]}


class RoutedRMSNorm(_RoutedNorm, nn.RMSNorm):
    """torch.nn.RMSNorm, or that of Llama or Gemma, with routed updates: `gradroute.routed_rms_norm`.

    Args:
        normalized_shape: D.
        eps: added to the mean square; None: torch.nn.RMSNorm's own.
        elementwise_affine: must be True.
        device: the weight's device.
        dtype: the weight's dtype.
        sites: where to mask.
        offset: added to the weight, which starts at 1 - offset. Gemma's is 1.
        casting_mode: "torch", "llama" or "gemma": whose rounding of intermediates.
        backend: see `gradroute.use_backend`.

    Raises:
        TypeError: sites of another layer.
        ValueError: no weight, more than one dimension, no such casting mode, or a table does not fit.
    """

    offset: float = 0.0
    casting_mode: str = "torch"

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float | None = None,
        elementwise_affine: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        sites: NormSites | None = None,
        offset: float = 0.0,
        casting_mode: str = "torch",
        backend: str | None = None,
    ) -> None:
        check_choice("casting_mode", casting_mode, CASTING_MODES)
        _check_shape(normalized_shape)
        if eps is not None:
            check_number("eps", eps, 0)
        check_bool("elementwise_affine", elementwise_affine)
        # reset_parameters, which the constructor calls, reads it.
        self.offset = check_number("offset", offset)
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)
        self._check_affine()
        self.casting_mode = casting_mode
        self.backend = check_backend(backend)
        self.sites = sites

    @classmethod
    def from_rms_norm(
        cls,
        norm: nn.Module,
        sites: NormSites | None = None,
        *,
        offset: float = 0.0,
        casting_mode: str | None = None,
        backend: str | None = None,
    ) -> Self:
        """A routed norm that shares the weight of `norm`; its hooks are not copied.

        Args:
            norm: a torch.nn.RMSNorm, or a module with a weight and `variance_epsilon` or `eps`.
            sites: where to mask.
            offset: what its forward adds to the weight. Gemma's is 1.
            casting_mode: the rounding that its forward has: "torch", "llama" (Llama, Mistral, Qwen) or "gemma". Needed
                where it is not a torch.nn.RMSNorm; default there: "torch".
            backend: see `gradroute.use_backend`.

        Raises:
            TypeError: `norm` has no weight of one dimension, has other parameters, or no epsilon.
            ValueError: a casting mode is needed, or there is no such one; a table does not fit.
        """
        weight, eps = _weight_and_eps(norm)
        if casting_mode is None:
            casting_mode = _own_casting_mode(norm)
        layer = cls(
            weight.shape[0],
            eps,
            device="meta",
            offset=offset,
            casting_mode=casting_mode,
            backend=backend,
        )
        return share(layer, norm, sites)

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.constant_(self.weight, 1.0 - self.offset)

    def forward(self, x: Tensor, routes: Routes | None = None) -> Tensor:
        weight = self.weight
        if routes is not None:
            refuse_dtensor(self, "weight", weight)
        return routed_rms_norm(
            x,
            weight,
            routes,
            self.sites,
            self.eps,
            self.offset,
            self.casting_mode,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, offset={self.offset}, casting_mode={self.casting_mode!r}"


def _weight_and_eps(norm: nn.Module) -> tuple[Tensor, float | None]:
    """The weight and the epsilon of an existing RMS norm; raises TypeError unless it has these alone."""
    name = type(norm).__name__
    tensors = dict(chain(norm.named_parameters(), norm.named_buffers()))
    weight = tensors.pop("weight", None)
    if weight is None or weight.dim() != 1 or tensors:
        shapes = {key: list(tensor.shape) for key, tensor in norm.state_dict().items()}
        raise TypeError(f"norm: got a {name} of parameters {shapes}, expected a weight [D] and nothing else")
    epsilon = next((key for key in ("variance_epsilon", "eps") if hasattr(norm, key)), None)
    if epsilon is None:
        raise TypeError(f"norm: got a {name}, expected a module with variance_epsilon or eps")
    return weight, getattr(norm, epsilon)


def _own_casting_mode(norm: nn.Module) -> str:
    """The casting mode of a torch.nn.RMSNorm; nothing tells how another norm rounds."""
    if type(norm) is not nn.RMSNorm:
        raise ValueError(
            f"casting_mode: got None for a {type(norm).__name__}, expected the one whose rounding its forward has: "
            "'llama', 'gemma' (mostly with offset=1.0) or 'torch'"
        )
    return "torch"


class RoutedLayerNorm(_RoutedNorm, nn.LayerNorm):
    """torch.nn.LayerNorm with routed updates of weight and bias: `gradroute.routed_layer_norm`.

    Args:
        normalized_shape: D.
        eps: added to the variance.
        elementwise_affine: must be True.
        bias: whether there is a bias.
        device: the parameters' device.
        dtype: the parameters' dtype.
        sites: where to mask.
        backend: see `gradroute.use_backend`.

    Raises:
        TypeError: sites of another layer.
        ValueError: no weight, more than one dimension, or a table does not fit.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        sites: NormSites | None = None,
        backend: str | None = None,
    ) -> None:
        _check_shape(normalized_shape)
        check_number("eps", eps, 0)
        check_bool("elementwise_affine", elementwise_affine)
        check_bool("bias", bias)
        super().__init__(normalized_shape, eps, elementwise_affine, bias, device, dtype)
        self._check_affine()
        self.backend = check_backend(backend)
        self.sites = sites

    @classmethod
    def from_layer_norm(
        cls, norm: nn.LayerNorm, sites: NormSites | None = None, *, backend: str | None = None
    ) -> Self:
        """A routed norm that shares the parameters of `norm`; its hooks are not copied.

        Raises:
            TypeError: `norm` is not a torch.nn.LayerNorm itself.
            ValueError: it has no weight or more than one dimension, or a table does not fit.
        """
        check_plain("norm", norm, nn.LayerNorm, "call it as it is")
        affine, bias = norm.elementwise_affine, norm.bias is not None
        layer = cls(norm.normalized_shape, norm.eps, affine, bias, device="meta", backend=backend)
        return share(layer, norm, sites)

    def forward(self, x: Tensor, routes: Routes | None = None) -> Tensor:
        weight = self.weight
        if routes is not None:
            refuse_dtensor(self, "weight", weight)
        return routed_layer_norm(x, weight, self.bias, routes, self.sites, self.eps, backend=self.backend)
