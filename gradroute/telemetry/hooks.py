"""The hooks of a measured step: they read outputs, gradients, ids and losses, and change nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .batches import BatchRoutes
from .measurement import Measurement


class Hooks:
    """The hooks of one measured step, until `remove`.

    Args:
        measurement: what the step has collected.
        num_routes: R, the number of routes.
        align: see `gradroute.telemetry.Telemetry`.

    Attributes:
        called: the names of the watched modules whose forward ran.
        is_paused: whether the hooks ignore what they see.
    """

    def __init__(self, measurement: Measurement, num_routes: int, align: str) -> None:
        self.called: set[str] = set()
        self.is_paused = False
        self._measurement = measurement
        self._num_routes = num_routes
        self._align = align
        self._handles: list[RemovableHandle] = []

    def watch_outputs(self, modules: Mapping[str, nn.Module]) -> None:
        """Watches the gradients of modules' outputs."""
        self._handles += [
            module.register_forward_hook(self._output_hook(name)) for name, module in modules.items()
        ]

    def read_forward(self, model: nn.Module) -> None:
        """Takes ids and losses from the forwards of a model."""
        self._handles.append(model.register_forward_pre_hook(self._before_forward, with_kwargs=True))
        self._handles.append(model.register_forward_hook(self._after_forward, with_kwargs=True))

    def watch_updates(
        self,
        optimizers: Iterable[torch.optim.Optimizer],
        before: Callable[[], None],
        after: Callable[[], None],
    ) -> None:
        """Calls functions before and after the steps of optimizers."""
        for optimizer in optimizers:
            self._handles.append(optimizer.register_step_pre_hook(lambda *_: before()))
            self._handles.append(optimizer.register_step_post_hook(lambda *_: after()))

    def remove(self) -> None:
        """Takes all hooks away."""
        for handle in self._handles:
            handle.remove()

    def _output_hook(self, name: str) -> Callable[..., None]:
        """A forward hook that watches the gradient of a module's output.

        Activation checkpointing runs the forward twice, and the gradient flows through one of the two outputs: with
        use_reentrant=True through the second, the first having no graph; with False through the first.
        """
        measurement = self._measurement

        def watch(module: nn.Module, args: tuple[object, ...], output: object) -> None:
            if torch.compiler.is_compiling() or self.is_paused:
                return  # compiled code would keep this step's hook for all steps
            self.called.add(name)
            x = _first_tensor(output)
            if x is None:
                raise TypeError(
                    f"{name}: got an output of type {type(output).__name__}, expected a tensor or a tuple"
                )
            if x.requires_grad:
                belongs = measurement.batch_of(name).belongs(x.shape[:-1], x.device, name)
                x.register_hook(lambda gradient: measurement.add_gradient(name, gradient, belongs))

        return watch

    def _before_forward(self, module: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, Any]) -> None:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return  # an evaluation within the step trains nothing
        if self._reads():
            ids = kwargs.get("routes") if kwargs.get("route_ids") is None else kwargs["route_ids"]
            self._measurement.take(None if ids is None else BatchRoutes(ids, self._num_routes))

    def _after_forward(
        self, module: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, Any], output: object
    ) -> None:
        if torch.compiler.is_compiling() or _is_recomputation() or not torch.is_grad_enabled():
            return
        logits, labels = getattr(output, "logits", None), kwargs.get("labels")
        if (
            self._reads()
            and self._measurement.batch is not None
            and logits is not None
            and labels is not None
        ):
            self._measurement.add_logits(logits, labels, shift=True, align=self._align)

    def _reads(self) -> bool:
        """Whether ids and losses come from the model's forward now."""
        return self._measurement.reads_forward and not self.is_paused


def _first_tensor(output: object) -> Tensor | None:
    """The activation among the things that a module returns: its output, or the first tensor of several."""
    if isinstance(output, Tensor):
        return output
    values: Sequence[object] = output if isinstance(output, (tuple, list)) else ()
    values = tuple(output.values()) if isinstance(output, Mapping) else values
    return next((value for value in values if isinstance(value, Tensor)), None)


def _is_recomputation() -> bool:
    """Whether this runs within a backward, as a checkpoint does."""
    return torch._C._current_graph_task_id() != -1
