"""export: a model saved for those who know nothing of routes."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import check_int, check_is
from ..models.inspection import inner_model, is_dtensor, offloaded, reshard, stored, whole
from .streaming import Entry, check_dtypes, files_of, write_file, write_index

#: The most bytes of a file of weights, unless a single parameter is larger.
_MOST = 5_000_000_000


def export(model: nn.Module, path: str | os.PathLike[str], *, max_shard_size: int = _MOST) -> None:
    """Saves a model for those who know nothing of routes, without a second copy of it in memory.

    Parameters that are sharded (FSDP2, tensor parallelism) are gathered, and offloaded ones loaded, one at a time: the
    first rank writes, and all ranks must call this.

    Args:
        model: a model of transformers, routed or not, which is saved as a folder that `from_pretrained` loads; or any
            other module, whose state_dict is saved on the CPU, as a file of safetensors where `path` ends in
            ".safetensors", and otherwise as one of torch.save, which needs memory for what is not on the CPU.
        path: the folder or the file to write.
        max_shard_size: bytes, the most of one file of weights of a folder, unless one parameter is larger.

    Raises:
        TypeError: adapters; sharded or offloaded parameters and a path of torch.save; a dtype that safetensors lacks.
        ValueError: a parameter on the meta device; the size is not positive.
    """
    check_is("path", path, (str, os.PathLike), "a path")
    check_int("max_shard_size", max_shard_size, 1)
    if inner_model(model) is not model:
        raise TypeError("model: got one with adapters, expected them merged: merge_and_unload() first")
    reshard(model)
    entries, is_sharded, is_offloaded = _entries(model)
    save: Callable[..., object] | None = getattr(model, "save_pretrained", None)
    if save is not None and not (is_sharded or is_offloaded):
        save(path, max_shard_size=max_shard_size)
        return
    writes = not is_sharded or torch.distributed.get_rank() == 0
    if save is not None:
        _write_folder(model, Path(path), _saved(model, entries), max_shard_size, writes)
    elif Path(path).suffix == ".safetensors":
        check_dtypes(entries)
        write_file(Path(path) if writes else None, entries)
    elif is_sharded or is_offloaded:
        raise TypeError(
            f"path: got {os.fspath(path)!r} for sharded or offloaded parameters, expected one that ends in "
            '".safetensors", which is written one parameter at a time'
        )
    else:
        torch.save({key: _on_the_cpu(value) for key, value in model.state_dict().items()}, path)
    if is_sharded:
        torch.distributed.barrier()  # who loads it on another rank finds it whole


def _entries(model: nn.Module) -> tuple[list[Entry], bool, bool]:
    """The tensors of a model's state_dict; whether some are sharded, and whether some are offloaded.

    Raises:
        ValueError: one is on the meta device, and nothing has offloaded it.
    """
    outside = offloaded(model)
    entries = []
    is_sharded = False
    for key, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            continue  # extra state, of which torch.save alone knows how to keep it
        path, _, name = key.rpartition(".")
        place = outside.get((id(_submodule(model, path)), name))
        if value.is_meta and place is None:
            raise ValueError(f"model: got {key} on the meta device, expected parameters with values")
        is_sharded |= is_dtensor(value)
        read = partial(whole, value) if place is None else place.read
        entries.append(Entry(key, value.dtype, value.shape, read))
    return entries, is_sharded, bool(outside)


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    """A submodule by its path; None where a state_dict's key is none, as hooks may make it."""
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _saved(model: Any, entries: list[Entry]) -> list[Entry]:
    """Those of a transformers model's tensors that it saves: each tied parameter by one of its names."""
    follows = set(getattr(model, "all_tied_weights_keys", None) or ())  # names that are tied to another one
    names = {entry.name for entry in entries}
    left_out = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    for home in stored(model).values():
        same = sorted(names & home.names.keys(), key=lambda name: name in follows)
        left_out |= set(same[1:])
    return [entry for entry in entries if entry.name not in left_out]


def _write_folder(model: Any, path: Path, entries: list[Entry], most: int, writes: bool) -> None:
    """Writes a folder that `from_pretrained` loads; ranks that do not write read their shards of each parameter."""
    check_dtypes(entries)
    files = files_of(entries, "model", most)
    if writes:
        path.mkdir(parents=True, exist_ok=True)
        for old in (*path.glob("model*.safetensors"), path / "model.safetensors.index.json"):
            old.unlink(missing_ok=True)
        config = copy.deepcopy(model.config)
        config.architectures = [type(model).__name__.removeprefix("FSDP")]
        config.dtype = str(model.dtype).removeprefix("torch.")
        config.save_pretrained(path)
        if model.can_generate():
            model.generation_config.save_pretrained(path)
        if len(files) > 1:
            write_index(path / "model.safetensors.index.json", files)
    for name, part in files.items():
        write_file(path / name if writes else None, part)


def _on_the_cpu(value: Any) -> Any:
    """A tensor on the CPU, itself where it is there; a part of a larger one as a copy, with which no rest is saved."""
    if not isinstance(value, Tensor):
        return value
    value = value.detach().cpu()
    return value.clone() if value.untyped_storage().nbytes() > value.nbytes else value
