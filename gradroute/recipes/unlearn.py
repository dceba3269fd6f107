"""The recipe unlearn: what some texts teach is confined to a part of a pretrained model, and the part taken out.

By the preset era (Cloud et al. 2024, arXiv 2410.04332, section 4.2.2) the part are hidden units that `expand` adds; by
sgtm (Shilov et al. 2025, arXiv 2512.05648) heads and units that retained texts do not see, added ones or the model's;
by localize_experts experts of a mixture that they do not see.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .. import era
from .. import models as routed
from ..blocks import Block
from . import checkpoints, data, labels
from .common import BASE, BASELINES, COHERENCE, RELEARNING, Figures, parameters, refuse_unread, rows, trained
from .evaluation.stage import STAGE as EVALUATE
from .plans import checker, plan_of, settled
from .reading import ConfigError
from .report.stage import STAGE as REPORT
from .sharding import check_run
from .stages import Context, Stage
from .training import Model, check_arguments, train
from .training_sections import Ablate, Expand, Route

if TYPE_CHECKING:
    from .config import Config


def expand(model: Model, settings: Expand, *, seed: int = 0) -> Block:
    """Adds hidden units and heads to every layer of a model, in place; it computes what it did.

    Args:
        model: an ordinary model of an architecture that `gradroute.models.route` takes.
        settings: how many.
        seed: the seed of the new weights.

    Returns:
        The block that was added.

    Raises:
        TypeError, ValueError: see `gradroute.era.expand`.
    """
    torch.manual_seed(seed)
    return era.expand(model, settings.units, heads=settings.heads, std=settings.std)


def route(model: Model, settings: Route, names: Sequence[str]) -> Model:
    """Routes a model by a settled section (`plans.settled`), in place; `names` are those of the routes."""
    return routed.route(model, plan_of(settings, names, model.config))


def ablate(
    model: Model, route: Route, names: Sequence[str], settings: Ablate, *, contract: bool, seed: int = 0
) -> None:
    """Takes the influence of the forget part away from a trained, ordinary model, in place, and then the part.

    Args:
        model: the ordinary model that was trained under the plan.
        route: the settled section of the plan.
        names: the names of the routes.
        settings: how.
        contract: whether the part is taken out, so that the model is smaller.
        seed: the seed of `how="resample"`.

    Raises:
        ValueError: the part has no influence: nothing was routed to it. Heads that cannot be taken out.
    """
    if route.preset == "era":
        generator = torch.Generator().manual_seed(seed)
        part = Block.units(model, route.units or 0, layers=route.layers)
        era.ablate(model, part, settings.how, generator=generator)
    else:
        plan = plan_of(route, names, model.config)
        routed.ablate(routed.route(model, plan), list(names).index(route.retain))
        routed.unroute(model)
    if contract:
        era.contract(model, part_of(model, route))


def part_of(model: Model, route: Route) -> Block:
    """The forget part of a plan: the last units and heads of every routed layer."""
    blocks = [Block.units(model, route.units, layers=route.layers)] if route.units else []
    if route.preset == "sgtm" and route.heads:
        blocks.append(Block.heads(model, route.heads, layers=route.layers))
    return blocks[0] if len(blocks) == 1 else blocks[0] | blocks[1]


def contracts(config: Config) -> bool:
    """Whether the forget part is taken out after it was ablated.

    Raises:
        ConfigError: it cannot be taken out.
    """
    route = settled(config.route, config.expand, "unlearn")
    if route.preset == "localize_experts":
        if config.ablate.contract:
            raise ConfigError.of("ablate.contract", True, "false beside the preset localize_experts")
        return False
    was_added = (route.units, route.heads or 0) == (config.expand.units, config.expand.heads)
    wanted = config.ablate.contract
    if wanted and route.layers is not None:
        raise ConfigError.of(
            "ablate.contract", True, "false beside route.layers: all layers are of one width"
        )
    if wanted is None:
        return was_added and route.layers is None and config.ablate.how == "zero"
    return wanted


def _check(config: Config) -> None:
    refuse_unread(config, "unlearn", ("expand", "route", "ablate", "coherence", "baselines", "relearning"))
    checker("unlearn")(config)
    check_arguments(config.train)
    preset = settled(config.route, config.expand, "unlearn").preset
    if preset != "era" and config.ablate.how != "zero":
        raise ConfigError.of("ablate.how", config.ablate.how, f"zero beside the preset {preset}")
    contracts(config)


def settled_of(context: Context) -> Route:
    """The plan's section of a run, with all that follows from others."""
    return settled(context.config.route, context.config.expand, context.recipe)


def _expand(context: Context) -> Figures:
    model = checkpoints.load(context, checkpoints.base(context))
    before = parameters(model)
    expand(model, context.config.expand, seed=context.config.seed)
    checkpoints.save(context, model)
    return {"parameters": parameters(model), "added": parameters(model) - before}


def start_of(context: Context) -> Any:
    """The folder of the model that is routed: expanded, where it was."""
    made = context.inputs.get("expand")
    return checkpoints.base(context) if made is None else made.folder / "model"


def _route(context: Context) -> Figures:
    """Routes the model without its weights, so that a plan that does not fit is found before the training."""
    from transformers import AutoConfig, AutoModelForCausalLM

    configuration = AutoConfig.from_pretrained(start_of(context), local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(configuration)
    settings = settled_of(context)
    try:
        if context.recipe == "unlearn" and contracts(context.config):
            part_of(model, settings)
        route(model, settings, context.config.routes)
    except ValueError as error:  # only now is the model known that the section has to fit
        raise ConfigError(f"route: {error}") from error
    return {"preset": settings.preset, "routes": list(context.config.routes), "sites": sites_of(model)}


def sites_of(model: Model) -> Mapping[str, int]:
    """How many modules of a routed model mask at each site, by its name, such as "MLPSites.hidden"."""
    counts: dict[str, int] = {}
    for module in model.modules():
        sites = getattr(module, "sites", None)
        for name in getattr(sites, "tables", {}):
            key = f"{type(sites).__name__}.{name}"
            counts[key] = counts.get(key, 0) + 1
    return counts


def _train(context: Context) -> Figures:
    model = checkpoints.load(context, start_of(context))
    route(model, settled_of(context), context.config.routes)
    return trained(context, train, model, rows(context, "train"), context.config.train)


def _ablate(context: Context) -> Figures:
    config = context.config
    model = checkpoints.load(context, context.inputs["train"].folder / "model")
    before = parameters(model)
    ablate(
        model,
        settled_of(context),
        config.routes,
        config.ablate,
        contract=contracts(config),
        seed=config.seed,
    )
    checkpoints.save(context, model)
    return {"parameters": parameters(model), "removed": before - parameters(model)}


EXPAND = Stage(
    "expand",
    _expand,
    reads=("model", "expand", "seed"),
    after=("base",),
    wanted=lambda config: config.expand.units + config.expand.heads > 0,
)
ROUTE = Stage("route", _route, reads=("model", "expand", "route", "routes"), after=("base", "expand"))
TRAIN = Stage(
    "train",
    _train,
    reads=("model", "expand", "route", "routes", "train", "seed"),
    after=("base", "labels", "expand", "route"),
    resumable=True,
    everywhere=True,
    fits=check_run,
)
ABLATE = Stage(
    "ablate",
    _ablate,
    reads=("model", "expand", "route", "routes", "ablate", "seed"),
    after=("base", "train"),
    check=_check,
)

STAGES = (
    data.STAGE,
    labels.STAGE,
    BASE,
    EXPAND,
    ROUTE,
    TRAIN,
    ABLATE,
    COHERENCE,
    *BASELINES,
    RELEARNING,
    EVALUATE,
    REPORT,
)
