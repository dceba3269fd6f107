"""Runs of a recipe whose figures are kept, and nothing else of them: a checkpoint has half a gigabyte."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gradroute.recipes import run
from gradroute.recipes.config import load, to_yaml

CONFIG = "package:gradroute/recipes/configs/unlearn_smollm2.yaml"

Figures = dict[str, Any]


def figures(recipe: str, settings: Sequence[str], folder: Path) -> Figures:
    """The losses, changes and attacks of a run on SmolLM2; of one that was done before with the same config, at once.

    Args:
        recipe: its name.
        settings: what is set beside the shipped config, `key.sub=value` each.
        folder: of the run; a stopped one goes on there.
    """
    whole = to_yaml(load(CONFIG, settings))
    kept = folder / "figures.json"
    if kept.exists():
        before: Figures = json.loads(kept.read_text(encoding="utf-8"))
        if before["config"] == whole:
            return before
    run(recipe, CONFIG, folder, settings=settings)
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    made = {name: report[name] for name in ("losses", "changes", "curves", "generations")} | {"config": whole}
    unfinished = folder.with_name(f"{folder.name}.part")
    unfinished.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(folder)
    folder.mkdir()
    unfinished.replace(kept)
    return made
