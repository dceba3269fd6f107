"""The checkpoints of a run: folders of save_pretrained, by the names that reports give them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import models
from .files import located
from .reading import ConfigError

if TYPE_CHECKING:
    from .config import Config
    from .stages import Context

_FOLDER = "model"


def base(context: Context) -> Path:
    """The folder of the model that the recipe begins with."""
    made = context.inputs.get("base")
    return located(context.config.model.path) if made is None else made.folder / _FOLDER


def is_converted(config: Config) -> bool:
    """Whether the model is one that has to be converted first: a GGUF file.

    Raises:
        ConfigError: the path is none of a model.
    """
    try:
        return models.resolve(config.model.path).gguf_file is not None
    except ValueError as error:
        raise ConfigError(f"model.{error}") from None


def load(context: Context, folder: Path) -> Any:
    """A model of a run, with the dtype, the device and the attention that the config names."""
    model = context.config.model
    return models.load(folder, dtype=model.dtype, device=model.device, attention=model.attention)


def save(context: Context, model: Any) -> None:
    """Saves the model that a stage made, with the tokenizer."""
    models.save(model, None, context.folder / _FOLDER)
    add_tokenizer(context)


def target(context: Context) -> Path:
    """Where a stage saves its model."""
    return context.folder / _FOLDER


def add_tokenizer(context: Context) -> None:
    """Saves the tokenizer beside a stage's model, by the first process."""
    if context.is_first:
        tokenizer = context.config.model.tokenizer
        source = base(context) if tokenizer is None else located(tokenizer)
        models.load_tokenizer(source).save_pretrained(target(context))
