"""The README's Python works when pasted."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippet_runs(snippet):
    exec(compile(snippet, "README.md", "exec"), {"__name__": "__main__"})


def test_there_are_snippets():
    assert len(SNIPPETS) >= 2
