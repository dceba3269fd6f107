"""What a step allocates and frees, operation by operation."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Moment(NamedTuple):
    """What is live right after an operation, in bytes.

    Attributes:
        kept: activations and temporaries, logits too.
        gradients: of parameters.
        logits: of `kept`, tensors as wide as the vocabulary.
    """

    kept: int
    gradients: int
    logits: int


class Tracker(TorchDispatchMode):
    """Adds up the storages that operations make while it is active.

    Storages that exist before (those of `known`) are not counted. A kernel's own scratch memory is not seen.

    Args:
        known: tensors that are counted apart, such as parameters.
        vocabulary: the width of the logits.

    Attributes:
        moments: the timeline.
    """

    def __init__(self, known: Any, vocabulary: int) -> None:
        super().__init__()
        self.moments: list[Moment] = []
        self._vocabulary = vocabulary
        self._live = {tensor.untyped_storage()._cdata: ("known", 0) for tensor in known}
        self._held = [tensor.untyped_storage() for tensor in known]  # so that their addresses stay theirs
        self._sums = {"kept": 0, "gradients": 0, "logits": 0}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        for tensor in made:
            self._see(tensor)
        if made:
            self.moments.append(self.now)
        return result

    @property
    def now(self) -> Moment:
        """What is live at this moment."""
        sums = self._sums
        return Moment(sums["kept"] + sums["logits"], sums["gradients"], sums["logits"])

    def gradients_of(self, model: nn.Module) -> list[Any]:
        """From now on what becomes a parameter's gradient counts as one; returns the hooks' handles."""
        return [
            parameter.register_post_accumulate_grad_hook(self._gradient)
            for parameter in model.parameters()
            if parameter.requires_grad
        ]

    def _gradient(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        storage = parameter.grad.untyped_storage()
        kind, size = self._live.get(storage._cdata, ("known", 0))
        if kind not in ("known", "gradients"):
            self._sums[kind] -= size
            self._sums["gradients"] += size
            self._live[storage._cdata] = ("gradients", size)
            self.moments.append(self.now)

    def _see(self, tensor: Tensor) -> None:
        if tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        size = storage.nbytes()
        kind = "logits" if tensor.dim() and tensor.shape[-1] == self._vocabulary else "kept"
        self._live[key] = (kind, size)
        self._sums[kind] += size
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        kind, size = self._live.pop(key, ("known", 0))
        if kind != "known":
            self._sums[kind] -= size
