"""report.html and report.json of a run's results, or of those parts of them that there are."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...arguments import check_is
from . import differences, parts
from .plots import with_own_ids
from .text import plain, visible, with_error

#: The parts of results, with what each is. `report.json` has the same keys.
PARTS = {
    "recipe": "the recipe's name",
    "title": "the page's heading",
    "config": "the whole config, as plain values or as YAML",
    "command": "the command that made it",
    "versions": "{package: version}",
    "stages": '[{"name", "seconds", "skipped", "figures"}]',
    "losses": '{checkpoint: {source: {"loss": nats a token, "standard_error", "tokens", "documents"}}}',
    "changes": 'since base: {checkpoint: {source: {"change", "standard_error", "tokens", "documents"}}}',
    "route_losses": "as losses, by the token's route",
    "route_changes": "as changes, by the token's route",
    "curves": '{"train": [{"step", "loss"}], "relearning": {checkpoint: [{"step", "tokens", "loss": {source: nats}}]}}',
    "generations": '[{"prompt", "source", "text", "completions": {checkpoint: text}}]',
    "steering": '{"losses": {scale: {source: as in losses}}, "generations": as generations, by scale}',
    "generation_settings": "how tokens were chosen, in words",
    "differences": 'gradroute.recipes.evaluation.differences, with "before", "after" and "weights"',
    "harness": "{checkpoint: {task: {metric: value}}}",
    "plan": "memory, whose keys end in bytes",
    "missing": "{part: why it is not there}",
}


def write(folder: str | os.PathLike[str], results: Mapping[str, Any]) -> tuple[Path, Path]:
    """Writes `report.html` and `report.json` into a folder, each whole or not at all.

    Args:
        folder: is made if it is not there.
        results: some of `PARTS`; the page leaves out the others, and says why where "missing" does.

    Returns:
        The two files.

    Raises:
        TypeError: results that JSON has no form for.
        ValueError: a part of another name.
    """
    values = _checked(results)
    page = render(values)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = folder / "report.html", folder / "report.json"
    figures = json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False)
    for file, text in zip(files, (page, figures + "\n"), strict=True):
        unfinished = file.with_name(f".{file.name}.{os.getpid()}")
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, file)
    return files


def render(results: Mapping[str, Any]) -> str:
    """The page, which is valid as HTML and as XML whatever the texts are. Arguments and errors as of `write`."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    values = _checked(results)
    pictures = iter(range(10**6))

    def svg(picture: str) -> Markup:
        return Markup(with_own_ids(picture, f"plot{next(pictures)}"))

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["svg"] = svg
    template = environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    recipe = values.get("recipe")
    title = values.get("title") or (f"gradroute: {recipe}" if recipe else "gradroute: report")
    page = template.render(
        title=visible(title),
        subtitle=visible(f"Recipe {recipe}." if recipe and values.get("title") else ""),
        findings=list(_findings(values)),
        sections=[section for make in SECTIONS for section in make(values)],
    )
    return page.strip() + "\n"


#: What makes the sections, in the page's order.
SECTIONS = (
    parts.losses,
    parts.baselines,
    parts.curves,
    parts.steering,
    parts.generations,
    differences.section,
    parts.harness,
    parts.memory,
    parts.making,
)


def _checked(results: Mapping[str, Any]) -> dict[str, Any]:
    check_is("results", results, Mapping, "a mapping with parts of a report")
    unknown = [name for name in results if name not in PARTS]
    if unknown:
        raise ValueError(f"results: got the parts {unknown}, expected some of {', '.join(PARTS)}")
    values: dict[str, Any] = plain({name: value for name, value in results.items() if value is not None})
    return values


def _findings(results: Mapping[str, Any]) -> Iterator[str]:
    """What the figures say first, in sentences made of them."""
    found = results.get("losses") or {}
    changes = results.get("changes") or {}
    ours = [name for name in parts.ordered(found) if name not in (*parts.BASELINES, "relearnt", "base")]
    if ours and changes.get(ours[-1]):
        for source, change in changes[ours[-1]].items():
            words = with_error(change.get("change"), change.get("standard_error"), change=True)
            loss = with_error(found[ours[-1]].get(source, {}).get("loss"), None)
            yield (
                f"Held-out {visible(source)} loss of {parts.meaning(ours[-1])}: {loss} nats a token, {words} since "
                f"the model before."
            )
    yield from differences.findings(results.get("differences") or {})
