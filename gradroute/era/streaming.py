"""safetensors files written one tensor at a time: the `safetensors` package wants all tensors of a file in memory.

The format: eight bytes of the header's length, a header of JSON that says each tensor's dtype, shape and place, and the
tensors' bytes in that order (https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Entry(NamedTuple):
    """A tensor that is to be written.

    Attributes:
        name: its name in the file.
        dtype: its dtype.
        shape: its shape.
        values: reads it; of a sharded one all ranks must call this, in one order.
    """

    name: str
    dtype: torch.dtype
    shape: torch.Size
    values: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """How many bytes it takes."""
        return self.shape.numel() * self.dtype.itemsize


def check_dtypes(entries: Iterable[Entry]) -> None:
    """Raises TypeError where safetensors does not have a tensor's dtype."""
    for entry in entries:
        if entry.dtype not in _DTYPES:
            raise TypeError(
                f"model: got {entry.name} of {entry.dtype}, expected a dtype that safetensors has"
            )


def files_of(entries: Iterable[Entry], stem: str, most: int) -> dict[str, list[Entry]]:
    """The files that tensors go to, none of more than `most` bytes unless of one tensor, named as Hugging Face's."""
    parts: list[list[Entry]] = [[]]
    for entry in entries:
        if parts[-1] and sum(one.nbytes for one in parts[-1]) + entry.nbytes > most:
            parts.append([])
        parts[-1].append(entry)
    if len(parts) == 1:
        return {f"{stem}.safetensors": parts[0]}
    return {f"{stem}-{i + 1:05}-of-{len(parts):05}.safetensors": part for i, part in enumerate(parts)}


def write_file(path: Path | None, entries: Iterable[Entry]) -> None:
    """Writes a safetensors file, reading one tensor after the other.

    Args:
        path: the file; None: tensors are read, as all ranks must, and nothing is written.
        entries: what goes into it.
    """
    entries = sorted(entries, key=lambda entry: -entry.dtype.itemsize)  # so that each is aligned
    if path is None:
        for entry in entries:
            entry.values()
        return
    with path.open("wb") as file:
        file.write(_header(entries))
        for entry in entries:
            values = entry.values().detach().to("cpu").contiguous()
            file.write(values.reshape(-1).view(torch.uint8).numpy().data)
            del values


def write_index(path: Path, files: Mapping[str, list[Entry]]) -> None:
    """Writes the index that says in which of several files each tensor is."""
    total = sum(entry.nbytes for part in files.values() for entry in part)
    where = {entry.name: name for name, part in files.items() for entry in part}
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2, sort_keys=True)
    path.write_text(f"{text}\n", encoding="utf-8")


def _header(entries: Iterable[Entry]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for entry in entries:
        end = start + entry.nbytes
        header[entry.name] = {
            "dtype": _DTYPES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
