"""Tasks of EleutherAI's lm-evaluation-harness, by name, where the package `lm_eval` is installed."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping, Sequence
from numbers import Number
from pathlib import Path
from typing import Any

from torch import nn

from ...arguments import check_int, shown
from .held_out import evaluating


def harness_unavailable() -> str | None:
    """Why tasks of lm-evaluation-harness cannot be run here; None: they can."""
    if importlib.util.find_spec("lm_eval") is None:
        return "lm_eval is not installed: pip install lm-eval"
    return None


def harness(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    folder: str | Path | None = None,
) -> dict[str, dict[str, Any]]:
    """Evaluates a model on tasks of lm-evaluation-harness, such as "wmdp_bio" or "mmlu".

    Tasks download their data unless it is on the machine. Routed models are evaluated without routes.

    Args:
        model: a causal language model of transformers.
        tokenizer: its tokenizer.
        tasks: the names of tasks or groups of tasks.
        num_fewshot: examples in the prompt; None: as the task says.
        limit: the first examples of a task alone, for a trial; None: all.
        batch_size: sequences of a forward.
        folder: a folder with YAML files of tasks of one's own; None: the package's tasks alone.

    Returns:
        task → {metric: value, metric_stderr: its standard error or None, "samples": n}. Metrics of a filter are named
        "metric,filter", those without one "metric".

    Raises:
        ImportError: `lm_eval` is not installed.
        TypeError, ValueError: an argument is not what is expected, such as a task that the harness does not know.
    """
    if isinstance(tasks, str) or not all(isinstance(task, str) for task in tasks):
        raise TypeError(f"tasks: got {shown(tasks)}, expected a list of names")
    if not tasks:
        raise ValueError("tasks: got none, expected at least one name")
    check_int("num_fewshot", num_fewshot, 0, optional=True)
    check_int("limit", limit, 1, optional=True)
    check_int("batch_size", batch_size, 1)
    reason = harness_unavailable()
    if reason is not None:
        raise ImportError(f"tasks: got {list(tasks)}, expected none, because {reason}")
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if folder is None else str(folder))
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise ValueError(
            f"tasks: got {unknown}, expected names that lm_eval knows: lm_eval ls tasks lists them"
        )
    with evaluating(model):
        results = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=list(tasks),
            num_fewshot=num_fewshot,
            limit=limit,
            log_samples=False,
            task_manager=manager,
        )
    return figures(results)


def figures(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The numbers of the harness's results, by task and group."""
    samples = results.get("n-samples", {})
    found: dict[str, dict[str, Any]] = {}
    for task, metrics in {**results["results"], **results.get("groups", {})}.items():
        values = {name.removesuffix(",none"): _plain(value) for name, value in metrics.items() if "," in name}
        count = samples.get(task, {}).get("effective")
        found[task] = values if count is None else values | {"samples": count}
    return found


def _plain(value: Any) -> float | None:
    """A number; None where the harness has none, for which it writes "N/A"."""
    if not isinstance(value, Number):
        return None
    number = float(value)  # type: ignore[arg-type]
    return number if math.isfinite(number) else None
