"""`python -m gradroute.recipes plan`: how much memory a config takes, before anything is loaded."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from .estimate import estimate
from .sections import load
from .table import text


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the tables; 0: the smallest batch fits on some number of GPUs, 1: on none."""
    parser = argparse.ArgumentParser(
        prog="python -m gradroute.recipes plan",
        description="The memory that training takes, from a config alone.",
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="a recipe's config, or one of a plan alone"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a dotted key and its value in YAML"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the estimate there as well, in bytes"
    )
    asked = parser.parse_args(arguments)
    if asked.config is None and not asked.set:
        parser.error("--config: got nothing, expected a file, or --set")
    found = estimate(load(asked.config, asked.set))
    if asked.json is not None:
        asked.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(text(found))
    return 0 if any(each["rows"] for entry in found["lengths"] for each in entry["largest"]) else 1
