"""The base of the ops' autograd.Functions, and what autograd hands them."""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor
from torch._C._functorch import unwrap_if_dead

from .primitives.protocol import Primitives
from .routes import Routes
from .sites import Sites
from .transforms import check_transforms

SitesT = TypeVar("SitesT", bound=Sites)


class Context(Protocol):
    """The context that autograd hands a Function's setup_context and backward.

    Attributes:
        needs_input_grad: for each argument of forward, whether its gradient is wanted.
    """

    needs_input_grad: tuple[bool, ...]

    @property
    def saved_tensors(self) -> tuple[Any, ...]:
        """The tensors that were saved, None where None was."""

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Keeps inputs and outputs for backward."""

    def mark_non_differentiable(self, *outputs: Tensor) -> None:
        """Says that these outputs have no gradient."""

    def set_materialize_grads(self, value: bool) -> None:
        """Whether a gradient that never arrives is handed to backward as zeros, or as None."""


class RoutedContext(Context, Protocol[SitesT]):
    """The context of an op's Function.

    Attributes:
        routes: the batch's routes.
        sites: effective sites.
        primitives: the backend's.
    """

    routes: Routes
    sites: SitesT
    primitives: Primitives


class Function(torch.autograd.Function):
    """torch.autograd.Function, without binding its arguments anew in every call.

    Where there is a setup_context, torch's `apply` binds them to the signature of `forward` by inspect, for defaults
    and keywords: 18 of the 30 µs that LinearFunction.apply took (2 cores, x of 4 × 8). Every call of ours gives every
    argument by its position. What torch does then is done here too.
    """

    @classmethod
    def apply(cls, *args: Any) -> Any:
        if torch.compiler.is_compiling():
            return super().apply(*args)
        if torch._C._are_functorch_transforms_active():
            check_transforms(f"a routed op ({cls.__name__})")
            return super().apply(*args)
        # What a transform of torch.func wraps is a plain Tensor, whatever is inside; no parameter is.
        live = [unwrap_if_dead(arg) if type(arg) is Tensor else arg for arg in args]
        return super(torch.autograd.Function, cls).apply(*live)  # type: ignore[misc]
