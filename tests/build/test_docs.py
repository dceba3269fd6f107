"""The manual: every snippet of README.md and docs/ runs and prints what the page says; no public name is left out."""

import ast
import doctest
import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

import gradroute.layers
import gradroute.testing

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))

#: A snippet, what it needs beyond the tests' packages, and what it prints where the page says so: "..." is anything.
SNIPPET = re.compile(
    r"(?:<!-- needs (?P<needs>\S+) -->\n)?```python\n(?P<code>.*?)```\n(?:\n```text\n(?P<printed>.*?)```)?",
    re.DOTALL,
)


class Snippet(NamedTuple):
    page: str
    line: int
    code: str
    printed: str | None
    needs: str | None


def snippets(page):
    text = page.read_text(encoding="utf-8")
    for match in SNIPPET.finditer(text):
        line = text[: match.start("code")].count("\n")
        yield Snippet(
            page.relative_to(ROOT).as_posix(), line, match["code"], match["printed"], match["needs"]
        )


SNIPPETS = [snippet for page in PAGES for snippet in snippets(page)]


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda snippet: f"{snippet.page}:{snippet.line}")
def test_snippet_runs(snippet, tmp_path, monkeypatch, capsys):
    if snippet.needs and importlib.util.find_spec(snippet.needs) is None:
        pytest.skip(f"needs {snippet.needs}")
    monkeypatch.chdir(tmp_path)
    code = "\n" * snippet.line + snippet.code  # so that a traceback says the page's line
    exec(compile(code, snippet.page, "exec"), {"__name__": "__main__"})
    printed = capsys.readouterr().out
    if snippet.printed is not None:
        checker = doctest.OutputChecker()
        flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        example = doctest.Example(snippet.code, snippet.printed)
        difference = checker.output_difference(example, printed, flags)
        assert checker.check_output(snippet.printed, printed, flags), difference


def test_there_are_snippets_of_both():
    assert sum(snippet.page == "README.md" for snippet in SNIPPETS) >= 2
    assert len({snippet.page for snippet in SNIPPETS}) >= 8


def test_the_figures_of_recipes_are_those_of_the_run():
    done = subprocess.run([sys.executable, "tools/recipe_results.py", "--check"], cwd=ROOT)
    assert done.returncode == 0, "run `python tools/recipe_results.py`"


@pytest.mark.slow
def test_memory_plans_are_those_of_the_configs():
    """Of one config: each takes a third of a minute."""
    pytest.importorskip("transformers")
    done = subprocess.run([sys.executable, "tools/plan_examples.py", "--check", "plan_neox_6.9b"], cwd=ROOT)
    assert done.returncode == 0, "run `python tools/plan_examples.py`"


def test_the_table_of_setups_is_that_of_the_tests():
    done = subprocess.run([sys.executable, "tools/setups.py", "--check"], cwd=ROOT)
    assert done.returncode == 0, "run `python tools/setups.py`"


def test_pictures_are_those_of_the_script():
    done = subprocess.run([sys.executable, "tools/pictures.py", "--check"], cwd=ROOT)
    assert done.returncode == 0, "run `python tools/pictures.py`"


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "-q", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert (tmp_path / "reference" / "index.html").exists()


def text_of(page):
    return (ROOT / "docs" / page).read_text(encoding="utf-8")


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    pages = [page.relative_to(ROOT / "docs").as_posix() for page in PAGES[1:]]
    assert [
        page for page in pages if f": {page}\n" not in navigation and f"- {page}\n" not in navigation
    ] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files(page):
    targets = re.findall(r"\]\((?!https?://|#)([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []


MODULES = ("gradroute", "gradroute.models", "gradroute.labels", "gradroute.era", "gradroute.telemetry")


@pytest.mark.parametrize("module", MODULES)
def test_every_public_name_is_in_the_reference(module):
    found = importlib.import_module(module)
    names = {name for name in found.__all__ if not isinstance(getattr(found, name), ModuleType)}
    pages = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs/reference").glob("*.md"))
    documented = set(re.findall(rf"^::: {re.escape(module)}\.(\w+)$", pages, re.MULTILINE))
    assert names - documented == set()


def sites_of_public_names():
    """The sites class of every op and layer; None where an op takes a table."""
    for op, known in gradroute.testing.OPS.items():
        yield op, None if known.sites_name is None else known.sites_class()
    for name in gradroute.layers.__all__:
        if name.startswith("Routed") and name != "RoutedModule":
            yield name, vars(gradroute.layers)[name].sites_type


@pytest.mark.parametrize(("name", "sites_type"), [*sites_of_public_names()])
def test_the_table_of_layers_has_every_op_layer_and_site(name, sites_type):
    text = (ROOT / "docs/layers.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ") and f"`{name}`" in line]
    assert len(rows) == 1
    missing = [site for site in (sites_type.declared if sites_type else ()) if f"`{site}`" not in rows[0]]
    assert missing == []


def source():
    for file in sorted((ROOT / "gradroute").rglob("*.py")):
        yield from ast.walk(ast.parse(file.read_text(encoding="utf-8")))


def first_words(call):
    """The text that a message begins with, up to its first value."""
    start = call.args[0] if call.args else None
    parts = start.values if isinstance(start, ast.JoinedStr) else [start]
    return parts[0].value if isinstance(parts[0], ast.Constant) and isinstance(parts[0].value, str) else ""


RAISED = [node.exc for node in source() if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)]
WARNED = [
    node for node in source() if isinstance(node, ast.Call) and ast.unparse(node.func) == "warnings.warn"
]


def test_troubleshooting_names_every_class_of_error():
    classes = {ast.unparse(call.func).split(".")[-1] for call in RAISED}
    errors = {name for name in classes if name.endswith("Error")}
    assert errors >= {"BackendError", "TypeError", "ValueError"}
    assert [name for name in sorted(errors) if name not in text_of("troubleshooting.md")] == []


def test_troubleshooting_names_every_argument_that_errors_name():
    page = text_of("troubleshooting.md")
    arguments = {
        re.split(r"[:\[]", first_words(call))[0].lstrip("-")
        for call in RAISED
        if ": got" in first_words(call)
    }
    assert len(arguments) > 50
    assert [name for name in sorted(arguments) if not re.search(rf"`[^`]*\b{re.escape(name)}\b", page)] == []


def test_troubleshooting_names_every_warning():
    page = " ".join(text_of("troubleshooting.md").split())
    assert WARNED
    for call in WARNED:
        constants = [part.value for part in ast.walk(call.args[0]) if isinstance(part, ast.Constant)]
        assert max(map(str, constants), key=len).strip(" :'") in page
