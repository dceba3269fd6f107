"""The sections of a page: losses, curves, generations, harness tasks, memory, and how all of it was made."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from . import plots
from .blocks import Block, Completions, Listing, Picture, Prose, Section, Table
from .text import bytes_of, duration, number, visible, with_error

Results = Mapping[str, Any]

#: Checkpoints in the order in which a recipe makes them; others come after.
ORDER = ("base", "trained", "unlearnt", "coherent", "filtering", "gradient_ascent", "rmu", "relearnt")
BASELINES = ("filtering", "gradient_ascent", "rmu")
MEANINGS = {
    "base": "the model before",
    "trained": "routed training, before ablation, the whole model",
    "unlearnt": "after ablation",
    "coherent": "after ablation and coherence fine-tuning",
    "relearnt": "after the relearning attack",
    "filtering": "baseline: fine-tuned on retain text alone",
    "gradient_ascent": "baseline: gradient ascent on forget text",
    "rmu": "baseline: RMU (Li et al. 2024, arXiv 2403.03218)",
}
UNROUTED = (
    "Loss of the next token in nats a token, on held-out documents, ± one standard error over documents. Every "
    "checkpoint is evaluated without routes: the loss is the whole model's (docs/training.md, Evaluation)."
)


def ordered(names: Any) -> list[str]:
    """Names of checkpoints, in the order in which they are made."""
    return sorted(names, key=lambda name: ORDER.index(name) if name in ORDER else len(ORDER))


def meaning(name: str) -> str:
    """A checkpoint's name with what it is."""
    return f"{visible(name)} ({MEANINGS[name]})" if name in MEANINGS else visible(name)


def losses(results: Results) -> Iterator[Section]:
    """The losses of every checkpoint by source, and by route where these differ."""
    for part, what in (("losses", "source"), ("route_losses", "route")):
        if results.get(part):
            title = "Held-out losses" if part == "losses" else "Held-out losses by route"
            yield Section(title, list(_losses(results, part, what)))


def _losses(results: Results, part: str, what: str) -> Iterator[Block]:
    found = results[part]
    changes = results.get("changes" if part == "losses" else "route_changes", {})
    names = list(dict.fromkeys(name for values in found.values() for name in values))
    yield Prose(UNROUTED)
    if what == "route":
        yield Prose("Here a token's loss belongs to the token's own route, and not to its document's source.")
    columns = ["checkpoint"]
    for name in names:
        columns += [f"{visible(name)} (nats a token)"]
        columns += [f"change since {ordered(found)[0]}"] if changes else []
    rows = []
    for checkpoint in ordered(found):
        row = [meaning(checkpoint)]
        for name in names:
            figures = found[checkpoint].get(name, {})
            row.append(with_error(figures.get("loss"), figures.get("standard_error")))
            if changes:
                change = changes.get(checkpoint, {}).get(name, {})
                row.append(with_error(change.get("change"), change.get("standard_error"), change=True))
        rows.append(row)
    paired = " A change has the error of the same documents' differences." if changes else ""
    yield Table(columns, rows, f"Mean ± standard error. {_counts(found, names)}{paired}")
    yield from _loss_bars(found, names)


def _counts(found: Results, names: Sequence[str]) -> str:
    """How many tokens and documents a loss is of; they are the same for all checkpoints."""
    first = next(iter(found.values()))
    counts = []
    for name in (name for name in names if name in first):
        tokens, documents = (number(first[name].get(what)) for what in ("tokens", "documents"))
        counts.append(f"{visible(name)}: {tokens} tokens of {documents} documents")
    return "; ".join(counts) + "."


def _loss_bars(found: Results, names: Sequence[str]) -> Iterator[Block]:
    heights = {
        name: {
            checkpoint: (figures["loss"], figures.get("standard_error"))
            for checkpoint in ordered(found)
            if (figures := found[checkpoint].get(name)) and finite(figures.get("loss"))
        }
        for name in names
    }
    if plots.unavailable() is None and any(heights.values()):
        yield Picture(
            plots.bars(heights, "loss (nats a token)"),
            "Held-out loss, nats a token, with one standard error.",
        )


def finite(value: Any) -> bool:
    """Whether a figure can be drawn."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def curves(results: Results) -> Iterator[Section]:
    """Training and the relearning attack, by step."""
    found = results.get("curves") or {}
    if found.get("relearning"):
        yield Section("Relearning", list(_relearning(results, found["relearning"])))
    if found.get("train"):
        yield Section("Training", list(_training(found["train"])))


def _relearning(results: Results, curves: Results) -> Iterator[Block]:
    yield Prose(
        "Each checkpoint is fine-tuned on a few forget documents, and the held-out loss is measured on the way. What "
        "was only hidden comes back in fewer steps than what has to be learnt again."
    )
    names = list(dict.fromkeys(name for points in curves.values() for p in points for name in p["loss"]))
    base = results.get("losses", {}).get("base", {})
    if plots.unavailable() is None:
        panels = {name: _curves(curves, name) for name in names}
        levels = {
            name: {"base": base[name]["loss"]} for name in names if finite(base.get(name, {}).get("loss"))
        }
        drawn = {name: lines for name, lines in panels.items() if lines}
        if drawn:
            yield Picture(
                plots.lines(drawn, "step of the attack", "loss (nats a token)", levels),
                "Held-out loss by step of the relearning attack, nats a token; dotted: the model before.",
            )
    yield Table(*_steps_back(curves, names, base), texts=frozenset({0}))
    rows = [
        [
            visible(checkpoint),
            number(p["step"]),
            number(p.get("tokens")),
            *(number(p["loss"].get(n)) for n in names),
        ]
        for checkpoint, points in curves.items()
        for p in points
    ]
    columns = ["checkpoint", "step", "tokens", *(f"{visible(name)} (nats a token)" for name in names)]
    yield Table(columns, rows, "Every measurement of the attack", opened=False)


def _curves(curves: Results, name: str) -> dict[str, list[plots.Point]]:
    lines = {
        checkpoint: [
            (p["step"], p["loss"][name], (p.get("standard_error") or {}).get(name))
            for p in points
            if finite(p["loss"].get(name))
        ]
        for checkpoint, points in curves.items()
    }
    return {checkpoint: points for checkpoint, points in lines.items() if points}


def _steps_back(
    curves: Results, names: Sequence[str], base: Results
) -> tuple[list[str], list[list[str]], str]:
    """By checkpoint the first and the last losses, and the first step at which the model is as good as before."""
    columns = ["checkpoint"]
    for name in names:
        columns += [f"{visible(name)} before the attack", "after it", "steps until the base's loss"]
    rows = []
    for checkpoint, points in curves.items():
        row = [meaning(checkpoint)]
        for name in names:
            measured = [p for p in points if name in p["loss"]]
            level = base.get(name, {}).get("loss")
            back = (
                [p["step"] for p in measured if finite(p["loss"][name]) and p["loss"][name] <= level]
                if finite(level)
                else []
            )
            row += (
                [number(measured[0]["loss"][name]), number(measured[-1]["loss"][name])]
                if measured
                else ["–", "–"]
            )
            never = f"not in {number(measured[-1]['step'])}" if measured and finite(level) else "–"
            row.append(number(back[0]) if back else never)
        rows.append(row)
    return columns, rows, "Losses in nats a token. More steps: harder to relearn."


def _training(points: Sequence[Mapping[str, Any]]) -> Iterator[Block]:
    """Trainer's log: losses by step, whole or by name."""
    lines: dict[str, list[plots.Point]] = {}
    for point in points:
        values = point.get("loss")
        named = values if isinstance(values, Mapping) else {"loss": values}
        for name, value in named.items():
            if value is not None and finite(value) and "step" in point:
                lines.setdefault(name, []).append((point["step"], float(value), None))
    if lines and plots.unavailable() is None:
        yield Picture(
            plots.lines({"training": lines}, "step", "loss (nats a token)"),
            "Training loss by step, nats a token, of routed batches.",
        )
    logged = {name: {step: value for step, value, _ in points} for name, points in lines.items()}
    steps = sorted({step for values in logged.values() for step in values})
    rows = [[number(step), *(number(values.get(step)) for values in logged.values())] for step in steps]
    yield Table(["step", *map(visible, lines)], rows, "Every logged step", opened=False)


def baselines(results: Results) -> Iterator[Section]:
    """The checkpoints that forget, beside each other: losses, and what the attack brings back."""
    found = results.get("losses") or {}
    shown = [name for name in ordered(found) if name in (*BASELINES, "unlearnt", "coherent")]
    if not any(name in BASELINES for name in shown):
        return
    names = list(dict.fromkeys(name for checkpoint in shown for name in found[checkpoint]))
    attack = (results.get("curves") or {}).get("relearning") or {}
    columns = ["checkpoint", *(f"{visible(name)} (nats a token)" for name in names)]
    columns += [f"{visible(name)} after the attack" for name in names if attack]
    rows = []
    for checkpoint in shown:
        row = [meaning(checkpoint)]
        for name in names:
            figures = found[checkpoint].get(name, {})
            row.append(with_error(figures.get("loss"), figures.get("standard_error")))
        points = attack.get(checkpoint) or []
        for name in names if attack else ():
            row.append(number(points[-1]["loss"].get(name)) if points else "–")
        rows.append(row)
    caption = f"Held-out losses ± standard error over documents. {_counts(found, names)}"
    yield Section("Baselines", [Table(columns, rows, caption)])


def generations(results: Results) -> Iterator[Section]:
    """What every checkpoint writes after the same prompts."""
    found = results.get("generations") or []
    if found:
        note = "Every checkpoint continues the same prompts, without routes."
        yield Section("Generations", [_how(results, note), *_completions(found)])


def _how(results: Results, note: str) -> Prose:
    """A note on generations, and how their tokens were chosen."""
    how = results.get("generation_settings")
    return Prose(f"{note} {how}" if how else note)


def _completions(found: Sequence[Mapping[str, Any]]) -> Iterator[Completions]:
    for entry in found:
        texts = [(visible(name), visible(text, lines=True)) for name, text in entry["completions"].items()]
        if "text" in entry:
            texts = [("the document itself", visible(entry["text"], lines=True)), *texts]
        yield Completions(visible(entry["prompt"], lines=True), visible(entry.get("source", "")), texts)


def steering(results: Results) -> Iterator[Section]:
    """What the part that was localised does at every scale: losses, and generations side by side."""
    found = results.get("steering") or {}
    by_scale = found.get("losses") or {}
    names = list(dict.fromkeys(name for figures in by_scale.values() for name in figures))
    if not names:
        return
    blocks: list[Block] = [
        Prose(
            "The trained model with its localised part steered: the scale is added to the dimensions at the output of "
            "every routed layer, or multiplies the units (1 leaves them as they are)."
        )
    ]
    lines = {name: points for name in names if (points := _by_scale(by_scale, name))}
    if lines and len(by_scale) > 1 and plots.unavailable() is None:
        blocks.append(
            Picture(
                plots.lines({"steered": lines}, "scale", "loss (nats a token)"),
                "Held-out loss by scale, nats a token, with one standard error.",
            )
        )
    rows = [
        [
            visible(scale),
            *(
                with_error(figures.get(name, {}).get("loss"), figures.get(name, {}).get("standard_error"))
                for name in names
            ),
        ]
        for scale, figures in by_scale.items()
    ]
    columns = ["scale", *(f"{visible(name)} (nats a token)" for name in names)]
    first = _counts(by_scale, names)
    blocks.append(Table(columns, rows, f"Held-out losses ± standard error over documents. {first}"))
    generated = found.get("generations") or []
    if generated:
        blocks += [_how(results, "At every scale the same prompts are continued."), *_completions(generated)]
    yield Section("Steering", blocks)


def _by_scale(by_scale: Results, name: str) -> list[plots.Point]:
    """The losses of one source by scale, in order."""
    points = [
        (float(scale), figures[name]["loss"], figures[name].get("standard_error"))
        for scale, figures in by_scale.items()
        if finite(figures.get(name, {}).get("loss"))
    ]
    return sorted(points)


def harness(results: Results) -> Iterator[Section]:
    """Tasks of lm-evaluation-harness, by checkpoint."""
    found = results.get("harness") or {}
    rows = []
    for checkpoint in ordered(found):
        for task, metrics in found[checkpoint].items():
            for metric, value in metrics.items():
                if metric == "samples" or "_stderr" in metric:
                    continue
                name, comma, filter_ = metric.partition(",")
                error = metrics.get(f"{name}_stderr{comma}{filter_}")
                rows.append(
                    [
                        visible(task),
                        visible(metric),
                        visible(checkpoint),
                        with_error(value, error),
                        number(metrics.get("samples")),
                    ]
                )
    if rows:
        rows.sort(key=lambda row: (row[0], row[1]))
        columns = ["task", "metric", "checkpoint", "value ± standard error", "samples"]
        table = Table(columns, rows, "lm-evaluation-harness", texts=frozenset({0, 1, 2}))
        yield Section("Tasks", [Prose("Evaluated without routes; a metric's unit is its task's."), table])


def memory(results: Results) -> Iterator[Section]:
    """The plan, whose keys that end in "bytes" are amounts of memory."""
    rows = list(_flat(results.get("plan") or {}))
    if rows:
        yield Section(
            "Memory", [Table(["what", "planned"], rows, "From the config, before anything is loaded.")]
        )


def _flat(values: Mapping[str, Any], path: str = "") -> Iterator[list[str]]:
    for name, value in values.items():
        key = f"{path} / {visible(name)}" if path else visible(name)
        if isinstance(value, Mapping):
            yield from _flat(value, key)
        elif isinstance(value, (list, tuple)):
            yield [key, visible(json.dumps(value))]
        else:
            amount = str(name).endswith("bytes") and finite(value)
            yield [key, bytes_of(value) if amount else number(value)]


def making(results: Results) -> Iterator[Section]:
    """How it was made: stages, command, config, versions, and what is not there."""
    blocks: list[Block] = []
    missing = dict(results.get("missing") or {})
    without = plots.unavailable()
    if without is not None:
        missing["plots"] = without
    if missing:
        rows = [[visible(part), visible(reason)] for part, reason in missing.items()]
        blocks.append(Table(["not on this page", "because"], rows, texts=frozenset({0, 1})))
    stages = results.get("stages") or []
    blocks += _documents({stage["name"]: stage.get("figures") or {} for stage in stages})
    if stages:
        rows = [
            [
                visible(stage["name"]),
                duration(stage["seconds"]) if finite(stage.get("seconds")) else "–",
                "done before" if stage.get("skipped") else "made now",
                visible(_brief(stage.get("figures") or {})),
            ]
            for stage in stages
        ]
        columns = ["stage", "time", "", "figures"]
        blocks.append(
            Table(columns, rows, "Stages, with the time that each took.", texts=frozenset({0, 2, 3}))
        )
    if results.get("command"):
        blocks.append(Prose(f"Made by: {visible(results['command'])}"))
    versions = results.get("versions") or {}
    if versions:
        words = ", ".join(f"{visible(name)} {visible(version)}" for name, version in versions.items())
        blocks.append(Prose(f"With {words}."))
    if results.get("config"):
        config = results["config"]
        text = config if isinstance(config, str) else json.dumps(config, indent=2, ensure_ascii=False)
        blocks.append(Listing("The whole config", visible(text, lines=True)))
    if blocks:
        yield Section("How it was made", blocks)


def _documents(figures: Mapping[str, Mapping[str, Any]]) -> Iterator[Block]:
    """What each source has, and what of it each route trains."""
    sources = figures.get("data", {}).get("sources") or {}
    routed = figures.get("labels", {}).get("train") or {}
    routes = list(dict.fromkeys(route for of in routed.values() for route in of))
    kinds = ("train", "train_tokens", "heldout", "heldout_tokens", "left_out")
    if sources:
        columns = ["source", "documents", "tokens", "held out", "their tokens", "texts left out"]
        rows = [
            [
                visible(name),
                *(number(counts.get(kind)) for kind in kinds),
                *(number(routed.get(name, {}).get(route, 0)) for route in routes),
            ]
            for name, counts in sources.items()
        ]
        yield Table(
            [*columns, *(f"training tokens of {visible(route)}" for route in routes)],
            rows,
            "Documents, training ones and held-out ones. Texts are left out that are empty, too short, or without "
            "anything that is learnt.",
        )


def _brief(figures: Mapping[str, Any]) -> str:
    """The plain figures of a stage; what has a shape of its own stands elsewhere, and in report.json."""
    return ", ".join(
        f"{name} {number(value)}" for name, value in figures.items() if isinstance(value, (str, int, float))
    )
