"""Labels, optim, blocks, era and telemetry use only public parts of the rest: read from the source, nothing is run."""

import ast
from pathlib import Path

import pytest

import gradroute

pytest.importorskip("transformers")

import gradroute.models
from gradroute.models import expert_blocks, inspection

ROOT = Path(gradroute.__file__).parent
FILES = sorted(
    path
    for part in ("labels", "optim", "era", "telemetry", "blocks.py")
    for path in ([ROOT / part] if part.endswith(".py") else (ROOT / part).glob("*.py"))
)
ROOMS = {"labels", "optim", "era", "telemetry"}

# Names that gradroute.models, its inspection, the places of experts, or RouteCollator's argument `align` make public.
OF_MODELS = {*gradroute.models.__all__, *inspection.__all__, *expert_blocks.__all__, "ALIGNMENTS"}


def imported(path):
    """The names that a file imports from other parts of gradroute, each with the module's path inside the package."""
    depth = len(path.relative_to(ROOT).parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == depth:
            yield from ((node.module or "", alias.name) for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_public_names(path):
    private = [name for module, name in imported(path) if name.startswith("_") or "._" in f".{module}"]
    assert private == []
    of_models = {name for module, name in imported(path) if module.split(".")[0] == "models"}
    assert of_models - OF_MODELS == set()


def test_nothing_below_imports_these_rooms():
    """Recipes stand above all rooms."""
    beside = (*FILES, ROOT / "models/__init__.py", *(ROOT / "recipes").rglob("*.py"))
    below = [path for path in ROOT.rglob("*.py") if path not in beside]
    for path in below:
        found = {module.split(".")[0] for module, _ in imported(path)} & ROOMS
        assert found == set(), path
    assert len(FILES) > 40
    assert len(below) > 40
