"""The commands of `python -m gradroute.recipes`."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import re
import sys
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .config import Config
from .folders import RunInUse
from .names import RECIPES
from .reading import ConfigError, described, nearest, written

# Command → its module, whose `main(arguments)` runs it, and what it does.
_COMMANDS: dict[str, tuple[str, str]] = {
    "compare": ("compare", "what two checkpoints say differently of the same texts"),
    "plan": ("planning.command", "the memory that a config's training takes, before anything is loaded"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; 0: all went well, 2: what was asked for cannot be meant, 130: it was interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if words and words[0] in _COMMANDS:
            return importlib.import_module(f"{__package__}.{_COMMANDS[words[0]][0]}").main(words[1:])
        if words and words[0] == "keys":
            return _print_keys(words[1:])
        return _recipe(words)
    except (ConfigError, RunInUse) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on where it was", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    lines = [f"  {name:10} {what}" for name, what in RECIPES.items()]
    lines += [f"  {name:10} {what}" for name, (_, what) in _COMMANDS.items()]
    lines += [f"  {'keys':10} every key of a config, with its type, default and meaning"]
    parser = argparse.ArgumentParser(
        prog="python -m gradroute.recipes",
        description="From a pretrained model and texts to a report.\n\n" + "\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "name", choices=[*RECIPES, *_COMMANDS, "keys"], metavar="NAME", help="one of those above"
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="a YAML or JSON file")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a dotted key and its value in YAML, on top of the file; may stand here many times",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="the run's folder; default: runs/NAME/FILE's name"
    )
    parser.add_argument("--only", metavar="STAGE", help="run this stage alone")
    parser.add_argument("--until", metavar="STAGE", help="stop after this stage")
    parser.add_argument("--list", action="store_true", help="say where every stage is, and run none")
    return parser


def _recipe(words: list[str]) -> int:
    parser = _parser()
    asked = parser.parse_args(words)
    if asked.config is None and not asked.set:
        parser.error("--config: got nothing, expected a file, or --set")
    from .running import run, states

    out = asked.out or Path("runs", asked.name, asked.config.stem if asked.config is not None else "default")
    if asked.list:
        found = states(asked.name, asked.config, out, asked.set)
        for name, state in found:
            print(f"{name:16} {state.word:12} {state.reason}".rstrip())
        return 0
    run(asked.name, asked.config, out, settings=asked.set, only=asked.only, until=asked.until)
    print(out)
    return 0


def _print_keys(words: list[str]) -> int:
    """Every key of a config; words choose those that begin with them."""
    from .planning.sections import Memory

    found = [*keys(), *keys(Memory, "memory.")]
    for word in words:
        if not any(_is_below(key, word) for key, *_ in found):
            known = [key for key, *_ in found]
            sections = list(dict.fromkeys(key.partition(".")[0] for key in known))
            expected = (
                f"a key or one of the sections {', '.join(sections)}{nearest(word, [*sections, *known])}"
            )
            raise ConfigError.of("keys", word, expected)
    for key, kind, default, meaning in found:
        if not words or any(_is_below(key, word) for word in words):
            print(f"{key}: {meaning}\n    {kind}; {default}")
    return 0


def _is_below(key: str, word: str) -> bool:
    """Whether a key is a word or in its section; any source's name stands for NAME."""
    word = re.sub(r"^data\.sources\.[^.]+", "data.sources.NAME", word)
    return key == word or key.startswith(f"{word}.")


def keys(section: Any = Config, prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Every key of a section: its dotted key, its type, its default, and its meaning."""
    hints = typing.get_type_hints(section)
    for field in dataclasses.fields(section):
        key, hint = f"{prefix}{field.name}", hints[field.name]
        inner = next((one for one in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(one)), None)
        if inner is not None:
            yield from keys(inner, f"{key}." if inner is hint else f"{key}.NAME.")
        else:
            yield key, described(hint, field.metadata), _default(field), field.metadata["meaning"]


def _default(field: Any) -> str:
    if field.default is not dataclasses.MISSING:
        return f"default {written(field.default)!r}"
    if field.default_factory is not dataclasses.MISSING:
        return f"default {written(field.default_factory())!r}"
    return "required"
