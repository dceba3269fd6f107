"""The stage `evaluate`: what every checkpoint of a run can do, one checkpoint in memory at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import located
from ..reading import ConfigError
from ..stages import Context, Stage
from .comparison import differences
from .generation import completions, openings
from .held_out import DocumentLosses, by_document, token_losses
from .lm_eval_tasks import harness, harness_unavailable
from .rows import Row, as_rows
from .weights import weight_differences

if TYPE_CHECKING:
    from ..config import Config

#: Checkpoint → the stage that makes it, in the order of reports.
MADE_BY = {
    "base": "base",
    "trained": "train",
    "unlearnt": "ablate",
    "coherent": "coherence",
    "filtering": "filtering",
    "gradient_ascent": "gradient_ascent",
    "rmu": "rmu",
}
#: Those of the recipe's own, of which the last one is compared with the base.
OWN = ("trained", "unlearnt", "coherent")


def checkpoints(context: Context) -> dict[str, Path]:
    """The folders of the run's checkpoints by name; "base" is always there."""
    made = {
        name: context.inputs[stage].folder / "model"
        for name, stage in MADE_BY.items()
        if stage in context.inputs
    }
    return made if "base" in made else {"base": located(context.config.model.path), **made}


def run(context: Context) -> Mapping[str, Any]:
    """Losses, changes since the base, generations, differences and tasks: parts of a report, by its names."""
    from .. import models

    config, settings = context.config, context.config.evaluate
    documents = limited(_held_out(context), settings.documents)
    rows = as_rows(documents, routed=True)
    tokenizer = models.tokenizer_of(config.model)
    folders = checkpoints(context)
    compared = [name for name in OWN if name in folders][-1:]
    prompts = prompts_of(documents, tokenizer, config)
    losses: dict[str, Any] = {}
    tasks: dict[str, Any] = {}
    for name, folder in folders.items():
        model = _load(config, folder)
        losses[name] = token_losses(model, rows, batch_tokens=settings.batch_tokens)
        complete(name, model, tokenizer, prompts, config)
        if settings.tasks:
            tasks[name] = _tasks(model, tokenizer, config)
        del model
    figures = tables(losses, rows, config.routes) | {"generations": prompts, "harness": tasks}
    if compared:
        after = compared[0]
        found = differences(
            losses["base"], losses[after], rows, tokenizer, top=settings.top, context=settings.context
        )
        weights = weight_differences(_load(config, folders["base"]), _load(config, folders[after]))
        figures["differences"] = {"before": "base", "after": after, **found, "weights": weights}
    return figures


def tables(losses: Mapping[str, Any], rows: list[Row], routes: tuple[str, ...]) -> dict[str, Any]:
    """The tables of a report: losses by source, and by route where tokens of a document differ in it."""
    figures = _table({name: by_document(of_one, rows) for name, of_one in losses.items()}, "")
    mixed = any(row.routes is not None and len(set(row.routes.tolist())) > 1 for row in rows)
    if mixed:
        by_route = {name: by_document(of_one, rows, routes) for name, of_one in losses.items()}
        figures |= _table(by_route, "route_")
    return figures


def _table(summed: Mapping[str, DocumentLosses], prefix: str) -> dict[str, Any]:
    first = next(iter(summed))
    return {
        f"{prefix}losses": {name: sums.means() for name, sums in summed.items()},
        f"{prefix}changes": {
            name: sums.changes(summed[first]) for name, sums in summed.items() if name != first
        },
    }


def limited(documents: Any, most: int | None) -> list[Mapping[str, Any]]:
    """The first documents of every source."""
    taken: dict[str, int] = {}
    kept = []
    for document in documents:
        source = document["source"]
        if most is None or taken.get(source, 0) < most:
            taken[source] = taken.get(source, 0) + 1
            kept.append(document)
    return kept


def _held_out(context: Context) -> Any:
    import datasets

    return datasets.load_from_disk(str(context.inputs["labels"].folder / "heldout"))


def _load(config: Config, folder: Path) -> Any:
    from .. import models

    settings = config.model
    return models.load(folder, dtype=settings.dtype, device=settings.device, attention=settings.attention)


def prompts_of(
    documents: Sequence[Mapping[str, Any]], tokenizer: Any, config: Config
) -> list[dict[str, Any]]:
    """The prompts of a config, and those that held-out documents open with, each with no completions yet."""
    settings = config.evaluate
    given = [{"prompt": prompt, "completions": {}} for prompt in settings.prompts]
    opened = openings(
        documents,
        tokenizer,
        each=settings.prompts_each,
        tokens=settings.prompt_tokens,
        continuation=settings.new_tokens,
    )
    return given + [{**entry, "completions": {}} for entry in opened]


def complete(name: str, model: Any, tokenizer: Any, prompts: list[dict[str, Any]], config: Config) -> None:
    """Adds one model's completions to every prompt."""
    settings = config.evaluate
    texts = completions(
        model,
        tokenizer,
        [entry["prompt"] for entry in prompts],
        max_new_tokens=settings.new_tokens,
        sample=settings.sample,
        temperature=settings.temperature,
        top_p=settings.top_p,
        seed=config.seed,
    )
    for entry, text in zip(prompts, texts, strict=True):
        entry["completions"][name] = text


def _tasks(model: Any, tokenizer: Any, config: Config) -> dict[str, dict[str, Any]]:
    settings = config.evaluate
    folder = None if settings.tasks_folder is None else located(settings.tasks_folder)
    return harness(
        model,
        tokenizer,
        settings.tasks,
        num_fewshot=settings.num_fewshot,
        limit=settings.tasks_limit,
        folder=folder,
    )


def check(config: Config) -> None:
    """Raises ConfigError where tasks are asked for and lm_eval is not installed."""
    reason = harness_unavailable()
    if config.evaluate.tasks and reason is not None:
        raise ConfigError.of("evaluate.tasks", list(config.evaluate.tasks), f"none, because {reason}")


STAGE = Stage(
    "evaluate",
    run,
    reads=("model", "routes", "seed", "evaluate"),
    after=("base", "labels", "train", "ablate", "coherence", "filtering", "gradient_ascent", "rmu"),
    check=check,
)
