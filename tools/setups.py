"""The table of set-ups, from the tests: `python tools/setups.py [--check]`.

A test that proves what a tool does beside routing says so in a marker:

    @pytest.mark.setup("Accelerate", "device_map")
    @pytest.mark.setup("FSDP1", "around linear layers alone", refused="it shards what routed layers read")

This program reads the markers of all tests, without running them, and writes docs/setups.md, and gradroute/setups.json
for `python -m gradroute --json`. With --check it writes nothing, and exits with 1 where they are not up to date.
"""

from __future__ import annotations

import argparse
import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "setups.md"
DATA = ROOT / "gradroute" / "setups.json"

#: The tools in the order of the table; a marker of another is an error.
TOOLS = (
    *(
        "Trainer",
        "TRL SFTTrainer",
        "TRL DPOTrainer",
        "TRL GRPOTrainer",
        "Lightning",
        "Accelerate",
        "PEFT",
        "Liger",
    ),
    *(
        "torchao",
        "bitsandbytes",
        "TransformerLens",
        "DDP",
        "FSDP1",
        "FSDP2",
        "Tensor parallelism",
        "Pipeline stages",
        "Context parallel",
        "device_map",
    ),
    *("Checkpointing", "torch.compile", "torch.func", "FakeTensorMode", "CUDA graphs", "Threads"),
    *("Modules and hooks", "Tokenizers"),
)

HEAD = """# Set-ups

What other tools do beside routed layers and routed models. A test on the CPU proves each row; nothing of this page has
run on a GPU. *Works* means: gradients are those of the detach idiom written by hand, or of the same step without the
tool. What is refused raises an error with the reason; [Troubleshooting](troubleshooting.md) lists the messages.
`python tools/setups.py` writes this page from the tests' markers, and `python -m gradroute --json` has the same rows.

| tool | set-up | works, or is refused because | test |
| --- | --- | --- | --- |
"""


class Setup(NamedTuple):
    """A row.

    Attributes:
        tool: one of TOOLS.
        setup: what is done with it.
        refused: why it is refused; "": it works.
        test: the test that proves it, as pytest names it.
        unrun: whether the test needs a GPU, and none has run it.
    """

    tool: str
    setup: str
    refused: str
    test: str
    unrun: bool = False


def setups() -> list[Setup]:
    """The rows of all tests, in the order of TOOLS; those that work come first."""
    found = [each for path in sorted((ROOT / "tests").rglob("test_*.py")) for each in setups_of(path)]
    unknown = [each for each in found if each.tool not in TOOLS]
    if unknown:
        raise SystemExit(
            f"tool: got {unknown[0].tool!r} in {unknown[0].test}, expected one of {', '.join(TOOLS)}"
        )
    missing = [tool for tool in TOOLS if tool not in {each.tool for each in found}]
    if missing:
        raise SystemExit(f"tests: got no marker of {', '.join(missing)}, expected at least one of each tool")
    return sorted(found, key=lambda each: (TOOLS.index(each.tool), bool(each.refused), each.setup, each.test))


def setups_of(path: Path) -> Iterator[Setup]:
    """The rows of one file: markers of its functions and classes, and of its parameters."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for function in ast.walk(tree):
        if isinstance(function, (ast.FunctionDef, ast.ClassDef)):
            for decorator in function.decorator_list:
                for marker in ast.walk(decorator):
                    if isinstance(marker, ast.Call) and ast.unparse(marker.func) == "pytest.mark.setup":
                        yield setup_of(
                            marker, f"{path.relative_to(ROOT / 'tests').as_posix()}::{function.name}"
                        )


def setup_of(marker: ast.Call, test: str) -> Setup:
    """The row of one marker."""
    tool, setup = map(ast.literal_eval, marker.args)
    options = {keyword.arg: ast.literal_eval(keyword.value) for keyword in marker.keywords}
    return Setup(tool, setup, options.get("refused", ""), test, options.get("unrun", False))


def page(rows: list[Setup]) -> str:
    """docs/setups.md."""
    lines = []
    for each in rows:
        verdict = f"refused: {each.refused}" if each.refused else "works"
        verdict = "has not run: the test needs a GPU" if each.unrun else verdict
        cells = (each.tool, each.setup, verdict, f"`{each.test}`")
        lines.append(" | ".join(cell.replace("|", "\\|") for cell in cells))
    return HEAD + "".join(f"| {line} |\n" for line in lines)


def data(rows: list[Setup]) -> str:
    """gradroute/setups.json."""
    return json.dumps([each._asdict() for each in rows], indent=1) + "\n"


def main() -> int:
    """Writes both files, or checks them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with 1 where a file is out of date"
    )
    check = parser.parse_args().check
    rows = setups()
    stale = []
    for path, text in ((PAGE, page(rows)), (DATA, data(rows))):
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(path.relative_to(ROOT).as_posix())
            if not check:
                path.write_text(text, encoding="utf-8")
    for name in stale:
        print(f"{name}: out of date, run `python tools/setups.py`" if check else f"wrote {name}")
    return int(check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
