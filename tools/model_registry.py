"""Which causal language models of transformers a plan can route: `python -m tools.model_registry [--check]`.

Every model of transformers' registry is made on the meta device, of its default configuration with two layers, and
routed by one plan for each entry; what the others lack is the error that `route` raises when it is told that the model
has Llama's form. It writes docs/models_registry.md. With --check it writes nothing, and exits with 1 where the page is
not up to date.
"""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from gradroute import AttentionSites, EmbeddingSites, LinearSites, MLPSites, NormSites
from gradroute.models import ARCHITECTURES, MoESites, ResidualSites, RoutingPlan, route, unroute
from gradroute.tables import Table

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "models_registry.md"

HEAD = """# Models of transformers

Which causal language models of transformers' registry a plan can route. Each was made on the meta device, of its
default configuration with two layers, and routed by a plan of one entry at a time: *yes* where `route` takes it.
Gradients and forwards of the routed ones are what the tests compare on the CPU.
`python -m tools.model_registry` writes this page.

"""
ENTRIES = ("mlp", "moe", "attention", "projections", "residual", "norm", "embedding", "lm_head")
WORDS = """
`mlp` and `moe`: hidden units of MLPs and of experts. `attention`: masks in attention itself; `projections`: who may
update its weights. A model may have both MLPs and experts, or one of them.

"""
_OPTIONS: tuple[dict[str, Any], ...] = (
    {"num_hidden_layers": 2},
    {"num_hidden_layers": 2, "head_dim": 64},
    {"num_hidden_layers": 2, "num_key_value_heads": 8},
    {"num_hidden_layers": 2, "pad_token_id": 0},
    {"is_decoder": True},
    {},
)


class Row(NamedTuple):
    """What was found of one model.

    Attributes:
        name: its model_type in the registry.
        model: the model's class, or "" where none was made.
        routed: the entries of a plan that route it.
        lacks: why nothing routes it, or "".
    """

    name: str
    model: str
    routed: tuple[str, ...]
    lacks: str


def _plan(entry: str) -> RoutingPlan:
    table = Table(torch.tensor([[1.0], [0.0]]))
    sites: dict[str, tuple[str, Any]] = {
        "mlp": ("mlp", lambda i, shape: None if i in shape.expert_layers else MLPSites(hidden=table)),
        "moe": ("moe", lambda i, shape: MoESites(hidden=table) if i in shape.expert_layers else None),
        "attention": ("attention", AttentionSites(query=table)),
        "projections": ("attention", AttentionSites(update_q=table, update_kv=table, update_out=table)),
        "residual": ("residual", ResidualSites(post=table)),
        "norm": ("norm", NormSites(table)),
        "embedding": ("embedding", EmbeddingSites(table)),
        "lm_head": ("lm_head", LinearSites(update_rows=table)),
    }
    name, value = sites[entry]
    return RoutingPlan(2, **{name: value})


def build(name: str) -> torch.nn.Module:
    """A model on the meta device.

    Raises:
        Exception: whatever its configuration or its class raises with the first of the options.
    """
    first: Exception | None = None
    for options in _OPTIONS:
        try:
            with torch.device("meta"):
                return transformers.AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**options))
        except Exception as error:  # what a model's own code raises can be anything
            first = first or error
    assert first is not None
    raise first


def short(error: Exception) -> str:
    """The first words of an error: what came, without what was expected."""
    text = re.sub(r"\s+", " ", str(error)).split(", expected")[0].split(": expected")[0]
    text = re.sub(r"^(model|layer \d+|RoutingPlan\.\w+): ", "", text)
    text = re.sub(r"^(layer \d+|RoutingPlan\.\w+): ", "", text).replace("|", "/").removeprefix("got a ")
    return text if len(text) <= 100 else text[:97] + "..."


def row_of(name: str) -> Row:
    """What routing says of one model."""
    try:
        model = build(name)
    except Exception as error:
        return Row(name, "", (), f"no model of its default configuration: {type(error).__name__}")
    kind = type(model).__name__
    if model.config.model_type not in ARCHITECTURES:
        return Row(name, kind, (), _lacking(model))
    routed, errors = [], []
    for entry in ENTRIES:
        try:
            route(model, _plan(entry))
        except (TypeError, ValueError) as error:
            errors.append(error)
        else:
            unroute(model)
            routed.append(entry)
    return Row(name, kind, tuple(routed), "" if routed else short(errors[0]))


def _lacking(model: torch.nn.Module) -> str:
    """Why a model without an entry is not of Llama's form."""
    for entry in ("mlp", "projections", "norm"):
        try:
            route(model, _plan(entry), architecture=ARCHITECTURES["llama"])
        except Exception as error:  # its configuration may raise what it likes
            return short(error)
        unroute(model)
    return "no entry; its submodules have the names of Llama's, its forward was not compared"


def rows() -> Iterator[Row]:
    """One row for each model of the registry, in the order of their names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of ties, and of what default configurations lack
        for name in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
            yield row_of(name)


def page() -> str:
    """The page."""
    found = list(rows())
    routed = [row for row in found if row.routed]
    unmade = [row for row in found if not row.model]
    lines = [
        HEAD,
        f"transformers {transformers.__version__}: {len(found)} models, {len(routed)} of them routed.\n{WORDS}",
        f"| model_type | {' | '.join(ENTRIES)} |\n| --- |{' --- |' * len(ENTRIES)}\n",
    ]
    for row in routed:
        lines.append(f"| {row.name} | {' | '.join('yes' if e in row.routed else '' for e in ENTRIES)} |\n")
    lines.append("\n## Those without an entry\n\n")
    lines.append("What `route` says when it is told that the model has Llama's form.\n\n")
    lines.append("| model_type | model | what it lacks |\n| --- | --- | --- |\n")
    lines += [
        f"| {row.name} | {row.model} | {row.lacks} |\n" for row in found if row.model and not row.routed
    ]
    lines.append("\n## Those that were not made\n\n| model_type | why |\n| --- | --- |\n")
    lines += [f"| {row.name} | {row.lacks} |\n" for row in unmade]
    return "".join(lines)


def routed_names(text: str) -> set[str]:
    """The models that a page says are routed."""
    table = text.split("| --- |", 1)[1].split("\n## ", 1)[0]
    return set(re.findall(r"^\| (\S+) \|.*yes", table, flags=re.MULTILINE))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with 1 if it is not up to date"
    )
    check = parser.parse_args().check
    transformers.logging.set_verbosity_error()
    text = page()
    if not check:
        PAGE.write_text(text, encoding="utf-8")
        return 0
    written = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    if f"transformers {transformers.__version__}:" in written:
        return int(text != written)
    return int(not routed_names(written) <= routed_names(text))


if __name__ == "__main__":
    sys.exit(main())
