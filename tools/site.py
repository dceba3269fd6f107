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

from griffe import GriffeLoader
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
    "bench/results/static/*.md",
    "examples/*.py",
    "examples/results/*.md",
    "examples/results/*.png",
    "tests/scale_worker.py",
)

#: The public modules in the order of the index. Names: those of `__all__`, or the ones that stand here.
MODULES: dict[str, tuple[str, ...] | None] = {
    "gradroute": None,
    "gradroute.tables": ("localize", "heads", "concatenate"),
    "gradroute.models": None,
    "gradroute.labels": None,
    "gradroute.optim": None,
    "gradroute.era": None,
    "gradroute.blocks": ("Part", "Piece"),
    "gradroute.telemetry": None,
    "gradroute.recipes": ("run", "plan"),
}

LINK = re.compile(r"\[([^]]*)\]\((?!https?://|#)([^)\s#]+)(#[^)\s]*)?\)")
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
        words, path, anchor = match[1], match[2], match[3] or ""
        target = posixpath.normpath(posixpath.join(base, path))
        if here is None and target.startswith("docs/"):
            return match[0]
        if (ROOT / target).is_dir():  # a folder is no page
            return words
        name = PAGES.get(target) or (target[len("docs/") :] if target.startswith("docs/") else asset(target))
        if target == "README.md":
            name = "index.md"
        start = posixpath.dirname(page.file.src_uri) or "."
        return f"[{words}]({posixpath.relpath(name, start)}{anchor})"

    return LINK.sub(moved, markdown).replace(NAMES, names_table() if NAMES in markdown else "")


def names_table() -> str:
    """Markdown: every public name of every public module, with the first sentence of its docstring."""
    loader = GriffeLoader(search_paths=[str(ROOT)])
    loader.load("gradroute")
    loader.resolve_aliases(external=False)
    parts = []
    for module, names in MODULES.items():
        rows = []
        for name in names or exported(module):
            path = f"{module}.{name}"
            try:
                found = loader.modules_collection[path]
                found = found.final_target if found.is_alias else found
            except KeyError:  # a name that the module looks up when it is asked for
                found = None
            if found is not None and found.is_module:
                continue
            said = found.docstring.value.strip().split("\n\n")[0] if found and found.docstring else ""
            summary = " ".join(said.split()).replace("|", "\\|")
            rows.append(f"| [`{name}`][{path}] | {summary} |")
        parts.append(f"## {module}\n\n| name | |\n| --- | --- |\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


def exported(module: str) -> list[str]:
    """A module's `__all__` as it is written, without importing it."""
    base = ROOT / module.replace(".", "/")
    file = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return sorted(ast.literal_eval(node.value), key=str.lower)
    raise ValueError(f"{file}: got no __all__, expected the public names")
