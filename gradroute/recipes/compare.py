"""`python -m gradroute.recipes compare A B --data FILE`: what two checkpoints say differently of the same texts."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import sources
from .files import matched
from .reading import ConfigError
from .sections import Source


def main(arguments: Sequence[str]) -> int:
    """Compares two checkpoints; 0: the report is written, 2: what was asked for cannot be meant."""
    asked = _parser().parse_args(arguments)
    try:
        results = compare(asked)
    except (ValueError, TypeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from . import report
    from .report.text import with_error

    page, figures = report.write(asked.out, results)
    for source, found in results["differences"]["sources"].items():
        change = with_error(found["difference"], found["standard_error"], 4, change=True)
        print(
            f"{source}: {found['before']:.4f} to {found['after']:.4f} nats a token, {change} "
            f"({found['tokens']} tokens of {found['documents']} documents)"
        )
    print(f"{page}\n{figures}")
    return 0


def compare(asked: argparse.Namespace) -> dict[str, Any]:
    """The parts of a report: losses, changes and differences of both checkpoints."""
    from . import models
    from .evaluation import differences, token_losses, weight_differences
    from .evaluation.rows import as_rows
    from .evaluation.stage import limited, tables

    first, second = (models.load_tokenizer(path) for path in (asked.before, asked.after))
    documents = limited(_documents(asked.data, first, second, asked.length), asked.documents)
    rows = as_rows(documents)
    before, after = (
        models.load(path, dtype=asked.dtype, device=asked.device) for path in (asked.before, asked.after)
    )
    names = ("before", "after")
    losses = {
        name: token_losses(model, rows, batch_tokens=asked.batch_tokens)
        for name, model in zip(names, (before, after), strict=True)
    }
    found = differences(losses["before"], losses["after"], rows, first, top=asked.top, context=asked.context)
    return tables(losses, rows, ()) | {
        "title": f"{asked.before} and {asked.after}",
        "command": " ".join(["python -m gradroute.recipes compare", *map(str, (asked.before, asked.after))]),
        "differences": {
            "before": str(asked.before),
            "after": str(asked.after),
            **found,
            "weights": weight_differences(before, after),
        },
    }


def _documents(data: Sequence[str], first: Any, second: Any, length: int) -> Iterator[Mapping[str, Any]]:
    """The texts' tokens, which must be the same for both tokenizers; longer texts are cut."""
    for entry in data:
        name, equals, place = entry.partition("=")
        path = Path(place if equals else name)
        for text in _texts(path):
            ids = first(text)["input_ids"][:length]
            if ids != second(text)["input_ids"][:length]:
                raise ConfigError(
                    f"compare: got checkpoints whose tokenizers make other tokens of a text of {path}, expected one "
                    "tokenizer, because losses are compared token by token"
                )
            yield {"input_ids": ids, "source": name if equals else path.stem}


def _texts(path: Path) -> Iterator[str]:
    """The texts of what a source of a config may be; a file whose name does not tell its format is one text."""
    found = matched(str(path))
    if not found:
        raise ConfigError(
            f"--data: got {path}, expected JSONL, Parquet or text, a folder of datasets, or NAME=FILE"
        )
    tells = all(one.is_dir() or sources.format_of_name(one) for one in found)
    for text in sources.texts("--data", Source(path=str(path), format="auto" if tells else "text")):
        yield text.text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m gradroute.recipes compare",
        description="Losses of two checkpoints, token by token on the same texts, without routes.",
    )
    parser.add_argument("before", metavar="A", help="a folder of save_pretrained, or a GGUF file")
    parser.add_argument("after", metavar="B", help="another checkpoint with the same tokenizer")
    parser.add_argument(
        "--data",
        action="append",
        required=True,
        metavar="[NAME=]FILE",
        help="JSONL, Parquet, text or a folder of datasets; the column is text; may stand many times",
    )
    parser.add_argument("--out", type=Path, default=Path("compared"), metavar="DIR", help="default: compared")
    parser.add_argument(
        "--length", type=_positive, default=512, help="the most tokens of a text; default: 512"
    )
    parser.add_argument("--documents", type=_positive, default=None, help="the most texts of a source")
    parser.add_argument(
        "--batch-tokens", type=_positive, default=4096, help="tokens of a forward; default: 4096"
    )
    parser.add_argument("--top", type=_positive, default=20, help="how many tokens and contexts; default: 20")
    parser.add_argument("--context", type=_positive, default=8, help="tokens shown on each side; default: 8")
    parser.add_argument("--dtype", default="float32", choices=["auto", "float32", "bfloat16", "float16"])
    parser.add_argument("--device", default=None, help="default: a GPU where there is one")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"got {text}, expected a whole number above 0")
    return value
