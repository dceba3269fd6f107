"""MkDocs' hook: pages of the manual that lie elsewhere in the repository, and the index of public names.

The manual's own pages link to files outside of docs/ as a reader of the repository needs them
(`../bench/results/README.md`); on the site those files are pages, and the links lead there.
"""

from __future__ import annotations

import ast
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent

#: Files that are pages of the site: path in the repository → path in the site.
PAGES = {
    "bench/results/README.md": "results.md",
    "examples/README.md": "experiments.md",
    "CONTRIBUTING.md": "contributing.md",
}

#: What those pages show or link to, as patterns, and goes along with them under the same path.
ASSETS = (
    "LICENSE",
    "bench/results/*/*.png",
    "examples/*.py",
    "examples/results/*.md",
    "examples/results/*.png",
)

#: The public modules, in the order of the index, and the page that documents each.
MODULES = {
    "gradroute": "",
    "gradroute.tables": "",
    "gradroute.models": "models.md",
    "gradroute.labels": "labels.md",
    "gradroute.optim": "optim.md",
    "gradroute.era": "era.md",
    "gradroute.blocks": "era.md",
    "gradroute.telemetry": "telemetry.md",
}

LINK = re.compile(r"(?<=\]\()(?!https?://|#)([^)\s#]+)(#[^)\s]*)?(?=\))")
NAMES = "<!-- names -->"


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages and what they show."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for pattern in ASSETS:
        for path in sorted(ROOT.glob(pattern)):
            name = asset(path.relative_to(ROOT).as_posix())
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def asset(path: str) -> str:
    """Where a file of ASSETS is on the site: as text where MkDocs would make a page of it."""
    return f"files/{path}.txt" if path.endswith(".md") else f"files/{path}"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lets links lead to where their files are on the site, and fills in the index."""
    here = next((source for source, name in PAGES.items() if name == page.file.src_uri), None)
    base = posixpath.dirname(here if here else f"docs/{page.file.src_uri}")

    def moved(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(base, match[1]))
        if here is None and target.startswith("docs/"):
            return match[0]
        name = PAGES.get(target) or (target[5:] if target.startswith("docs/") else asset(target))
        if target == "README.md":
            name = "index.md"
        return posixpath.relpath(name, posixpath.dirname(page.file.src_uri) or ".") + (match[2] or "")

    return LINK.sub(moved, markdown).replace(NAMES, names_table() if NAMES in markdown else "")


def names_table() -> str:
    """Markdown: every public name of every public module, with the first sentence of its docstring."""
    from griffe import GriffeLoader

    loader = GriffeLoader(search_paths=[str(ROOT)])
    loader.load("gradroute")
    loader.resolve_aliases(external=False)
    parts = []
    for module in MODULES:
        rows = []
        for name in public_names(module):
            found = loader.modules_collection[f"{module}.{name}"]
            target = found.final_target if found.is_alias else found
            said = target.docstring.value.strip().split("\n\n")[0] if target.docstring else ""
            summary = " ".join(said.split()).replace("|", "\\|")
            rows.append(f"| [`{name}`][{module}.{name}] | {summary} |")
        parts.append(f"## {module}\n\n| name | |\n| --- | --- |\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


def public_names(module: str) -> list[str]:
    """`__all__` of a module as it is written, without importing it; else its functions and classes without `_`."""
    base = ROOT / module.replace(".", "/")
    file = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return sorted(ast.literal_eval(node.value), key=str.lower)
    kinds = (ast.FunctionDef, ast.ClassDef)
    return [node.name for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]
