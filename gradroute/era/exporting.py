"""export: a model saved for those who know nothing of routes."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..arguments import check_is
from ..models.inspection import inner_model, is_dtensor


def export(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Saves a model for those who know nothing of routes.

    Args:
        model: a model of transformers, routed or not, which is saved as a folder that `from_pretrained` loads; or any
            other module, whose state_dict is saved as a file of torch.save, on the CPU.
        path: the folder or the file to write.

    Raises:
        TypeError: adapters, or sharded parameters.
    """
    check_is("path", path, (str, os.PathLike), "a path")
    if inner_model(model) is not model:
        raise TypeError("model: got one with adapters, expected them merged: merge_and_unload() first")
    for name, parameter in model.named_parameters():
        if is_dtensor(parameter):
            raise TypeError(f"model: got {name} sharded, expected whole parameters: gather them first")
    save: Callable[[str | os.PathLike[str]], object] | None = getattr(model, "save_pretrained", None)
    if save is not None:
        save(path)
        return
    state = model.state_dict()
    torch.save({k: v.detach().cpu().clone() if isinstance(v, Tensor) else v for k, v in state.items()}, path)
