"""The ops under torch.func: first derivatives are right, everything else is refused with the reason."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch._C._functorch as functorch
from torch import Tensor

Backward = TypeVar("Backward", bound=Callable[..., tuple[Any, ...]])

NO_SECOND_DERIVATIVE = "a routed gradient has no second derivative"


SAMPLE_BY_SAMPLE = (
    "kernels read the tokens of a batch together; for gradients of each sample call torch.func.grad sample by sample, "
    "with Routes.of of its ids"
)


def check_batched(*arguments: tuple[str, Any]) -> None:
    """Raises RuntimeError where vmap has batched one of the arguments, (name, value) each."""
    for name, value in arguments:
        if isinstance(value, Tensor) and _is_batched(value):
            raise RuntimeError(
                f"{name}: got a tensor batched by torch.func.vmap (or jacrev, or is_grads_batched), expected an "
                f"ordinary one: {SAMPLE_BY_SAMPLE}"
            )


def _is_batched(tensor: Tensor) -> bool:
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return functorch.is_legacy_batchedtensor(tensor)


def check_transforms(name: str) -> None:
    """Raises RuntimeError inside a transform of torch.func for which an op has no rule: vmap, or forward mode."""
    kinds = [level.key() for level in functorch.get_interpreter_stack() or ()]
    if functorch.TransformType.Jvp in kinds:
        raise RuntimeError(
            f"{name}: got a derivative in forward mode (torch.func.jvp, jacfwd, hessian), expected one in reverse "
            "mode: a routed gradient is defined by its backward; use torch.func.grad or vjp"
        )
    if functorch.TransformType.Vmap in kinds:
        raise RuntimeError(
            f"{name}: got a call inside torch.func.vmap (or jacrev), expected one outside: {SAMPLE_BY_SAMPLE}"
        )


def _run(backward: Backward, ctx: Any, gradients: tuple[Any, ...]) -> tuple[Any, ...]:
    """A backward whose products are in its forward's dtypes, though autocast may be on where somebody calls it.

    As torch's own backwards are: what they compute in was decided when the forward ran. Gradients of zeros without
    memory, which cannot be written to, get one.
    """
    if torch.compiler.is_compiling():
        return backward(ctx, *gradients)
    gradients = tuple([_with_memory(gradient) for gradient in gradients])
    if not torch._C._is_any_autocast_enabled():
        return backward(ctx, *gradients)
    with contextlib.ExitStack() as stack:
        for device in {t.device.type for t in gradients if isinstance(t, Tensor)}:
            stack.enter_context(torch.autocast(device, enabled=False))
        return backward(ctx, *gradients)


def _with_memory(gradient: Any) -> Any:
    return gradient.clone() if isinstance(gradient, Tensor) and gradient._is_zerotensor() else gradient


def first_order(op: str | Callable[[Any], str]) -> Callable[[Backward], Backward]:
    """Makes a Function's backward refuse to be differentiated: its own gradient would silently lack terms.

    Autograd says by the grad mode that it wants a graph (create_graph=True), and is refused at once. torch.func.grad
    and vjp want one always, whether or not anybody differentiates again: what they get raises when somebody does.

    Args:
        op: the op's name, or what finds it by the context.
    """

    def decorated(backward: Backward) -> Backward:
        @functools.wraps(backward)
        def checked(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
            if torch.compiler.is_compiling() or not _is_transformed(ctx, gradients):
                if torch.is_grad_enabled():
                    raise RuntimeError(
                        f"{op if isinstance(op, str) else op(ctx)}: backward was called with create_graph=True, but "
                        f"{NO_SECOND_DERIVATIVE}; call it without create_graph"
                    )
                return _run(backward, ctx, gradients)
            name = op if isinstance(op, str) else op(ctx)
            check_transforms(name)
            check_batched(*((name, gradient) for gradient in gradients))
            detached = _Detached(ctx)
            found = backward(detached, *map(_detach, gradients))
            sources = [t for t in (*gradients, *detached.sources) if isinstance(t, Tensor)]
            return _undifferentiable(name, found, sources)

        return cast(Backward, checked)

    return decorated


def _is_transformed(ctx: Any, gradients: tuple[Any, ...]) -> bool:
    """Whether a transform made the backward, or runs it: that of vjp runs when the transform has ended."""
    if torch._C._are_functorch_transforms_active():
        return True
    if not issubclass(type(ctx)._forward_cls, torch.autograd.Function):
        return True
    # A loop: any() of a generator takes 0.3 µs longer.
    for gradient in gradients:  # noqa: SIM110
        if gradient is not None and functorch.is_legacy_batchedtensor(gradient):
            return True
    return False


def _detach(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


class _Detached:
    """A context whose saved tensors are constants; the tensors themselves are kept as `sources`."""

    def __init__(self, ctx: Any) -> None:
        self._ctx = ctx
        self.sources: tuple[Any, ...] = ()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)

    @property
    def saved_tensors(self) -> tuple[Any, ...]:
        self.sources = self._ctx.saved_tensors
        return tuple(map(_detach, self.sources))


def _undifferentiable(name: str, gradients: tuple[Any, ...], sources: list[Tensor]) -> tuple[Any, ...]:
    """The gradients as functions of `sources`, whose derivative raises."""
    tensors = [gradient for gradient in gradients if gradient is not None]
    if not tensors:
        return gradients
    found = iter(_Undifferentiable.apply(name, len(tensors), *tensors, *sources))
    return tuple(None if gradient is None else next(found) for gradient in gradients)


class _Undifferentiable(torch.autograd.Function):
    """Its first inputs, as they are."""

    @staticmethod
    def forward(name: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Any) -> tuple[Any, ...]:
        raise RuntimeError(f"{ctx.name}: got a second derivative (torch.func), but {NO_SECOND_DERIVATIVE}")
