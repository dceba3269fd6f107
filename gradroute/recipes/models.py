"""Models and tokenizers from files of this machine: folders of save_pretrained, and GGUF files."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..arguments import check_choice
from .files import located
from .reading import ConfigError

if TYPE_CHECKING:
    from .sections import Model

# Models, tokenizers and configurations of transformers, of any class.
Pretrained = Any
Tokenizer = Any

DTYPES = ("auto", "float32", "bfloat16", "float16")


class Place(NamedTuple):
    """Where a model's files are.

    Attributes:
        folder: the folder that from_pretrained is given.
        gguf_file: the name of the GGUF file in it; None: the folder is one of save_pretrained.
    """

    folder: Path
    gguf_file: str | None

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of every from_pretrained; nothing is looked for on the network."""
        gguf = {} if self.gguf_file is None else {"gguf_file": self.gguf_file}
        return {"pretrained_model_name_or_path": str(self.folder), "local_files_only": True, **gguf}


def resolve(path: str | os.PathLike[str]) -> Place:
    """Where the model is that a path names.

    Args:
        path: a folder with a config.json, a GGUF file, a folder whose only model is one GGUF file, or
            `package:NAME/FILE` in an installed package, which is not imported.

    Raises:
        ValueError: the path does not exist or is none of these; a GGUF file, and the package gguf is not installed.
    """
    place = _place(path)
    if place.gguf_file is None and not (place.folder / "config.json").is_file():
        what = "which has no config.json" if place.folder.exists() else "which does not exist"
        raise ValueError(
            f"path: got {os.fspath(path)!r}, {what}, expected a folder of save_pretrained or a GGUF file"
        )
    return place


def _place(path: str | os.PathLike[str]) -> Place:
    """The folder, or the GGUF file, that a path names; whether it holds a model is not looked at."""
    place = _located(path)
    if place.is_dir() and not any((place / name).exists() for name in ("config.json", "tokenizer.json")):
        files = sorted(place.glob("*.gguf"))
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            raise ValueError(f"path: got {os.fspath(path)!r}, expected one of its files: {names}")
        place = files[0] if files else place
    if not place.is_file():
        return Place(place, None)
    if place.suffix != ".gguf":
        raise ValueError(f"path: got the file {os.fspath(path)!r}, expected a folder or a GGUF file")
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"path: got the GGUF file {place}, expected the package gguf, which reads it")
    return Place(place.parent, place.name)


def _located(path: str | os.PathLike[str]) -> Path:
    try:
        return located(os.fspath(path))
    except FileNotFoundError as error:
        raise ValueError(f"path: got {os.fspath(path)!r}, expected an installed package: {error}") from None


def load(
    path: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    device: str | None = None,
    attention: str | None = None,
) -> Pretrained:
    """A causal language model of transformers, its weights as ordinary tensors; GGUF's are dequantised.

    Args:
        path: see `resolve`.
        dtype: of the parameters, or "auto": as they are saved.
        device: such as "cpu" or "cuda:0"; None: this process's GPU where there is one.
        attention: transformers' attn_implementation; None: its own choice.

    Raises:
        TypeError: the weights are quantised, so that they cannot be trained.
        ValueError: no such model, dtype or device.
    """
    from transformers import AutoModelForCausalLM

    place = resolve(path)
    check_choice("dtype", dtype, DTYPES)
    options: dict[str, Any] = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
    if attention is not None:
        options["attn_implementation"] = attention
    if place.gguf_file is not None:
        options |= _dequantised()
    chosen = choose_device(device)
    model = AutoModelForCausalLM.from_pretrained(**place.arguments, **options)
    if getattr(model, "is_quantized", False):
        raise TypeError(
            f"path: got {os.fspath(path)!r}, whose weights are quantised, expected a model whose weights can be "
            "trained: save it dequantised first"
        )
    return model.to(chosen)


def _dequantised() -> dict[str, Any]:
    """The argument by which a GGUF file's weights become ordinary ones; older transformers know no other way."""
    import transformers

    kind = getattr(transformers, "GgufConfig", None)
    return {} if kind is None else {"quantization_config": kind(dequantize=True)}


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a path names a folder of save_pretrained, which is quick to read, and no GGUF file."""
    return _place(path).gguf_file is None


def choose_device(device: str | None) -> torch.device:
    """The device that a config names; None: this process's GPU where there is one, else the CPU.

    Raises:
        ValueError: no such device on this machine.
    """
    if device is None:
        local = int(os.environ.get("LOCAL_RANK", 0))
        return torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device: got {device!r}, expected one such as cpu or cuda:0: {error}") from None
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device: got {device!r}, expected a device of this machine, which has {torch.cuda.device_count()} GPUs"
        )
    return chosen


def check_device(key: str, device: str | None) -> None:
    """Raises ConfigError where this machine has no device that a key names."""
    try:
        choose_device(device)
    except ValueError as error:
        raise ConfigError.of(key, device, str(error).partition("expected ")[2]) from None


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer beside a model, or in its GGUF file.

    Raises:
        ValueError: no such model, or no tokenizer beside it.
    """
    from transformers import AutoTokenizer

    place = _place(path)
    if not place.folder.is_dir():
        raise ValueError(
            f"path: got {os.fspath(path)!r}, which does not exist, expected a folder with a tokenizer or a GGUF file"
        )
    try:
        return AutoTokenizer.from_pretrained(**place.arguments)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"path: got {os.fspath(path)!r}, expected a folder with a tokenizer or a GGUF file: {error}"
        ) from error


def of(settings: Model) -> Pretrained:
    """The model that a config names."""
    return load(settings.path, dtype=settings.dtype, device=settings.device, attention=settings.attention)


def tokenizer_of(settings: Model) -> Tokenizer:
    """The tokenizer that a config names, by default the model's own."""
    return load_tokenizer(settings.tokenizer or settings.path)


def save(model: Pretrained, tokenizer: Tokenizer | None, folder: str | os.PathLike[str]) -> None:
    """Saves a model, and its tokenizer where it has one, as a folder that from_pretrained loads."""
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
