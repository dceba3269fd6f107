"""The recipe localize: what some texts teach is confined to dimensions of the residual stream, or to hidden units.

By the preset steering (Cloud et al. 2024, arXiv 2410.04332, section 4.2.1) adding to the dimensions steers the trained
model; by localize_mlp (section 4.2.3) the units are scaled, and 0 takes them out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from .. import era
from ..blocks import Block
from ..models import ARCHITECTURES
from . import checkpoints, data, labels
from .common import BASE, Figures, refuse_unread, rows
from .evaluation.stage import STAGE as EVALUATE
from .plans import checker, settled
from .report.stage import STAGE as REPORT
from .selection import most_of_each
from .stages import Context, Stage
from .training import Model, check_arguments
from .training_sections import Route
from .unlearn import ROUTE, TRAIN

if TYPE_CHECKING:
    from .config import Config


@contextmanager
def steered(model: Model, route: Route, scale: float) -> Iterator[None]:
    """Within it the localised part of an ordinary model is steered; afterwards the model is what it was.

    Args:
        model: an ordinary model that was trained under the plan.
        route: the settled section of the plan.
        scale: preset steering: what is added to the dimensions at the output of every routed layer; localize_mlp: by
            what the units are multiplied.

    Raises:
        ValueError: the model has no such layers, dimensions or units.
    """
    if route.preset == "localize_mlp":
        with era.gate(model, Block.units(model, list(route.indices), layers=route.layers), scale):
            yield
        return
    layers = model.get_submodule(ARCHITECTURES[model.config.model_type].layers)
    chosen = range(len(layers)) if route.layers is None else route.layers
    hooks = [layers[index].register_forward_hook(_adding(route, scale)) for index in chosen]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _adding(route: Route, scale: float) -> Any:
    """A hook of a decoder layer that adds to some dimensions of its output."""

    def add(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = (output[0] if isinstance(output, tuple) else output).clone()  # [B, S, d_model]
        hidden[..., list(route.indices)] += scale
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    return add


def _check(config: Config) -> None:
    refuse_unread(config, "localize", ("route", "steer"))
    checker("localize")(config)
    check_arguments(config.train)


def _steer(context: Context) -> Figures:
    """The held-out losses at every scale, and what the steered model writes."""
    from . import models
    from .evaluation import losses
    from .evaluation.stage import complete, prompts_of

    config = context.config
    route = settled(config.route, config.expand, "localize")
    model = checkpoints.load(context, context.inputs["train"].folder / "model")
    documents = most_of_each(rows(context, "heldout"), config.evaluate.documents)
    tokenizer = models.tokenizer_of(config.model)
    prompts = prompts_of(documents, tokenizer, config)
    found: dict[str, Mapping[str, Any]] = {}
    for scale in config.steer.scales:
        with steered(model, route, scale):
            found[f"{scale:g}"] = losses(model, documents, batch_tokens=config.evaluate.batch_tokens)
            complete(f"{scale:g}", model, tokenizer, prompts, config)
    return {"losses": found, "generations": prompts}


STAGES = (
    data.STAGE,
    labels.STAGE,
    BASE,
    ROUTE,
    TRAIN,
    Stage(
        "steer",
        _steer,
        reads=("model", "expand", "route", "routes", "steer", "evaluate", "seed"),
        after=("base", "labels", "train"),
        check=_check,
    ),
    EVALUATE,
    REPORT,
)
